"""The tensors that losses ask for by the names of their parameters, taken from a batch and the model's output.

N predictions (tokens or samples with a label), C classes, B samples, T tokens of a sequence, D hidden, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_fuse.batch_counts import IGNORED
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of

if TYPE_CHECKING:
    from hf_fuse.objectives import Objective

# Where a loss's parameter gets its tensor from; any other name is a column of the batch.
FROM_MODEL = {
    "logits": "(N, C), the predictions that have a label, shifted for causal language models",
    "second_logits": "(N, C), the same from a second forward pass: other dropout, or the columns second_*",
    "hidden_states": "tuple of (B, T, D), embeddings first",
    "features": "(N, D), one vector per sample: what the classifier takes, else the mean of the last hidden state",
    "second_features": "(N, D), the same from a second forward pass",
    "attentions": "tuple of (B, heads, T, T), with attn_implementation='eager'",
    "attention": "(B, heads, T, T) of one layer, another one each step, with attn_implementation='eager'",
    "router_logits": "tuple of (B * T, E) or (B, T, E), one per router",
    "router_weights": "tuple of the same shapes, 0 where an expert was not chosen",
    "sample_logits": "(B, C), of all samples, with a label or not",
    "sample_labels": "(B,), their labels, -100 for none",
    "image_embeds": "(N, D), of models with two towers, such as CLIP",
    "text_embeds": "(N, D), likewise",
    "ids_restore": "(B, L), the place of each patch in the shuffled order of a ViTMAE, which masks the last ones",
}
FROM_TRAINER = {
    "head": "(C, D), weights of the classifier of whole samples",
    "head_bias": "(C,), its bias, if it has one",
    "logits_at": "a function from a move of the inputs' points (pixels, word embeddings) to logits (N, C)",
    "features_at": "a function from such a move to features (N, D)",
    "partner_labels": "(N,), labels of the samples that are mixed into these (mixup_alpha)",
    "shares": "(N,), what each sample keeps of itself in the mix",
    "replay_logits": "(N, C), predictions for a batch of replay_dataset that have a label",
    "replay_labels": "(N,), their labels",
    "old_features": "(N, D), features of old_model for the same samples",
    "old_head": "(C, D), weights of old_model's classifier",
    "old_bias": "(C,), its bias, if it has one",
    "old_class_means": "(C, D), old_model's mean features of each class of the training set, NaN for absent classes",
    "class_counts": "(C,), how often each label occurs in the training set",
    "progress": "share of the training that is done, 0 to 1",
    "epoch": "number of epochs that are done, with a fraction",
    "step": "number of optimizer steps that are done",
}
SECOND = "second_"


def forward_options(needed: Iterable[str], model: nn.Module) -> dict[str, bool]:
    """Arguments of ``forward`` that make ``model`` return more than logits."""
    asked = {"hidden_states": "hidden_states", "attentions": "attentions"}
    asked |= {"router_logits": "router_logits", "router_weights": "router_logits"}
    if classifier_of(model) is None:
        asked["features"] = "hidden_states"
    return {f"output_{asked[name]}": True for name in needed if name in asked}


def kept_predictions(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits ``(N, C)`` and labels ``(N,)`` of the positions that have a label.

    Labels that are no class indices (regression, several labels per sample) are returned as they are.

    Raises:
        FuseError: logits and labels don't fit each other.
    """
    if labels.is_floating_point():
        return logits, labels
    if labels.dim() > 1:
        # Prompt tuning puts tokens without labels in front.
        logits = logits[:, -labels.shape[1] :]
    if logits.shape[:-1] != labels.shape:
        raise FuseError(
            f"logits have shape {list(logits.shape)}, labels {list(labels.shape)}. Losses on predictions expect a row "
            "of logits per label."
        )
    if shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    kept = labels != IGNORED
    return logits[kept], labels[kept]


def router_choices(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, ...]:
    """The weights of a top-k router: probabilities of the chosen experts, normalised to sum 1, and 0 elsewhere."""
    weights = []
    for logits in router_logits:
        logits = logits.float()
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)
        weights.append(logits.masked_fill(~chosen, float("-inf")).softmax(-1))
    return tuple(weights)


def own_balance_weight(model: nn.Module) -> float | None:
    """With which factor a mixture-of-experts model adds its ``aux_loss`` to its loss; None if it can't be told."""
    config = getattr(model, "config", None)
    places = (model, config.get_text_config() if config is not None else None)
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((getattr(place, name) for place in places for name in names if hasattr(place, name)), None)


