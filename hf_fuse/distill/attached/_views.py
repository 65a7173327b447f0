"""Views of images that change what they show: which one it is can be learnt.

N images, M views of each (the first is the image itself), C classes, D features.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_fuse.batch_counts import IGNORED
from hf_fuse.errors import FuseError

Transform = Literal["rotation", "colors"]
VIEWS = {"rotation": 4, "colors": 6}


def check_images(model: nn.Module, where: str) -> None:
    """Refuses models of anything but images.

    Raises:
        FuseError: the main input isn't pixels.
    """
    if getattr(model, "main_input_name", None) != "pixel_values" or not hasattr(model.config, "num_labels"):
        raise FuseError(f"{where}: turns images; {type(model).__name__} doesn't classify any.")


def further_views(inputs: dict[str, Any], transform: Transform) -> Tensor:
    """All views but the first of the images that have a label, ``((M - 1) N, channels, height, width)``.

    Raises:
        FuseError: images that aren't square can't be rotated, those without three channels can't be recoloured.
    """
    pixels_NCHW = inputs["pixel_values"][inputs["labels"] != IGNORED]
    channels, height, width = pixels_NCHW.shape[1:]
    if transform == "rotation":
        if height != width:
            raise FuseError(f"transform: rotation needs square images, these are {height} x {width}.")
        return torch.cat([pixels_NCHW.rot90(turns, (-2, -1)) for turns in (1, 2, 3)])
    if channels != 3:
        raise FuseError(f"transform: colors needs three channels, these images have {channels}.")
    return torch.cat([pixels_NCHW[:, list(order)] for order in list(itertools.permutations(range(3)))[1:]])


def joint_labels(labels_N: Tensor, views: int) -> Tensor:
    """``label * M + view``, views first, ``(M N,)``."""
    return (labels_N * views + torch.arange(views, device=labels_N.device).unsqueeze(-1)).flatten()


def aggregated(joint_BK: Tensor, views: int) -> Tensor:
    """Mean over the views of their logits for "class c in this view", ``(N, C)``; ``joint`` is ``(M N, C M)``."""
    joint_MNCM = joint_BK.float().view(views, -1, joint_BK.shape[-1] // views, views)
    return torch.stack([joint_MNCM[view, :, :, view] for view in range(views)]).mean(0)
