import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods import _threshold

TAU = ([4, -3, 0.5, 1, -0.1], [-2, -5, 2.5, -1, 0.2], [1, 6, 3, 0, -0.3])


def ties(*deltas, weights=None, **parameters):
    deltas = [torch.tensor(d, dtype=torch.float32) for d in deltas]
    base = {"w": torch.zeros_like(deltas[0])}
    return merge_state_dicts([{"w": d} for d in deltas], "ties", base=base, weights=weights, parameters=parameters)["w"]


@pytest.mark.parametrize(
    "density, expected", [(0.2, [4, -4, 2.75, 0, 0]), (0.4, [2.5, -4, 2.75, 1, 0]), (0.6, [2.5, -4, 2, -1, -0.3])]
)
def test_worked_examples_of_the_authors_code(density, expected):
    assert ties(*TAU, density=density).tolist() == pytest.approx(expected)


def test_exact_count_within_a_tensor_and_positive_ties():
    merged = ties(*TAU, density=0.4, trim="exact", scope="tensor", tie="positive")
    assert merged.tolist() == pytest.approx([4, -4, 2.75, 0, 0])


def test_tie_rules():
    assert ties([1, -2], [-1, -3], density=1).tolist() == [-1, -2.5]
    assert ties([1, -2], [-1, -3], density=1, tie="positive").tolist() == [1, -2.5]


def test_weights_vote_and_divide():
    # 0.25 * 4 = 1 outvotes 0.5 * -1; the agreeing weight 0.25 is the denominator, so the value keeps its size.
    assert ties([4.0], [-1.0], weights=[0.25, 0.5], density=1).tolist() == [4.0]
    assert ties([4.0], [-1.0], weights=[0.25, 0.5], density=1, normalize=False).tolist() == [1.0]


def family(sizes, count=3):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(n, generator=generator).bfloat16() for name, n in sizes.items()}
    models = [
        {
            name: (t.float() + 0.02 * (k + 1) * torch.randn(t.shape, generator=generator)).bfloat16()
            for name, t in base.items()
        }
        for k in range(count)
    ]
    return base, models


def reference(base, models, density):
    """The authors' procedure on one flat vector per model."""
    tau = torch.stack([torch.cat([model[name].float() - base[name].float() for name in base]) for model in models])
    count = tau.shape[1]
    threshold = tau.abs().kthvalue(count - int(count * density), dim=1, keepdim=True).values
    tau = torch.where(tau.abs() >= threshold, tau, 0.0)
    sign = tau.sum(0).sign()
    sign[sign == 0] = 1.0 if sign.sum() > 0 else -1.0
    agree = tau * sign > 0
    return (tau * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.03, 0.2, 0.9])
def test_global_trim_of_a_large_model_is_exact(density, monkeypatch):
    """Large enough for the sampled passes, with several tensors, against one flat vector."""
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 100_000)
    base, models = family({"a": 400_000, "b": 250_001, "c": 77})
    merged = merge_state_dicts(models, "ties", base=base, parameters={"density": density}, out_dtype="float32")
    found = torch.cat([merged[name] - base[name].float() for name in base])
    assert (found - reference(base, models, density)).abs().max() < 5e-7


def test_a_sample_that_misleads_costs_time_only(monkeypatch):
    """The first elements of each block, which are the sample, are tiny; all the rest is large."""
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 100_000)
    values = 1 + torch.arange(2 << 17) * 1e-3
    values[: (1 << 18) // 8] = 1e-6
    base, model = {"w": torch.zeros(2 << 17)}, {"w": values}
    merged = merge_state_dicts([model], "ties", base=base, parameters={"density": 0.3, "trim": "exact"})["w"]
    expected = model["w"].topk(int(0.3 * (2 << 17))).values.min()
    kept = merged[merged != 0]
    assert kept.numel() == int(0.3 * (2 << 17)) and kept.min() == expected


def test_scope_tensor_trims_each_tensor():
    base, models = family({"a": 1000, "b": 1000}, count=1)
    models[0]["b"] = base["b"] + 100 * (models[0]["b"] - base["b"])
    both = {"density": 0.5, "trim": "exact"}
    whole = merge_state_dicts(models, "ties", base=base, parameters=both, out_dtype="float32")
    apart = merge_state_dicts(models, "ties", base=base, parameters=both | {"scope": "tensor"}, out_dtype="float32")
    changed = [(m["a"] != base["a"].float()).sum().item() for m in (whole, apart)]
    assert changed[0] < 200 and 450 <= changed[1] <= 550


def test_all_zero_task_vector_and_more_models():
    assert ties([0, 0, 0], [1, -2, 3], density=0.5).tolist() == [0, -2, 3]


def test_density_per_model_and_gradients():
    assert ties([4, 1], [4, 1], density=1).tolist() == [4, 1]
    base = {f"layers.{i}.w": torch.zeros(4) for i in range(3)}
    model = {name: torch.tensor([4.0, 3.0, 2.0, 1.0]) for name in base}
    merged = merge_state_dicts(
        [model], "ties", base=base, parameters={"density": [0.25, 0.75], "scope": "tensor", "trim": "exact"}
    )
    assert [(merged[f"layers.{i}.w"] != 0).sum().item() for i in range(3)] == [1, 2, 3]
    with pytest.raises(RecipeError, match="density differs between tensors.*scope: tensor"):
        merge_state_dicts([model], "ties", base=base, parameters={"density": [0.25, 0.75]})


def test_density_zero_keeps_nothing():
    assert ties([3.0, 1.0], [1.0, 2.0], density=[{"value": 0}]).tolist() == [0.0, 0.0]


def test_fewer_elements_than_one_over_density():
    assert ties([3.0, 1.0], density=0.01, trim="exact").tolist() == [3.0, 0.0]


def test_fp64():
    torch.manual_seed(0)
    base, models = {"w": torch.zeros(5000, dtype=torch.float64)}, [{"w": torch.randn(5000, dtype=torch.float64)}]
    merged = merge_state_dicts(models, "ties", base=base, parameters={"trim": "exact"}, dtype="float64")["w"]
    assert (merged != 0).sum() == 1000 and merged[merged != 0].abs().min() == models[0]["w"].abs().topk(
        1000
    ).values.min()


def test_few_distinct_values_are_found_by_samples_and_checked(monkeypatch):
    """Differences of bf16 models: one pass checks the guess and holds the vote. A wrong guess is replaced."""
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 100_000)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(900_000)}
    models = [{"w": torch.randint(-4, 5, (900_000,), generator=generator) / 8} for _ in range(3)]
    found = merge_state_dicts(models, "ties", base=base, parameters={"density": 0.3})["w"]
    assert (found - reference(base, models, 0.3)).abs().max() < 1e-6
    from hf_fuse.merge.methods import ties as module

    def wrong(*arguments):
        return [0.125] * 3
        yield

    monkeypatch.setattr(module, "guess_kth_largest_magnitude", wrong)
    again = merge_state_dicts(models, "ties", base=base, parameters={"density": 0.3})["w"]
    assert torch.equal(again, found)
