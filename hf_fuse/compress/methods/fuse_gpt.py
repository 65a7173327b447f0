"""FuseGPT: deletes the blocks that matter least and grafts their weights onto the blocks around them.

Each matrix of a neighbour becomes ``W + B A + (C D) * W_v``: a low-rank change, and the deleted block's matrix of the
same name behind an elementwise low-rank gate. Tuned so that the neighbours together put out what they did with the
block, then folded: the result is a stock checkpoint with fewer blocks.

Shapes: N sequences, T tokens, D width, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, mse_loss
from torch.nn.utils import parametrize
from tqdm import tqdm

from hf_fuse.compress.edit import Edit, the_stack
from hf_fuse.compress.importance_chart import importance_chart
from hf_fuse.compress.subject import Subject
from hf_fuse.compress.sublayers import decoder_layers, skip
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.registry import Between

PAPER = "2411.14507"
NEEDS_TEXT = True
BETAS = (0.9, 0.95)


def fuse_gpt(
    subject: Subject,
    *,
    fuse: Annotated[int, Between(0)],
    group: Annotated[int, Between(2)] = 8,
    rank: Annotated[int, Between(1)] = 16,
    epochs: Annotated[int, Between(0)] = 20,
    batch_size: Annotated[int, Between(1)] = 8,
    learning_rate: Annotated[float, Between(0)] = 1e-3,
    tuning_rate: Annotated[float, Between(0)] = 1e-3,
    loss: Literal["mse", "kl"] = "mse",
    inject: bool = True,
    importance_sequences: Annotated[int, Between(1)] = 32,
) -> Edit:
    """Prunes ``fuse`` blocks, one after the other, each chosen anew by Macro Influence and fused into its group.

    Args:
        fuse: number of blocks to take away.
        group: consecutive blocks, the fused one among them, that are tuned together.
        rank: of gates and low-rank changes.
        epochs: passes over the calibration text per fused block; 0 deletes without tuning.
        batch_size: sequences per step.
        learning_rate: of the gates, falling to zero in half a cosine.
        tuning_rate: of low-rank changes and norms. The authors' code has 9.65e-6, with which small models hardly learn.
        loss: between hidden states: their squared difference, or KL of their softmax per token (the authors' code takes
            the softmax across the batch instead).
        inject: False leaves the deleted weights out, so that only low-rank changes and norms are tuned (the ablation).
        importance_sequences: how many sequences of the text the influence is measured on.

    Raises:
        RecipeError: as many blocks to take away as there are.
        FuseError: the layers hold nothing that can be fused.
    """
    stack, height = the_stack(subject.checkpoint)
    if fuse >= height:
        raise RecipeError(f"parameters: fuse is {fuse}, but the model has {height} blocks and one has to stay.")
    model = subject.model.requires_grad_(False)
    layers = decoder_layers(model)
    _check_stored(subject, layers, stack)
    alive, changed = list(range(height)), set()
    history, losses = [], {}
    texts = subject.calibration[:importance_sequences]
    for _ in range(fuse):
        influence = macro_influence(subject, layers, alive, texts)
        history.append(influence)
        victim = min(influence, key=lambda index: (influence[index], index))
        members = _around(alive, victim, group)
        pair = _record(subject, [layers[index] for index in members])
        skip(layers[victim], "block", None)
        targets = [index for index in members if index != victim]
        with torch.enable_grad():
            losses[victim] = _tune(
                [layers[index] for index in targets], layers[victim] if inject else None, pair,
                [members.index(index) for index in targets], rank, epochs, batch_size,
                (learning_rate, tuning_rate), loss,
            )  # fmt: skip
        alive.remove(victim)
        changed |= set(targets)
    fused = [index for index in range(height) if index not in alive]
    first = history[0] if history else {}
    importance = {"block": [first.get(index, math.nan) for index in range(height)]}
    return Edit(
        layers=alive if fuse else None,
        tensors=_new_tensors(layers, stack, changed - set(fused)) if epochs else {},
        expected=subject.probe(model),
        summary=f"Fused blocks {', '.join(map(str, fused)) or 'none'} into their neighbours.",
        facts={"fused": list(losses), "influence": history, "loss": losses},
        chart=partial(importance_chart, importance, {"block": fused}, ylabel="macro influence") if fuse else None,
    )


@torch.no_grad()
def macro_influence(subject: Subject, layers: nn.ModuleList, alive: list[int], texts: list[Tensor]) -> dict[int, float]:
    """Block -> 1 - mean cosine over tokens of the last block's output with and without it (before the final norm)."""
    states: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda _, __, out: states.append(_first(out)))
    sums, tokens = dict.fromkeys(alive, 0.0), 0
    try:
        for ids_1T in tqdm(texts, desc="influence", unit="sequence", disable=None):
            subject.run(subject.model, ids_1T)
            whole_1TD = states.pop()
            tokens += ids_1T.numel()
            for index in alive:
                skip(layers[index], "block", None)
                try:
                    subject.run(subject.model, ids_1T)
                finally:
                    del layers[index].forward  # the class's own again
                sums[index] += cosine_similarity(whole_1TD.float(), states.pop().float(), dim=-1).sum().item()
    finally:
        handle.remove()
    return {index: 1 - total / tokens for index, total in sums.items()}


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _around(alive: list[int], victim: int, group: int) -> list[int]:
    """``group`` living blocks with the victim near their middle; fewer where there are no more."""
    start = max(0, min(alive.index(victim) - group // 2, len(alive) - group))
    return alive[start : start + group]


@dataclass
class _Recorded:
    """What goes into and comes out of a group of blocks, and how each block was called besides."""

    inputs_NTD: Tensor
    outputs_NTD: Tensor
    calls: list[tuple[tuple, dict]]  # of each member, without the hidden states


@torch.no_grad()
def _record(subject: Subject, members: list[nn.Module]) -> _Recorded:
    inputs, outputs, calls = [], [], {}

    def enter(place: int, args: tuple, kwargs: dict) -> None:
        hidden_1TD, *rest = args if args else (kwargs["hidden_states"],)
        if place == 0:
            inputs.append(hidden_1TD)
        calls[place] = tuple(rest), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, place=place: enter(place, args, kwargs), with_kwargs=True
        )
        for place, layer in enumerate(members)
    ]
    handles.append(members[-1].register_forward_hook(lambda _, __, out: outputs.append(_first(out))))
    try:
        for ids_1T in tqdm(subject.calibration, desc="record", unit="sequence", disable=None):
            subject.run(subject.model, ids_1T)
    finally:
        for handle in handles:
            handle.remove()
    return _Recorded(torch.cat(inputs), torch.cat(outputs), [calls[place] for place in range(len(members))])


