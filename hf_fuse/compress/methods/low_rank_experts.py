"""MC-SMoE: the matrices of experts become low-rank products plus a few rows, taught by the model before.

Each matrix is split as ``W = L R + S``, all three are trained, and rows of ``S`` that matter least are set to zero,
more and more of them while the training goes on. Meant for what :mod:`expert_merging` makes: merged experts compress
better than those they are made of.

Shapes: O outputs, I inputs, r rank, N rows of all matrices, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize
from tqdm import tqdm

from hf_fuse.checkpoint.reader import TORCH_NAMES, resolve
from hf_fuse.compress.edit import Edit
from hf_fuse.compress.factored_experts import (
    FACTORS_FILE,
    PARTS,
    ROLES,
    composed,
    expert_matrices,
    is_factored,
    places,
)
from hf_fuse.compress.grouped_experts import expert_blocks
from hf_fuse.compress.methods.expert_merging import stored_experts
from hf_fuse.compress.subject import Subject
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.merge.methods._spectral import thin_svd
from hf_fuse.registry import Between

PAPER = "2310.01334"
NEEDS_TEXT = True
BETAS, EPSILON, DECAY = (0.9, 0.98), 1e-6, 0.01
WARM_UP = 16  # steps; an eighth of the training where that is less
SMOOTHING = 0.85  # of the importance, from step to step


def low_rank_experts(
    subject: Subject,
    *,
    rank: Annotated[int, Between(1)] = 32,
    keep: Annotated[float, Between(0, 1)] = 0.1,
    epochs: Annotated[int, Between(1)] = 3,
    batch_size: Annotated[int, Between(1)] = 8,
    learning_rate: Annotated[float, Between(0)] = 1e-4,
    teacher: str | None = None,
    distillation: Annotated[float, Between(0)] = 0.2,
    temperature: Annotated[float, Between(0, open_low=True)] = 2.0,
) -> Edit:
    """Compresses the experts of Mixtral-, Qwen-MoE- and Switch-like models, merged before or not.

    Stored are the products, as stock loaders need them, and beside them ``expert_factors.safetensors``, from which
    :func:`hf_fuse.load_compressed` makes the smaller model. Only the experts are trained (the authors train all but the
    routers), without dropout and balance loss.

    Args:
        rank: of ``L R``. At the start it is the best approximation of the matrix, and ``S`` is what that leaves.
        keep: share of the rows of all ``S`` that is left; the model chooses from which matrices.
        epochs: passes over the calibration text.
        batch_size: sequences per step.
        learning_rate: of AdamW, after a warm-up falling to zero in a straight line; 0 prunes without training.
        teacher: folder or Hub id of the model to learn from, such as the one before merging; by default the model as
            it comes.
        distillation: weight of the KL divergence from the teacher, beside the cross-entropy of the text.
        temperature: of both in that divergence, whose gradient is not scaled up again by its square.

    Raises:
        RecipeError: a rank with which nothing is saved, a teacher with another vocabulary, or a model that has factors
            already.
        FuseError: the model has no experts, or they are stored in a way that is not known here.
    """
    names = stored_experts(subject)
    if is_factored(subject.checkpoint.folder):
        raise RecipeError(
            f"{subject.candidate.name}: its experts are factored already. Remove {FACTORS_FILE} from it to factor the "
            "whole matrices anew."
        )
    model = subject.model.requires_grad_(False)
    blocks = {layer: block for layer, block in expert_blocks(model).items() if layer in names}
    if set(blocks) != set(names):
        raise FuseError(f"{subject.candidate.name}: routers and stored experts are not in the same layers.")
    guide = subject.load(resolve(teacher)[0] if teacher else subject.checkpoint.folder).requires_grad_(False)
    splits = [one for layer, block in blocks.items() for one in _split(layer, block.experts, rank)]
    with torch.enable_grad():
        losses = _train(subject, guide, splits, keep, epochs, batch_size, learning_rate, (distillation, temperature))
    edit = Edit(facts={"loss": losses, "rows": {}})
    left: dict[str, dict[str, list[int]]] = {}
    for split in splits:
        dtype = _stored_dtype(subject, names, split)
        for key, parts in split.fold(dtype).items():
            edit.files.setdefault(FACTORS_FILE, {}).update(
                {f"{key}.{name}": part.cpu().contiguous() for name, part in zip(PARTS, parts)}
            )
            role = key.rpartition(".")[2]
            left.setdefault(split.layer, {}).setdefault(role, []).append(len(parts[3]) / len(parts[0]))
    for layer, block in blocks.items():
        edit.tensors |= _new_tensors(block.experts, names[layer])
    shares = {layer: {role: sum(of) / len(of) for role, of in roles.items()} for layer, roles in left.items()}
    edit.facts["rows"] = shares
    edit.expected = subject.probe(model)
    edit.summary = f"Factored the experts of {len(blocks)} layers into rank {rank} and {keep:.0%} of the rows."
    edit.chart = partial(_draw, shares)
    return edit


class _Sum(nn.Module):
    """Parametrization ``W -> L R + S`` in fp32, for one matrix or a stack of them along the first axes."""

    def __init__(self, left: Tensor, right: Tensor, rows: Tensor):
        super().__init__()
        self.left, self.right, self.rows = map(nn.Parameter, (left, right, rows))

    def forward(self, weight: Tensor) -> Tensor:
        return (self.left @ self.right + self.rows).reshape(weight.shape).to(weight.dtype)


@dataclass
class _Split:
    """One parameter of the live model with its parametrization; matrices are ``[places, roles, O, I]`` there."""

    layer: str
    module: nn.Module
    name: str
    place: int | None
    roles: dict[str, slice]
    sum: _Sum

    def keys(self) -> Iterator[tuple[str, int, int]]:
        """Name of each matrix in the file of factors, and where it is in the stack."""
        for at in range(len(self.sum.rows)):
            for number, role in enumerate(self.roles):
                yield f"{self.layer}.experts.{at if self.place is None else self.place}.{role}", at, number

    @torch.no_grad()
    def fold(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
        """Ends the parametrization, with factors rounded to ``dtype`` and the weight that they make."""
        found, made = {}, torch.empty_like(self.sum.rows)
        for key, at, number in self.keys():
            left, right, rows = (part[at, number].to(dtype) for part in (self.sum.left, self.sum.right, self.sum.rows))
            kept_k = rows.abs().amax(1).nonzero()[:, 0]
            found[key] = (left, right, rows[kept_k], kept_k)
            made[at, number] = composed(*found[key])
        parametrize.remove_parametrizations(self.module, self.name, leave_parametrized=False)
        weight = getattr(self.module, self.name)
        weight.copy_(made.reshape(weight.shape).to(dtype))
        return found


def _split(layer: str, experts: nn.Module, rank: int) -> Iterator[_Split]:
    for module, name, place, roles in list(expert_matrices(experts)):
        weight = getattr(module, name)
        count, inputs = len(weight) if place is None else 1, weight.shape[-1]
        stacked = weight.detach().float().reshape(count, len(roles), -1, inputs)
        outputs = stacked.shape[2]
        if rank * (inputs + outputs) >= inputs * outputs:
            raise RecipeError(
                f"parameters: rank is {rank}, with which factors of experts of {outputs} x {inputs} are no smaller "
                f"than these. Use at most {(inputs * outputs - 1) // (inputs + outputs)}."
            )
        left = stacked.new_empty(count, len(roles), outputs, rank)
        right = stacked.new_empty(count, len(roles), rank, inputs)
        for at in range(count):
            for number in range(len(roles)):
                found = thin_svd(stacked[at, number]).first(rank)
                left[at, number] = found.left_MR * found.values_R.sqrt()
                right[at, number] = found.values_R.sqrt()[:, None] * found.right_RN
        split = _Sum(left, right, stacked - left @ right)
        parametrize.register_parametrization(module, name, split, unsafe=True)
        yield _Split(layer, module, name, place, roles, split)


def _train(
    subject: Subject,
    teacher: nn.Module,
    splits: list[_Split],
    keep: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    distillation: tuple[float, float],
) -> dict[str, float]:
    """Trains and prunes. -> mean loss over the text before and after."""
    texts, sums = torch.cat(subject.calibration), [split.sum for split in splits]
    importance = [torch.zeros(one.rows.shape[:-1], device=one.rows.device) for one in sums]
    steps = epochs * math.ceil(len(texts) / batch_size)
    warm_up = min(WARM_UP, steps // 8)
    optimizer = torch.optim.AdamW(
        [part for one in sums for part in one.parameters()], learning_rate, BETAS, EPSILON, DECAY
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm_up + 1), (steps - step) / max(steps - warm_up, 1))
    )

    def loss_of(rows: Tensor) -> Tensor:
        return _loss(subject, teacher, texts[rows], *distillation)

    @torch.no_grad()
    def whole_loss() -> float:
        parts = torch.arange(len(texts)).split(batch_size)
        return sum(loss_of(rows).item() * len(rows) for rows in parts) / len(texts)

    before, step = whole_loss(), 0
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(texts)).split(batch_size):
                optimizer.zero_grad()
                # Stock experts ask for their weights once per expert; the sum is made once per step.
                with parametrize.cached():
                    loss_of(rows).backward()
                for mean, one in zip(importance, sums):
                    gradient = 0 if one.rows.grad is None else one.rows.grad  # none: an expert that nobody chose
                    mean.lerp_((one.rows.detach() * gradient).abs().mean(-1), 1 - SMOOTHING)
                optimizer.step()
                rate.step()
                step += 1
                _prune(sums, importance, kept_share(step, steps, warm_up, keep))
                bar.update()
    return {"before": before, "after": whole_loss()}


def kept_share(step: int, steps: int, warm_up: int, keep: float) -> float:
    """Share of rows left after ``step`` of ``steps``: 1 during the warm-up, then falling as a cube, then constant."""
    last = max(steps - 4 * warm_up, warm_up + 1)
    done = min(max((step - warm_up) / (last - warm_up), 0.0), 1.0)
    return keep + (1 - keep) * (1 - done) ** 3


@torch.no_grad()
def _prune(sums: list[_Sum], importance: list[Tensor], share: float) -> None:
    """Sets all but ``share`` of the rows of all matrices to zero, the least important first."""
    flat_N = torch.cat([values.flatten().cpu() for values in importance])
    gone_N = torch.zeros(len(flat_N), dtype=torch.bool)
    gone_N[flat_N.argsort(stable=True)[: len(flat_N) - round(share * len(flat_N))]] = True
    for one, part in zip(sums, gone_N.split([values.numel() for values in importance])):
        one.rows[part.view(one.rows.shape[:-1]).to(one.rows.device)] = 0


def _loss(subject: Subject, teacher: nn.Module, ids_BT: Tensor, weight: float, temperature: float) -> Tensor:
    """Cross-entropy of the text plus weighted KL from the teacher, means over tokens in fp32."""
    logits_BTV = subject.run(subject.model, ids_BT).logits.float()
    length = logits_BTV.shape[1]  # an encoder-decoder predicts the second half only
    labels_N = ids_BT[:, -length:][:, 1:].flatten().to(logits_BTV.device)
    student_NV = logits_BTV[:, :-1].flatten(0, 1)
    loss = cross_entropy(student_NV, labels_N)
    if not weight:
        return loss
    with torch.no_grad():
        teacher_NV = subject.run(teacher, ids_BT).logits.float()[:, :-1].flatten(0, 1)
    if teacher_NV.shape != student_NV.shape:
        raise RecipeError(
            f"parameters: the teacher predicts {teacher_NV.shape[1]} tokens, the model {student_NV.shape[1]}. Give a "
            "teacher with the same vocabulary."
        )
    one, other = (log_softmax(logits / temperature, dim=-1) for logits in (student_NV, teacher_NV))
    return loss + weight * kl_div(one, other, reduction="batchmean", log_target=True)


def _stored_dtype(subject: Subject, names: dict, split: _Split) -> torch.dtype:
    stored = next(iter(names[split.layer][0].values()))
    return getattr(torch, TORCH_NAMES[subject.checkpoint.tensors[stored].dtype])


def _new_tensors(experts: nn.Module, names: dict[int, dict[str, str]]) -> dict[str, Tensor]:
    """Stored name -> values: for each expert number those of its group."""
    found, place_of = {}, places(experts)
    for module, name, own_place, roles in expert_matrices(experts):
        for expert, place in enumerate(place_of):
            if own_place in (None, place):
                weight = getattr(module, name)
                dense = weight[place] if own_place is None else weight
                found |= {
                    stored: dense[roles[ROLES[matrix]]]
                    for matrix, stored in names[expert].items()
                    if ROLES[matrix] in roles
                }
    return found


def _draw(shares: dict[str, dict[str, float]], path: Any) -> None:
    from hf_fuse.plots import heat_map

    heat_map(
        [list(roles.values()) for roles in shares.values()],
        row_labels=list(shares),
        column_labels=list(next(iter(shares.values()))),
        path=path,
        title="Rows left beside the low-rank part of the experts",
        value_range=(0, 1),
    )
