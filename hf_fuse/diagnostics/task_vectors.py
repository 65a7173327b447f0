"""How far fine-tunes went from their base, in which direction, and where they disagree: what to know before merging."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_fuse import registry
from hf_fuse.merge.methods._products import add_products
from hf_fuse.merge.plan import plan
from hf_fuse.merge.progress import Progress
from hf_fuse.merge.sources import BLOCK, Buffers
from hf_fuse.merge.stream import Merger
from hf_fuse.merge.units import MERGE, Unit
from hf_fuse.merge.workers import Workers

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Comparison:
    """Task vectors of K models over some tensors. All matrices are ``float64 [K, K]``.

    ``products`` are inner products of the task vectors, ``conflicts`` the number of elements where two task vectors
    have opposite signs, ``both`` where both are not zero.
    """

    name: str
    numel: int
    base_square: float
    products: Tensor
    conflicts: Tensor
    both: Tensor

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.name, self.numel + other.numel, self.base_square + other.base_square, self.products + other.products,
            self.conflicts + other.conflicts, self.both + other.both,
        )  # fmt: skip

    @property
    def norms(self) -> list[float]:
        """L2 norms of the K task vectors."""
        return self.products.diagonal().sqrt().tolist()

    @property
    def relative_norms(self) -> list[float]:
        """The same as a share of the base's norm (infinite if the base is zero there)."""
        base = self.base_square**0.5
        return [norm / base if base else (float("inf") if norm else 0.0) for norm in self.norms]

    @property
    def changed(self) -> list[float]:
        """Share of elements that each model changed."""
        return (self.both.diagonal() / max(self.numel, 1)).tolist()

    @property
    def cosines(self) -> Tensor:
        """Cosines between task vectors; 0 where one of them is zero."""
        norms = self.products.diagonal().sqrt()
        scale = norms[:, None] * norms[None, :]
        return torch.where(scale > 0, self.products / scale.masked_fill(scale == 0, 1.0), 0.0).clamp(-1, 1)

    @property
    def sign_conflict(self) -> Tensor:
        """Share of the elements that two models both changed in which they went opposite ways."""
        return torch.where(self.both > 0, self.conflicts / self.both.clamp(min=1), 0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "numel": self.numel,
            "norms": self.norms,
            "relative_norms": self.relative_norms,
            "changed": self.changed,
            "cosines": self.cosines.tolist(),
            "sign_conflict": self.sign_conflict.tolist(),
        }


