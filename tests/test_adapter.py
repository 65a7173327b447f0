"""LoRA folders as deltas: equal to PEFT's merge for every tensor, the same bits in any cut, every misfit an error."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import adapted, bert, bind, dense, gpt2, llama, numbers, save, train, vit, wav2vec

from hf_fuse.checkpoint import adapter as adapter_module
from hf_fuse.checkpoint.adapter import BoundAdapter, base_fingerprint, is_adapter, open_adapter
from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint
from hf_fuse.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, tuple[Callable, dict]] = {
    "plain": (llama, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "rank_pattern": (llama, {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3, "1.self_attn.v_proj": 7}}),
    "first_match_wins": (
        llama,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {r".*\.0\..*": 2, "k_proj": 5, "^model.layers.1.self_attn.o_proj": 6, "q_pro": 9},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 11.5, "^self_attn.v_proj": 1000, "v_proj": 3},
        },
    ),
    "patterns_and_rslora": (
        llama,
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"q_proj": 1},
        },
    ),
    "expression": (llama, {"target_modules": r".*\.(0|1)\.mlp\.(up|down)_proj"}),
    "all_linear": (llama, {"target_modules": "all-linear"}),
    "some_layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one_layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "excluded": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "excluded_by_expression": (llama, {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tied_embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "down_proj"]}),
    "biases": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "adapted_biases": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_unsaid": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d_square_alone": (gpt2, {"target_modules": ["attn.c_proj"]}),
    "conv1d_and_linear": (gpt2, {"target_modules": ["c_attn", "attn.c_proj", "wte"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "bert_embeddings": (bert, {"target_modules": ["query", "word_embeddings", "position_embeddings"]}),
    "vit_conv2d": (vit, {"target_modules": ["projection", "q_proj", "query", "fc1"]}),
    "wav2vec_conv1d": (wav2vec, {"target_modules": ["conv_layers.1.conv", "q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_delta_is_what_peft_merges(case: str, tmp_path: Path):
    build, settings = CASES[case]
    model = build()
    base, folder = save(tmp_path, model, train(copy.deepcopy(model), **settings))
    bound = bind(base, folder)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = open_checkpoint(str(tmp_path / "merged")).tensors
    found = adapted(bound)
    assert set(found) == set(expected)
    changed = set()
    for name, tensor in found.items():
        reference = numbers(expected[name])
        torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if not torch.equal(reference, numbers(bound.base.tensors[name])):
            changed.add(name)
    assert changed and changed <= set(bound.low_rank) | set(bound.replaced), "the reference changed nothing"
    assert set(bound.low_rank) <= changed
    for name in bound.low_rank:
        left, right, scale = bound.factors(name)
        shape = bound.base.tensors[name].shape
        assert left.shape[0] == shape[0] and left.shape[1] == right.shape[0] == bound.low_rank[name].rank
        torch.testing.assert_close((left @ right * scale).view(shape), dense(bound, name))
        product = dense(bound, name, torch.float64)
        assert torch.allclose(product, dense(bound, name).double(), rtol=1e-4, atol=1e-5)


def test_half_precision_factors_are_multiplied_in_full(tmp_path: Path):
    model = llama().bfloat16()
    base, folder = save(tmp_path, model, train(copy.deepcopy(model), target_modules=["q_proj"], r=3))
    rewritten(folder, lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    bound = bind(base, folder)
    state = load_file(folder / "adapter_model.safetensors")
    a, b = (state[f"{Q}.lora_{side}.weight"].double() for side in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert bound.low_rank[name].up.dtype == "BF16"
    torch.testing.assert_close(dense(bound, name, torch.float64), b @ a * 2, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dense(bound, name).double(), b @ a * 2, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> BoundAdapter:
    """Tensors of several row blocks each, no dimension a round number."""
    folder = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"tall.weight": draw(1037, 301), "flat.weight": draw(7, 40013), "tokens.weight": draw(5003, 77)}
    base |= {"tall.bias": draw(1037), "kernel.weight": draw(150, 31, 3, 3), "h.0.turned.weight": draw(301, 1037)}
    low = {"tall": (draw(5, 301), draw(1037, 5)), "flat": (draw(13, 40013), draw(7, 13))}
    low |= {"kernel": (draw(6, 31, 3, 3), draw(150, 6, 1, 1)), "h.0.turned": (draw(9, 301), draw(1037, 9))}
    tensors = {f"base_model.model.{n}.lora_{s}.weight": t for n, pair in low.items() for s, t in zip("AB", pair)}
    tensors |= {
        "base_model.model.tokens.lora_embedding_A": draw(4, 5003),
        "base_model.model.tokens.lora_embedding_B": draw(77, 4),
        "base_model.model.tall.lora_B.bias": draw(1037),
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 5, "fan_in_fan_out": True, "target_modules": [*low, "tokens"]}
    config["rank_pattern"] = {"tall": 5, "flat": 13, "kernel": 6, "turned": 9}
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return bind(folder / "base", folder / "adapter")


def cuts(count: int, generator: torch.Generator) -> Iterator[list[int]]:
    yield [0, count]
    yield [0, 1, 2, count // 2, count - 1, count]
    for size in (4099, 131072, 131073):
        yield [*range(0, count, size), count]
    inner = torch.randint(1, count, (40,), generator=generator).tolist()
    yield sorted({0, *inner, count})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_cut_gives_the_same_bits(wide: BoundAdapter, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    assert len(wide.low_rank) == 6
    for name, change in wide.low_rank.items():
        count = math.prod(change.shape)
        whole = dense(wide, name, dtype).view(-1)
        left, right, scale = wide.factors(name, torch.float64)
        exact = (left @ right * scale).view(-1)
        assert (whole.double() - exact).abs().max() < (1e-12 if dtype == torch.float64 else 2e-5), name
        for marks in cuts(count, generator):
            # Written at an odd place of a larger buffer, as a caller that reuses memory would.
            buffer = torch.full((count + 3,), math.nan, dtype=dtype)
            for start, stop in zip(marks, marks[1:]):
                wide.delta(name, start, stop, buffer[start + 3 : stop + 3])
            assert torch.equal(buffer[3:], whole), (name, marks[:4])
            assert buffer[:3].isnan().all()


def test_threads_and_a_small_cache_change_nothing(wide: BoundAdapter, monkeypatch: pytest.MonkeyPatch):
    whole = {name: dense(wide, name).view(-1) for name in wide.low_rank}
    monkeypatch.setattr(adapter_module, "CACHE_BYTES", 100_000)
    wide._held.clear()
    jobs = [(n, s, min(s + 50_021, w.numel())) for n, w in whole.items() for s in range(0, w.numel(), 50_021)]
    jobs = [jobs[i] for i in torch.randperm(len(jobs), generator=torch.Generator().manual_seed(1)).tolist()]
    results = {name: torch.empty_like(w) for name, w in whole.items()}

    def work(job: tuple[str, int, int]) -> None:
        name, start, stop = job
        wide.delta(name, start, stop, results[name][start:stop])

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, jobs))
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = {name: dense(wide, name).view(-1) for name in whole}
    finally:
        torch.set_num_threads(threads)
    for name in whole:
        assert torch.equal(results[name], whole[name]) and torch.equal(again[name], whole[name])
    held = sum(t.nbytes for pair in wide._held.values() for t in pair)
    assert held <= 100_000 or len(wide._held) == 1


def test_opening_and_binding_import_no_torch(tmp_path: Path):
    model = llama()
    base, folder = save(tmp_path, model, train(copy.deepcopy(model), target_modules=["q_proj"]))
    script = f"""
