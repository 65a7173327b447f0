"""The common checks, over the registry."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import yaml
from checks_merge import (
    EXEMPT,
    PARAMETERS,
    assert_same,
    count_of,
    family,
    method_names,
    needs_base,
    run,
    statistics_of,
)
from safetensors.torch import load_file, save_file

import hf_fuse
from hf_fuse import cli, registry
from hf_fuse.errors import FuseError
from hf_fuse.merge.units import takes_base

METHODS = method_names()
every_method = pytest.mark.parametrize("name", METHODS)


def holds(promise: str, name: str, claim) -> None:
    """The claim must hold, or fail for a method that is exempt from the promise."""
    if name not in EXEMPT[promise]:
        claim()
        return
    with pytest.raises(AssertionError):
        claim()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_shapes(name, dtype):
    base, models = family(count_of(name), dtype=dtype)
    merged = run(name, base, models)
    assert merged.keys() == base.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == base[key].dtype and tensor.shape == base[key].shape
    assert torch.equal(merged["position_ids"], base["position_ids"])


@every_method
def test_low_precision_input_is_merged_in_fp32_and_rounded_once(name):
    base, models = family(count_of(name), dtype=torch.bfloat16)
    merged = run(name, base, models)
    wide = run(name, base, models, out_dtype="float32")
    for key, tensor in merged.items():
        if tensor.is_floating_point():
            assert wide[key].dtype == torch.float32
            assert torch.equal(tensor, wide[key].bfloat16()), key


@every_method
def test_fp64_agrees(name):
    base, models = family(count_of(name))
    single = run(name, base, models, out_dtype="float64")
    double = run(name, base, models, dtype="float64", out_dtype="float64")
    assert_same(single, double, exact=False, tolerance=2e-5)


@every_method
def test_inputs_untouched(name):
    base, models = family(count_of(name))
    before = [{key: t.clone() for key, t in state.items()} for state in (base, *models)]
    run(name, base, models)
    for old, new in zip(before, (base, *models)):
        assert_same(old, new)


@every_method
def test_function_leaves_its_arguments_alone(name):
    """The method itself, called as the engine calls it, must not write into the block it is given."""
    method = registry.get("merge", name)
    base, models = family(count_of(name))
    seen = []
    original = method.function

    def spy(block, **options):
        copy = block.clone()
        result = original(block, **options)
        seen.append(torch.equal(copy, block))
        return result

    object.__setattr__(method, "function", spy)
    spy.__signature__ = inspect.signature(original)
    try:
        run(name, base, models)
    finally:
        object.__setattr__(method, "function", original)
    assert seen and all(seen)


@every_method
def test_deterministic_and_independent_of_chunks_and_threads(name):
    base, models = family(count_of(name))
    base["large"] = torch.randn(300_000, generator=torch.Generator().manual_seed(3))
    for k, model in enumerate(models):
        model["large"] = base["large"] + 0.02 * torch.randn(300_000, generator=torch.Generator().manual_seed(4 + k))
    first = run(name, base, models, workers=1)
    assert_same(first, run(name, base, models, workers=1))
    assert_same(first, run(name, base, models, workers=3, chunk_elements=1024 * 5))
    assert_same(first, run(name, base, models, workers=2, chunk_elements=1 << 20))


@every_method
def test_order_of_models(name):
    base, models = family(count_of(name))
    if len(models) < 2:
        return
    if "random" in inspect.signature(registry.get("merge", name).function).parameters:
        pytest.skip("masks belong to a model's position in the recipe; the distribution does not change")
    holds(
        "order", name,
        lambda: assert_same(run(name, base, models), run(name, base, models[::-1]), exact=False, tolerance=1e-6),
    )  # fmt: skip


@every_method
def test_identical_models(name):
    base, (model, *_) = family(1)
    holds(
        "idempotent", name,
        lambda: assert_same(run(name, base, [model] * count_of(name)), model, exact=False, tolerance=1e-5),
    )  # fmt: skip


@every_method
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])
def test_scale_of_the_task_vectors_does_not_matter(name, scale):
    """f(c tau) = c f(tau): no absolute epsilon hides in a method. Powers of two, so rounding is the same."""
    if not needs_base(name):
        pytest.skip("works on weights")
    base, models = family(count_of(name))
    zero = {key: torch.zeros_like(t) for key, t in base.items()}
    deltas = [{key: model[key] - base[key] for key in model} for model in models]
    scaled = [{key: t * scale if t.is_floating_point() else t for key, t in delta.items()} for delta in deltas]
    merged, other = run(name, zero, deltas), run(name, zero, scaled)

    def claim() -> None:
        for key in merged:
            if merged[key].is_floating_point():
                torch.testing.assert_close(merged[key] * scale, other[key], rtol=1e-6, atol=0.0)

    holds("scale", name, claim)


@every_method
def test_zero_task_vectors_give_the_base(name):
    base, _ = family(1)
    merged = run(name, base, [base] * count_of(name), parameters={"scale": 1.0} if name == "passthrough" else {})
    assert_same(merged, base, exact=False, tolerance=1e-6)


@every_method
def test_one_zero_task_vector_is_harmless(name):
    base, models = family(count_of(name))
    merged = run(name, base, [base, *models[1:]])
    assert all(torch.isfinite(t).all() for t in merged.values())


@every_method
def test_number_of_models(name):
    base, models = family(count_of(name) + 1)
    low, high = getattr(registry.get("merge", name).module, "MODELS", (1, None))
    if low == 1:
        run(name, base, models[:1])
    else:
        with pytest.raises(FuseError, match=f"{name} takes"):
            run(name, base, models[:1])
    if high is not None:
        with pytest.raises(FuseError, match=f"{name} takes exactly {high}"):
            run(name, base, models)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_input_is_refused(name, bad):
    base, models = family(count_of(name))
    models[0]["matrix"][3, 7] = bad
    with pytest.raises(FuseError, match=r"models\[0\].*matrix.*1 NaN or infinite"):
        run(name, base, models)
    run(name, base, models, allow_nonfinite=True)


@every_method
def test_streamed_equals_in_memory_from_yaml_and_cli(name, tmp_path, capsys):
    base, models = family(count_of(name), dtype=torch.bfloat16)
    for folder, state in {"base": base, **{f"m{k}": m for k, m in enumerate(models)}}.items():
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    recipe = {"method": name, "models": [{"path": str(tmp_path / f"m{k}")} for k in range(len(models))]}
    for k, (entry, numbers) in enumerate(zip(recipe["models"], statistics_of(name, models) or [])):
        entry["statistics"] = str(tmp_path / f"statistics-{k}.safetensors")
        save_file(numbers, entry["statistics"])
    recipe |= {"base_model": str(tmp_path / "base")} if needs_base(name) else {}
    recipe |= {"parameters": PARAMETERS[name]} if name in PARAMETERS else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.app(["merge", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")], standalone_mode=False)
    assert f"method: {name}" in capsys.readouterr().out
    expected = run(name, base, models)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    again = hf_fuse.merge(recipe, tmp_path / "again", chunk_elements=2048)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@every_method
def test_documented(name):
    method = registry.get("merge", name)
    assert method.summary.endswith(".") and len(method.summary) < 120 and "\n" not in method.summary
    assert hasattr(method.module, "PAPER"), "say PAPER = None and why if there is no paper"
    assert method.paper is None or re.match(r"https://(arxiv\.org/abs|dl\.acm\.org/doi|openreview\.net)/", method.paper)
    text = method.function.__doc__
    assert text and "Args:" in text
    assert method.argument in ("models_KN", "deltas_KN", "vectors_KN") and takes_base(method) in (True, False, None)
    for option in method.options.values():
        assert f"{option.keyword}:" in text, f"{option.keyword} is not documented"


def test_random_methods_follow_the_seed():
    base, models = family(3)
    for name in ("dare_linear", "dare_ties"):
        assert_same(run(name, base, models, seed=1), run(name, base, models, seed=1))
        assert not torch.equal(run(name, base, models, seed=1)["matrix"], run(name, base, models, seed=2)["matrix"])
