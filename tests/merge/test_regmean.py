"""RegMean, by what its closed form promises."""

import pytest
import torch
from torch import Tensor

from hf_fuse import merge_state_dicts
from hf_fuse.errors import FuseError, RecipeError

OUT, IN, K = 5, 8, 3


def numbers(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(count=K, transposed=False) -> list[dict[str, Tensor]]:
    return [{"w": numbers(OUT, IN, seed=k), "b": numbers(OUT, seed=50 + k)} for k in range(count)]


def gram(inputs_NI: Tensor) -> dict[str, Tensor]:
    return {"w": inputs_NI.T @ inputs_NI / len(inputs_NI)}


def merged(models, grams, **options) -> dict[str, Tensor]:
    return merge_state_dicts(models, "regmean", statistics=grams, dtype="float64", **options)


def mean_of(models, weights=None) -> dict[str, Tensor]:
    return merge_state_dicts(models, "linear", weights=weights, dtype="float64")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equal_grams_give_the_mean(alpha):
    models, one = layers(), gram(numbers(40, IN, seed=9))
    found = merged(models, [one] * K, weights=[1, 2, 3], parameters={"alpha": alpha})
    torch.testing.assert_close(found, mean_of(models, [1, 2, 3]), rtol=1e-9, atol=1e-9)


def test_what_has_no_gram_is_averaged():
    models = layers()
    found = merged(models, [gram(numbers(40, IN, seed=k)) for k in range(K)])
    torch.testing.assert_close(found["b"], mean_of(models)["b"])
    assert (found["w"] - mean_of(models)["w"]).abs().max() > 0.01


def test_experts_on_disjoint_inputs_are_all_reproduced():
    models = layers(2)
    inputs = [torch.zeros(30, IN, dtype=torch.float64) for _ in models]
    inputs[0][:, :4], inputs[1][:, 4:] = numbers(30, 4, seed=1), numbers(30, 4, seed=2)
    found = merged(models, [gram(x) for x in inputs], parameters={"alpha": 1.0, "ridge": 0.0})
    for x, model in zip(inputs, models):
        torch.testing.assert_close(x @ found["w"].T, x @ model["w"].T)


def test_gradient_of_the_objective_is_zero():
    models, weights = layers(), torch.tensor([1.0, 2.0, 5.0])
    inputs = [numbers(40, IN, seed=20 + k) for k in range(K)]
    found = merged(models, [gram(x) for x in inputs], weights=weights.tolist(), parameters={"alpha": 1.0, "ridge": 0.0})
    matrix = found["w"].requires_grad_()
    loss = sum(w * (x @ matrix.T - x @ m["w"].T).square().sum() for w, x, m in zip(weights, inputs, models))
    loss.backward()
    assert matrix.grad.abs().max() < 1e-9
    elsewhere = mean_of(models)["w"].requires_grad_()
    sum(w * (x @ elsewhere.T - x @ m["w"].T).square().sum() for w, x, m in zip(weights, inputs, models)).backward()
    assert elsewhere.grad.abs().max() > 1


def test_alpha_scales_what_is_off_the_diagonal():
    models, grams = layers(2), [gram(numbers(40, IN, seed=k)) for k in (1, 2)]
    by_hand = [0.4 * g["w"] + 0.6 * torch.diag(g["w"].diagonal()) for g in grams]
    right = sum(g @ model["w"].T for g, model in zip(by_hand, models))
    expected = torch.linalg.solve(sum(by_hand), right).T
    found = merged(models, grams, parameters={"alpha": 0.4, "ridge": 0.0})["w"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_common_factor_of_all_grams_does_not_matter_but_one_models_own_does():
    models, grams = layers(2), [gram(numbers(40, IN, seed=k)) for k in (1, 2)]
    first = merged(models, grams)["w"]
    torch.testing.assert_close(first, merged(models, [{"w": g["w"] * 1e6} for g in grams])["w"], rtol=1e-9, atol=1e-9)
    heavier = merged(models, [{"w": grams[0]["w"] * 1e6}, grams[1]])["w"]
    torch.testing.assert_close(heavier, models[0]["w"], rtol=1e-3, atol=1e-3)


def test_inputs_that_are_always_zero_get_the_mean():
    models = layers(2)
    inputs = [numbers(40, IN, seed=k) for k in (1, 2)]
    for x in inputs:
        x[:, 3] = 0
    for alpha in (1.0, 0.9):
        found = merged(models, [gram(x) for x in inputs], parameters={"alpha": alpha, "ridge": 1e-4})["w"]
        torch.testing.assert_close(found[:, 3], mean_of(models)["w"][:, 3])
        assert (found[:, 2] - mean_of(models)["w"][:, 2]).abs().max() > 1e-3


def test_fewer_inputs_than_columns():
    models, grams = layers(2), [gram(numbers(2, IN, seed=k)) for k in (1, 2)]
    with pytest.raises(FuseError, match="Raise ridge"):
        merged(models, grams, parameters={"alpha": 1.0, "ridge": 0.0})
    for alpha in (0.9, 1.0):
        assert merged(models, grams, parameters={"alpha": alpha})["w"].isfinite().all()


def test_no_inputs_at_all_give_the_mean():
    models, nothing = layers(2), {"w": torch.zeros(IN, IN)}
    torch.testing.assert_close(merged(models, [nothing] * 2), mean_of(models))


def test_grams_in_bfloat16_are_read_in_the_working_precision():
    models, grams = layers(2), [{"w": gram(numbers(40, IN, seed=k))["w"].bfloat16()} for k in (1, 2)]
    wide = [{"w": g["w"].double()} for g in grams]
    assert torch.equal(merged(models, grams)["w"], merged(models, wide)["w"])


def test_weights_that_make_no_average_are_refused():
    with pytest.raises(RecipeError, match="at least 0"):
        merged(layers(2), [gram(numbers(40, IN))] * 2, weights=[1, -1])
