"""What a model's last layer takes: the output layer of a language model, the classifier of another.

B samples, S tokens, D hidden, N predictions that have a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.loss_inputs import kept_predictions
from hf_fuse.model_features import classifier_of, of_labelled, sample_features


def head_of(model: nn.Module) -> nn.Module:
    """The layer that makes the logits.

    Raises:
        FuseError: there is none, or it can't be told.
    """
    layer = model.get_output_embeddings()
    layer = classifier_of(model) if layer is None else layer
    if layer is None:
        raise FuseError(f"{type(model).__name__}: which layer makes its logits can't be told.")
    return layer


@contextlib.contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what that layer takes in the forward passes inside."""
    seen: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda layer, taken: seen.append(taken[0]))
    try:
        yield seen
    finally:
        hook.remove()


def of_predictions(model: nn.Module, taken: Tensor, inputs: dict[str, Any], labels: Tensor, *, shifted: bool) -> Tensor:
    """What the layer took for each prediction, ``(N, D)``.

    Args:
        model: whose layer it is.
        taken: ``(B, S, D)`` or ``(B, D)``, from :func:`head_inputs`.
        inputs: of the forward pass.
        labels: of the batch.
        shifted: whether they are still to be shifted by one.
    """
    if model.get_output_embeddings() is not None:
        return kept_predictions(taken, labels, shifted=shifted)[0]
    return of_labelled(sample_features(model, inputs, None, [taken]), labels)