import sys
from pathlib import Path
from hf_fuse.checkpoint.adapter import base_fingerprint, open_adapter
from hf_fuse.checkpoint.reader import open_checkpoint
base = open_checkpoint({str(base)!r})
assert open_adapter(Path({str(folder)!r}), "a").bind(base).low_rank and base_fingerprint(base)
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_base_names_with_and_without_a_prefix(tmp_path: Path):
    """GPT-2's own checkpoint lacks ``transformer.``; a headless adapter goes onto a model with a head and back."""
    model = gpt2()
    peft = train(copy.deepcopy(model), target_modules=["c_attn", "attn.c_proj"])
    _, folder = save(tmp_path, model, peft)
    full = bind(tmp_path / "base", folder)
    model.transformer.save_pretrained(tmp_path / "bare")
    bare = bind(tmp_path / "bare", folder)
    assert set(bare.low_rank) == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"} | {
        f"h.{i}.attn.c_proj.weight" for i in (0, 1)
    }
    for name in bare.low_rank:
        assert torch.equal(dense(bare, name), dense(full, f"transformer.{name}"))

    inner = bert(transformers.BertModel)
    train(copy.deepcopy(inner), target_modules=r"encoder\.layer\.\d\.attention\.self\.query").save_pretrained(
        tmp_path / "inner"
    )
    bert().save_pretrained(tmp_path / "outer")
    outer = bind(tmp_path / "outer", tmp_path / "inner")
    assert set(outer.low_rank) == {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}