def without(outputs: Any, names: Iterable[str]) -> Any:
    """The output less some fields, which evaluation would otherwise gather from all batches."""
    dropped = {*names}
    if not isinstance(outputs, ModelOutput) or dropped.isdisjoint(outputs):
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name not in dropped})


def class_counts(dataset: Any, classes: int) -> Tensor:
    """How often each of ``classes`` labels occurs, ``(C,)``.

    Raises:
        FuseError: the data set has no length, no label column, or a label outside the classes.
    """
    if not hasattr(dataset, "__len__"):
        raise FuseError("class_counts: the training set has no length, so its labels can't be counted beforehand.")
    names = getattr(dataset, "column_names", None) or list(dataset[0] if isinstance(dataset[0], Mapping) else ())
    name = next((name for name in ("labels", "label", "label_ids") if name in names), None)
    if name is None:
        raise FuseError(
            f"class_counts: the training set has no labels, only {', '.join(map(str, names)) or 'no names'}."
        )
    column = list(dataset[name] if hasattr(dataset, "column_names") else (row[name] for row in dataset))
    # One label per sample is the usual case; lists of labels may differ in length.
    rows = [torch.as_tensor(column)] if column and not hasattr(column[0], "__len__") else map(torch.as_tensor, column)
    labels_N = torch.cat([labels.reshape(-1) for labels in rows])
    labels_N = labels_N[labels_N != IGNORED]
    if labels_N.is_floating_point() or not labels_N.numel() or not 0 <= labels_N.min() <= labels_N.max() < classes:
        raise FuseError(
            f"class_counts: the training set's {name} are {sorted({*labels_N.tolist()})[:20]}, but the model's classes "
            f"are 0 to {classes - 1}."
        )
    return torch.bincount(labels_N, minlength=classes)


def check_needs(objective: Objective, model: nn.Module, dataset: Any, extra: frozenset[str]) -> None:
    """Refuses an objective that ``model`` can't serve; columns are checked against the first batch.

    Raises:
        FuseError: what is missing and how to get it.
    """
    where, kind = f"objectives.{objective.name}", type(model).__name__
    needed = objective.required - extra
    config = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters.values()
    if needed & FROM_MODEL.keys() and config is None:
        raise FuseError(f"{where}: needs the outputs of a transformers model, but {kind} has no config.")
    if needed & {"attentions", "attention"} and getattr(config, "_attn_implementation", "eager") != "eager":
        raise FuseError(
            f"{where}: needs attention matrices, which {config._attn_implementation!r} attention never makes. Load the "
            "model with attn_implementation='eager'."
        )
    if "router_logits" in needed or "router_weights" in needed:
        if getattr(config, "is_encoder_decoder", False):
            raise FuseError(
                f"{where}: the routers of {kind}'s encoder and decoder see different tokens, which one mask can't tell "
                "apart. Give the adapter's own coefficients instead (router_aux_loss_coef, router_z_loss_coef)."
            )
        own = hasattr(config.get_text_config(), "output_router_logits")
        if not own and not hasattr(model, "peft_config"):
            raise FuseError(
                f"{where}: needs the logits of routers, but {kind} has none. Use it with a mixture of experts."
            )
        if own and own_balance_weight(model) is None:
            raise FuseError(f"{where}: {kind} adds a balance loss of its own with a weight that can't be told.")
    for option in forward_options(needed, model):
        if not any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters):
            raise FuseError(f"{where}: needs {option.removeprefix('output_')}, but {kind} has no argument {option}.")
    if "class_counts" in needed:
        class_counts(dataset, config.num_labels)


def check_columns(objectives: list[Objective], batch: dict[str, Any], extra: frozenset[str]) -> None:
    """Refuses objectives whose columns a batch doesn't have.

    Raises:
        FuseError: what is missing.
    """
    for objective in objectives:
        columns = objective.required - FROM_MODEL.keys() - FROM_TRAINER.keys() - extra
        missing = sorted(columns - {*batch})
        if missing:
            raise FuseError(
                f"objectives.{objective.name}: needs {', '.join(missing)}, but the batches have only "
                f"{', '.join(batch)}. Add such a column to the data, or to what the data collator returns."
            )
