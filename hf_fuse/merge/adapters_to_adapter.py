"""LoRA adapters of one base become one LoRA adapter.

Weighted sums stay in the space of the factors: concatenation is exact, and a smaller rank is the truncated SVD of the
sum, computed without ever forming it. Other methods on task vectors (TIES, DARE, ...) see the dense changes, one tensor
at a time, through the same stream as a merge of models; their result is cut down to the rank asked for.

PEFT's own combination of A's with A's and B's with B's adds cross terms that none of the adapters has; nothing of the
kind happens here.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import TORCH_NAMES
from hf_fuse.checkpoint.writer import PartialFolder, exclusive_output
from hf_fuse.errors import CheckpointError, OutputError
from hf_fuse.merge.adapter_plan import AdapterPlan
from hf_fuse.merge.progress import Progress
from hf_fuse.merge.rank_space import LowRankChange, concatenated, low_rank, squared_norm, truncated
from hf_fuse.merge.sources import Buffers
from hf_fuse.merge.stream import Merger
from hf_fuse.merge.units import Unit
from hf_fuse.merge.workers import Workers, World


def write_adapter(
    plan: AdapterPlan,
    folder: Path,
    device: torch.device,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    workers: int | None = None,
) -> bool:
    """Makes the adapter folder; whether this process leads. Of several processes the first does all the work, for
    there is little."""
    with World() as world, world.together():
        if world.leads:
            _Run(plan, device, allow_nonfinite, workers).write(folder, overwrite)
        return world.leads


class _Run:
    def __init__(self, plan: AdapterPlan, device: torch.device, allow_nonfinite: bool, workers: int | None):
        self.plan, self.allow_nonfinite = plan, allow_nonfinite
        self.dtype = getattr(torch, plan.recipe.dtype)
        self.merger = Merger(plan.method, plan.sources, plan.units, self.dtype, plan.recipe.seed, allow_nonfinite)
        self.device, self.count = device, workers

    def write(self, folder: Path, overwrite: bool) -> None:
        plan, merger = self.plan, self.merger
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(sum(plan.layout.sizes.values()), quiet=False))
            pool = Workers(self.device, self.dtype, self.count)
            stack.callback(pool.close)
            for parent in plan.inputs.parents.values():
                stack.callback(parent.adapter.close)
            partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
            partial.create(plan.layout)
            merger.folder = partial.folder
            units = merger.prepare(World(size=1, rank=0), pool)
            stack.callback(merger.close)

            def work(unit: Unit, buffers: Buffers, _: int) -> None:
                if unit.name not in plan.pairs:
                    merger.merge(unit, 0, unit.numel, sink, buffers)
                    return
                change = self._dense(unit, buffers) if plan.dense else self._factored(unit)
                for name, side in plan.pairs[unit.name].stored(*self._padded(unit, change)).items():
                    self._put(partial, unit, name, side)
                    progress.add(side.nbytes)

            def sink(unit: Unit, start: int, out: Tensor) -> None:
                partial.write(plan.layout.places[plan.stored[unit.name]], start, memoryview(out.numpy()))
                progress.add(len(out))

            pool.run(sorted(units, key=lambda unit: -unit.numel), work)
            progress.phase("save")
            partial.sync()
            from hf_fuse.merge.adapter_finish import write_merge_companions

            write_merge_companions(plan, partial.folder)
            partial.publish()

    def _factored(self, unit: Unit) -> LowRankChange:
        plan, parts = self.plan, []
        for part, weight in zip(unit.inputs, plan.weights[unit.name]):
            adapter = plan.parents[part.key].adapter
            if unit.name not in adapter.low_rank:
                continue
            left, right, scale = adapter.factors(unit.name, self.dtype)
            if not self.allow_nonfinite and not (left.sum() + right.sum()).isfinite():
                self._check_inputs(left, right, part.key, unit.name)
            parts.append((left, right, weight * scale))
        left, right = concatenated(parts)
        rank = plan.pairs[unit.name].rank
        if left.shape[1] > rank:
            change = truncated(left, right, rank)
        elif plan.recipe.rank is None:
            return LowRankChange(left, right)
        else:
            change = LowRankChange(left, right, 0.0, squared_norm(left, right))
        plan.lost[unit.name] = change.error, change.total
        return change

    @staticmethod
    def _check_inputs(left: Tensor, right: Tensor, key: str, name: str) -> None:
        bad = sum(int(side.numel() - side.isfinite().sum()) for side in (left, right))
        if bad:
            raise CheckpointError(
                f"{key}: its factors of tensor {name} hold {bad} NaN or infinite value(s). Mend the adapter, or pass "
                "--allow-nonfinite to concatenate it all the same."
            )

    def _dense(self, unit: Unit, buffers: Buffers) -> LowRankChange:
        rows = unit.shape[0]
        dense = buffers.numbers("dense", rows, unit.numel // rows)
        for start, merged, _ in self.merger.computed(unit, 0, unit.numel, buffers):
            dense.view(-1)[start : start + merged.numel()] = merged
        if not dense.isfinite().all():
            raise OutputError(
                f"tensor {unit.name}: the merge makes values that are not finite, which no low-rank change "
                "approximates. Choose smaller weights, or mend the adapters."
            )
        change = low_rank(
            lambda: [(0, dense)], tuple(dense.shape), self.plan.pairs[unit.name].rank, unit.name,
            seed=self.plan.recipe.seed,
        )  # fmt: skip
        if change is None:
            change = LowRankChange(dense[:, :0], dense[:0])
        self.plan.lost[unit.name] = change.error, change.total
        return change

    def _padded(self, unit: Unit, change: LowRankChange) -> tuple[Tensor, Tensor]:
        """Places are laid out for the planned rank; a change of a smaller one leaves zeros."""
        left, right = change.left_MR, change.right_RN
        rank = self.plan.pairs[unit.name].rank
        missing = rank - left.shape[1]
        if missing:
            left = torch.cat([left, left.new_zeros(len(left), missing)], 1)
            right = torch.cat([right, right.new_zeros(missing, right.shape[1])])
        return left, right

    def _put(self, partial: PartialFolder, unit: Unit, name: str, side: Tensor) -> None:
        place = self.plan.layout.places[name]
        cast = side.to("cpu", getattr(torch, TORCH_NAMES[place.dtype])).contiguous()
        if not self.allow_nonfinite and not cast.isfinite().all():
            raise OutputError(
                f"tensor {name}: holds values that are not finite in {place.dtype}. Choose smaller weights or a wider "
                "out_dtype."
            )
        partial.write(place, 0, memoryview(cast.view(-1).view(torch.uint8).numpy()))
