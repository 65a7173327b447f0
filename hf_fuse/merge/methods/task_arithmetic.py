"""Task arithmetic: add a scaled sum of task vectors to the base."""

from __future__ import annotations

from torch import Tensor

from hf_fuse.registry import PerModel

PAPER = "https://arxiv.org/abs/2212.04089"
CHUNKED_WEIGHTS = True


def task_arithmetic(
    deltas_KN: Tensor, *, weight: PerModel = 1.0, lambda_: float = 1.0, normalize: bool = False
) -> Tensor:
    """``theta_0 + lambda * sum_k w_k tau_k``.

    Args:
        deltas_KN: task vectors tau_k = theta_k - theta_0, N elements.
        weight: one number per model; negative to forget a task.
        lambda_: the common scale. The paper picks it on validation data (about 0.3 for eight tasks).
        normalize: divide by the sum of the weights (if it is not 0).
    """
    scale = lambda_ / (sum(weight) or 1.0) if normalize else lambda_
    merged_N = deltas_KN[0] * (weight[0] * scale)
    for k in range(1, len(weight)):
        if isinstance(weight[k], Tensor):  # learned ones may differ from element to element
            merged_N.addcmul_(deltas_KN[k], weight[k] * scale)
        else:
            merged_N.add_(deltas_KN[k], alpha=weight[k] * scale)
    return merged_N