def rewritten(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in change(state).items()}, path)


def configured(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_modules_that_transformers_renames_on_loading(tmp_path: Path):
    """ViT's files say ``encoder.layer.0.attention.attention.query``, its modules ``layers.0.attention.q_proj``."""
    model = vit()
    base, folder = save(tmp_path, model, train(copy.deepcopy(model), target_modules=["q_proj", "fc1"]))
    names = [n for n in load_file(folder / "adapter_model.safetensors") if ".q_proj." in n]
    assert names and not any(".q_proj." in n for n in open_checkpoint(str(base)).tensors), "nothing is renamed any more"
    rewritten(folder, without("q_proj"))
    configured(folder, target_modules=["q_proj"])
    assert "target_modules" in failure(base, folder)


def test_wrapper_order_and_adapter_names_in_keys(tmp_path: Path):
    model = llama()
    base, folder = save(tmp_path, model, train(copy.deepcopy(model), target_modules=["q_proj", "embed_tokens"]))
    expected = {name: dense(bound, name) for bound in [bind(base, folder)] for name in bound.low_rank}

    def renamed(name: str) -> str:
        name = name.replace(".lora_A.weight", ".lora_A.math.weight").replace(".lora_B.weight", ".lora_B.math.weight")
        name = re.sub(r"(lora_embedding_[AB])$", r"\1.math", name)
        return name.replace("base_model.model.model.", "base_model.model.model.language_model.")

    rewritten(folder, lambda state: {renamed(name): t for name, t in state.items()})
    bound = bind(base, folder)
    assert set(bound.low_rank) == set(expected)
    assert all(torch.equal(dense(bound, name), t) for name, t in expected.items())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = llama()
    peft = train(copy.deepcopy(model), target_modules=["q_proj", "v_proj"])
    peft.peft_config["default"].base_model_name_or_path = "org/small-llama"
    return save(tmp_path, model, peft)


def failure(base: Path, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        bind(base, folder)
    return str(caught.value)


def test_is_adapter(pair: tuple[Path, Path]):
    base, folder = pair
    assert is_adapter(folder) and not is_adapter(base)
    adapter = open_adapter(folder, "mine")
    assert adapter.base_ref == "org/small-llama" and adapter.ref == "mine"
    assert adapter.nbytes == sum(i.nbytes for i in adapter.infos.values()) > 0


@pytest.mark.parametrize(
    ("other", "fragments"),
    [
        ({"hidden": 32}, ["lora_B [16, 4]", "lora_A [4, 16]", "'model.layers.0.self_attn.q_proj'", "[32, 32]"]),
        ({"layers": 4}, ["4 module(s)", "deeper", "'model.layers.2.self_attn.q_proj'"]),
        ({"layers": 1}, ["no weights", "'model.layers.1.self_attn.q_proj'", "'model.layers.1.self_attn.v_proj'"]),
    ],
)
def test_wider_deeper_and_shallower_bases_are_refused(other: dict, fragments: list[str], pair, tmp_path: Path):
    llama(**other).save_pretrained(tmp_path / "other")
    message = failure(tmp_path / "other", pair[1])
    for fragment in [*fragments, "org/small-llama", str(tmp_path / "other"), "the-adapter"]:
        assert fragment in message, message
    if other == {"layers": 4}:
        assert len(bind(tmp_path / "other", pair[1], strict=False).low_rank) == 4


def test_another_architecture_is_refused_in_a_line(pair, tmp_path: Path):
    bert().save_pretrained(tmp_path / "other")
    message = failure(tmp_path / "other", pair[1])
    assert "no weights" in message and "\n" not in message and len(message) < 700


def test_same_shape_other_weights_is_found_by_fingerprint(pair, tmp_path: Path):
    base, folder = pair
    llama(seed=1).save_pretrained(tmp_path / "other")
    assert bind(tmp_path / "other", folder).low_rank, "without a fingerprint nothing can tell"
    configured(folder, hf_fuse_base_fingerprint=base_fingerprint(open_checkpoint(str(base))))
    assert bind(base, folder).low_rank
    message = failure(tmp_path / "other", folder)
    assert "hf_fuse_base_fingerprint" in message and "org/small-llama" in message and "other weights" in message
    assert bind(tmp_path / "other", folder, strict=False).low_rank
    # Sharding is no difference, one changed matrix is.
    llama().save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert bind(tmp_path / "sharded", folder).low_rank
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    assert "fingerprint" in failure(tmp_path / "tuned", folder)


def without(*fragments: str) -> Callable[[dict], dict]:
    return lambda state: {n: t for n, t in state.items() if not any(f in n for f in fragments)}


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (without("layers.1.self_attn.q_proj.lora_B"), ["'model.layers.1.self_attn.q_proj'", "no lora_B", "incomplete"]),
        (without("layers.1.self_attn.v_proj.lora_A"), ["'model.layers.1.self_attn.v_proj'", "no lora_A"]),
        (without("layers.1.self_attn.v_proj"), ["1 module(s)", "'model.layers.1.self_attn.v_proj'", "target_modules"]),
        (without("v_proj"), ["target_modules", "'v_proj'", "no tensors"]),
        (without("."), ["holds no tensors"]),
        (lambda s: s | {"base_model.model.extra.weight": torch.ones(2)}, ["1 unknown", "model.extra.weight"]),
        (lambda s: s | {f"{Q}.lora_magnitude_vector": torch.ones(2)}, ["unknown", "lora_magnitude_vector"]),
        (lambda s: s | {f"{Q}.lora_A.bias": torch.ones(4)}, ["unknown", "lora_A.bias"]),
        (lambda s: s | {f"{Q}.lora_B.bias": torch.ones(16)}, ["q_proj.bias", "lora_B.bias"]),
        (lambda s: s | {f"{Q}.lora_A.two.weight": torch.ones(4, 4)}, ["several adapters", "'two'"]),
        (lambda s: {n: t.int() for n, t in s.items()}, ["I32", "floating-point"]),
        (lambda s: {n: t[:0] for n, t in s.items()}, ["[0, 16]", "gather"]),
        (lambda s: s | {f"{Q}.lora_A.weight": torch.ones(3, 16)}, ["do not multiply", "q_proj"]),
        (lambda s: s | {f"{Q}.lora_A.weight": torch.ones(16)}, ["do not multiply", "q_proj"]),
        (
            lambda s: s | {f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 2)},
            ["rank 2", "adapter_config.json says 4"],
        ),
        (lambda s: s | {f"self_attn.q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, ["could mean"]),
        (lambda s: s | {f"x.{Q[17:]}.lora_{x}.weight": s[f"{Q}.lora_{x}.weight"] + 1 for x in "AB"}, ["two of"]),
        (lambda s: s | {"base_model.model.lm_head.weight": torch.ones(40, 20)}, ["[40, 20]", "[40, 16]"]),
    ],
)  # fmt: skip
def test_damaged_adapters_are_refused(change: Callable, fragments: list[str], pair: tuple[Path, Path]):
    base, folder = pair
    rewritten(folder, change)
    message = failure(base, folder)
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
        ({"peft_type": "IA3"}, ["peft_type", '"IA3"']),
        ({"peft_type": None}, ["peft_type"]),
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
        ({"target_parameters": ["experts.up"]}, ["target_parameters"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "OLoRA"}, ["init_lora_weights"]),
        ({"init_lora_weights": "loftq"}, ["init_lora_weights"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"kasa_config": {"beta": 1}}, ["kasa_config"]),
        ({"use_something_new": True}, ["use_something_new"]),
        ({"r": "4"}, ['r is "4"']),
        ({"rank_pattern": {"q_proj": "4"}}, ["rank 4", "'4'"]),
        ({"rank_pattern": {"q_(": 4}}, ["'(.*\\\\.)?(q_()$'", "not an expression"]),
        ({"alpha_pattern": {"q_proj": True}}, ["lora_alpha", "True"]),
        ({"lora_alpha": math.inf}, ["lora_alpha", "inf"]),
        ({"modules_to_save": "head"}, ["modules_to_save"]),
        ({"target_modules": 3}, ["target_modules"]),
    ],
)
def test_settings_that_no_factors_express_are_refused(settings: dict, fragments: list[str], pair: tuple[Path, Path]):
    base, folder = pair
    configured(folder, **settings)
    message = failure(base, folder)
    for fragment in [*fragments, "adapter_config.json" if "lora_alpha" not in fragments else "the-adapter"]:
        assert fragment in message, message


