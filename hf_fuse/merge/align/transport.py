"""Optimal transport between two sets of units with equal masses: log-domain Sinkhorn, and the exact plan.

Shapes: m, n units; leading dimensions are problems of their own.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_fuse.errors import FuseError

ITERATIONS, CHECK_EVERY, TOLERANCE = 2000, 20, 1e-6
LARGEST_ASSIGNMENT = 8192  # beyond that, units in equal portions take an hour


def distance(similarity: Tensor, terms: int) -> Tensor:
    """Euclidean distance of unit vectors whose inner products are given, as a sum of so many."""
    return (2 - 2 * (similarity / terms).clamp(-1, 1)).sqrt()


def scaled(cost: Tensor) -> Tensor:
    """Each matrix divided by its largest entry, if that is not zero; fp64."""
    largest = cost.double().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, cost.double() / largest.clamp_min(1e-300), 0)


def sinkhorn(cost: Tensor, regularization: float) -> Tensor:
    """The plan ``[.., m, n]`` with uniform marginals that minimises cost minus ``regularization`` times entropy, fp64.

    At most 2000 iterations; columns are exact, rows to a millionth where it converges.
    """
    m, n = cost.shape[-2:]
    logits = -cost.double() / regularization
    to_n = logits.new_zeros(*cost.shape[:-2], 1, n)
    for _ in range(ITERATIONS // CHECK_EVERY):
        for _ in range(CHECK_EVERY):
            to_m = -math.log(m) - torch.logsumexp(logits + to_n, -1, keepdim=True)
            to_n = -math.log(n) - torch.logsumexp(logits + to_m, -2, keepdim=True)
        plan = (logits + to_m + to_n).exp()
        if (plan.sum(-1) * m - 1).abs().max() < TOLERANCE:
            break
    return plan


def exact(cost: Tensor) -> Tensor:
    """The plan ``[.., m, n]`` with uniform marginals of least cost, fp64: an assignment, of equal portions of the units
    where their numbers differ.

    Raises:
        FuseError: the portions would be too many.
    """
    m, n = cost.shape[-2:]
    portions = math.lcm(m, n)
    if portions > LARGEST_ASSIGNMENT and m != n:
        raise FuseError(
            f"solver: exact needs {portions} equal portions for {m} and {n} units, more than {LARGEST_ASSIGNMENT}. Use "
            "sinkhorn."
        )
    plan = torch.zeros(cost.shape, dtype=torch.float64)
    row_P, column_P = torch.arange(portions) // (portions // m), torch.arange(portions) // (portions // n)
    for cost_mn, plan_mn in zip(cost.reshape(-1, m, n), plan.view(-1, m, n)):
        one, other = linear_sum_assignment(cost_mn[row_P][:, column_P].numpy())
        pairs = (row_P[torch.from_numpy(one)], column_P[torch.from_numpy(other)])
        plan_mn.index_put_(pairs, torch.tensor(1 / portions, dtype=torch.float64), accumulate=True)
    return plan


def transport_map(cost: Tensor, regularization: float | None) -> Tensor:
    """Plan of the scaled cost as a map whose columns sum to one, fp32. ``regularization`` None: the exact plan."""
    cost = scaled(cost)
    plan = exact(cost) if regularization is None else sinkhorn(cost, regularization)
    return (plan * cost.shape[-1]).float()
