"""Wall time and memory of ``hf-fuse merge``, as ratios to a floor measured in the same run.

A family of checkpoints (a base and its fine-tunes) is made once. Then, for each method, whole processes take turns: the
*floor* (imports torch, reads every input byte, writes the output bytes once), ``hf-fuse merge``, and, with
``--mergekit``, mergekit on the equivalent recipe. A wall-clock figure means nothing on another machine; the ratio of
two neighbours in one run does. See the README beside this file.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from checkpoint_family import FamilySize, build_family
from process_usage import cores, file_system, measure, memory_available, wait_for_calm

MB = 1_000_000
ATTEMPTS = 5  # at a run that other processes do not disturb

# Reads the weights of every folder named on the command line in pieces of a megabyte, writes as many bytes as asked.
FLOOR = """
import pathlib, sys
import torch
output, count, *folders = sys.argv[1:]
piece = bytearray(1_000_000)
for folder in folders:
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
pathlib.Path(output).mkdir()
left = int(count)
with (pathlib.Path(output) / "model.safetensors").open("wb", buffering=0) as file:
    while left:
        left -= file.write(memoryview(piece)[:left])
"""


@dataclass(frozen=True)
class Case:
    """One method: how much of the family it takes, its parameters here and in mergekit, the ratio aimed at."""

    models: int | None = None
    base: bool = True
    parameters: tuple[tuple[str, float], ...] = ()
    mergekit_parameters: tuple[tuple[str, float], ...] = ()
    weight: float | None = None
    target: float | None = None


CASES = {
    "linear": Case(base=False, weight=1.0, target=1.3),
    "task_arithmetic": Case(weight=0.4, target=1.3),
    "model_stock": Case(target=1.3),
    "slerp": Case(models=2, base=False, parameters=(("t", 0.5),), mergekit_parameters=(("t", 0.5),), target=1.6),
    "nuslerp": Case(models=2, weight=0.5),
    "ties": Case(weight=1.0, parameters=(("density", 0.2),), mergekit_parameters=(("density", 0.2),), target=2.5),
    "dare_linear": Case(weight=0.4, parameters=(("density", 0.5),), mergekit_parameters=(("density", 0.5),)),
    "dare_ties": Case(weight=0.4, parameters=(("density", 0.5),), mergekit_parameters=(("density", 0.5),), target=2.5),
    "passthrough": Case(models=1, base=False),
    "wise_ft": Case(models=1, target=1.3),
    "nearswap": Case(models=1, mergekit_parameters=(("t", 0.0001),), target=1.3),
    "multislerp": Case(weight=1.0, mergekit_parameters=(("weight", 1.0),)),
    "karcher": Case(base=False, target=3.5),
    "magnitude": Case(weight=0.4, target=3.5),
    "breadcrumbs": Case(weight=0.4, mergekit_parameters=(("density", 0.2), ("gamma", 0.1)), target=3.5),
    "breadcrumbs_ties": Case(weight=0.4, mergekit_parameters=(("density", 0.2), ("gamma", 0.1)), target=3.5),
    "della": Case(weight=0.4, mergekit_parameters=(("density", 0.7), ("epsilon", 0.07)), target=3.5),
    "della_linear": Case(weight=0.4, mergekit_parameters=(("density", 0.7), ("epsilon", 0.07)), target=3.5),
    "consensus": Case(target=3.5),
    "pcb": Case(target=3.5),
    "sce": Case(mergekit_parameters=(("select_topk", 0.1),), target=3.5),
    "varm": Case(),
    "widen": Case(),
    "arcee_fusion": Case(models=1),
    "ram": Case(),
    "ramplus_tl": Case(),
}


def recipes(method: str, family: list[Path]) -> tuple[dict, dict, list[Path]]:
    """The method's recipe for hf-fuse, the same for mergekit, and the folders that it reads."""
    case, (base, *tuned) = CASES[method], family
    models = tuned[: case.models]
    weight = {} if case.weight is None else {"weight": case.weight}
    ours: dict = {
        "method": method,
        "models": [{"path": str(path), **weight} for path in models],
        "parameters": dict(case.parameters),
        "out_dtype": "bfloat16",
    }
    theirs: dict = {
        "merge_method": method,
        "models": [{"model": str(path)} | ({"parameters": dict(weight)} if weight else {}) for path in models],
        "parameters": dict(case.mergekit_parameters),
        "dtype": "bfloat16",
    }
    if case.base:
        ours["base_model"] = theirs["base_model"] = str(base)
    if method == "slerp":
        theirs["base_model"] = str(models[0])  # mergekit's word for the model at t = 0
    return ours, theirs, [base, *models] if case.base else models


