"""Transport maps: marginals, limits, the spec's example; fusion of equal and of different widths."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny_models import load_weights, save_weights, seeded

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.align.maps import carried
from hf_fuse.merge.align.spaces import Part
from hf_fuse.merge.align.transport import distance, exact, scaled, sinkhorn, transport_map

from .align_cases import saved, shuffled

pytestmark = pytest.mark.usefixtures("no_charts")


def test_the_spec_s_example():
    """W0 = I, W1 = [[0, 2], [3, 0]]: rows as unit vectors; then the mean of the carried and the other matrix."""
    ours, theirs = torch.eye(2), torch.tensor([[0.0, 2], [3, 0]])
    unit = torch.nn.functional.normalize
    cost = distance(unit(ours) @ unit(theirs).T, 1)
    axes = ((Part("out", 0, 2, False),), ())
    for strength, expected, fused in [
        (None, [[0, 1], [1, 0]], [[0, 1.5], [2, 0]]),
        (0.06, [[0, 1], [1, 0]], [[0, 1.5], [2, 0]]),
        (1.0, [[0.268941, 0.731059], [0.731059, 0.268941]], [[0.134471, 1.365529], [1.865529, 0.134471]]),
    ]:
        found = transport_map(cost, strength)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)
        mean = (carried(ours, axes, {"out": found}) + theirs) / 2
        torch.testing.assert_close(mean, torch.tensor(fused, dtype=torch.float32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (5, 7)])
def test_marginals_of_both_solvers(shape):
    cost = scaled(torch.rand(3, *shape, generator=seeded(0)))
    for plan in (sinkhorn(cost, 0.05), exact(cost)):
        torch.testing.assert_close(plan.sum(-1), torch.full((3, shape[0]), 1 / shape[0]).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(plan.sum(-2), torch.full((3, shape[1]), 1 / shape[1]).double(), atol=1e-6, rtol=0)
    for strength in (None, 0.05, 10.0):
        columns = transport_map(cost, strength).sum(-2)
        torch.testing.assert_close(columns, torch.ones(3, shape[1]), atol=1e-6, rtol=0)


def test_the_exact_plan_is_the_cheapest_and_sinkhorn_goes_to_it():
    cost = torch.rand(9, 9, generator=seeded(1)).double()
    one, other = linear_sum_assignment(cost.numpy())
    plan = exact(cost)
    assert (plan * cost).sum().item() * 9 == pytest.approx(cost[one, other].sum().item())
    assert plan[one, other].tolist() == [1 / 9] * 9 and int((plan > 0).sum()) == 9
    gaps = [((sinkhorn(cost, strength) - plan) * cost).sum().item() for strength in (0.5, 0.1, 0.02)]
    assert gaps[0] > gaps[1] > gaps[2] >= -1e-9 and gaps[2] < 0.01
    wide = torch.rand(6, 4, generator=seeded(2)).double()
    assert (exact(wide) * wide).sum() <= (sinkhorn(wide, 0.02) * wide).sum() + 1e-9


def test_no_cost_and_endless_regularization_mix_everything():
    for cost, strength in [(torch.zeros(4, 6), 0.05), (torch.rand(4, 6, generator=seeded(0)), 1e6)]:
        torch.testing.assert_close(transport_map(cost, strength), torch.full((4, 6), 0.25), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("llama", "exact"), ("gpt2", "exact"), ("bert_classifier", "exact"), ("t5", "exact"), ("vit", "sinkhorn")],
)
def test_a_shuffled_copy_fuses_to_the_model(tmp_path, kind, solver):
    source = saved(kind, tmp_path / "model")
    copy, _ = shuffled(source, tmp_path / "copy")
    recipe = {"method": "optimal_transport", "model": str(copy), "reference": str(source)}
    recipe["parameters"] = {"solver": solver}
    made = hf_fuse.align(recipe, tmp_path / "out")
    assert (made.difference is not None) == (solver == "exact")
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        torch.testing.assert_close(found[name], value, atol=1e-6 if solver == "exact" else 5e-2, rtol=0, msg=name)


def widened(source, folder, order_seed=3):
    """A model of twice the neurons and heads that computes the same: every one twice, read with half the weight."""
    state = load_weights(source)
    config = json.loads((source / "config.json").read_text())
    random = seeded(order_seed)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        twice = torch.randperm(48, generator=random) // 2
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            state[prefix + name] = state[prefix + name][twice]
        state[prefix + "mlp.down_proj.weight"] = state[prefix + "mlp.down_proj.weight"][:, twice] / 2
        groups = torch.randperm(4, generator=random) // 2
        for name, size in (("q", 8), ("k", 4), ("v", 4)):
            rows = (groups[:, None] * size + torch.arange(size)).flatten()
            state[f"{prefix}self_attn.{name}_proj.weight"] = state[f"{prefix}self_attn.{name}_proj.weight"][rows]
        columns = (groups[:, None] * 8 + torch.arange(8)).flatten()
        state[prefix + "self_attn.o_proj.weight"] = state[prefix + "self_attn.o_proj.weight"][:, columns] / 2
    folder.mkdir()
    save_weights(folder, {name: value.contiguous() for name, value in state.items()})
    config |= {"intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_other_widths_is_carried_over_without_loss(tmp_path):
    source = saved("llama", tmp_path / "model")
    wide = widened(source, tmp_path / "wide")
    parameters = {"solver": "exact", "share": 0.0}
    recipe = {"method": "optimal_transport", "model": str(wide), "reference": str(source), "parameters": parameters}
    made = hf_fuse.align(recipe, tmp_path / "out")
    assert made.found.maps["layers.0.inner"].shape == (48, 24)
    assert made.found.maps["layers.1.mixed"].shape == (32, 16)
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def test_what_can_not_be_carried_over_is_told_before_any_work(tmp_path):
    source = saved("qwen3", tmp_path / "model")
    other = saved("llama", tmp_path / "other")
    recipe = {"method": "optimal_transport", "model": str(source), "reference": str(other)}
    with pytest.raises(FuseError, match=r"has a tensor .*k_norm.weight, which .*other lacks"):
        hf_fuse.align(recipe, tmp_path / "out")
    with pytest.raises(FuseError, match="watches the models on data"):
        hf_fuse.align(recipe | {"parameters": {"metric": "activations"}}, tmp_path / "out")
    wide = json.loads((other / "config.json").read_text()) | {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "config.json").write_text(json.dumps(wide))
    save_weights(tmp_path / "third", load_weights(other))
    with pytest.raises(FuseError, match="heads must be equally large"):
        hf_fuse.align(recipe | {"model": str(tmp_path / "third")}, tmp_path / "out")
    with pytest.raises(FuseError, match="more than 8192"):
        exact(torch.zeros(1009, 1013))
    assert not (tmp_path / "out").exists()
