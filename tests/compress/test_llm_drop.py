"""LLM-Drop: similarities against their definition, checkpoints against models with the parts skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_models import HEADS, VOCABULARY, WIDTH, WORDS, digests, load_weights, save_tokenizer

import hf_fuse
from hf_fuse.compress.loading import lighten
from hf_fuse.compress.methods.llm_drop import similarities
from hf_fuse.compress.recipe import load_compress_recipe
from hf_fuse.compress.subject import open_subject
from hf_fuse.compress.sublayers import decoder_layers, family_of, skip
from hf_fuse.errors import FuseError

LAYERS = 4
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip


def _llama() -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**SHAPE))


def _gpt2() -> t.PreTrainedModel:
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "initializer_range": 0.3}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape))


def _mixtral() -> t.PreTrainedModel:
    return t.MixtralForCausalLM(t.MixtralConfig(**SHAPE, num_local_experts=4))


def _gemma2() -> t.PreTrainedModel:
    return t.Gemma2ForCausalLM(t.Gemma2Config(**SHAPE, head_dim=4, sliding_window=8, query_pre_attn_scalar=4))


def _qwen2() -> t.PreTrainedModel:
    return t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE))


MODELS = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral, "gemma2": _gemma2, "qwen2": _qwen2}


def _save(model: t.PreTrainedModel, folder: Path) -> Path:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero from the start: a bias that is not dropped would go unnoticed
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = torch.Generator().manual_seed(0)
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (400,), generator=random)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = _save(MODELS[kind](), tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get


def _recipe(folder: Path, text: Path, **parameters) -> dict:
    calibration = {"path": str(text), "sequences": 4, "length": 32}
    return {"method": "llm_drop", "model": str(folder), "calibration": calibration, "parameters": parameters}


def _load(folder: Path) -> t.PreTrainedModel:
    return t.AutoModelForCausalLM.from_pretrained(folder).eval()


IDS = torch.arange(4, 16)[None] % VOCABULARY


def test_similarities_are_mean_cosines_of_the_residual_stream(folder, text):
    """Against the definition, with states from the library's own output_hidden_states and from the modules by hand."""
    subject = open_subject(load_compress_recipe(_recipe(folder("llama"), text, drop=1)))
    layers = decoder_layers(subject.model)
    found = similarities(subject, layers, family_of(layers), span=2)
    expected = {(kind, i): [] for kind in ("attention", "mlp", "block") for i in range(LAYERS)}
    runs = {("run", i): [] for i in range(LAYERS - 1)}

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()

    with torch.no_grad():
        for ids in subject.calibration:
            decoder = subject.model.model
            position = decoder.rotary_emb(decoder.embed_tokens(ids), torch.arange(ids.shape[1])[None])
            stream = [decoder.embed_tokens(ids)]
            for i, layer in enumerate(layers):
                x = stream[-1]
                mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
                y = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=position, attention_mask=mask)[0]
                z = y + layer.mlp(layer.post_attention_layernorm(y))
                expected["attention", i].append(cosine(x, y))
                expected["mlp", i].append(cosine(y, z))
                expected["block", i].append(cosine(x, z))
                stream.append(z)
            for i in range(LAYERS - 1):
                runs["run", i].append(cosine(stream[i], stream[i + 2]))
    for part, values in (expected | runs).items():
        assert found[part] == pytest.approx(sum(values) / len(values), abs=1e-5), part