def test_harmless_settings_of_other_releases_are_accepted(pair: tuple[Path, Path]):
    base, folder = pair
    configured(
        folder, peft_version="9.9", new_field=3, use_new_thing=False, some_config=None, init_lora_weights="gaussian",
        loftq_config={}, runtime_config={"ephemeral_gpu_offload": True}, trainable_token_indices=[],
        eva_config={"rho": 1},
    )  # fmt: skip
    assert len(bind(base, folder).low_rank) == 4


def test_targets_that_are_not_spelt_out_must_be_complete_all_the_same(pair: tuple[Path, Path]):
    base, folder = pair
    configured(folder, target_modules="all-linear")
    assert len(bind(base, folder).low_rank) == 4
    rewritten(folder, without("layers.1.self_attn.v_proj"))
    assert "'model.layers.1.self_attn.v_proj'" in failure(base, folder)


def test_layers_that_only_the_file_knows_are_no_gap(pair: tuple[Path, Path], tmp_path: Path):
    """Fused experts are separate matrices on disk and no modules in the model, so PEFT never adapted them."""
    base, folder = pair
    state = load_file(base / "model.safetensors")
    for layer, expert in ((0, 0), (0, 1), (1, 0)):
        state[f"model.layers.{layer}.mlp.experts.{expert}.v_proj.weight"] = torch.ones(4, 4)
    save_file(state, base / "model.safetensors")
    assert len(bind(base, folder).low_rank) == 4