class _Fused(nn.Module):
    """Parametrization ``W -> W + B A + (C D) * W_v`` in fp32. B and C start at zero: at first nothing changes."""

    def __init__(self, weight: Tensor, grafted: Tensor | None, rank: int):
        super().__init__()
        rows, columns = weight.shape

        def factors() -> tuple[nn.Parameter, nn.Parameter]:
            right = torch.empty(rank, columns, device=weight.device)
            nn.init.kaiming_uniform_(right, a=math.sqrt(5))
            return nn.Parameter(torch.zeros(rows, rank, device=weight.device)), nn.Parameter(right)

        self.b, self.a = factors()
        self.grafted = grafted
        if grafted is not None:
            self.c, self.d = factors()

    def forward(self, weight: Tensor) -> Tensor:
        change = self.b @ self.a
        if self.grafted is not None:
            change = change + (self.c @ self.d) * self.grafted.float()
        return (weight.float() + change).to(weight.dtype)


def _tune(
    targets: list[nn.Module],
    victim: nn.Module | None,
    pair: _Recorded,
    places: list[int],
    rank: int,
    epochs: int,
    batch_size: int,
    rates: tuple[float, float],
    loss: str,
) -> dict[str, float]:
    """Tunes and folds. -> mean loss over the text before and after."""
    donors = dict(victim.named_modules()) if victim is not None else {}
    gates, tuned, wrapped = [], [], []
    for layer in targets:
        for name, module in list(layer.named_modules()):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if weight.dim() == 1:  # of a norm
                tuned.append(weight.requires_grad_(True))
            elif weight.dim() == 2:
                donor = getattr(donors.get(name), "weight", None)
                fits = donor is not None and donor.shape == weight.shape
                fused = _Fused(weight, donor.detach() if fits else None, rank)
                parametrize.register_parametrization(module, "weight", fused)
                gates += [fused.c, fused.d] if fits else []
                tuned += [fused.a, fused.b]
                wrapped.append(module)
    if not wrapped or (victim is not None and not gates):
        raise FuseError("fuse_gpt: the blocks hold no matrices that fit each other, so they can't be fused.")
    calls = [pair.calls[place] for place in places]
    count = len(pair.inputs_NTD)

    def batch_loss(rows: Tensor) -> Tensor:
        hidden = pair.inputs_NTD[rows]
        for layer, (args, kwargs) in zip(targets, calls):
            hidden = _first(layer(hidden, *args, **kwargs))
        return _distance(hidden.float(), pair.outputs_NTD[rows].float(), loss)

    @torch.no_grad()
    def whole_loss() -> float:
        parts = torch.arange(count).split(batch_size)
        return sum(batch_loss(rows).item() * len(rows) for rows in parts) / count

    before = whole_loss()
    optimizer = torch.optim.Adam(
        [{"params": gates, "lr": rates[0]}, {"params": tuned, "lr": rates[1]}][0 if gates else 1 :], betas=BETAS
    )
    steps = epochs * math.ceil(count / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with tqdm(total=steps, desc="tune", unit="step", disable=None) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(count).split(batch_size):
                optimizer.zero_grad()
                batch_loss(rows).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    after = whole_loss()
    with torch.no_grad():
        for module in wrapped:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for layer in targets:
        layer.requires_grad_(False)
    return {"before": before, "after": after}


def _distance(student_NTD: Tensor, teacher_NTD: Tensor, loss: str) -> Tensor:
    """Mean over tokens, in fp32."""
    if loss == "mse":
        return mse_loss(student_NTD, teacher_NTD)
    student, teacher = (log_softmax(states, dim=-1).flatten(0, -2) for states in (student_NTD, teacher_NTD))
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def _new_tensors(layers: nn.ModuleList, stack: str, changed: set[int]) -> dict[str, Tensor]:
    """Stored name -> values, for all parameters of the changed layers."""
    return {
        f"{stack}.{index}.{name}": parameter.detach()
        for index in sorted(changed)
        for name, parameter in layers[index].named_parameters()
    }


def _check_stored(subject: Subject, layers: nn.ModuleList, stack: str) -> None:
    """Tuned layers are written under their modules' names, so the checkpoint has to use those."""
    wanted = _new_tensors(layers, stack, set(range(len(layers))))
    if unknown := sorted(set(wanted) - set(subject.checkpoint.tensors)):
        raise FuseError(f"{subject.candidate.name}: how {unknown[0]} is stored is not known here. It can't be fused.")