@dataclass
class Inspection:
    """Comparisons per tensor, per kind of tensor and over the whole model."""

    base: str
    models: list[str]
    tensors: list[Comparison]

    @property
    def labels(self) -> list[str]:
        """Short names for tables and axes: the last parts of the paths, as many as it takes to tell them apart."""
        parts = [re.split(r"[/\\]", model.rstrip("/\\")) for model in self.models]
        for count in range(1, max(map(len, parts)) + 1):
            short = ["/".join(p[-count:]) for p in parts]
            if len(set(short)) == len(short):
                return short
        return self.models

    @property
    def total(self) -> Comparison:
        return _sum(self.tensors, "all")

    @property
    def kinds(self) -> list[Comparison]:
        """Grouped by the name without the layer number."""
        groups: dict[str, list[Comparison]] = {}
        for tensor in self.tensors:
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", tensor.name), []).append(tensor)
        return [_sum(group, name) for name, group in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "models": self.models,
            "all": self.total.to_dict(),
            "kinds": [kind.to_dict() for kind in self.kinds],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    def plot(self, path: Path | str) -> Path:
        """Saves a heat-map of the cosines between task vectors (needs matplotlib)."""
        from hf_fuse.plots import heat_map

        return heat_map(
            self.total.cosines.tolist(),
            row_labels=self.labels,
            column_labels=self.labels,
            path=Path(path),
            title="Cosine between task vectors",
            value_range=(-1.0, 1.0),
            diverging=True,
        )


def _sum(comparisons: list[Comparison], name: str) -> Comparison:
    first, *rest = comparisons
    for other in rest:
        first = first + other
    first.name = name
    return first


def inspect_models(
    models: list[str], base: str, *, allow_pickle: bool = False, workers: int | None = None
) -> Inspection:
    """Compares the task vectors of fine-tuned models, streaming: memory stays bounded whatever the models' size.

    Args:
        models: folders, Hub ids or LoRA adapters.
        base: what they were fine-tuned from.
        allow_pickle: accept ``.bin`` inputs.

    Raises:
        FuseError: as in :func:`hf_fuse.plan`: models that do not fit, damaged files, values that are not finite.
    """
    recipe = {"method": "task_arithmetic", "base_model": base, "models": list(models)}
    made = plan(recipe, allow_pickle=allow_pickle)
    units = [unit for unit in made.units if unit.action == MERGE]
    found: dict[str, Comparison] = {}
    pool = Workers(torch.device("cpu"), torch.float32, workers)
    with Progress(made.bytes_read, quiet=False) as progress:
        progress.phase("inspect")
        merger = Merger(
            registry.get("merge", "task_arithmetic"), {key: p.source for key, p in made.parents.items()}, units,
            torch.float32, progress=progress,
        )  # fmt: skip

        def work(unit: Unit, buffers: Buffers, number: int) -> None:
            found[unit.name] = _compare(unit, merger, buffers)

        try:
            pool.run(sorted(units, key=lambda unit: -unit.numel), work)
        finally:
            pool.close()
    return Inspection(base, [model.key for model in made.recipe.models], [found[unit.name] for unit in units])


def _compare(unit: Unit, merger: Merger, buffers: Buffers) -> Comparison:
    count = len(unit.inputs)
    products, conflicts, both = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
    square = 0.0
    for start, stop in merger.blocks(0, unit.numel, BLOCK):
        block, base = merger.block(unit, start, stop, buffers)
        add_products(block, products)
        square += float(base.double().square().sum())
        signs = block.sign()
        agreement = signs @ signs.T  # agreeing minus disagreeing elements
        present = signs.abs()
        shared = present @ present.T
        both += shared
        conflicts += (shared - agreement) / 2
    return Comparison(unit.name, unit.numel, square, products, conflicts, both)


def print_inspection(inspection: Inspection, console: Console, *, per_tensor: bool = False) -> None:
    """Tables for people: the whole model, pairs of models, then kinds of tensors or every tensor."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    labels, total = inspection.labels, inspection.total
    table = Table(
        title=f"task vectors against {inspection.base}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("model", overflow="fold")
    for column in ("norm", "of the base", "changed"):
        table.add_column(column, justify="right")
    for label, norm, share, changed in zip(labels, total.norms, total.relative_norms, total.changed):
        table.add_row(label, f"{norm:.4g}", f"{share:.2%}", f"{changed:.1%}")
    console.print(table)
    if len(labels) > 1:
        pairs = Table(title="cosine / sign conflict", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        pairs.add_column("")
        for label in labels[1:]:
            pairs.add_column(label, justify="right", overflow="fold")
        for i, label in enumerate(labels[:-1]):
            cells = [
                "" if j <= i else f"{total.cosines[i, j]:+.3f} / {total.sign_conflict[i, j]:.0%}"
                for j in range(1, len(labels))
            ]
            pairs.add_row(label, *cells)
        console.print(pairs)
    rows = inspection.tensors if per_tensor else inspection.kinds
    title = "every tensor" if per_tensor else "by kind of tensor (norm: share of the base's; pairs: mean)"
    detail = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    detail.add_column("tensor", overflow="fold", min_width=30)
    for column in ("elements", "norm", *(["cosine", "conflict"] if len(labels) > 1 else [])):
        detail.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row.numel:,}", _span(row.relative_norms)]
        if len(labels) > 1:
            off = ~torch.eye(len(labels), dtype=torch.bool)
            cells += [f"{row.cosines[off].mean():+.3f}", f"{row.sign_conflict[off].mean():.0%}"]
        name = row.name if per_tensor else re.sub(r"^.*?\.\*\.", "*.", row.name)
        detail.add_row(name.removesuffix(".weight"), *cells)
    console.print(detail)


def _span(shares: list[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{low:.2%}" if f"{low:.2%}" == f"{high:.2%}" else f"{low:.2%} - {high:.2%}"