def test_a_quantised_base_is_refused(pair: tuple[Path, Path]):
    base, folder = pair
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 16, dtype=torch.uint8)
    save_file(state, base / "model.safetensors")
    assert "quantised, as U8" in failure(base, folder)


def test_a_change_of_a_tied_output_alone_is_refused(tmp_path: Path):
    model = llama()
    _, folder = save(tmp_path, model, train(copy.deepcopy(model), target_modules=["lm_head"]))
    llama(tied=True).save_pretrained(tmp_path / "tied")
    message = failure(tmp_path / "tied", folder)
    assert "'lm_head'" in message and "ties its output" in message


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_comes_with_the_adapter(tied: bool, tmp_path: Path):
    model = llama(tied=tied)
    model.save_pretrained(tmp_path / "base")
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(43)
    settings = {"target_modules": ["q_proj", *(["embed_tokens"] if tied else [])]}
    peft = train(larger, **settings)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    bound = bind(tmp_path / "base", tmp_path / "adapter")
    ends = {"model.embed_tokens.weight"} | ({"lm_head.weight"} - ({"lm_head.weight"} if tied else set()))
    assert set(bound.replaced) == ends
    assert {info.shape for info in bound.replaced.values()} == {(43, 16)}
    assert {info.name for info in bound.replaced.values()} == ends
    merged = peft.merge_and_unload().state_dict()
    for name, tensor in adapted(bound).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-5)
    # Both ends of a tied model in the file: one is a copy.
    if tied:
        name = "base_model.model.lm_head.weight"
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        rewritten(tmp_path / "adapter", lambda state: state | {name: state[key].clone()})
        assert set(bind(tmp_path / "base", tmp_path / "adapter").replaced) == ends
        rewritten(tmp_path / "adapter", lambda state: state | {name: state[key] + 1})
        assert "lm_head.weight" in bind(tmp_path / "base", tmp_path / "adapter").replaced