@contextlib.contextmanager
def work_folder(chosen: Path | None, needed: int) -> Iterator[Path]:
    """``chosen``, which is kept; else a folder that vanishes, in shared memory if that leaves 4 GB to the programs."""
    if chosen:
        chosen.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(chosen).free + sum(p.stat().st_size for p in chosen.rglob("*.safetensors"))
        if free < needed:
            raise SystemExit(
                f"{chosen}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free. Choose another --work-dir."
            )
        yield chosen.resolve()
        return
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > needed and memory_available() > needed + 4e9
    with tempfile.TemporaryDirectory(prefix="hf-fuse-benchmark-", dir=memory if roomy else None) as folder:
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{folder}: {needed / 1e9:.1f} GB needed. Choose a roomier place with --work-dir.")
        yield Path(folder)


def compare(
    method: str, family: list[Path], size: FamilySize, work: Path, repeats: int, options: argparse.Namespace
) -> dict[str, list[dict]]:
    """Runs floor, hf-fuse and (with ``--mergekit``) mergekit in turn; the raw usage of each."""
    ours, theirs, read = recipes(method, family)
    mine, yours, output = work / "recipe.yaml", work / "mergekit.yaml", work / "output"
    mine.write_text(yaml.safe_dump(ours, sort_keys=False))
    yours.write_text(yaml.safe_dump(theirs, sort_keys=False))
    inputs = family if options.floor_inputs == "family" else read
    environment = child_environment(options.threads)
    commands = {
        "floor": [sys.executable, "-c", FLOOR, str(output), str(size.nbytes), *map(str, inputs)],
        "hf_fuse": [sys.executable, "-m", "hf_fuse", "merge", str(mine), "--output", str(output), "--overwrite"],
    }
    if options.mergekit:
        commands["mergekit"] = [str(options.mergekit), "-m", "mergekit.scripts.run_yaml", str(yours), str(output)]
    used: dict[str, list[dict]] = {name: [] for name in commands}
    for turn, (name, command) in itertools.product(range(repeats), commands.items()):
        if name == "mergekit" and turn >= (options.mergekit_repeats or repeats):
            continue
        for attempt in range(1, 1 + (ATTEMPTS if options.calm is not None else 1)):
            shutil.rmtree(output, ignore_errors=True)
            if options.calm is not None:
                wait_for_calm(options.calm)
            print(f"{method} {turn + 1}/{repeats}: {name}{f', again ({attempt})' * (attempt > 1)}", file=sys.stderr)
            usage = measure(command, environment)
            if options.calm is None or (usage.others or 0.0) <= options.calm:
                break
        used[name].append(asdict(usage))
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if not size.nbytes <= written < size.nbytes + MB:
        raise RuntimeError(f"{method}: {written} bytes of weights written, expected {size.nbytes} and a header.")
    shutil.rmtree(output, ignore_errors=True)
    return used


