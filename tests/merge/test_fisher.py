"""Fisher merging, by the properties that its formula has."""

import pytest
import torch
from checks_merge import family

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError


def merged(models, fishers, **options):
    return merge_state_dicts(models, "fisher", statistics=fishers, **options)


def states(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def random_fishers(count, seed=0, size=3.0):
    _, models = family(count, seed=seed + 10)
    return [{name: t.exp() * size for name, t in state.items() if t.is_floating_point()} for state in models]


def test_each_weight_is_averaged_by_its_own_fisher():
    found = merged(states([0.0, 8.0], [4.0, 0.0]), states([1.0, 3.0], [3.0, 1.0]), parameters={"normalize": False})
    assert found["w"].tolist() == [3.0, 6.0]


def test_weights_multiply_the_fisher():
    found = merged(states([0.0], [4.0]), states([1.0], [1.0]), weights=[1, 3], parameters={"normalize": False})
    assert found["w"].tolist() == [3.0]


def test_normalisation_takes_the_length_over_the_whole_model():
    models = [
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
    ]
    fishers = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([5.0]), "b": torch.tensor([12.0])},
    ]
    found = merged(models, fishers)  # lengths 5 and 13
    assert found["a"].item() == pytest.approx((5 / 13) / (3 / 5 + 5 / 13))
    assert found["b"].item() == pytest.approx((12 / 13) / (4 / 5 + 12 / 13))


def test_equal_fishers_give_the_weighted_mean():
    _, models = family(3)
    fisher = random_fishers(1)[0]
    found = merged(models, [fisher] * 3, weights=[1, 2, 3])
    mean = merge_state_dicts(models, "linear", weights=[1, 2, 3])
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_a_common_factor_does_not_matter(factor):
    _, models = family(3)
    fishers = random_fishers(3)
    scaled = [{name: t * factor for name, t in fisher.items()} for fisher in fishers]
    for normalize in (True, False):
        options = {"parameters": {"normalize": normalize, "floor": 0.0}}
        torch.testing.assert_close(
            merged(models, fishers, **options), merged(models, scaled, **options), rtol=1e-5, atol=1e-6
        )


def test_normalised_even_one_models_own_factor_does_not_matter():
    _, models = family(2)
    one, other = random_fishers(2)
    larger = {name: t * 1000 for name, t in other.items()}
    torch.testing.assert_close(merged(models, [one, other]), merged(models, [one, larger]), rtol=1e-4, atol=1e-5)


def test_far_larger_fisher_wins():
    _, models = family(2)
    fishers = random_fishers(2)
    fishers[0] = {name: t * 1e7 for name, t in fishers[0].items()}
    found = merged(models, fishers, parameters={"normalize": False})
    torch.testing.assert_close(found, models[0], rtol=1e-4, atol=1e-4)


def test_no_fisher_anywhere_gives_the_mean_with_and_without_floor():
    _, models = family(2)
    nothing = [{name: torch.zeros_like(t) for name, t in state.items() if t.is_floating_point()} for state in models]
    mean = merge_state_dicts(models, "linear", weights=[1, 3])
    for floor in (1e-6, 0.0):
        for normalize in (True, False):
            found = merged(models, nothing, weights=[1, 3], parameters={"floor": floor, "normalize": normalize})
            torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)


def test_floor_holds_for_the_raw_fisher_of_every_model():
    found = merged(
        states([0.0, 0.0], [4.0, 4.0]), states([0.0, 3.0], [0.5, 4.0]), parameters={"floor": 1.0, "normalize": False}
    )
    assert found["w"].tolist() == [2.0, pytest.approx(16 / 7)]


def test_floor_does_not_make_a_model_that_is_sure_of_everything_win():
    sure, unsure = torch.tensor([1e-4, 1e-8, 1e-8, 0.0]), torch.tensor([1e2, 1e-1, 1e-1, 0.0])
    found = merged(states([0.0] * 4, [1.0] * 4), [{"w": sure}, {"w": unsure}])["w"]
    assert found[0] == pytest.approx(0.5, abs=1e-4)
    assert found[1:3].tolist() == pytest.approx([10 / 11] * 2, abs=1e-3)  # shares 1e-4 and 1e-3 of the largest
    assert found[3] == pytest.approx(0.5)


def test_one_model_of_weight_zero_and_no_donor_fisher_is_no_nan():
    found = merged(states([1.0], [5.0]), states([1.0], [0.0]), weights=[0, 1], parameters={"floor": 0.0})
    assert found["w"].tolist() == [5.0]


@pytest.mark.parametrize("weights", [[-1, 2], [0, 0]])
def test_weights_that_make_no_average_are_refused(weights):
    with pytest.raises(RecipeError, match="at least 0, and one above 0"):
        merged(states([1.0], [5.0]), states([1.0], [1.0]), weights=weights)
