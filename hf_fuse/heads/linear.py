"""From a linear head to the last layer of a classifier of transformers, which is then saved and pushed as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_layer(head: Any, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer with the head's scores, but for what they have in common in each sample.

    Args:
        head: fitted, with a method ``linear`` (nearest_mean, naive_bayes, analytic), or a linear model of scikit-learn
            (``coef_`` and ``intercept_``).

    Raises:
        FuseError: the head is not linear, or its settings make it not linear.
    """
    if hasattr(head, "linear"):
        try:
            weights_CD, bias_C = head.linear()
        except ValueError as error:
            raise FuseError(f"{type(head).__name__}: {error}") from None
    elif hasattr(head, "coef_"):
        weights_CD, bias_C = head.coef_, head.intercept_
        if len(weights_CD) == 1:  # scikit-learn keeps one row for two classes
            weights_CD, bias_C = [0 * weights_CD[0], weights_CD[0]], [0.0, bias_C[0]]
    else:
        raise FuseError(f"{type(head).__name__}: is not linear: it can't become a layer. Save it with save_pretrained.")
    weights_CD, bias_C = torch.tensor(np.asarray(weights_CD)), torch.tensor(np.asarray(bias_C))
    layer = nn.Linear(weights_CD.shape[1], len(weights_CD), dtype=dtype)
    # What all classes have in common does not count in a softmax, but rounding it to ``dtype`` would.
    layer.weight.data.copy_(weights_CD - weights_CD.mean(0))
    layer.bias.data.copy_(bias_C - bias_C.mean())
    return layer


def install_head(head: Any, model: PreTrainedModel) -> PreTrainedModel:
    """Replaces the last layer of a classifier of transformers by a linear head; changes ``model`` and returns it.

    The head's features have to be what that layer takes, as :class:`~hf_fuse.heads.features.EncoderFeatures` of the
    same model gives them. The config gets the head's classes.

    Raises:
        FuseError: ``model`` is no classifier of whole samples, the head is not linear or of another width, or the
            model's last layer has no bias and the head needs one.
    """
    old = classifier_of(model)
    if old is None:
        raise FuseError(
            f"{type(model).__name__}: has no layer that classifies whole samples. Load it with "
            "AutoModelForSequenceClassification or AutoModelForImageClassification."
        )
    layer = linear_layer(head, old.weight.dtype).to(old.weight.device)
    if layer.in_features != old.in_features:
        raise FuseError(
            f"the head has learned from {layer.in_features} features, but {type(model).__name__} classifies "
            f"{old.in_features}. Take the features from this model with EncoderFeatures."
        )
    if old.bias is None:  # of decoders
        if layer.bias.abs().max() > 1e-6 * layer.weight.abs().max():
            raise FuseError(
                f"{type(model).__name__}: its last layer has no bias, which the head needs. Use a head without one: "
                "Analytic, or LogisticRegression(fit_intercept=False)."
            )
        layer.bias = None
    name = next(name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, layer)
    names = [str(label) for label in head.classes_.tolist()]
    model.config.num_labels = len(names)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.num_labels = len(names)
    model.config.problem_type = None
    return model
