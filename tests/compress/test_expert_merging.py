"""Merging experts: exact where experts repeat each other, and the spec's small numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_experts import EXPERTS, MODELS, logits_of, new_experts, save_experts, stock, write_text
from tiny_models import load_weights

import hf_fuse
from hf_fuse.compress.grouped_experts import expert_blocks
from hf_fuse.compress.methods.expert_merging import (
    NEURON_AXIS,
    group_experts,
    measure_routing,
    neuron_order,
    stored_experts,
)  # fmt: skip
from hf_fuse.compress.recipe import load_compress_recipe
from hf_fuse.compress.subject import open_subject
from hf_fuse.errors import FuseError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def _recipe(folder: Path, text: Path, **parameters) -> dict:
    calibration = {"path": str(text), "sequences": 4, "length": 32}
    return {"method": "expert_merging", "model": str(folder), "calibration": calibration, "parameters": parameters}


def _make_equal(model: t.PreTrainedModel, shuffled: bool) -> None:
    """All experts of a layer become expert 0, with their neurons in another order if ``shuffled``."""
    for block in expert_blocks(model).values():
        for index in range(1, EXPERTS):
            order = slice(None)
            if isinstance(block.experts, torch.nn.ModuleDict):
                first, other = block.experts["expert_0"], block.experts[f"expert_{index}"]
                if shuffled:
                    order = torch.randperm(first.wi.weight.shape[0])
                other.wi.weight.data = first.wi.weight.data[order].clone()
                other.wo.weight.data = first.wo.weight.data[:, order].clone()
                continue
            gate, up = block.experts.gate_up_proj.data[0].chunk(2)
            if shuffled:
                order = torch.randperm(len(gate))
            block.experts.gate_up_proj.data[index] = torch.cat([gate[order], up[order]])
            block.experts.down_proj.data[index] = block.experts.down_proj.data[0][:, order]


@pytest.mark.parametrize("kind", MODELS)
def test_equal_experts_in_any_neuron_order_merge_without_loss(text, tmp_path, kind):
    model = new_experts(kind)
    _make_equal(model, shuffled=False)
    before = logits_of(model)
    _make_equal(model, shuffled=True)
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    made = hf_fuse.compress(_recipe(save_experts(model, tmp_path / "model"), text, groups=1), tmp_path / "out")
    for load in (stock, hf_fuse.load_compressed):
        torch.testing.assert_close(logits_of(load(made.output).eval()), before, atol=1e-4, rtol=1e-4)
    unaligned = hf_fuse.compress(_recipe(tmp_path / "model", text, groups=1, align=False), tmp_path / "unaligned")
    assert not torch.allclose(logits_of(stock(unaligned.output)), before, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_groups_are_stored_for_stock_loaders_and_kept_once_by_ours(text, tmp_path, kind):
    model = new_experts(kind)
    source = save_experts(model, tmp_path / "model")
    made = hf_fuse.compress(_recipe(source, text, groups=2, align=False), tmp_path / "out")
    before, after = load_weights(source), load_weights(tmp_path / "out")
    subject = open_subject(load_compress_recipe(_recipe(source, text, groups=2)))
    stored = stored_experts(subject)
    assert sum(len(set(became)) for became in made.facts["groups"].values()) == 4
    for layer, became in made.facts["groups"].items():
        usage = made.facts["usage"][layer]
        for leader in set(became):
            members = [index for index in range(EXPERTS) if became[index] == leader]
            total = sum(usage[member] for member in members)
            for matrix, name in stored[layer][leader].items():
                mean = sum(usage[m] * before[stored[layer][m][matrix]] for m in members) / total if total else None
                expected = before[name] if mean is None or len(members) == 1 else mean
                for member in members:
                    torch.testing.assert_close(after[stored[layer][member][matrix]], expected)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".experts." in name for name in changed)
    light, whole = hf_fuse.load_compressed(made.output).eval(), stock(made.output)
    torch.testing.assert_close(logits_of(light), logits_of(whole), atol=1e-5, rtol=1e-5)
    per_expert = sum(before[name].numel() for name in next(iter(stored.values()))[0].values())
    saved = made.before["parameters"] - made.after["parameters"]
    assert saved == per_expert * (len(stored) * EXPERTS - 4)
    assert json.loads((made.output / "config.json").read_text())["expert_groups"] == made.facts["groups"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen_moe"])
def test_usage_and_similarity_are_those_of_the_routers_logits(text, tmp_path, kind):
    subject = open_subject(
        load_compress_recipe(_recipe(save_experts(new_experts(kind), tmp_path / "model"), text, groups=1))
    )
    found = list(measure_routing(subject).values())
    all_logits: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for ids in subject.calibration:
            for layer, logits in enumerate(subject.model(ids, output_router_logits=True).router_logits):
                all_logits[layer].append(logits.reshape(-1, EXPERTS).double())
    for routing, parts in zip(found, all_logits):
        logits_TE = torch.cat(parts)
        counts = torch.nn.functional.one_hot(logits_TE.topk(2).indices, EXPERTS).sum((0, 1))
        torch.testing.assert_close(routing.usage_E, counts / counts.sum(), check_dtype=False)
        for i in range(EXPERTS):
            for j in range(EXPERTS):
                cosine = torch.cosine_similarity(logits_TE[:, i], logits_TE[:, j], dim=0)
                assert float(routing.similarity_EE[i, j]) == pytest.approx(float(1 + cosine) / 2, abs=1e-6)


def test_leaders_are_the_most_used_of_all_layers_but_each_layer_has_one():
    usage = {"a": torch.tensor([0.4, 0.3, 0.2, 0.1]), "b": torch.tensor([0.97, 0.01, 0.01, 0.01])}
    alike = torch.eye(4) + 0.1
    alike[3, 1] = alike[1, 3] = 0.9
    groups = group_experts(usage, {"a": alike, "b": alike}, 4)
    assert groups == {"a": [0, 1, 2, 1], "b": [0, 0, 0, 0]}
    assert group_experts(usage, {"a": alike, "b": alike}, 8) == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


def test_the_spec_s_numbers():
    """Experts [1,0], [0,1], [2,2] used .5, .3, .2; groups {0, 2} and {1}."""
    from hf_fuse.compress.methods.expert_merging import _mean

    rows = {"e0": torch.tensor([[1.0, 0]]), "e1": torch.tensor([[0, 1.0]]), "e2": torch.tensor([[2.0, 2]])}
    names = {index: {"wi": f"e{index}"} for index in range(3)}
    merged = _mean(names, "wi", {0: 0.5 / 0.7, 2: 0.2 / 0.7}, {}, rows.__getitem__)
    torch.testing.assert_close(merged, torch.tensor([[1.285714, 0.571428]]), atol=1e-5, rtol=0)


def test_neuron_order_is_found_again():
    torch.manual_seed(0)
    expert = {"w1": torch.randn(9, 5), "w3": torch.randn(9, 5), "w2": torch.randn(5, 9)}
    order = torch.randperm(9)
    shuffled = {name: value.index_select(NEURON_AXIS[name], order) for name, value in expert.items()}
    found = neuron_order(expert, shuffled)
    for name, value in shuffled.items():
        assert torch.equal(value.index_select(NEURON_AXIS[name], found), expert[name])


@pytest.mark.parametrize("parameters", [{"groups": 5}, {"groups": 0}, {}])
def test_impossible_numbers_of_groups_are_refused(text, tmp_path, parameters):
    source = save_experts(new_experts("mixtral"), tmp_path / "model")
    with pytest.raises(FuseError, match="groups"):
        hf_fuse.compress(_recipe(source, text, **parameters), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused(text, tmp_path, tiny_family):
    source = tiny_family("plain").base
    with pytest.raises(FuseError, match="has no experts"):
        hf_fuse.compress(_recipe(source, text, groups=1), tmp_path / "out")
