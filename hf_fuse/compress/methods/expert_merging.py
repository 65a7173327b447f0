"""M-SMoE: experts of a mixture that are routed alike become one, weighted by how often they are used.

The most used experts of the whole model lead a group each, every other one joins the leader of its layer with the most
similar router logits, and a group's weights are the usage-weighted mean after its neurons are matched to the leader's.
The router stays as it is: every old number finds its group's weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from hf_fuse.checkpoint.reader import FilePool
from hf_fuse.compress.edit import Edit, Read, read_tensor
from hf_fuse.compress.grouped_experts import GROUPS_KEY, expert_blocks, layer_key, router_of
from hf_fuse.compress.subject import Subject
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.registry import Between

PAPER = "2310.01334"
NEEDS_TEXT = True
_EXPERT = re.compile(r".*\.experts\.(?:expert_)?(\d+)\.(\w+)\.weight")
# Which axis of a matrix counts the expert's neurons.
NEURON_AXIS = {"w1": 0, "w3": 0, "gate_proj": 0, "up_proj": 0, "wi": 0, "w2": 1, "down_proj": 1, "wo": 1}

Names = dict[int, dict[str, str]]  # expert -> matrix -> stored name


@dataclass
class Routing:
    """What the router of one layer did with the calibration text."""

    counts_E: Tensor  # tokens that chose each expert
    gram_EE: Tensor  # sum over tokens of the products of two experts' logits

    @property
    def usage_E(self) -> Tensor:
        return self.counts_E / self.counts_E.sum()

    @property
    def similarity_EE(self) -> Tensor:
        """Cosine of two experts' logits over all tokens, mapped to [0, 1]."""
        length_E = self.gram_EE.diagonal().sqrt().clamp_min(1e-30)
        return (1 + self.gram_EE / (length_E[:, None] * length_E)) / 2


def expert_merging(
    subject: Subject,
    *,
    groups: Annotated[float, Between(1)],
    weighting: Literal["usage", "uniform"] = "usage",
    align: bool = True,
) -> Edit:
    """Merges the experts of Mixtral-, Qwen-MoE- and Switch-like models. No training.

    Stored are all experts, equal within a group, as stock loaders need them; ``config.json`` lists the groups, and
    :func:`hf_fuse.load_compressed` keeps each group once. The paper trains the merged model with the old one as its
    teacher afterwards; that is a run of distillation of its own. :mod:`low_rank_experts` is the paper's second stage.

    Args:
        groups: mean number of groups per layer; layers where use is spread more evenly get more of them.
        weighting: of the experts in a group. Groups that no token chose keep their leader's weights.
        align: match each expert's neurons to its leader's before the mean (the authors' code does not for Mixtral).

    Raises:
        FuseError: the model has no experts, or they are stored in a way that is not known here.
        RecipeError: more groups than experts.
    """
    stored = stored_experts(subject)
    measured = measure_routing(subject)
    if set(measured) != set(stored):
        raise FuseError(f"{subject.candidate.name}: routers and stored experts are not in the same layers.")
    counts = {layer: len(routing.counts_E) for layer, routing in measured.items()}
    if groups > (most := sum(counts.values()) / len(counts)):
        raise RecipeError(f"parameters: groups is {groups:g}, but the layers have {most:g} experts on average.")
    usage = {layer: routing.usage_E for layer, routing in measured.items()}
    similarity = {layer: routing.similarity_EE for layer, routing in measured.items()}
    became = group_experts(usage, similarity, round(groups * len(usage)))
    edit = Edit(
        config={GROUPS_KEY: became},
        summary=f"Merged {sum(counts.values())} experts into {sum(len(set(one)) for one in became.values())}.",
        facts={"usage": {layer: values.tolist() for layer, values in usage.items()}, "groups": became},
        chart=partial(_draw, usage, became),
    )
    for layer, leaders in tqdm(became.items(), desc="merge", unit="layer", disable=None):
        weights_E = usage[layer] if weighting == "usage" else torch.ones_like(usage[layer])
        edit.tensors |= _merged(subject, stored[layer], leaders, weights_E, align)
    return edit


def stored_experts(subject: Subject) -> dict[str, Names]:
    """Layer -> names of its experts' matrices."""
    found: dict[str, Names] = {}
    for name in subject.checkpoint.tensors:
        if ".experts." not in name:
            continue
        match = _EXPERT.fullmatch(name)
        if not match or match[2] not in NEURON_AXIS:
            raise FuseError(
                f"{subject.candidate.name}: {name} is not one matrix of one expert, as stored by Mixtral, Qwen-MoE and "
                "Switch models. Experts in other layouts can't be merged here."
            )
        found.setdefault(layer_key(name), {}).setdefault(int(match[1]), {})[match[2]] = name
    if not found:
        raise FuseError(f"{subject.candidate.name}: has no experts to merge.")
    return found


