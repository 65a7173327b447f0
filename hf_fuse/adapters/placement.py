"""Where a budget of trainable parameters does most good: sensitivity-aware placement, SPT (arXiv 2303.08566).

A weight's sensitivity is its squared gradient: what one small step of gradient descent on it alone would take off the
loss, up to a factor. The most sensitive weights of the whole model are looked for; a matrix that holds many of them
gets a LoRA, one that holds few has just those trained::

    scores = sensitivity(model, dataloader)
    placement = plan_placement(scores, budget=400_000, unstructured=False)
    model = get_peft_model(model, placement.lora_config(lora_alpha=16))
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_fuse.checkpoint.adapter_writer import rank_settings
from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from peft import ShiraConfig

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Loss | None = None,
    max_batches: int = 16,
    per_example: bool = False,
    exclude: str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Sum over batches of every weight's squared gradient, fp32, by parameter name.

    Scored are the weights of Linear and Conv1D layers and all vectors (norms, biases) of the backbone; heads (whatever
    lies outside ``model.base_model``), embeddings, convolutions and frozen parameters are left out. Dropout is off, so
    the same batches give the same scores. Memory: the gradients and 4 bytes per weight, beside the model.

    Args:
        model: a transformers model before any adapter is put on it.
        batches: keyword arguments of the model, such as a DataLoader gives; with labels unless ``loss`` is given.
        loss: of the model and a batch; by default the model's own.
        max_batches: as many are read (the paper's code: 16).
        per_example: square the gradient of each example instead of the mean gradient of each batch: the diagonal of
            the empirical Fisher matrix. As many passes as examples.
        exclude: a regular expression; parameters with a match in their names are left out.
        progress: show a progress bar on a terminal.

    Raises:
        FuseError: nothing to score, adapters on the model, no batches, or a loss that is missing or not finite.
    """
    scored = dict(_scored(model, exclude))
    if not scored or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise FuseError(
            f"{type(model).__name__}: no weights to score. Expected Linear layers that require gradients: pass the "
            "bare model, unquantised, with requires_grad_(True), and check exclude."
        )
    scores = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in scored.items()}
    total = min(max_batches, len(batches)) if hasattr(batches, "__len__") else max_batches
    read, training = 0, model.training
    model.eval()
    try:
        for batch in tqdm(islice(batches, max_batches), "sensitivity", total, disable=None if progress else True):
            read += 1
            batch = {name: _moved(value, model) for name, value in batch.items()}
            for part in _examples(batch) if per_example else [batch]:
                value = loss(model, part) if loss else model(**part).loss
                if value is None or not value.isfinite():
                    raise FuseError(
                        f"batch {read}: the loss is {value}, expected a finite number. Batches need labels (not all "
                        "of them -100), or give a loss function."
                    )
                gradients = torch.autograd.grad(value, scored.values(), allow_unused=True)
                for score, gradient in zip(scores.values(), gradients):
                    if gradient is not None:
                        score += gradient.float().square()
    finally:
        model.train(training)
    if not read:
        raise FuseError("batches: there are none.")
    return scores