def child_environment(threads: int | None) -> dict[str, str]:
    """Offline, with compiled modules kept as in an ordinary installation, and as many threads as asked."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def summarize(used: dict[str, list[dict]], target: float | None) -> dict:
    """Ratios of each run to its neighbour: median, least and greatest, and the highest memory in bytes."""

    def ratio(quantity: str, above: str, below: str) -> dict[str, float]:
        values = [a[quantity] / b[quantity] for a, b in zip(used[above], used[below])]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def most(quantity: str, name: str) -> int | None:
        values = [run[quantity] for run in used[name] if run[quantity] is not None]
        return max(values) if values else None

    row: dict = {
        "wall_to_floor": ratio("wall", "hf_fuse", "floor"),
        "cpu_to_floor": ratio("cpu", "hf_fuse", "floor"),
        "target": target,
        "peak_anonymous": most("anonymous", "hf_fuse"),
        "peak_rss": most("rss", "hf_fuse"),
        "floor_peak_anonymous": most("anonymous", "floor"),
    }
    if used.get("mergekit"):
        row |= {
            "mergekit_wall_to_floor": ratio("wall", "mergekit", "floor"),
            "wall_to_mergekit": ratio("wall", "hf_fuse", "mergekit"),
            "mergekit_peak_anonymous": most("anonymous", "mergekit"),
        }
    return row


def print_table(report: dict) -> None:
    """One row per method on standard output."""
    from rich.console import Console
    from rich.table import Table

    def times(value: dict[str, float]) -> str:
        spread = "" if value["min"] == value["max"] else f" ({value['min']:.2f}-{value['max']:.2f})"
        return f"{value['median']:.2f}{spread}"

    def megabytes(value: int | None) -> str:
        return "?" if value is None else f"{value / MB:.0f}"

    rows = report["methods"]
    peer = any("wall_to_mergekit" in row for row in rows.values())
    doubled = any("double" in row for row in rows.values())
    title = f"hf-fuse merge, {report['parameters'] / 1e6:.1f} M parameters, {report['repeats']} runs each"
    table = Table(title=title)
    headings = ["method", "wall / floor", "target", "CPU / floor", "anonymous MB", "RSS MB"]
    headings += ["anonymous MB, twice the layers", "wall / floor, twice"] if doubled else []
    headings += ["mergekit wall / floor", "ours / mergekit", "mergekit anonymous MB"] if peer else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, row in rows.items():
        if "failed" in row:
            table.add_row(method, "failed")
            continue
        met = row["target"] is None or row["wall_to_floor"]["median"] <= row["target"]
        cells = [method, times(row["wall_to_floor"]), f"{'' if met else 'over '}{row['target'] or '-'}"]
        cells += [times(row["cpu_to_floor"]), megabytes(row["peak_anonymous"]), megabytes(row["peak_rss"])]
        if doubled:
            twice = row.get("double")
            cells += [megabytes(twice["peak_anonymous"]), times(twice["wall_to_floor"])] if twice else ["-", "-"]
        if peer:
            cells += [times(row["mergekit_wall_to_floor"]), f"{row['wall_to_mergekit']['median']:.3f}"]
            cells += [megabytes(row["mergekit_peak_anonymous"])]
        table.add_row(*cells)
    # A pipe has no width; a table cut at 80 columns would lose figures.
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(
        f"Floor: import torch, read {report['floor_inputs']} in pieces of 1 MB, write the output once; "
        f"median {report['floor_wall']:.2f} s here, {megabytes(report['floor_peak_anonymous'])} MB anonymous.\n"
        f"{report['cores']} cores, OMP_NUM_THREADS {report['threads'] or 'unset'}; "
        f"files on {report['file_system']} ({'' if report['in_memory'] else 'not '}in memory), read once before; "
        f"other processes kept {report['others_median']} cores busy (median; at most {report['others_most']}).\n"
        "Ratios of neighbouring runs: median (least-greatest). Memory: highest of all runs, children included.",
        soft_wrap=True,
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    size = FamilySize()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in asdict(size).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program per method (default 3)")
    parser.add_argument("--double", action="store_true", help="again with twice the layers: memory must not grow")
    parser.add_argument(
        "--floor-inputs",
        choices=("family", "method"),
        default="family",
        help="the floor reads the base and all fine-tunes (default), or only what the method reads",
    )
    parser.add_argument(
        "--calm",
        type=float,
        metavar="CORES",
        help="wait until other processes keep fewer than this many cores busy (at most a minute a run), and repeat "
        f"a run that they disturb (at most {ATTEMPTS} times)",
    )
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all programs (default: as it is)")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="interpreter of an environment with mergekit")
    parser.add_argument("--mergekit-repeats", type=int, help="fewer runs of mergekit, which takes its time")
    parser.add_argument("--work-dir", type=Path, help="keeps the family there (default: a folder that is removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures, single runs included")
    options = parser.parse_args(arguments)
    options.size = FamilySize(**{name: getattr(options, name) for name in asdict(size)})
    for name in (*asdict(size), "repeats"):
        if getattr(options, name) < (0 if name == "seed" else 1):
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.models < 2 or options.vocab < 4:
        parser.error("--models must be at least 2 and --vocab at least 4")
    if options.hidden % options.heads or options.heads % options.kv_heads or options.hidden // options.heads % 2:
        parser.error("--hidden must be an even multiple of --heads, and --heads a multiple of --kv-heads")
    if not hasattr(os, "wait4"):
        parser.error("this system cannot say what a child process used (os.wait4); use Linux or macOS")
    if options.mergekit:
        probe = [str(options.mergekit), "-c", "import mergekit.scripts.run_yaml"]
        try:
            found = subprocess.run(probe, capture_output=True, env=child_environment(None)).returncode == 0
        except OSError:
            found = False
        if not found:
            parser.error("--mergekit: this interpreter cannot import mergekit; expected a path like .venv/bin/python")
    return options


def main(arguments: list[str] | None = None) -> int:
    import hf_fuse

    options = parse_arguments(arguments)
    # Compiled once, as an installer would have done; else the first run of each would pay for it.
    compileall.compile_dir(Path(hf_fuse.__file__).parent, quiet=2)
    size = options.size
    rows: dict[str, dict] = {}
    runs: dict[str, dict] = {}
    scales = [("single", size)]
    if options.double:
        scales.append(("double", FamilySize(**{**asdict(size), "layers": 2 * size.layers})))
    # Beside the family: the output, and for a moment the one that it replaces.
    needed = max(scale.nbytes * (scale.models + 3) for _, scale in scales)
    if options.work_dir:
        needed = sum(scale.nbytes * (scale.models + 1) for _, scale in scales) + 2 * scales[-1][1].nbytes
    with work_folder(options.work_dir, needed) as work:
        kind = file_system(work)
        for scale_name, scale in scales:
            folder = work / f"family-{scale.layers}"
            print(f"making {scale.models + 1} checkpoints of {scale.nbytes / MB:.0f} MB", file=sys.stderr)
            family = build_family(scale, folder)
            warm_up(family)
            if scale_name == "double":
                options.mergekit = None
            for method in options.methods:
                try:
                    used = compare(method, family, scale, work, options.repeats, options)
                except RuntimeError as error:
                    print(f"{method}: {error}", file=sys.stderr)
                    rows.setdefault(method, {})["failed"] = str(error)
                    continue
                runs[f"{scale_name}/{method}"] = used
                summary = summarize(used, CASES[method].target)
                if scale_name == "single":
                    rows[method] = summary
                elif "failed" not in rows[method]:
                    rows[method]["double"] = summary
            if not options.work_dir:
                shutil.rmtree(folder)
    single = [used for key, used in runs.items() if key.startswith("single/")]
    floors = [run for used in single for run in used["floor"]]
    loads = [
        run["others"] for used in runs.values() for name in used for run in used[name] if run["others"] is not None
    ]
    report = {
        "parameters": size.parameters,
        "size": asdict(size),
        "repeats": options.repeats,
        "cores": cores(),
        "threads": options.threads or os.environ.get("OMP_NUM_THREADS"),
        "file_system": kind,
        "in_memory": kind in ("tmpfs", "ramfs"),
        "floor_inputs": f"base + {size.models}" if options.floor_inputs == "family" else "the method's inputs",
        "floor_wall": statistics.median(run["wall"] for run in floors) if floors else 0.0,
        "floor_peak_anonymous": max((run["anonymous"] or 0 for run in floors), default=0) or None,
        "others_median": round(statistics.median(loads), 2) if loads else "an unknown number of",
        "others_most": round(max(loads), 2) if loads else "unknown",
        "methods": rows,
        "runs": runs,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)
    return 1 if any("failed" in row for row in rows.values()) else 0


def warm_up(family: list[Path]) -> None:
    """Reads every weight file once, so that the first run finds them in the page cache like the later ones."""
    piece = bytearray(MB)
    for path in itertools.chain.from_iterable(folder.glob("*.safetensors") for folder in family):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


if __name__ == "__main__":
    sys.exit(main())