@torch.no_grad()
def measure_routing(subject: Subject) -> dict[str, Routing]:
    """Runs the calibration text and watches the routers. No sequence is padded, so every token counts."""
    blocks, found = expert_blocks(subject.model), {}
    config = subject.candidate.config.get_text_config()
    chosen_of_each = getattr(config, "num_experts_per_tok", 1)  # Switch has no such setting: it chooses one

    def watch(layer: str, output: Any) -> None:
        logits_TE = _logits(output).flatten(0, -2).double().cpu()
        experts = logits_TE.shape[1]
        chosen_N = logits_TE.topk(chosen_of_each).indices.flatten()
        counts_E = torch.bincount(chosen_N, minlength=experts).double()
        seen = found.setdefault(layer, Routing(torch.zeros(experts).double(), torch.zeros(experts, experts).double()))
        seen.counts_E += counts_E
        seen.gram_EE += logits_TE.T @ logits_TE

    handles = [
        router_of(block).register_forward_hook(lambda _, __, output, layer=layer: watch(layer, output))
        for layer, block in blocks.items()
    ]
    try:
        for ids_1T in tqdm(subject.calibration, desc="routing", unit="sequence", disable=None):
            subject.run(subject.model, ids_1T)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _logits(output: Any) -> Tensor:
    """A router returns logits, or a tuple in which they are the floating tensor with a number for every expert.

    Switch's comes last, after a mask and one probability per token; the others' first, before the chosen ones' weights.
    """
    if isinstance(output, Tensor):
        return output
    found = [value for value in output if value.is_floating_point()]
    return found[0] if output[0].is_floating_point() else found[-1]


def group_experts(usage: dict[str, Tensor], similarity: dict[str, Tensor], budget: int) -> dict[str, list[int]]:
    """Layer -> for each expert the number of its group's leader.

    The ``budget`` most used experts of all layers lead; the most used of each layer always does. Ties go to the lower
    layer and number.
    """
    order = {layer: place for place, layer in enumerate(usage)}
    ranked = []
    for layer, usage_E in usage.items():
        first = int(usage_E.argmax())
        ranked += [(index != first, -float(share), order[layer], index) for index, share in enumerate(usage_E)]
    leaders: dict[str, list[int]] = {layer: [] for layer in usage}
    layers = list(usage)
    for _, _, place, index in sorted(ranked)[:budget]:
        leaders[layers[place]].append(index)
    return {
        layer: [
            index
            if index in leaders[layer]
            else max(sorted(leaders[layer]), key=lambda one: float(alike_EE[index, one]))
            for index in range(len(alike_EE))
        ]
        for layer, alike_EE in similarity.items()
    }


def _merged(
    subject: Subject, names: Names, leaders: list[int], weights_E: Tensor, align: bool
) -> dict[str, Callable[[Read], Tensor]]:
    """Stored name -> how to make it, for all matrices of groups of more than one."""
    found = {}
    for leader in sorted(set(leaders)):
        members = [index for index, one in enumerate(leaders) if one == leader]
        total = float(sum(weights_E[member] for member in members))
        if len(members) == 1:
            continue
        if total:
            shares = {member: float(weights_E[member]) / total for member in members if weights_E[member]}
        else:  # nobody came here
            shares = {leader: 1.0}
        orders = _orders(subject, names, leader, list(shares)) if align else {}
        for member in members:
            for matrix, name in names[member].items():
                found[name] = partial(_mean, names, matrix, shares, orders)
    return found


def _mean(names: Names, matrix: str, shares: dict[int, float], orders: dict[int, Tensor], read: Read) -> Tensor:
    total = 0
    for member, share in shares.items():
        values = read(names[member][matrix])
        if member in orders:
            values = values.index_select(NEURON_AXIS[matrix], orders[member])
        total = total + share * values
    return total


def _orders(subject: Subject, names: Names, leader: int, members: list[int]) -> dict[int, Tensor]:
    """For each member the order of its neurons that fits the leader's best."""
    pool = FilePool()

    def matrices(expert: int) -> dict[str, Tensor]:
        return {matrix: read_tensor(subject.checkpoint.tensors[name], pool) for matrix, name in names[expert].items()}

    try:
        reference = matrices(leader)
        return {member: neuron_order(reference, matrices(member)) for member in members if member != leader}
    finally:
        pool.close()


def neuron_order(reference: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """Order of ``other``'s neurons ``[I]`` with the largest inner product of all its matrices with ``reference``'s."""
    gain_II = sum(
        reference[name] @ other[name].T if NEURON_AXIS[name] == 0 else reference[name].T @ other[name]
        for name in reference
    )
    return torch.from_numpy(linear_sum_assignment(gain_II.numpy(), maximize=True)[1])


def _draw(usage: dict[str, Tensor], became: dict[str, list[int]], path: Any) -> None:
    from hf_fuse.plots import heat_map

    widest = max(map(len, usage.values()))
    heat_map(
        [[*values.tolist(), *[float("nan")] * (widest - len(values))] for values in usage.values()],
        row_labels=[f"{layer} ({len(set(became[layer]))} left)" for layer in usage],
        column_labels=[str(index) for index in range(widest)],
        path=path,
        title="Use of the experts before merging",
    )
