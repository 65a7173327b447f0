"""Adapters merged into one adapter: what PEFT makes of the result on the base is what merging the models makes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from tiny_adapters import bert, bind, dense, gpt2, llama, train, vit, wav2vec
from tiny_models import digests
from torch import Tensor

import hf_fuse
from hf_fuse import cli
from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.adapter_writer import rank_settings, target_list
from hf_fuse.checkpoint.reader import open_checkpoint
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.merge.rank_space import concatenated, low_rank, squared_norm, truncated

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = [0.7, -0.4, 1.3]

# Model, then the settings of each adapter.
CASES: dict[str, tuple[Callable, list[dict]]] = {
    "same": (llama, [{"target_modules": ["q_proj", "up_proj"]}] * 3),
    "ranks_and_scales": (
        llama,
        [
            {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 16},
            {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 5, "use_rslora": True},
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"1.self_attn.q_proj": 3, "v_proj": 6},
                "alpha_pattern": {"0.self_attn.v_proj": 11.5},
                "use_rslora": True,
            },
        ],
    ),
    "targets_of_some": (
        llama,
        [
            {"target_modules": ATTENTION},
            {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
        ],
    ),
    "embeddings": (
        llama,
        [{"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, {"target_modules": ["embed_tokens", "k_proj"]}],
    ),
    "tied_embedding": (
        lambda: llama(tied=True),
        [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"], "r": 3}],
    ),
    "modules_to_save": (
        llama,
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["norm", "lm_head"]},
        ],
    ),
    "biases": (
        lambda: llama(attention_bias=True),
        [{"target_modules": ["q_proj"], "bias": "all"}, {"target_modules": ["v_proj"], "bias": "all"}],
    ),
    "lora_bias": (
        lambda: llama(attention_bias=True),
        [{"target_modules": ["q_proj", "k_proj"], "lora_bias": True}, {"target_modules": ["q_proj"], "r": 3}],
    ),
    "conv1d": (
        gpt2,
        [
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "attn.c_proj"], "r": 2},
        ],
    ),
    "conv1d_and_embedding": (gpt2, [{"target_modules": ["c_attn", "wte"]}, {"target_modules": ["attn.c_proj"]}]),
    "classifier": (
        bert,
        [
            {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
            {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        ],
    ),
    "convolution_2d": (vit, [{"target_modules": ["projection", "q_proj", "fc1"]}, {"target_modules": ["projection"]}]),
    "convolution_1d": (wav2vec, [{"target_modules": ["conv_layers.1.conv", "q_proj"]}, {"target_modules": ["q_proj"]}]),
}
NEED_BASE = ("embeddings", "modules_to_save", "biases", "classifier")


def family(folder: Path, build: Callable, settings: list[dict]) -> tuple[torch.nn.Module, Path, list[Path]]:
    """The base model, its folder, and those of its adapters."""
    model = build()
    model.save_pretrained(folder / "base")
    adapters = []
    for number, setting in enumerate(settings):
        adapters.append(folder / f"adapter-{number}")
        torch.manual_seed(100 + number)
        train(copy.deepcopy(model), seed=number, **setting).save_pretrained(adapters[-1])
    return model, folder / "base", adapters


def recipe(adapters: list[Path], base: Path | None = None, method: str = "task_arithmetic", **more) -> dict:
    models = [{"path": str(path), "weight": w} for path, w in zip(adapters, WEIGHTS)]
    if method == "wise_ft":
        models = [str(adapters[0])]
    return {"method": method, "models": models, "output_kind": "adapter", **more} | (
        {"base_model": str(base)} if base else {}
    )


def as_model(stated: dict, base: Path) -> dict:
    """The same merge, of models."""
    return {k: v for k, v in stated.items() if k not in ("output_kind", "rank")} | {"base_model": str(base)}


def applied(model: torch.nn.Module, adapter: Path) -> dict[str, Tensor]:
    """The base with the adapter, as PEFT loads and merges it; nothing may be missing or left over."""
    peft = PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    stored = set(load_file(adapter / "adapter_model.safetensors"))
    named = {name.replace(".default", "") for name in peft.state_dict() if ".lora_" in name}
    assert {name for name in stored if ".lora_" in name} <= named
    missing = named - stored
    assert not [name for name in missing if not name.endswith("lora_B.bias")], sorted(missing)[:4]
    return peft.merge_and_unload().state_dict()


def loaded(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    state = type(model).from_pretrained(folder).state_dict()
    return {name: state[name] for name in model.state_dict()}  # ViT comes with a pooler that nobody saved


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_sum_in_rank_space_is_the_merged_model(case: str, tmp_path: Path):
    model, base, adapters = family(tmp_path, *CASES[case])
    stated = recipe(adapters, base, parameters={"lambda": 0.8})
    out = hf_fuse.merge(stated, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fuse_recipe.yaml",
    ]  # fmt: skip
    expected = loaded(model, hf_fuse.merge(as_model(stated, base), tmp_path / "model"))
    before = model.state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in expected.items())
    assert_close(applied(model, out), expected)
    # Without the base: the same numbers, in the same places.
    if case not in NEED_BASE:
        alone = hf_fuse.merge(recipe(adapters, parameters={"lambda": 0.8}), tmp_path / "alone")
        assert_close(applied(model, alone), expected)
        config = json.loads((alone / "adapter_config.json").read_text())
        assert "hf_fuse_base_fingerprint" not in config
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["hf_fuse_base_fingerprint"] == base_fingerprint(open_checkpoint(str(base)))
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    # What came out goes in again.
    again = hf_fuse.merge(recipe([out], base, "wise_ft", parameters={"alpha": 1.0}), tmp_path / "again")
    assert_close(applied(model, again), expected)
    assert_close(loaded(model, hf_fuse.merge(as_model(recipe([out], base, "wise_ft", parameters={"alpha": 1.0}), base),
                                             tmp_path / "last")), expected)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 5])
def test_smaller_rank_is_the_best_of_its_rank(case: str, rank: int, tmp_path: Path):
    _, base, adapters = family(tmp_path, *CASES[case])
    stated = recipe(adapters, base, rank=rank)
    plan = hf_fuse.plan(stated, output=tmp_path / "out")
    out = hf_fuse.merge(plan)
    bounds, merged = [bind(base, adapter) for adapter in adapters], bind(base, out)
    error = total = 0.0
    for name, change in merged.low_rank.items():
        parts = [(w, bound) for w, bound in zip(WEIGHTS, bounds) if name in bound.low_rank]
        whole = sum(w * dense(bound, name, torch.float64) for w, bound in parts)
        found = dense(merged, name, torch.float64)
        if whole.dim() == 1:
            torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
            continue
        assert change.rank <= rank
        values = torch.linalg.svdvals(whole.flatten(1))
        best = float(values[change.rank :].square().sum())
        assert float((found - whole).square().sum()) <= best * (1 + 1e-6) + 1e-10 * float(values[0]) ** 2
        error, total = error + best, total + float(values.square().sum())
    assert plan.truncation == pytest.approx((error / total) ** 0.5, rel=1e-5, abs=1e-6)


def test_embeddings_without_the_base_need_their_copies_to_agree(tmp_path: Path):
    """PEFT stores the base's embedding beside an adapted one. Equal copies say what the base has."""
    model, base, adapters = family(tmp_path, *CASES["tied_embedding"])
    out = hf_fuse.merge(recipe(adapters), tmp_path / "out")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert torch.equal(
        load_file(out / "adapter_model.safetensors")[name], model.state_dict()["model.embed_tokens.weight"]
    )
    kept = load_file(adapters[1] / "adapter_model.safetensors")
    (adapters[1] / "adapter_model.safetensors").unlink()
    save_file({key: t for key, t in kept.items() if key != name}, adapters[1] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter-1: lacks the tensor 'model.embed_tokens.weight'.*base_model"):
        hf_fuse.merge(recipe(adapters), tmp_path / "other")
    with_base = hf_fuse.merge(recipe(adapters, base), tmp_path / "other")
    assert name not in load_file(with_base / "adapter_model.safetensors")


def test_tensors_stored_whole_by_some_only(tmp_path: Path):
    settings = [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj"]}]
    model, base, adapters = family(tmp_path, llama, settings)
    with pytest.raises(CheckpointError, match=r"adapter-1: lacks the tensor 'lm_head.weight' that .*adapter-0 stores"):
        hf_fuse.plan(recipe(adapters, method="linear"))
    plan = hf_fuse.plan(recipe(adapters, base), output=tmp_path / "out")
    assert any("lm_head.weight is stored whole, but not by" in line for line in plan.warnings)
    expected = loaded(model, hf_fuse.merge(as_model(recipe(adapters, base), base), tmp_path / "model"))
    assert_close(applied(model, hf_fuse.merge(plan)), expected)
    with pytest.raises(RecipeError, match="is stored whole, and task_arithmetic needs the base's"):
        hf_fuse.plan(recipe(family(tmp_path / "two", *CASES["modules_to_save"])[2]))


def test_new_heads_are_averaged(tmp_path: Path):
    """The base has no classifier; two adapters bring one each."""
    model, _, adapters = family(tmp_path, *CASES["classifier"])
    model.bert.save_pretrained(tmp_path / "inner")
    out = hf_fuse.merge(recipe(adapters, tmp_path / "inner"), tmp_path / "out")
    states = [load_file(path / "adapter_model.safetensors") for path in (*adapters, out)]
    name = "base_model.model.classifier.weight"
    torch.testing.assert_close(states[2][name], (states[0][name] + states[1][name]) / 2)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    linear = hf_fuse.merge(recipe(adapters, method="linear"), tmp_path / "linear")
    mean = (0.7 * states[0][name] - 0.4 * states[1][name]) / 0.3
    torch.testing.assert_close(load_file(linear / "adapter_model.safetensors")[name], mean)
    with pytest.raises(RecipeError, match="sum to 0.3 and would rescale it. Say normalize: true"):
        hf_fuse.plan(recipe(adapters, method="linear", parameters={"normalize": False}))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs", "nuslerp"])
@pytest.mark.parametrize("case", ["ranks_and_scales", "conv1d", "embeddings", "modules_to_save", "lora_bias"])
def test_methods_on_dense_changes_at_full_rank(method: str, case: str, tmp_path: Path):
    model, base, adapters = family(tmp_path, *CASES[case])
    scope = {"scope": "tensor"} if method in ("ties", "breadcrumbs") else {}
    parameters = scope | ({} if method == "nuslerp" else {"density": 0.5})
    stated = recipe(adapters[:2], base, method, rank=99, parameters=parameters, seed=5)
    plan = hf_fuse.plan(stated, output=tmp_path / "out")
    assert plan.dense and "formed one tensor at a time" in plan.way()
    out = hf_fuse.merge(plan)
    expected = loaded(model, hf_fuse.merge(as_model(stated, base), tmp_path / "model"))
    assert_close(applied(model, out), expected)
    assert plan.truncation == pytest.approx(0, abs=1e-5)


def test_methods_on_dense_changes_cut_down(tmp_path: Path):
    model, base, adapters = family(tmp_path, lambda: llama(hidden=64), [{"target_modules": ["q_proj", "up_proj"]}] * 3)
    stated = recipe(adapters, base, "ties", rank=6)
    plan = hf_fuse.plan(stated, output=tmp_path / "out")
    found = applied(model, hf_fuse.merge(plan))
    # Over the adapted tensors, where the merged model counts untouched ones as well.
    full = applied(model, hf_fuse.merge(stated | {"rank": 64}, tmp_path / "full"))
    before, error, best, total = model.state_dict(), 0.0, 0.0, 0.0
    for name in plan.pairs:
        change = full[name] - before[name]
        error += float((found[name] - full[name]).square().sum())
        best += float(torch.linalg.svdvals(change)[6:].square().sum())
        total += float(change.square().sum())
    assert best <= error * (1 + 1e-5) and error**0.5 < 1.02 * best**0.5
    assert plan.truncation == pytest.approx((error / total) ** 0.5, rel=1e-3)


def test_a_post_step_makes_the_sum_dense(tmp_path: Path):
    model, base, adapters = family(tmp_path, *CASES["same"])
    stated = recipe(adapters, base, rank=99, post={"subspace_boosting": {"beta": 0.1}})
    expected = loaded(model, hf_fuse.merge(as_model(stated, base), tmp_path / "model"))
    assert_close(applied(model, hf_fuse.merge(stated, tmp_path / "out")), expected)
    with pytest.raises(RecipeError, match="rank: subspace_boosting makes changes of full rank"):
        hf_fuse.plan({key: value for key, value in stated.items() if key != "rank"})


def test_weights_follow_depth_and_names(tmp_path: Path):
    model, base, adapters = family(tmp_path, *CASES["same"])
    stated = recipe(adapters[:2], base)
    stated["models"][0]["weight"] = [0.0, 1.0]
    stated["models"][1]["weight"] = [{"filter": "q_proj", "value": 2.0}, {"value": 0.5}]
    out = hf_fuse.merge(stated, tmp_path / "out")
    assert_close(applied(model, out), loaded(model, hf_fuse.merge(as_model(stated, base), tmp_path / "model")))
    one, two, merged = (bind(base, folder) for folder in (*adapters[:2], out))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(dense(merged, name), 2 * dense(two, name))
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(dense(merged, name), dense(one, name) + 0.5 * dense(two, name))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_the_bytes_depend_on_the_recipe_alone(method: str, tmp_path: Path):
    _, base, adapters = family(tmp_path, *CASES["targets_of_some"])
    stated = recipe(adapters, base, method, rank=3)
    found = [digests(hf_fuse.merge(stated, tmp_path / str(w) / "out", workers=w)) for w in (1, 3)]
    assert found[0] == found[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert digests(hf_fuse.merge(stated, tmp_path / "threads" / "out")) == found[0]
    finally:
        torch.set_num_threads(threads)
    # The stored recipe makes it again.
    again = hf_fuse.merge(tmp_path / "1" / "out" / "fuse_recipe.yaml", tmp_path / "again" / "out")
    assert digests(again) == found[0]


def test_types_of_numbers(tmp_path: Path):
    model, base, adapters = family(tmp_path, *CASES["same"])
    for adapter in adapters[:2]:
        state = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        save_file({n: t.bfloat16() for n, t in state.items()}, adapter / "adapter_model.safetensors")

    def kinds(folder: Path) -> set[torch.dtype]:
        return {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}

    assert kinds(hf_fuse.merge(recipe(adapters[:2]), tmp_path / "half")) == {torch.bfloat16}
    assert kinds(hf_fuse.merge(recipe(adapters), tmp_path / "mixed")) == {torch.float32}
    stated = recipe(adapters[:2], base, out_dtype="float32", dtype="float64")
    out = hf_fuse.merge(stated, tmp_path / "float")
    assert kinds(out) == {torch.float32}
    assert_close(applied(model, out), loaded(model, hf_fuse.merge(as_model(stated, base), tmp_path / "model")))
    with pytest.raises(OutputError, match="not finite in F16.*wider out_dtype"):
        hf_fuse.merge(recipe(adapters, out_dtype="float16", parameters={"lambda": 1e6}), tmp_path / "overflow")
    assert not (tmp_path / "overflow").exists()


def test_prefixes_of_other_releases(tmp_path: Path):
    """The second adapter calls the same modules by another prefix; the first one's names count."""
    settings = [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "up_proj"]}]
    model, base, adapters = family(tmp_path, llama, settings)
    expected = loaded(model, hf_fuse.merge(as_model(recipe(adapters, base), base), tmp_path / "model"))
    path = adapters[1] / "adapter_model.safetensors"
    state = load_file(path)
    path.unlink()
    save_file(
        {n.replace("base_model.model.model.", "base_model.model.language_model."): t for n, t in state.items()}, path
    )
    out = hf_fuse.merge(recipe(adapters, base), tmp_path / "out")
    assert_close(applied(model, out), expected)
    assert all(".model.model.layers." in name for name in load_file(out / "adapter_model.safetensors"))


def test_modules_that_transformers_renames(tmp_path: Path):
    """ViT's files and modules differ in name, so modules are named one by one and PEFT finds them."""
    settings = [{"target_modules": r".*layers?\.0\..*(q_proj|query)"}, {"target_modules": ["fc1"]}]
    model, base, adapters = family(tmp_path, vit, settings)
    out = hf_fuse.merge(recipe(adapters, base), tmp_path / "out")
    assert_close(
        applied(model, out), loaded(model, hf_fuse.merge(as_model(recipe(adapters, base), base), tmp_path / "m"))
    )


@pytest.mark.parametrize("seed", range(20))
def test_patterns_are_read_back_by_the_rule_of_peft(seed: int):
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=random))

    modules = {f"{'x.' * draw(2)}layers.{draw(12)}.{'mlp.' * draw(2)}{'abc'[draw(3)]}" for _ in range(30)} | {
        "a",
        "x-y",
    }
    ranks = {module: [4, 4, 4, 8, 16][draw(5)] for module in sorted(modules)}
    usual, pattern = rank_settings(ranks)
    for module, rank in ranks.items():
        assert pattern.get(get_pattern_key(list(pattern), module), usual) == rank, (module, pattern)