@pytest.mark.parametrize(
    ("kind", "target"),
    [("llama", "attention"), ("llama", "mlp"), *((kind, target) for kind in MODELS for target in ("joint", "block"))],
)
def test_the_checkpoint_computes_what_the_model_without_these_parts_computes(folder, text, tmp_path, kind, target):
    made = hf_fuse.compress(_recipe(folder(kind), text, drop=2, target=target), tmp_path / "out")
    dropped = made.facts["dropped"]
    assert sum(map(len, dropped.values())) == 2
    model = _load(folder(kind))
    layers = decoder_layers(model)
    whole = model(IDS).logits
    for part, indices in dropped.items():
        for index in indices:
            skip(layers[index], part, family_of(layers))
    expected = model(IDS, use_cache=False).logits
    assert not torch.allclose(expected, whole, atol=1e-2)
    stock = _load(tmp_path / "out")
    torch.testing.assert_close(stock(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    light = hf_fuse.load_compressed(tmp_path / "out").eval()
    torch.testing.assert_close(light(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert made.after["parameters"] < made.before["parameters"]
    assert sum(p.numel() for p in light.parameters()) == made.after["parameters"]
    # Step by step with a cache, as one decodes: layer numbers and cache places have to fit.
    for live in (stock, light):
        cache, steps = None, []
        for position in range(IDS.shape[1]):
            out = live(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)


def test_dropping_nothing_keeps_every_byte(folder, text, tmp_path):
    for target in ("joint", "block"):
        made = hf_fuse.compress(_recipe(folder("llama"), text, drop=0, target=target), tmp_path / target)
        assert made.facts["dropped"] == ({"attention": [], "mlp": []} if target == "joint" else {"block": []})
        assert digests(tmp_path / target)["model.safetensors"] == digests(folder("llama"))["model.safetensors"]
        assert _json(tmp_path / target, "config.json") == _json(folder("llama"), "config.json")


def _json(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_that_adds_nothing_is_dropped_first_and_changes_nothing(text, tmp_path, part):
    torch.manual_seed(1)
    model = _llama()
    layer = model.model.layers[2]
    torch.nn.init.zeros_((layer.self_attn.o_proj if part == "attention" else layer.mlp.down_proj).weight)
    source = _save(model, tmp_path / "model")
    made = hf_fuse.compress(_recipe(source, text, drop=1, target="joint"), tmp_path / "out")
    assert made.facts["dropped"][part] == [2]
    assert made.facts["importance"][part][2] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(hf_fuse.load_compressed(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_a_layer_that_only_stretches_the_stream_counts_as_redundant(text, tmp_path):
    """The cosine is blind to scale; so says the paper's measure, and the docstring."""
    torch.manual_seed(1)
    model = _llama()
    subject = open_subject(load_compress_recipe(_recipe(_save(model, tmp_path / "model"), text, drop=1)))
    layer = decoder_layers(subject.model)[1]
    layer.forward = lambda hidden_states, **_: 3 * hidden_states
    found = similarities(subject, decoder_layers(subject.model), None)
    assert found["block", 1] == pytest.approx(1, abs=1e-6)


def test_blocks_are_gone_and_renumbered(folder, text, tmp_path):
    made = hf_fuse.compress(_recipe(folder("llama"), text, drop=2, target="block"), tmp_path / "out")
    kept = [index for index in range(LAYERS) if index not in made.facts["dropped"]["block"]]
    assert _json(tmp_path / "out", "config.json")["num_hidden_layers"] == 2
    before, after = load_weights(folder("llama")), load_weights(tmp_path / "out")
    for new, old in enumerate(kept):
        key = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(after[key.format(new)], before[key.format(old)])
    assert made.after["bytes"] < made.before["bytes"]
    values = made.facts["importance"]["block"]
    assert sorted(values)[:2] == sorted(values[index] for index in made.facts["dropped"]["block"])


def test_consecutive_drops_the_run_with_the_most_similar_ends(folder, text, tmp_path):
    """The reference scores runs one block too long; ours spans exactly the dropped blocks."""
    subject = open_subject(load_compress_recipe(_recipe(folder("llama"), text, drop=1)))
    layers = decoder_layers(subject.model)
    runs = similarities(subject, layers, None, span=2)
    best = max(range(LAYERS - 1), key=lambda index: runs["run", index])
    recipe = _recipe(folder("llama"), text, drop=2, target="block", consecutive=True)
    assert hf_fuse.compress(recipe, tmp_path / "out").facts["dropped"]["block"] == [best, best + 1]


def test_in_rounds_each_choice_is_measured_on_what_is_left(folder, text, tmp_path):
    subject = open_subject(load_compress_recipe(_recipe(folder("llama"), text, drop=1)))
    layers = decoder_layers(subject.model)
    family, chosen = family_of(layers), []
    for _ in range(2):
        scores = similarities(subject, layers, family)
        chosen.append(max((i for i in range(LAYERS) if i not in chosen), key=lambda i: scores["mlp", i]))
        skip(layers[chosen[-1]], "mlp", family)
    made = hf_fuse.compress(_recipe(folder("llama"), text, drop=2, target="mlp", rounds=2), tmp_path / "out")
    assert made.facts["dropped"]["mlp"] == sorted(chosen)


def test_a_light_model_can_be_compressed_again(folder, text, tmp_path):
    hf_fuse.compress(_recipe(folder("llama"), text, drop=1, target="attention"), tmp_path / "one")
    hf_fuse.compress(_recipe(tmp_path / "one", text, drop=1, target="block"), tmp_path / "two")
    config = _json(tmp_path / "two", "config.json")
    assert config["num_hidden_layers"] == 3
    stock, light = _load(tmp_path / "two"), hf_fuse.load_compressed(tmp_path / "two")
    torch.testing.assert_close(light(IDS).logits, stock(IDS).logits)


def test_lighten_leaves_other_models_alone(folder):
    model = _load(folder("llama"))
    modules = [type(module) for module in model.modules()]
    assert [type(module) for module in lighten(model, folder("llama")).modules()] == modules


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {}}, "drop is missing"),
        ({"parameters": {"drop": 5}}, "at most 4 of target attention"),
        ({"parameters": {"drop": 4, "target": "block"}}, "at most 3 of target block"),
        ({"parameters": {"drop": 1, "taget": "mlp"}}, "Did you mean 'target'"),
        ({"parameters": {"drop": 1, "target": "heads"}}, "attention | mlp | joint | block"),
        ({"parameters": {"drop": 1, "consecutive": True}}, "consecutive is for target: block"),
        ({"drop": 1}, "parameters.drop"),
        ({"calibrations": "x"}, "Did you mean 'calibration'"),
        ({"calibration": None}, "needs calibration text"),
        ({"method": "llm_drp"}, "Did you mean 'llm_drop'"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt"),
        ({"models": ["a"]}, "hf-fuse merge"),
    ],
)
def test_mistakes_get_one_clear_error_and_no_output(folder, text, tmp_path, change, words):
    recipe = _recipe(folder("llama"), text, drop=1) | change
    with pytest.raises(FuseError) as caught:
        hf_fuse.compress(recipe, tmp_path / "out")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_another_make_are_refused_by_name(text, tmp_path):
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    torch.manual_seed(0)
    source = _save(t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**shape)), tmp_path / "model")
    with pytest.raises(FuseError, match="GPTNeoXLayer.*Use target: block"):
        hf_fuse.compress(_recipe(source, text, drop=1), tmp_path / "out")
    made = hf_fuse.compress(_recipe(source, text, drop=1, target="block"), tmp_path / "out")
    assert _load(made.output).config.num_hidden_layers == LAYERS - 1


def test_a_result_that_computes_something_else_is_not_saved(folder, text, tmp_path, monkeypatch):
    from hf_fuse.compress.methods import llm_drop as module

    monkeypatch.setattr(module, "_silenced", lambda *_: {})
    with pytest.raises(FuseError, match="does not compute what it should"):
        hf_fuse.compress(_recipe(folder("llama"), text, drop=1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
