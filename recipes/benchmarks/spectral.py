"""CPU time per matrix of the spectral methods, as ratios to the singular value decompositions that they cannot avoid.

For each method and shape, in turn: the method on K task vectors, and ``torch.linalg.svd`` of every matrix that it
decomposed in that call: as the matrix lies (what a direct implementation pays), and in whichever of its two
orientations is faster. A ratio is that of neighbouring runs in one process; CPU seconds, one thread, so that a busy
machine disturbs little. See the README beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_fuse import registry
from hf_fuse.merge.methods import _spectral

TARGET = 1.5
METHODS = ("tsv_m", "iso_c", "iso_cts", "opcm", "subspace_boosting")
SHAPES = ("1024x1024", "2816x1024", "1024x2816", "256x1024")


def task_vectors(rows: int, columns: int, count: int, seed: int = 0) -> Tensor:
    """Changes as fine-tuning makes them: a few strong directions, some of them common, above a full spectrum."""
    random = torch.Generator().manual_seed(seed)
    deltas = 1e-4 * torch.randn(count, rows, columns, generator=random)
    common = torch.randn(rows, 4, generator=random) @ torch.randn(4, columns, generator=random)
    for delta in deltas:
        own = torch.randn(rows, 16, generator=random) @ torch.randn(16, columns, generator=random)
        delta += 1e-4 * (own + common)
    return deltas


def caller(name: str, deltas: Tensor) -> Callable[[], Tensor]:
    """The method on these task vectors, as the engine calls it; a post step on their sum."""
    kind = "post" if name in registry.names("post") else "merge"
    method = registry.get(kind, name)
    options = {
        option.keyword: [option.default] * len(deltas) if option.per_model else option.default
        for option in method.options.values()
    }
    argument = deltas.sum(0) if kind == "post" else deltas
    return lambda: method.function(argument, **options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Collects the matrices that are decomposed inside the block."""
    genuine, found = _spectral.thin_svd, []

    def record(matrix: Tensor) -> _spectral.Triplets:
        found.append(matrix.clone())
        _spectral.thin_svd = genuine  # wide matrices go through it twice
        try:
            return genuine(matrix)
        finally:
            _spectral.thin_svd = record

    _spectral.thin_svd = record
    try:
        yield found
    finally:
        _spectral.thin_svd = genuine


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def decompose(matrices: list[Tensor]) -> None:
    for matrix in matrices:
        torch.linalg.svd(matrix, full_matrices=False)


def compare(name: str, shape: str, count: int, repeats: int) -> dict:
    """Ratios of ``repeats`` runs, and what the matrices were."""
    rows, columns = (int(part) for part in shape.split("x"))
    work = caller(name, task_vectors(rows, columns, count))
    with recorded() as matrices:
        work()
    turned = [matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T.contiguous() for matrix in matrices]
    decompose(matrices[:1])  # the first call of LAPACK is slower
    direct, best, taken = [], [], []
    for _ in range(repeats):
        own, plain, tall = seconds(work), seconds(lambda: decompose(matrices)), seconds(lambda: decompose(turned))
        taken.append(own)
        direct.append(own / plain)
        best.append(own / min(plain, tall))
    return {
        "decompositions": len(matrices),
        "seconds": statistics.median(taken),
        "to_direct": statistics.median(direct),
        "to_best": statistics.median(best),
        "to_best_range": [min(best), max(best)],
    }


def print_table(rows: dict[str, dict[str, dict]], count: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{count} task vectors, CPU time, one thread")
    table.add_column("method")
    table.add_column("matrix")
    for heading in ("SVDs", "seconds", "/ SVDs as they lie", "/ faster orientation", "aim"):
        table.add_column(heading, justify="right")
    for name, shapes in rows.items():
        for shape, row in shapes.items():
            low, high = row["to_best_range"]
            met = "" if row["to_best"] <= TARGET else "over "
            table.add_row(
                name, shape, str(row["decompositions"]), f"{row['seconds']:.2f}", f"{row['to_direct']:.2f}",
                f"{row['to_best']:.2f} ({low:.2f}-{high:.2f})", f"{met}{TARGET}",
            )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxCOLUMNS")
    parser.add_argument("--models", type=int, default=3, help="task vectors (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options = parser.parse_args(arguments)
    if options.models < 1 or options.repeats < 1:
        parser.error("--models and --repeats must be at least 1")
    if wrong := [shape for shape in options.shapes if not all(map(str.isdigit, shape.split("x"))) or "x" not in shape]:
        parser.error(f"--shapes: {wrong[0]} is not ROWSxCOLUMNS")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engine's workers do
    rows: dict[str, dict[str, dict]] = {}
    try:
        with torch.inference_mode():
            for name in options.methods:
                for shape in options.shapes:
                    print(f"{name} {shape}", file=sys.stderr)
                    rows.setdefault(name, {})[shape] = compare(name, shape, options.models, options.repeats)
    finally:
        torch.set_num_threads(threads)
    if options.json:
        options.json.write_text(json.dumps({"models": options.models, "rows": rows}, indent=2) + "\n")
    print_table(rows, options.models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
