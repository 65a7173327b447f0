"""Gradients of merging coefficients by contraction: one live model, task vectors streamed from files beside it.

The live model holds ``theta_j = theta0_j + sum_k c_kj tau_kj`` for every tensor j. Whatever loss is computed with it,
``dL/dc_kj = <dL/dtheta_j, tau_kj>``. So one plain backward pass is enough: as soon as the gradient of a parameter is
complete it is multiplied with the K task vectors, which are read block by block, and thrown away. Memory: the live
model, the gradient of one parameter, a few blocks of numbers; never a second model.

How an estimator uses it (``family`` is an open :class:`hf_fuse.merge.family.Family`)::

    layout, count = columns(family.units, "tensor")
    coefficients_KG = torch.full((len(family.models), count), 0.3)
    optimizer = torch.optim.Adam([coefficients_KG], lr=1e-3)
    with Contraction(model, family.merger, family.units, layout, count) as contraction:
        for batch in batches:
            contraction.write(coefficients_KG)  # the live model is the merged one now
            loss(model(**batch)).backward()  # as often as wanted: gradients add up
            coefficients_KG.grad = contraction.taken_gradient()
            optimizer.step()

Coefficients that are a function of something else: write ``alpha_KG.detach()``, then
``alpha_KG.backward(contraction.taken_gradient())``. What is learned about the elements themselves, such as a mask m in
``theta_0 + sum_k c_k m tau_k``, goes in by ``change`` (returns m tau) and gets its gradient by ``watch`` (is handed
dL/dtheta and the unchanged tau, block by block).

Gradient checkpointing, accumulation, bf16 models and tied weights need nothing special. With LoRA adapters of the base
the product BA is not formed: ``<G, s B A> = s <B' G, A>``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import FilePool
from hf_fuse.merge.columns import Columns
from hf_fuse.merge.learned_weights import chunk_numbers
from hf_fuse.merge.live import Region, regions
from hf_fuse.merge.sources import BLOCK, Buffers
from hf_fuse.merge.stream import Merger
from hf_fuse.merge.units import MERGE, Unit

Change = Callable[[Unit, int, Tensor], Tensor]  # (unit, first element, deltas_KN) -> deltas_KN
Watch = Callable[[Unit, int, Tensor, Tensor], None]  # (unit, first element, gradient_N, deltas_KN)


class Contraction:
    """A live model that holds the merged weights, and the gradient of its coefficients.

    Args:
        model: any module loaded by transformers; its weights are overwritten. Parameters that are not merged, and those
            whose coefficients are not learned, get no gradient.
        merger: knows the sources of base and models, and the precision to compute in.
        units: what is merged; those of other actions are left alone.
        layout: columns of each unit; of units that are not in it the live model keeps what it has.
        count: columns in all, G.
        cut, seed: of tensors with several columns, see :func:`~hf_fuse.merge.learned_weights.chunk_numbers`.
        change: what to make of the task vectors before they are used.
        watch: is shown every block of gradients.

    Attributes:
        gradient_KG: sum of dL/dc since it was last taken, in the merger's precision.
    """

    def __init__(
        self,
        model: Any,
        merger: Merger,
        units: Iterable[Unit],
        layout: Mapping[str, Columns],
        count: int,
        *,
        cut: str = "slices",
        seed: int = 0,
        change: Change | None = None,
        watch: Watch | None = None,
    ):
        self.model, self.merger, self.layout, self.cut, self.seed = model, merger, layout, cut, seed
        self.change, self.watch = change, watch
        units = list(units)
        merged = {unit.name: unit for unit in units if unit.action == MERGE and unit.name in layout}
        shapes = {name: unit.shape for name, unit in merged.items()}
        places = regions(model, shapes, {unit.name for unit in units} - set(merged))
        self.places: list[tuple[Unit, Region]] = [(merged[name], region) for name, region in places.items()]
        device = self.places[0][1].parameter.device
        self._buffers = Buffers(device, merger.dtype, FilePool())
        models = max(len(unit.inputs) for unit in merged.values())
        self.gradient_KG = torch.zeros(models, count, dtype=merger.dtype, device=device)
        self._written: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Contraction:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        inside: dict[Tensor, list[tuple[Unit, Region]]] = {}
        for unit, region in self.places:
            if self.layout[unit.name].learned and isinstance(region.parameter, torch.nn.Parameter):
                inside.setdefault(region.parameter, []).append((unit, region))
        for parameter, parts in inside.items():
            parameter.requires_grad_(True)
            hook = self._hook(parts)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._buffers.pool.close()
        self._buffers.close()

    def taken_gradient(self) -> Tensor:
        """dL/dc summed over all backward passes since this was last asked for, ``fp32 [K, G]`` on the CPU (fp64 if that
        is the merger's precision)."""
        taken = self.gradient_KG.cpu().clone()
        self.gradient_KG.zero_()
        return taken

    @torch.no_grad()
    def write(self, coefficients_KG: Tensor, *, everything: bool = False) -> None:
        """Puts the merged weights into the live model; tensors whose coefficients are as before are left alone.

        Args:
            everything: write those too, because what ``change`` does has changed.
        """
        new_KG = coefficients_KG.detach().to(self.gradient_KG)
        old_KG = None if everything else self._written
        for unit, region in self.places:
            part = self._of(unit)
            if old_KG is None or not torch.equal(new_KG[:, part], old_KG[:, part]):
                self._write(unit, region, new_KG[:, part])
        self._written = new_KG.clone()

    def _of(self, unit: Unit) -> slice:
        own = self.layout[unit.name]
        return slice(own.first, own.first + own.count)

    def _hook(self, parts: list[tuple[Unit, Region]]) -> Callable[[Tensor], None]:
        def contract(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            for unit, region in parts:
                self._contract(unit, region, gradient)

        return contract

    def _write(self, unit: Unit, region: Region, coefficients_KC: Tensor) -> None:
        factors = self._factors(unit)
        if factors is not None:
            self._write_low_rank(unit, region, coefficients_KC[:, 0], factors)
            return
        for start, stop in self.merger.blocks(0, unit.numel, BLOCK):
            deltas_KN, base_N = self.merger.block(unit, start, stop, self._buffers)
            if self.change is not None:
                deltas_KN = self.change(unit, start, deltas_KN)
            if coefficients_KC.shape[1] == 1:
                merged_N = coefficients_KC[:, 0] @ deltas_KN
            else:
                merged_N = (coefficients_KC[:, self._chunks(unit, start, stop)] * deltas_KN).sum(0)
            region.write(start, merged_N.add_(base_N))

    def _write_low_rank(
        self, unit: Unit, region: Region, coefficients_K: Tensor, factors: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Row by row, the sum over models as one product of their factors side by side."""
        left_MR = torch.cat([left * c for (left, _), c in zip(factors, coefficients_K)], 1)
        right_RN = torch.cat([right for _, right in factors])
        width = right_RN.shape[1]
        rows = max(1, BLOCK // width)
        for first in range(0, len(left_MR), rows):
            left = left_MR[first : first + rows]
            base_N = self._buffers.numbers("base", len(left) * width)
            self.merger.sources[unit.base.key].read(unit.base.name, first * width, base_N, self._buffers)
            region.write(first * width, base_N.view(-1, width).addmm_(left, right_RN).view(-1))

    @torch.no_grad()
    def _contract(self, unit: Unit, region: Region, gradient: Tensor) -> None:
        total_KC = self.gradient_KG[:, self._of(unit)]
        factors = self._factors(unit)
        if factors is not None:
            gradient_MN = region.read(gradient, 0, unit.numel).view(-1, factors[0][1].shape[1]).to(total_KC.dtype)
            for total_C, (left_MR, right_RN) in zip(total_KC, factors):
                total_C += ((left_MR.T @ gradient_MN) * right_RN).sum()
            return
        for start, stop in self.merger.blocks(0, unit.numel, BLOCK):
            gradient_N = region.read(gradient, start, stop).to(total_KC.dtype)
            deltas_KN, _ = self.merger.block(unit, start, stop, self._buffers)
            if self.watch is not None:
                self.watch(unit, start, gradient_N, deltas_KN)
            if self.change is not None:
                deltas_KN = self.change(unit, start, deltas_KN)
            if total_KC.shape[1] == 1:
                total_KC[:, 0] += deltas_KN @ gradient_N
            else:
                total_KC.index_add_(1, self._chunks(unit, start, stop), deltas_KN * gradient_N)

    def _chunks(self, unit: Unit, start: int, stop: int) -> Tensor:
        count = self.layout[unit.name].count
        found = chunk_numbers(unit.name, unit.numel, count, self.cut, self.seed, start, stop)
        return found.to(self.gradient_KG.device)

    def _factors(self, unit: Unit) -> list[tuple[Tensor, Tensor]] | None:
        """``(left [m, r], right [r, n])`` of every model, scaled, if all are LoRA adapters of the base and nobody wants
        to see the elements."""
        if self.change is not None or self.watch is not None or self.layout[unit.name].count > 1 or unit.base is None:
            return None
        base, found = self.merger.sources[unit.base.key], []
        for part in unit.inputs:
            source = self.merger.sources[part.key]
            if not source.delta_from(base, part.name):
                return None
            name = source.tensors[part.name].name
            if name in source.bound.low_rank:
                left, right, scale = source.bound.factors(name, self.merger.dtype)
                found.append((left.to(self.gradient_KG.device) * scale, right.to(self.gradient_KG.device)))
            else:  # this model leaves the tensor as it is
                rows = unit.shape[0] if unit.shape else 1
                width = math.prod(unit.shape) // max(rows, 1)
                found.append((self.gradient_KG.new_zeros(rows, 1), self.gradient_KG.new_zeros(1, width)))
        return found