@dataclass(frozen=True)
class Placement:
    """What to train.

    Attributes:
        ranks: module -> rank of its LoRA.
        masks: name of a matrix -> bool of its shape, True where a weight is to be trained by itself.
        vectors: names of norms and biases to be trained whole.
        parameters: trained numbers of all three kinds together.
        threshold: weights with a larger score count as sensitive.
    """

    ranks: dict[str, int]
    masks: dict[str, Tensor]
    vectors: list[str]
    parameters: int
    threshold: float

    @property
    def target_modules(self) -> list[str]:
        return list(self.ranks)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For modules whose rank differs from the commonest."""
        return rank_settings(self.ranks)[1]

    def lora_config(self, **settings: Any) -> LoraConfig:
        """A ``LoraConfig`` with these modules and ranks; masks and vectors are not part of it.

        Raises:
            FuseError: no module has a LoRA.
        """
        if not self.ranks:
            raise FuseError("The budget is too small for a LoRA anywhere. Raise it, or lower the ranks.")
        rank, pattern = rank_settings(self.ranks)
        return LoraConfig(target_modules=self.target_modules, r=rank, rank_pattern=pattern, **settings)


def plan_placement(
    scores: Mapping[str, Tensor],
    budget: int,
    *,
    ranks: Sequence[int] = (8,),
    alpha: float = 10.0,
    beta: float = 5.0,
    unstructured: bool = True,
    progress: bool = True,
) -> Placement:
    """The placement of the most sensitive weights that costs at most ``budget`` parameters, and as many as possible.

    One threshold on the scores holds for the whole model. A matrix ``(a, b)`` with ``m`` weights above it gets a LoRA
    of the largest rank ``r`` with ``m >= r (a + b) / alpha``; with fewer, those m weights alone are trained. A vector
    with at least ``1 / beta`` of its numbers above it is trained whole. A larger budget never takes anything away.

    Args:
        scores: of :func:`sensitivity`.
        budget: number of trained parameters, heads not counted.
        ranks: to choose from. The paper has one, 8.
        alpha: 10 in the paper's settings; at least 1, or a LoRA would cost less than what it replaces.
        beta: 5 in the paper's settings.
        unstructured: False spends all on LoRAs and leaves ``masks`` and ``vectors`` empty.
        progress: show a progress bar on a terminal.

    Raises:
        FuseError: no scores, scores that are not finite, or options out of range.
    """
    ranks = sorted({*ranks})
    if not scores or not all(score.isfinite().all() and (score >= 0).all() for score in scores.values()):
        raise FuseError("scores: expected finite numbers >= 0 for at least one parameter, as sensitivity() gives them.")
    if budget < 0 or not ranks or ranks[0] < 1 or alpha < 1 or beta < 1:
        raise FuseError(
            f"budget {budget}, ranks {ranks}, alpha {alpha}, beta {beta}: expected a budget >= 0, ranks >= 1, and "
            "alpha and beta >= 1."
        )

    def rank_and_cost(score: Tensor, threshold: float) -> tuple[int, int]:
        above = int(torch.count_nonzero(score > threshold))
        if score.dim() == 1:
            return 0, len(score) if unstructured and above >= len(score) / beta else 0
        both = sum(score.shape)
        rank = max((r for r in ranks if above >= r * both / alpha and r <= min(score.shape)), default=0)
        return rank, rank * both if rank else above * unstructured

    # Floats >= 0 are ordered as their bits are, so halving the bits finds the lowest threshold that the budget allows.
    low, high = -1, _bits(torch.finfo(torch.float32).max)
    for _ in tqdm(range(31), "placement", disable=None if progress else True):
        middle = (low + high) // 2
        if middle == low:
            break
        cost = sum(rank_and_cost(score, _float(middle))[1] for score in scores.values())
        low, high = (low, middle) if cost <= budget else (middle, high)
    threshold = _float(high)

    lora, masks, vectors, parameters = {}, {}, [], 0
    for name, score in scores.items():
        rank, cost = rank_and_cost(score, threshold)
        parameters += cost
        if rank:
            lora[name.removesuffix(".weight")] = rank
        elif cost and score.dim() == 1:
            vectors.append(name)
        elif cost:
            masks[name] = score > threshold
    return Placement(lora, masks, vectors, parameters, threshold)


def shira_config(model: nn.Module, scores: Mapping[str, Tensor], *, r: int = 8, **settings: Any) -> ShiraConfig:
    """A ``ShiraConfig`` that trains each targeted matrix's most sensitive weights instead of random ones.

    PEFT's SHiRA has room for exactly ``r (in + out)`` weights per matrix, so it cannot hold the masks of a
    :class:`Placement`; ``target_modules`` may be the modules of one. Which weights they are is saved with the adapter.

    Args:
        model: that the scores are of, before the adapter is put on it.
        scores: of :func:`sensitivity`.
        r: sets the number of weights.
        settings: of ``ShiraConfig``, such as ``target_modules``.
    """
    from peft import ShiraConfig

    by_layer = {id(module): scores.get(f"{name}.weight") for name, module in model.named_modules()}

    def most_sensitive(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        score = by_layer.get(id(base_layer))
        if score is None:
            raise FuseError(f"{base_layer}: has no scores. Target only layers of the model that was scored.")
        chosen = score.flatten().topk(r * sum(score.shape)).indices
        mask = torch.zeros(score.numel(), device=score.device, dtype=base_layer.weight.dtype)
        return mask.index_fill_(0, chosen, 1).view(score.shape).to(base_layer.weight.device)

    config = ShiraConfig(r=r, **settings)
    config.mask_fn = most_sensitive
    return config


def plot_sensitivity(scores: Mapping[str, Tensor], path: str | Path) -> Path:
    """A heat map of the matrices' mean sensitivity, layers by kinds of module, log10; returns ``path``.

    Raises:
        FuseError: no matrices, or matplotlib is missing.
    """
    from hf_fuse.plots import heat_map

    cells: dict[str, dict[str, float]] = {}
    for name, score in scores.items():
        if score.dim() == 2:
            module = name.removesuffix(".weight")
            layer, _, kind = re.fullmatch(r"(?:(.*?\b\d+)(\.))?(.+)", module).groups()
            cells.setdefault(layer or "elsewhere", {})[kind] = score.mean().log10().item()
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    return heat_map(
        [[row.get(kind, float("nan")) for kind in kinds] for row in cells.values()],
        row_labels=list(cells),
        column_labels=kinds,
        path=path,
        title="Sensitivity (log10 of the mean squared gradient)",
    )


def _scored(model: nn.Module, exclude: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    backbone = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in backbone.parameters()}
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    for name, parameter in model.named_parameters():
        if (
            parameter.requires_grad
            and id(parameter) in inside - embedded
            and (parameter.dim() == 1 or id(parameter) in linear)
            and not (exclude and re.search(exclude, name))
        ):
            yield name, parameter


def _examples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    size = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())
    for row in range(size):
        yield {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.items()
        }


def _moved(value: Any, model: nn.Module) -> Any:
    return value.to(next(model.parameters()).device) if isinstance(value, Tensor) else value


def _bits(number: float) -> int:
    return struct.unpack("<i", struct.pack("<f", number))[0]


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<i", bits))[0]
