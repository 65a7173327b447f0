"""breadcrumbs, breadcrumbs_ties and magnitude, which share the trimming step."""

import pytest
import torch

from hf_fuse import merge_state_dicts


def merge(method, *deltas, weights=None, **parameters):
    deltas = [torch.as_tensor(d, dtype=torch.float32) for d in deltas]
    base = {"w": torch.zeros_like(deltas[0])}
    if method != "magnitude":
        parameters = {"lambda": 1.0} | parameters
    return merge_state_dicts([{"w": d} for d in deltas], method, base=base, weights=weights, parameters=parameters)["w"]


@pytest.mark.parametrize(
    "row, density, gamma, expected",
    [
        ([4, -3, 2, 1], 0.5, 0.25, [0, -3, 2, 0]),
        ([1, -8, 0.5, 6], 0.5, 0.25, [1, 0, 0, 6]),
        (list(range(1, 11)), 0.5, 0.1, [0, 0, 0, 0, 5, 6, 7, 8, 9, 0]),
    ],
)
def test_worked_examples(row, density, gamma, expected):
    assert merge("breadcrumbs", row, density=density, gamma=gamma).tolist() == expected


def test_defaults_are_the_authors_example():
    merged = merge_state_dicts([{"w": torch.arange(1.0, 101)}], "breadcrumbs", base={"w": torch.zeros(100)})["w"]
    expected = torch.zeros(100)
    expected[70:90] = 0.4 * torch.arange(71.0, 91)  # 10 largest out, the next 20 kept
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("size", [1, 3, 64, 200])
def test_never_empty(size):
    """Few elements, or no outlier to remove: the references then lose the whole tensor."""
    tau = torch.randn(size, generator=torch.Generator().manual_seed(size))
    for gamma in (0.0, 0.01, 1.0):
        kept = (merge("breadcrumbs", tau, density=0.1, gamma=gamma) != 0).sum()
        assert kept == (1 if gamma == 1 else max(1, int(0.1 * size)))


def test_equal_magnitudes_are_all_kept():
    tau = torch.tensor([0.5, -0.5] * 50)
    assert torch.equal(merge("breadcrumbs", tau, density=0.2, gamma=0.1), tau)


def test_gamma_or_density_gives_way():
    row = list(range(1, 11))
    assert merge("breadcrumbs", row, density=0.8, gamma=0.4).tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0, 0]
    kept = merge("breadcrumbs", row, density=0.8, gamma=0.4, precedence="density")
    assert kept.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert merge("breadcrumbs", row, density=1, gamma=0.4, precedence="density").tolist() == row


def test_density_zero_keeps_nothing():
    assert not merge("breadcrumbs", [1, 2, 3], density=0).any()
    assert not merge("magnitude", [1, 2, 3], density=0).any()


def test_weights():
    taus = torch.tensor([[4.0, 1, 3, 2], [1.0, 2, 3, 4]])
    merged = merge("breadcrumbs", *taus, weights=[2.0, 1.0], density=0.5, gamma=0.25)
    # 4 is out of the first, 3 and 2 stay; 4 is out of the second, 3 and 2 stay.
    assert merged.tolist() == [0, 2, 9, 4]
    assert merge("breadcrumbs", *taus, weights=[2.0, 1.0], density=0.5, gamma=0.25, normalize=True).tolist() == (
        pytest.approx([0, 2 / 3, 3, 4 / 3])
    )


@pytest.mark.parametrize("method", ["breadcrumbs", "magnitude"])
def test_scope_against_a_flat_sort(method):
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(3000, generator=generator), "b": 5 * torch.randn(50, 40, generator=generator)}
    base = {name: torch.zeros_like(t) for name, t in state.items()}
    gamma = {} if method == "magnitude" else {"gamma": 0.02, "lambda": 1.0}
    for scope in ("tensor", "model"):
        merged = merge_state_dicts([state], method, base=base, parameters={"density": 0.3, "scope": scope} | gamma)
        groups = [["a"], ["b"]] if scope == "tensor" else [["a", "b"]]
        for group in groups:
            flat = torch.cat([state[name].flatten() for name in group])
            top = int(gamma.get("gamma", 0) * flat.numel())
            kept = flat.abs().argsort(descending=True)[top : top + int(0.3 * flat.numel())]
            expected = torch.zeros_like(flat)
            expected[kept] = flat[kept]
            assert torch.equal(torch.cat([merged[name].flatten() for name in group]), expected)


def test_election():
    taus = [3.0, -1, 2, 5], [-1.0, -2, 2, -5]
    assert merge("breadcrumbs_ties", *taus, density=1, gamma=0).tolist() == [3, -3, 4, 5]
    assert merge("breadcrumbs_ties", *taus, density=1, gamma=0, normalize=True).tolist() == [3, -1.5, 2, 5]
    # Of each, the largest is out and the next two are kept.
    assert merge("breadcrumbs_ties", *taus, density=0.5, gamma=0.25).tolist() == [3, -2, 4, 0]


def test_magnitude_keeps_the_largest():
    taus = [4.0, -3, 0.5, 1], [1.0, 2, -3, 0]
    assert merge("magnitude", *taus, density=0.5).tolist() == [4, -1, -3, 0]
    half = merge("magnitude", *taus, density=0.5, weights=[1.0, 3.0], normalize=True, **{"lambda": 2.0})
    assert half.tolist() == [2, 1.5, -4.5, 0]
