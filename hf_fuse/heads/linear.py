"""From a linear head to the last layer of a classifier of transformers, which is then saved and pushed as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_layer(head: Any, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer that computes the head's scores.

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
    weights = torch.as_tensor(weights_CD).to(dtype)
    layer = nn.Linear(weights.shape[1], weights.shape[0], dtype=dtype)
    layer.weight.data.copy_(weights)
    layer.bias.data.copy_(torch.as_tensor(bias_C))
    return layer


def install(head: Any, model: PreTrainedModel) -> PreTrainedModel:
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
        spread = layer.bias.detach() - layer.bias.detach().mean()
        if spread.abs().max() > 1e-6 * layer.weight.abs().max():
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