def test_patterns_and_targets_are_short_where_kinds_agree():
    ranks = {f"layers.{i}.{kind}": rank for i in range(9) for kind, rank in (("q", 8), ("k", 4), ("v", 8))}
    assert rank_settings(ranks) == (8, {"k": 4})
    assert target_list(ranks, ["layers.0.o"]) == ["k", "q", "v"]
    assert target_list(["layers.0.q", "layers.0.k"], ["layers.1.q"]) == ["k", "layers.0.q"]
    assert rank_settings({"a.q": 3}) == (3, {})


def test_algebra():
    random = torch.Generator().manual_seed(0)
    parts = [(torch.randn(30, r, generator=random), torch.randn(r, 20, generator=random), c)
             for r, c in ((3, 0.5), (4, -2.0), (30, 1.0))]  # fmt: skip
    whole = sum(c * left.double() @ right.double() for left, right, c in parts)
    left, right = concatenated(parts)
    torch.testing.assert_close(left.double() @ right.double(), whole, rtol=1e-5, atol=1e-5)
    assert squared_norm(left, right) == pytest.approx(float(whole.square().sum()), rel=1e-6)
    u, values, v = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 5, 20, 25):
        change = truncated(left, right, rank)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        torch.testing.assert_close(change.left_MR.double() @ change.right_RN.double(), best, rtol=1e-5, atol=1e-5)
        assert change.error == pytest.approx(float(values[rank:].square().sum()), rel=1e-5, abs=1e-6)
        assert change.total == pytest.approx(float(values.square().sum()), rel=1e-6)
    # Duplicates make the factors rank-deficient, nothing else.
    doubled = truncated(torch.cat([left[:, :3]] * 2, 1), torch.cat([right[:3]] * 2), 4)
    torch.testing.assert_close(doubled.left_MR @ doubled.right_RN, 2 * left[:, :3] @ right[:3], rtol=1e-5, atol=1e-5)
    # Nothing depends on the size of the numbers.
    tiny = truncated(left * 1e-12, right * 1e-12, 5)
    torch.testing.assert_close(
        (tiny.left_MR * 1e12) @ (tiny.right_RN * 1e12), (u[:, :5] * values[:5] @ v[:5]).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_randomised_svd_in_pieces(decay: float):
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 150, generator=random))[0] for n in (400, 150))
    values = torch.arange(1, 151) ** -decay
    matrix = (u * values) @ v.T
    whole = low_rank(lambda: [(0, matrix)], (400, 150), 12, "a")
    cut = low_rank(lambda: ((i, matrix[i : i + 37]) for i in range(0, 400, 37)), (400, 150), 12, "a")
    best = float(values[12:].square().sum())
    for found in (whole, cut):
        assert best * (1 - 1e-5) <= found.error < best * 1.04
        rest = matrix - found.left_MR @ found.right_RN
        assert found.error == pytest.approx(float(rest.square().sum()), rel=1e-4)
        assert found.total == pytest.approx(float(values.square().sum()), rel=1e-5)
    if decay:  # equal singular values have no directions of their own
        torch.testing.assert_close(cut.left_MR @ cut.right_RN, whole.left_MR @ whole.right_RN, rtol=1e-3, atol=1e-3)
    assert low_rank(lambda: [(0, torch.zeros(9, 7))], (9, 7), 2, "zero") is None
    some = low_rank(lambda: [(0, matrix)], (400, 150), 100, "a", energy=0.5)
    share = values.square().cumsum(0) / values.square().sum()
    assert some.left_MR.shape[1] == min(100, int((share < 0.5).sum()) + 1)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("pair"), llama, [{"target_modules": ["q_proj", "v_proj"]}] * 2)[1:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output_kind": "model", "rank": 3}, RecipeError, "rank is that of an adapter"),
        ({"tokenizer": "base"}, RecipeError, "tokenizer has no meaning with output_kind: adapter"),
        ({"rank": 0}, RecipeError, "rank: .*greater than or equal to 1"),
        ({"method": "ties"}, RecipeError, "base_model: ties needs the layout"),
        ({"method": "slerp", "parameters": {"t": 0.5}}, RecipeError, "slerp merges whole weights.*task_arithmetic"),
        ({"method": "linear", "models": "zero"}, RecipeError, "the weights sum to 0"),
        ({"parameters": {"lamda": 1}}, RecipeError, "Did you mean 'lambda'"),
        ({"models": "base"}, CheckpointError, "base: is not an adapter"),
        ({"base_model": "adapter"}, CheckpointError, "is an adapter, not a full model"),
        ({"models": "other_base"}, RecipeError, "stand on different bases"),
    ],
)
def test_recipes_that_make_no_adapter(change: dict, error: type[FuseError], message: str, pair, tmp_path: Path):
    base, adapters = pair
    stated = recipe(adapters) | change
    if change.get("base_model") == "adapter":
        stated["base_model"] = str(adapters[0])
    if change.get("models") == "zero":
        stated["models"] = [{"path": str(path), "weight": w} for path, w in zip(adapters, (1, -1))]
    if change.get("models") == "base":
        stated["models"] = [str(adapters[0]), str(base)]
    if change.get("models") == "other_base":
        stated["models"] = [f"{base}+{adapters[0]}", f"{adapters[1]}+{adapters[1]}"]
    with pytest.raises(error, match=message) as caught:
        hf_fuse.merge(stated, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def copied(adapters: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copytree(path, folder / path.name)) for path in adapters]


