"""Datamodel matching: predicts what a model without some samples would say, and fine-tunes the model to say so.

(https://arxiv.org/abs/2410.23232.) The prediction is additive: the model's logits minus the attribution of each sample
to forget. Attributions here are those of the last layer, by one Newton step of its training without the samples: an
approximation, the better the fewer they are. No reference code was found; how the paper samples is recalled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import default_data_collator

from hf_fuse.diagnostics.callbacks import collect_features
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of


@torch.no_grad()
def logits_without(
    features_ND: Tensor,
    labels_N: Tensor,
    forget_N: Tensor,
    weights_CD: Tensor,
    bias_C: Tensor | None,
    at_MD: Tensor,
    *,
    ridge: float = 1e-3,
) -> Tensor:
    """Predicted logits ``(M, C)`` at other samples of a last layer trained without some; fp64.

    One Newton step from the present weights on the loss of the samples that stay, by conjugate gradients: no Hessian is
    made.

    Args:
        features_ND: of all training samples.
        labels_N: their class numbers.
        forget_N: true for those to forget.
        weights_CD, bias_C: the layer.
        at_MD: features to predict at.
        ridge: added to the Hessian, as a share of its mean diagonal. Larger: smaller steps.

    Raises:
        FuseError: nothing to forget or to keep, or sets of other sizes.
    """
    if len(forget_N) != len(features_ND):
        raise FuseError(f"forget: {len(forget_N)} values; expected one for each of the {len(features_ND)} samples.")
    if not forget_N.any() or forget_N.all():
        raise FuseError("datamodel matching needs samples to forget and samples to keep; one of the two sets is empty.")
    ones = features_ND.new_ones(len(features_ND), 1)
    inputs_NE = torch.cat([features_ND, ones], dim=1).double()
    bias_C = weights_CD.new_zeros(len(weights_CD)) if bias_C is None else bias_C
    layer_CE = torch.cat([weights_CD, bias_C[:, None]], dim=1).double()
    probabilities_NC = (inputs_NE @ layer_CE.T).softmax(-1)
    errors_NC = probabilities_NC - nn.functional.one_hot(labels_N, len(layer_CE)).double()
    kept_NE = inputs_NE[~forget_N]
    # At the end of training the others' gradient is the opposite of the forgotten samples': that is the one used here.
    pull_CE = errors_NC[forget_N].T @ inputs_NE[forget_N]
    kept_NC = probabilities_NC[~forget_N]
    damping = ridge * ((kept_NC * (1 - kept_NC)).T @ kept_NE.square()).mean() + 1e-12

    def hessian(direction: np.ndarray) -> np.ndarray:
        direction_CE = torch.from_numpy(direction).to(pull_CE).view_as(pull_CE)
        change_NC = kept_NC * (kept_NE @ direction_CE.T)
        change_NC = change_NC - kept_NC * change_NC.sum(-1, keepdim=True)
        return (change_NC.T @ kept_NE + damping * direction_CE).flatten().cpu().numpy()

    wanted = pull_CE.flatten().cpu().numpy()
    # Enough for the prediction, which is an approximation anyway.
    moved, _ = cg(LinearOperator((wanted.size,) * 2, matvec=hessian), wanted, rtol=1e-6, maxiter=1000)
    at_ME = torch.cat([at_MD, at_MD.new_ones(len(at_MD), 1)], dim=1).double()
    return at_ME @ (layer_CE + torch.from_numpy(moved).to(pull_CE).view_as(pull_CE)).T


def datamodel_matching(
    model: nn.Module,
    train: Any,
    forget_N: Tensor,
    *,
    data_collator: Callable = default_data_collator,
    retain_share: float = 1.0,
    epochs: int = 10,
    learning_rate: float = 1e-4,
    ridge: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> nn.Module:
    """Fine-tunes a classifier towards the logits predicted for a model that never saw some samples; one process.

    Args:
        model: classifier of whole samples, on its device.
        train: all rows that it was trained on, with labels.
        forget_N: true for the rows to forget.
        data_collator: rows -> a batch.
        retain_share: how many rows that stay are matched in each epoch, per forgotten one.
        epochs, learning_rate, batch_size: of the fine-tuning, on the squared error of centred logits.
        ridge: as of :func:`logits_without`.
        seed: of the order and the choice of rows.

    Returns:
        ``model``.

    Raises:
        FuseError: not a classifier of whole samples, or nothing to forget or to keep.
    """
    classifier = classifier_of(model)
    if classifier is None:
        raise FuseError(f"{type(model).__name__}: datamodel matching needs a classifier of whole samples.")
    forget_N = torch.as_tensor(forget_N, dtype=torch.bool)
    features_ND, labels_N = collect_features(model, DataLoader(train, batch_size, collate_fn=data_collator))
    if labels_N is None:
        raise FuseError("datamodel matching needs rows with labels.")
    layer = [
        values if values is None else values.detach().float().cpu() for values in (classifier.weight, classifier.bias)
    ]
    wanted_NC = _centred(logits_without(features_ND, labels_N, forget_N, *layer, features_ND, ridge=ridge).float())
    random = torch.Generator().manual_seed(seed)
    gone, kept = forget_N.nonzero()[:, 0], (~forget_N).nonzero()[:, 0]
    count = min(len(kept), round(retain_share * len(gone)))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    was_training = model.training
    model.eval()
    for _ in tqdm(range(epochs), desc="datamodel matching", unit="epoch", disable=None):
        rows = torch.cat([gone, kept[torch.randperm(len(kept), generator=random)[:count]]])
        for numbers in rows[torch.randperm(len(rows), generator=random)].split(batch_size):
            batch = data_collator([train[number] for number in numbers.tolist()])
            inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
            logits_BC = model(**inputs).logits.float()
            gap = _centred(logits_BC) - wanted_NC[numbers].to(logits_BC.device)
            optimizer.zero_grad()
            gap.square().sum(-1).mean().backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.train(was_training)


def _centred(logits_NC: Tensor) -> Tensor:
    return logits_NC - logits_NC.mean(-1, keepdim=True)
