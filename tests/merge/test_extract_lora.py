"""LoRA out of fine-tunes: what is low-rank is found again, what is not is cut as well as it can be, PEFT loads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import bert, bind, clip, dense, gpt2, llama, t5, train, vit
from tiny_models import digests
from torch import Tensor
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    ViTForImageClassification,
)

import hf_fuse
from hf_fuse import cli, extract_lora
from hf_fuse.checkpoint.reader import open_checkpoint
from hf_fuse.errors import CheckpointError, FuseError, OutputError
from hf_fuse.merge import extract_lora as module
from hf_fuse.merge import lora_targets
from hf_fuse.merge.extraction import kind_of

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def tuned_by(folder: Path, model: torch.nn.Module, **settings) -> tuple[Path, Path]:
    """The base, and a fine-tune whose change is a LoRA."""
    model.save_pretrained(folder / "base")
    train(copy.deepcopy(model), **settings).merge_and_unload().save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def moved(folder: Path, model: torch.nn.Module, decay: float = 0.7, scale: float = 0.05) -> tuple[Path, Path]:
    """The base, and a fine-tune in which everything has changed; the singular values of changes fall slowly."""
    model.save_pretrained(folder / "base")
    tuned, random = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            change = torch.randn(parameter.shape, generator=random)
            if change.dim() == 2:
                u, values, v = torch.linalg.svd(change, full_matrices=False)
                change = (u * torch.arange(1, len(values) + 1) ** -(decay + 0.1 * (number % 4))) @ v
            parameter.add_(change, alpha=scale)
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def applied(model: torch.nn.Module, adapter: Path) -> dict[str, Tensor]:
    peft = PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    stored = {name for name in load_file(adapter / "adapter_model.safetensors") if ".lora_" in name}
    assert stored == {name.replace(".default", "") for name in peft.state_dict() if ".lora_" in name}
    return peft.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("build", "settings", "options"),
    [
        (llama, {"target_modules": ALL}, {}),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {}),
        (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {}),
        (lambda: gpt2().transformer, {"target_modules": ["c_attn"]}, {}),
        (bert, {"target_modules": ["query", "dense"]}, {}),
        (vit, {"target_modules": ["q_proj", "fc1"]}, {}),
        (vit, {"target_modules": ["projection", "q_proj"]}, {"targets": "projection|q_proj"}),
        (llama, {"target_modules": ["embed_tokens", "lm_head"]}, {"targets": "embed_tokens|lm_head"}),
        (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "v_proj"]}, {"targets": "embed_tokens|v_proj"}),
        (t5, {"target_modules": ["q", "v", "wo", "wi"]}, {}),
        (t5, {"target_modules": ["shared", "o"]}, {"targets": r"shared|\.o$"}),
        (clip, {"target_modules": ["q_proj", "fc2", "text_projection"]}, {}),
        (clip, {"target_modules": ["token_embedding", "fc1"]}, {"targets": "token_embedding|fc1"}),
    ],
    ids=[
        "llama",
        "one_layer",
        "gpt2",
        "gpt2_bare",
        "bert",
        "vit",
        "convolution",
        "both_ends",
        "tied",
        "t5",
        "t5_shared",
        "clip",
        "clip_tokens",
    ],
)
def test_a_low_rank_change_is_recovered(build, settings: dict, options: dict, tmp_path: Path):
    model = build()
    base, tuned = tuned_by(tmp_path, model, **settings)
    found = extract_lora(tuned, base, rank=4, output=tmp_path / "out", **options)
    assert found.relative_error < 2e-6
    expected, state = type(model).from_pretrained(tuned).state_dict(), applied(model, tmp_path / "out")
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")
    # Our own reader agrees, and only what has changed became an adapter.
    bound, before, after = bind(base, tmp_path / "out"), state_of(base), state_of(tuned)
    assert set(bound.low_rank) == {name for name in before if not torch.equal(before[name], after[name])}
    for name in bound.low_rank:
        torch.testing.assert_close(dense(bound, name), after[name] - before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_a_cut_is_close_to_the_best_one(decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, tuned = moved(tmp_path, llama(hidden=96, layers=1), decay)
    found = extract_lora(tuned, base, rank=8, output=tmp_path / "out")
    before, after, bound = state_of(base), state_of(tuned), bind(base, tmp_path / "out")
    assert len(bound.low_rank) == 7
    error = best = total = 0.0
    for part in found.parts:
        change = after[part.name].double() - before[part.name].double()
        assert part.total == pytest.approx(float(change.square().sum()), rel=1e-5)
        total += float(change.square().sum())
        if part.way == "left out":
            assert part.error == part.total
            error += part.total
            continue
        assert part.rank == bound.low_rank[part.name].rank == 8
        rest = float((change - dense(bound, part.name, torch.float64)).square().sum())
        optimum = float(torch.linalg.svdvals(change)[8:].square().sum())
        assert part.error == pytest.approx(rest, rel=1e-4)
        assert optimum * (1 - 1e-6) <= rest < 1.04 * optimum
        best, error = best + optimum, error + rest
    assert found.relative_error == pytest.approx((error / total) ** 0.5, rel=1e-5)
    assert found.relative_error_of_factors < found.relative_error
    # Matrices too large to hold are read again in rows, to the same result but for rounding.
    monkeypatch.setattr(module, "HELD_ELEMENTS", 100)
    monkeypatch.setattr(module, "BLOCK", 128)
    again = extract_lora(tuned, base, rank=8, output=tmp_path / "again")
    assert again.relative_error == pytest.approx(found.relative_error, rel=2e-3)


def test_rank_by_energy(tmp_path: Path):
    model = llama(hidden=64)
    base, tuned = moved(tmp_path, model, decay=0.5)
    found = extract_lora(tuned, base, rank=40, energy=0.9, output=tmp_path / "out")
    before, after = state_of(base), state_of(tuned)
    ranks = set()
    for part in found.parts:
        if part.way == "factors":
            values = torch.linalg.svdvals(after[part.name].double() - before[part.name].double()).square()
            share = values.cumsum(0) / values.sum()
            assert share[part.rank - 1] > 0.897 and (part.rank == 1 or share[part.rank - 2] < 0.9)
            ranks.add(part.rank)
    config = config_of(tmp_path / "out")
    assert len(ranks) > 1 and {config["r"], *config["rank_pattern"].values()} == ranks
    applied(model, tmp_path / "out")


def test_whole_tensors_make_it_exact(tmp_path: Path):
    """Norms, embeddings and head whole, matrices of full rank: the fine-tune itself."""
    model = llama(attention_bias=True)
    base, tuned = moved(tmp_path, model)
    found = extract_lora(tuned, base, rank=99, save_full=r"norm|embed_tokens|lm_head|\.bias$", output=tmp_path / "out")
    assert found.relative_error < 1e-5
    config = config_of(tmp_path / "out")
    assert config["bias"] == "lora_only" and "model.embed_tokens" in config["modules_to_save"]
    assert not any("q_proj" in name for name in config["modules_to_save"])
    expected = type(model).from_pretrained(tuned).state_dict()
    for name, tensor in applied(model, tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # As an input of a merge it is the fine-tune, too.
    recipe = {"method": "linear", "base_model": str(base), "models": [str(tmp_path / "out")]}
    merged = state_of(hf_fuse.merge(recipe, tmp_path / "merged"))
    for name, tensor in state_of(tuned).items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-6)


def test_whole_modules_take_their_other_tensors_along(tmp_path: Path):
    model = bert()
    base, tuned = moved(tmp_path, model)
    options = {"targets": "query|key", "save_full": r"value\.weight|attention\.self\.query\.bias|classifier"}
    found = extract_lora(tuned, base, rank=99, output=tmp_path / "out", **options)
    whole = {part.name for part in found.parts if part.way == "whole"}
    layers = [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert whole == {f"{layer}.{end}" for layer in layers for end in ("value.weight", "value.bias", "query.bias")} | {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    expected, state, start = (
        type(model).from_pretrained(tuned).state_dict(),
        applied(model, tmp_path / "out"),
        model.state_dict(),
    )
    for name, tensor in state.items():
        adapted = name in whole or name.endswith(("query.weight", "key.weight"))
        torch.testing.assert_close(tensor, (expected if adapted else start)[name], rtol=1e-4, atol=1e-6)
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"


def test_the_head_of_a_new_task_comes_along(tmp_path: Path):
    """PEFT does not load an adapter for classification without its classifier, and a base may have none."""
    model = bert()
    base, tuned = tuned_by(tmp_path, model, target_modules=["query"])
    state = state_of(base)
    save_file({name: t for name, t in state.items() if "classifier" not in name}, base / "model.safetensors")
    extract_lora(tuned, base, rank=4, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.classifier.weight"], state["classifier.weight"])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]
    save_file({name: t for name, t in state.items() if "pooler" not in name}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensors.*'bert.pooler.dense.bias'.*--save-full"):
        extract_lora(tuned, base, rank=4, output=tmp_path / "other")
    extract_lora(tuned, base, rank=4, save_full="pooler", output=tmp_path / "other")


@pytest.mark.parametrize(
    ("build", "target", "wanted", "options"),
    [
        (lambda: bert(BertForPreTraining), BertForSequenceClassification, "query", {}),
        (lambda: bert(BertForPreTraining), BertForTokenClassification, "key", {}),
        (lambda: bert(BertModel), BertForSequenceClassification, "query", {}),
        (lambda: gpt2().transformer, GPT2LMHeadModel, "c_attn", {}),
        (gpt2, GPT2ForSequenceClassification, "c_attn", {}),
        (llama, LlamaForSequenceClassification, "q_proj", {}),
        (vit, ViTForImageClassification, "q_proj", {"save_full": "classifier"}),
    ],
)
def test_the_base_may_have_the_head_of_another_task(
    build: Callable, target: type, wanted: str, options: dict, tmp_path: Path
):
    """Base and fine-tune then also differ in prefixes ("bert.", "transformer.") and in what their heads are called."""
    build().save_pretrained(tmp_path / "base")
    start, tuned = (target.from_pretrained(tmp_path / "base") for _ in range(2))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if f".{wanted}." in name and weight.dim() == 2:
                left, right = (
                    torch.randn(shape, generator=random) for shape in ((len(weight), 2), (2, weight[0].numel()))
                )
                weight.add_(left @ right, alpha=0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", rank=3, output=tmp_path / "out", **options)
    assert found.relative_error < 2e-6
    expected = tuned.state_dict()
    for name, tensor in applied(start, tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_another_number_of_labels(tmp_path: Path):
    base, tuned = tuned_by(tmp_path, bert(), target_modules=["query"])
    state = state_of(tuned)
    save_file(state | {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.ones(5)},
              tuned / "model.safetensors")  # fmt: skip
    extract_lora(tuned, base, rank=4, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.classifier.weight"], torch.ones(5, 16))
    save_file(state | {"bert.pooler.dense.weight": torch.ones(5, 16)}, tuned / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"pooler.dense.weight is \[5, 16\].*--save-full"):
        extract_lora(tuned, base, rank=4, output=tmp_path / "other")


def test_a_head_that_the_config_ties_and_the_file_does_not(tmp_path: Path):
    """transformers leaves such models untied, and writes T5 1.1 like this."""
    base, tuned = tuned_by(tmp_path, t5(), target_modules=["q"])
    head = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    change = torch.outer(torch.arange(40.0), torch.ones(16)) / 100
    for folder, stored in ((base, head), (tuned, head + change)):
        save_file(state_of(folder) | {"lm_head.weight": stored}, folder / "model.safetensors")
    found = {p.name: p for p in extract_lora(tuned, base, rank=4, output=tmp_path / "out").parts}
    assert found["lm_head.weight"].total == pytest.approx(float(change.square().sum()))
    extract_lora(tuned, base, rank=4, output=tmp_path / "both", targets=r"\.q$|lm_head")
    torch.testing.assert_close(dense(bind(base, tmp_path / "both"), "lm_head.weight"), change, rtol=1e-5, atol=1e-6)
    # Where the file repeats the embedding, there is no head.
    for folder in (base, tuned):
        state = state_of(folder)
        save_file(state | {"lm_head.weight": state["shared.weight"].clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in {p.name for p in extract_lora(tuned, base, rank=4, output=tmp_path / "tied").parts}


def test_bytes_do_not_depend_on_threads_but_on_the_seed(tmp_path: Path):
    base, tuned = moved(tmp_path, llama(hidden=48))
    options = [{"workers": 1}, {"workers": 3}, {"seed": 1}]
    one, other, seeded = (
        digests(extract_lora(tuned, base, rank=3, output=tmp_path / str(number) / "out", **option).output)
        for number, option in enumerate(options)
    )
    assert one == other
    assert one["adapter_model.safetensors"] != seeded["adapter_model.safetensors"]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float64"])
def test_what_is_stored_is_what_is_measured(out_dtype: str, tmp_path: Path):
    base, tuned = tuned_by(tmp_path, llama(), target_modules=["q_proj"])
    found = extract_lora(tuned, base, rank=4, output=tmp_path / "out", out_dtype=out_dtype)
    low, high = {"bfloat16": (5e-4, 1e-2), "float16": (5e-5, 1e-3), "float64": (0, 2e-6)}[out_dtype]
    assert low <= found.relative_error < high
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, out_dtype)}


def test_architectures_that_transformers_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_targets, "_skeleton", lambda checkpoint: None)
    model = llama()
    base, tuned = tuned_by(tmp_path, model, target_modules=ALL)
    assert extract_lora(tuned, base, rank=4, output=tmp_path / "out").relative_error < 2e-6
    assert config_of(tmp_path / "out")["target_modules"] == sorted(ALL)
    modules = lora_targets.find_modules(open_checkpoint(str(base)))
    assert modules.targets["model.embed_tokens.weight"].kind == "embedding" and modules.targets["lm_head.weight"].head
    turned, tuned = tuned_by(tmp_path / "gpt2", gpt2(), target_modules=["c_attn"])
    extract_lora(tuned, turned, rank=4, output=tmp_path / "gpt2" / "out")
    assert set(bind(turned, tmp_path / "gpt2" / "out").low_rank) == {
        f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)
    }


def test_peft_finds_the_base_by_itself(tmp_path: Path):
    base, tuned = tuned_by(tmp_path, llama(), target_modules=["q_proj"])
    extract_lora(tuned, base, rank=4, output=tmp_path / "out")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = type(llama()).from_pretrained(tuned)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tuned_by(tmp_path_factory.mktemp("pair"), llama(), target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0 is not a rank"),
        ({"energy": 1.5}, "energy: 1.5 is not a share"),
        ({"out_dtype": "int8"}, "out_dtype: 'int8' is not one of float64"),
        ({"targets": "q_("}, r"targets: 'q_\(' is not an expression"),
        ({"targets": "query"}, "'query' is found in no module's name. The model has down_proj, embed_tokens"),
        ({"targets": "k_proj"}, "no chosen module of .* differs"),
        ({"save_full": "pooler"}, "'pooler' is found in no tensor's name"),
    ],
)
def test_arguments_that_make_no_adapter(options: dict, message: str, pair: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(FuseError, match=message) as caught:
        extract_lora(pair[1], pair[0], output=tmp_path / "out", **{"rank": 4} | options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_models_that_are_no_pair(pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = pair
    with pytest.raises(CheckpointError, match="is equal to"):
        extract_lora(base, base, rank=4, output=tmp_path / "out")
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="lacks tensors that the other model has"):
        extract_lora(tuned, tmp_path / "bert", rank=4, output=tmp_path / "out")
    larger = type(llama()).from_pretrained(base)
    larger.resize_token_embeddings(43)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(CheckpointError, match=r"\[43, 16\], \[40, 16\].*resize_token_embeddings"):
        extract_lora(tmp_path / "larger", base, rank=4, output=tmp_path / "out")
    broken = type(llama()).from_pretrained(tuned)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(
        CheckpointError, match="tensor model.layers.1.mlp.up_proj.weight: the change from .* NaN or inf"
    ):
        extract_lora(tmp_path / "broken", base, rank=4, output=tmp_path / "out")
    with pytest.raises(OutputError, match="lies in the input"):
        extract_lora(tuned, base, rank=4, output=tuned / "out")
    assert not (tmp_path / "out").exists()
    extract_lora(tuned, base, rank=4, output=tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        extract_lora(tuned, base, rank=2, output=tmp_path / "out")
    assert digests(tmp_path / "out") == before
    extract_lora(tuned, base, rank=2, output=tmp_path / "out", overwrite=True)
    assert config_of(tmp_path / "out")["r"] == 2


def test_command_line(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    base, tuned = map(str, pair)
    command = ["extract-lora", tuned, "--base", base, "--rank", "2", "--output", str(tmp_path / "out")]
    cli.app(command, standalone_mode=False)
    text = capsys.readouterr().out
    assert "q_proj" in text and "unchanged: 19 tensors" in text and f"extracted: {tmp_path / 'out'}" in text
    cli.app([*command, "--overwrite", "--json", "--save-full", "norm", "--energy", "0.5"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["relative_error"] < 1 and facts["tensors"]["model.norm.weight"]["way"] == "whole"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hf-fuse extract-lora" in card and "| tuned | fine-tune | local |" in card and str(tmp_path) not in card


def test_kinds():
    assert kind_of("model.layers.3.mlp.up_proj.weight") == "up_proj"
    assert kind_of("model.layers.3.self_attn.q_proj.bias") == "q_proj.bias"
    assert kind_of("h.0.experts.7.weight") == "experts"
    assert kind_of("embeddings.cls_token") == "embeddings.cls_token" and kind_of("scale") == "scale"
