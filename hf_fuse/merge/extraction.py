"""What an extraction of a LoRA kept and what it left out, by kind of tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FACTORS, WHOLE, LEFT_OUT = "factors", "whole", "left out"


@dataclass(frozen=True)
class Part:
    """One tensor; ``error`` and ``total`` are the squared norms of what the adapter leaves out, and of the change."""

    name: str
    kind: str
    way: str
    rank: int
    error: float
    total: float

    @property
    def relative_error(self) -> float:
        return relative(self.error, self.total)


@dataclass
class Extraction:
    """The result of :func:`hf_fuse.extract_lora`. Errors are Frobenius norms relative to that of the change."""

    output: Path
    model: str
    base: str
    parts: list[Part] = field(default_factory=list)
    bytes: int = 0

    @property
    def relative_error(self) -> float:
        """Of the whole model: what lies in tensors that were left out counts, too."""
        return _error(self.parts)

    @property
    def relative_error_of_factors(self) -> float:
        return _error([part for part in self.parts if part.way == FACTORS])

    def kinds(self) -> list[dict[str, Any]]:
        """One entry per kind of tensor and way, largest changes first."""
        groups: dict[tuple[str, str], list[Part]] = {}
        for part in self.parts:
            groups.setdefault((part.kind, part.way), []).append(part)
        whole = math.fsum(part.total for part in self.parts)
        rows = []
        for (kind, way), parts in groups.items():
            total = math.fsum(part.total for part in parts)
            ranks = [part.rank for part in parts]
            rows.append(
                {
                    "kind": kind,
                    "way": way if total or way == WHOLE else "unchanged",
                    "tensors": len(parts),
                    "share": total / whole if whole else 0.0,
                    "ranks": [min(ranks), max(ranks)] if way == FACTORS else None,
                    "relative_error": _error(parts),
                }
            )
        return sorted(rows, key=lambda row: (-row["share"], row["kind"]))

    def to_dict(self) -> dict[str, Any]:
        tensors = {
            part.name: {"way": part.way, "rank": part.rank, "relative_error": part.relative_error,
                        "norm": math.sqrt(part.total)}
            for part in self.parts
        }  # fmt: skip
        return {
            "output": str(self.output),
            "model": self.model,
            "base": self.base,
            "bytes": self.bytes,
            "relative_error": self.relative_error,
            "relative_error_of_factors": self.relative_error_of_factors,
            "kinds": self.kinds(),
            "tensors": tensors,
        }

    def print(self, console: Console) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("kind", "kept as", "tensors", "share of change", "rank", "error"):
            table.add_column(column, justify="left" if column in ("kind", "kept as") else "right")
        rows = self.kinds()
        for row in rows:
            if row["way"] == "unchanged":
                continue
            low, high = row["ranks"] or (0, 0)
            rank = "" if not high else str(high) if low == high else f"{low}-{high}"
            error = f"{row['relative_error']:.3g}"
            table.add_row(row["kind"], row["way"], str(row["tensors"]), f"{row['share']:.1%}", rank, error)
        console.print(table)
        if same := sum(row["tensors"] for row in rows if row["way"] == "unchanged"):
            print(f"unchanged: {same} tensors")
        print(f"extracted: {self.output}\nbytes: {self.bytes}")
        print(f"error: {self.relative_error_of_factors:.4g} of the adapted changes, {self.relative_error:.4g} of all")


def kind_of(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``up_proj``; ``...up_proj.bias`` -> ``up_proj.bias``."""
    module, _, leaf = name.rpartition(".")
    parts = [part for part in module.split(".") if part and not part.isdigit()]
    kind = parts[-1] if parts else leaf
    return kind if leaf == "weight" or not parts else f"{kind}.{leaf}"


def relative(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0


def _error(parts: list[Part]) -> float:
    return relative(math.fsum(part.error for part in parts), math.fsum(part.total for part in parts))