def test_adapters_that_do_not_fit_together(pair, tmp_path: Path):
    base, adapters = pair
    _, _, (wide,) = family(tmp_path / "wide", lambda: llama(hidden=32), [{"target_modules": ["q_proj"]}])
    with pytest.raises(CheckpointError, match=r"lora_B \[32, 4\].*\[16, 16\]"):
        hf_fuse.plan(recipe([adapters[0], wide]))
    saved = family(tmp_path / "saved", llama, [{"target_modules": ["up_proj"], "modules_to_save": ["v_proj"]}])[2]
    with pytest.raises(CheckpointError, match="'model.layers.0.self_attn.v_proj'.*modules_to_save"):
        hf_fuse.plan(recipe([adapters[0], *saved], base))
    changed = copied(adapters, tmp_path / "copies")
    for number, path in enumerate(changed):
        config = json.loads((path / "adapter_config.json").read_text()) | {"hf_fuse_base_fingerprint": str(number)}
        (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="trained on different bases"):
        hf_fuse.plan(recipe(changed))
    with pytest.raises(CheckpointError, match="trained on other weights"):
        hf_fuse.plan(recipe(changed[:1], base))
    out = hf_fuse.merge(recipe(changed[:1]), tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["hf_fuse_base_fingerprint"] == "0"


def test_nan_is_found_and_named(pair, tmp_path: Path):
    _, adapters = pair
    adapters = copied(adapters, tmp_path)
    path = adapters[1] / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][0, 3] = torch.nan
    path.unlink()
    save_file(state, path)
    with pytest.raises(
        CheckpointError, match="adapter-1: its factors of tensor model.layers.1.self_attn.v_proj.weight"
    ):
        hf_fuse.merge(recipe(adapters), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    assert hf_fuse.merge(recipe(adapters), tmp_path / "out", allow_nonfinite=True).exists()


def test_existing_outputs_and_overlaps(pair, tmp_path: Path):
    base, adapters = pair
    adapters = copied(adapters, tmp_path)
    with pytest.raises(OutputError, match="overlaps with the input"):
        hf_fuse.merge(recipe(adapters), adapters[0] / "inside")
    out = hf_fuse.merge(recipe(adapters), tmp_path / "out")
    before = digests(out)
    with pytest.raises(OutputError, match="--overwrite"):
        hf_fuse.merge(recipe(adapters, rank=2), tmp_path / "out")
    assert digests(out) == before
    hf_fuse.merge(recipe(adapters, rank=2), tmp_path / "out", overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert "adapter_model.safetensors" in digests(out) != before


def test_command_line(pair, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    base, adapters = pair
    file = tmp_path / "merge.yaml"
    file.write_text(
        f"method: task_arithmetic\noutput_kind: adapter\nbase_model: {base}\nmodels: [{adapters[0]}, {adapters[1]}]\n"
    )
    cli.app(["plan", str(file), "--rank", "3"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "4 modules, rank 3: truncated SVD in the space of the factors" in " ".join(text.split())
    cli.app(["plan", str(file), "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapter"]["way"] == "rank 8: factors concatenated, exact"
    assert [parent["role"] for parent in facts["parents"]] == ["base", "adapter", "adapter"]
    assert facts["bytes_read"] == sum((path / "adapter_model.safetensors").stat().st_size for path in adapters) - sum(
        int.from_bytes((path / "adapter_model.safetensors").read_bytes()[:8], "little") + 8 for path in adapters
    )
    cli.app(["merge", str(file), "--output", str(tmp_path / "out"), "--rank", "3"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "left out by the rank:" in text and "% of the change" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: adapter" in card and "library_name: peft" in card and str(tmp_path) not in card


def test_card_names_the_base_on_the_hub(pair, tmp_path: Path):
    _, adapters = pair
    adapters = copied(adapters, tmp_path)
    for path in adapters:
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "org/small-llama", "task_type": "CAUSAL_LM"}
        (path / "adapter_config.json").write_text(json.dumps(config))
    out = hf_fuse.merge(recipe(adapters), tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "base_model:\n- org/small-llama\n" in card and "pipeline_tag: text-generation" in card
    assert "AutoPeftModelForCausalLM.from_pretrained(model_id)" in card
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/small-llama" and config["task_type"] == "CAUSAL_LM"