def test_a_new_head_is_reported_as_a_tensor_that_the_base_lacks(tmp_path: Path):
    model = bert()
    train(copy.deepcopy(model), target_modules=["query"], modules_to_save=["classifier"]).save_pretrained(
        tmp_path / "a"
    )
    bert(transformers.BertModel).save_pretrained(tmp_path / "base")
    bound = bind(tmp_path / "base", tmp_path / "a")
    assert set(bound.replaced) == {"classifier.weight", "classifier.bias"}
    assert set(bound.low_rank) == {f"encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}


def test_a_square_weight_among_both_orientations_is_refused(tmp_path: Path):
    def layer(name: str, rank_out: int, rank_in: int) -> dict[str, torch.Tensor]:
        return {
            f"h.0.{name}.lora_A.weight": torch.ones(2, rank_in),
            f"h.0.{name}.lora_B.weight": torch.ones(rank_out, 2),
        }

    base = {"h.0.turned.weight": torch.ones(3, 5), "h.0.square.weight": torch.ones(4, 4)}
    base |= {"h.0.straight.weight": torch.ones(5, 3)}
    (tmp_path / "base").mkdir()
    (tmp_path / "a").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file(
        layer("turned", 5, 3) | layer("square", 4, 4) | layer("straight", 5, 3),
        tmp_path / "a" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert "'h.0.square' is square" in failure(tmp_path / "base", tmp_path / "a")
    configured(tmp_path / "a", fan_in_fan_out=False)
    assert "[3, 5]" in failure(tmp_path / "base", tmp_path / "a"), "without the setting a transposed shape is a misfit"


def test_folders_that_are_incomplete_or_mean_two_things(pair: tuple[Path, Path]):
    base, folder = pair
    shutil.copy(base / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="beside adapter_config.json"):
        open_adapter(folder, "a")
    (folder / "model.safetensors").unlink()
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: truncated"):
        open_adapter(folder, "a")
    state = load_file(shutil.copy(base / "model.safetensors", path))
    assert state
    path.unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        open_adapter(folder, "a")
    path.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json: not valid JSON"):
        open_adapter(folder, "a")


def test_a_pickled_adapter_needs_permission(pair: tuple[Path, Path]):
    base, folder = pair
    expected = adapted(bind(base, folder))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_adapter(folder, "a")
    bound = open_adapter(folder, "a", allow_pickle=True).bind(open_checkpoint(str(base)))
    found = adapted(bound)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_fingerprint_of_an_empty_or_integer_checkpoint(tmp_path: Path):
    save_file({"a": torch.empty(0, 3), "n": torch.arange(5)}, tmp_path / "model.safetensors")
    one: Checkpoint = open_checkpoint(str(tmp_path))
    first = base_fingerprint(one)
    save_file({"a": torch.empty(0, 3), "n": torch.arange(5) + 1}, tmp_path / "model.safetensors")
    assert base_fingerprint(open_checkpoint(str(tmp_path))) != first
