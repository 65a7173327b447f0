"""FuseGPT: deletion first, tuning that helps, and a fold that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_models import HEADS, VOCABULARY, WIDTH, WORDS, load_weights, save_tokenizer

import hf_fuse
from hf_fuse.compress.methods.fuse_gpt import _around, _distance, _Fused, macro_influence
from hf_fuse.compress.recipe import load_compress_recipe
from hf_fuse.compress.subject import open_subject
from hf_fuse.compress.sublayers import decoder_layers
from hf_fuse.errors import FuseError

LAYERS = 4
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
IDS = torch.arange(4, 16)[None]


def _gpt2() -> t.PreTrainedModel:
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "initializer_range": 0.3}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = torch.Generator().manual_seed(0)
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (300,), generator=random)))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    found = {}
    for name, model in (("llama", t.LlamaForCausalLM(t.LlamaConfig(**SHAPE))), ("gpt2", _gpt2())):
        found[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(found[name])
        save_tokenizer(found[name])
    return found


def _recipe(source: Path, text: Path, **parameters) -> dict:
    calibration = {"path": str(text), "sequences": 8, "length": 32}
    return {"method": "fuse_gpt", "model": str(source), "calibration": calibration, "parameters": parameters}


def _load(folder: Path) -> t.PreTrainedModel:
    return t.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_without_tuning_it_deletes_blocks_and_nothing_else(sources, text, tmp_path):
    made = hf_fuse.compress(_recipe(sources["llama"], text, fuse=2, epochs=0), tmp_path / "out")
    model = _load(sources["llama"])
    for index in made.facts["fused"]:
        model.model.layers[index].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(_load(made.output)(IDS).logits, model(IDS, use_cache=False).logits)
    assert _load(made.output).config.num_hidden_layers == LAYERS - 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"inject": False}, {"loss": "kl"}], ids=["gates", "lora only", "kl"])
def test_tuning_brings_the_group_s_output_back(sources, text, tmp_path, kind, options):
    """The engine itself compares the folded checkpoint with the tuned model in memory."""
    recipe = _recipe(sources[kind], text, fuse=1, epochs=6, group=3, rank=4, learning_rate=1e-2, tuning_rate=1e-2)
    recipe["parameters"] |= options
    made = hf_fuse.compress(recipe, tmp_path / "out")
    (loss,) = made.facts["loss"].values()
    assert loss["after"] < 0.9 * loss["before"]
    (victim,) = made.facts["fused"]
    before, after = load_weights(sources[kind]), load_weights(tmp_path / "out")
    stack = "model.layers" if kind == "llama" else "transformer.h"
    kept = [index for index in range(LAYERS) if index != victim]
    members = _around(list(range(LAYERS)), victim, 3)
    for new, old in enumerate(kept):
        name = "mlp.up_proj.weight" if kind == "llama" else "mlp.c_fc.weight"
        same = torch.equal(before[f"{stack}.{old}.{name}"], after[f"{stack}.{new}.{name}"])
        assert same == (old not in members)


def test_influence_is_the_change_of_the_last_state_and_none_for_an_idle_block(text, tmp_path):
    torch.manual_seed(1)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)).eval()
    idle = model.model.layers[2]
    torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
    torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    subject = open_subject(load_compress_recipe(_recipe(tmp_path / "model", text, fuse=1)))
    layers = decoder_layers(subject.model)
    found = macro_influence(subject, layers, list(range(LAYERS)), subject.calibration[:2])
    assert found[2] == pytest.approx(0, abs=1e-6) and min(found, key=found.get) == 2
    # The last block away: the state before the final norm is then the last but one of the library's own list.
    cosines = []
    with torch.no_grad():
        for ids in subject.calibration[:2]:
            last: list[torch.Tensor] = []
            handle = subject.model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
            states = subject.model(ids, output_hidden_states=True).hidden_states
            handle.remove()
            cosines.append(torch.cosine_similarity(last[0], states[LAYERS - 1], dim=-1).mean().item())
    assert found[LAYERS - 1] == pytest.approx(1 - sum(cosines) / 2, abs=1e-5)
    made = hf_fuse.compress(_recipe(tmp_path / "model", text, fuse=1, epochs=0), tmp_path / "out")
    assert made.facts["fused"] == [2]
    torch.testing.assert_close(_load(made.output)(IDS).logits, model(IDS).logits)


def test_the_gate_is_elementwise_and_starts_closed():
    torch.manual_seed(0)
    weight, grafted = torch.randn(5, 4), torch.randn(5, 4)
    fused = _Fused(weight, grafted, rank=1)
    assert torch.equal(fused(weight), weight)
    fused(weight).sum().backward()
    assert fused.c.grad.abs().sum() > 0 and fused.d.grad.abs().sum() == 0
    with torch.no_grad():
        fused.c.fill_(1)
        fused.d.fill_(1)
    torch.testing.assert_close(fused(weight), weight + grafted)  # a gate of ones adds the grafted matrix


def test_kl_is_per_token():
    """Across the batch, as in the authors' code, one sequence would always have a loss of zero."""
    student, teacher = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(_distance(student, teacher, "kl"), expected)
    assert expected > 0.01


@pytest.mark.parametrize(
    ("victim", "members"), [(0, [0, 1, 2, 3]), (5, [3, 4, 5, 7]), (9, [5, 7, 8, 9]), (4, [2, 3, 4, 5])]
)
def test_a_group_lies_around_its_victim_and_inside_the_model(victim, members):
    assert _around([0, 1, 2, 3, 4, 5, 7, 8, 9], victim, 4) == members


def test_layers_stored_in_another_form_are_refused_before_any_work(text, tmp_path):
    t.MixtralForCausalLM(t.MixtralConfig(**SHAPE)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(FuseError, match="how model.layers.0.mlp.* is stored is not known"):
        hf_fuse.compress(_recipe(tmp_path / "model", text, fuse=1), tmp_path / "out")


def test_the_last_block_has_to_stay(sources, text, tmp_path):
    with pytest.raises(FuseError, match="4 blocks and one has to stay"):
        hf_fuse.compress(_recipe(sources["llama"], text, fuse=4), tmp_path / "out")
