"""Aggregate responses: labels are known for bags of samples only, as their mean or as shares of classes.

For data that is published as averages (regions, households, days). Batches must hold whole bags.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import mean
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2401.11081"
IN_BATCH = True


def aggregate_responses(
    logits_NC: Tensor,
    labels_N: Tensor,
    bag_ids_N: Tensor,
    *,
    instance: Annotated[float, Between(0, 1)] = 0.0,
) -> Tensor:
    """``(1 - r) * loss of the bag's mean prediction + r * mean loss of its samples``, bags weighed by their sizes.

    With squared errors that is the bag's error plus r times the variance of predictions within it; with shares of
    classes it is cross-entropy. r near 1 is steadier for few or large bags, and pulls all samples of a bag together.
    Which way r runs in the paper is not verified. Set the weight of ``task`` to 0. A bag that lies in several
    micro-batches counts as so many bags; processes are taken together.

    Args:
        logits_NC: one number per sample (regression), or logits of C classes.
        labels_N: of the bag of each sample: ``(N,)`` its mean, or ``(N, C)`` the shares of its classes. Floats.
        bag_ids_N: which bag each sample is of, any whole numbers.
        instance: r.

    Raises:
        FuseError: labels that are no floats, or of another shape.
    """
    wide = labels_N.dim() == 2 and labels_N.shape[-1] > 1
    fits = logits_NC.shape == labels_N.shape if wide else logits_NC.numel() == labels_N.numel()
    if not (fits and labels_N.is_floating_point()):
        raise FuseError(
            f"aggregate_responses: labels are {labels_N.dtype} of shape {list(labels_N.shape)}, logits have shape "
            f"{list(logits_NC.shape)}. Expected floats: the bag's mean, or its share of each class."
        )
    logits_NC, labels_N, ids_N = gathered(logits_NC.float()), gathered(labels_N.float()), gathered(bag_ids_N)
    predicted_NC = logits_NC.softmax(-1) if wide else logits_NC.reshape(len(ids_N), 1)
    labels_NC = labels_N.reshape(predicted_NC.shape)
    _, bag_N, sizes_G = ids_N.unique(return_inverse=True, return_counts=True)
    sums_GC = predicted_NC.new_zeros(len(sizes_G), predicted_NC.shape[-1]).index_add(0, bag_N, predicted_NC)
    # Each sample stands for its share of the bag.
    of_bag_NC = (sums_GC / sizes_G.unsqueeze(-1))[bag_N]
    if wide:
        log_p_NC, log_mean_NC = logits_NC.log_softmax(-1), of_bag_NC.clamp(min=1e-12).log()
        bag_N, instance_N = (-(labels_NC * log_NC).sum(-1) for log_NC in (log_mean_NC, log_p_NC))
    else:
        bag_N, instance_N = ((values_NC - labels_NC).square().sum(-1) for values_NC in (of_bag_NC, predicted_NC))
    return mean((1 - instance) * bag_N + instance * instance_N)
