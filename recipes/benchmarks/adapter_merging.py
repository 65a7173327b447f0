"""Wall time of adapters merged into one, as ratios to PEFT's ``add_weighted_adapter`` in the same run.

Three LoRA adapters of a base (0.5 billion parameters unless said otherwise) become one. Whole processes take turns, as
people run them: PEFT loads the base, loads the adapters, combines them by ``cat`` and saves; ``hf-fuse merge`` does the
same by concatenation and by truncated SVD to a chosen rank. ``--svd`` adds PEFT's own truncated SVD, which needs a
minute or more. The numbers are checked against dense SVDs of some matrices. See the README beside this file.
"""

from __future__ import annotations

import argparse
import compileall
import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import yaml
from checkpoint_family import FamilySize
from merge import ATTEMPTS, MB, child_environment, work_folder
from process_usage import cores, file_system, measure, wait_for_calm

WEIGHTS = (0.5, 0.3, 0.7)
TARGET = 2.0  # wall time in units of PEFT's `cat`
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
output, kind, rank, weights, base, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
names = [f"adapter_{number}" for number in range(len(adapters))]
model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
for name, adapter in zip(names[1:], adapters[1:]):
    model.load_adapter(adapter, adapter_name=name)
weights = [float(weight) for weight in weights.split(",")]
options = {"svd_rank": int(rank)} if kind == "svd" else {}
model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
model.save_pretrained(output, selected_adapters=["merged"])
"""


def build_base(size: FamilySize, folder: Path) -> None:
    """A base of zeros, as a file with holes: merging adapters looks at its names and shapes only."""
    from hf_fuse.checkpoint.writer import lay_out

    folder.mkdir(parents=True, exist_ok=True)
    layout = lay_out(((name, "BF16", shape) for name, shape in size.tensors().items()), 1 << 62)
    for file, header in layout.headers.items():
        with (folder / file).open("wb") as handle:
            handle.write(header)
            handle.truncate(layout.sizes[file])
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2))


def build_adapter(size: FamilySize, rank: int, seed: int, folder: Path) -> None:
    """A LoRA of all projections in fp32, scaled by ``alpha / r = 2``."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in size.tensors().items():
        if name.split(".")[-2] in PROJECTIONS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=random) * shape[1] ** -0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=random) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": list(PROJECTIONS), "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def check(output: Path, adapters: list[Path], rank: int | None, modules: int) -> float:
    """The largest relative difference from the dense sum, or from its truncated SVD, over some modules."""
    import torch
    from safetensors.torch import load_file

    states = [load_file(path / "adapter_model.safetensors") for path in adapters]
    merged = load_file(output / "adapter_model.safetensors")
    # PEFT's own output carries the adapter's scale 1 as well: lora_alpha is the rank.
    names = sorted(name.removesuffix(".lora_A.weight") for name in merged if name.endswith(".lora_A.weight"))
    worst = 0.0
    for name in names[:: max(1, len(names) // modules)][:modules]:
        change = sum(
            2 * weight * state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
            for weight, state in zip(WEIGHTS, states)
        )
        if rank is not None:
            u, values, v = torch.linalg.svd(change, full_matrices=False)
            change = (u[:, :rank] * values[:rank]) @ v[:rank]
        found = merged[f"{name}.lora_B.weight"].double() @ merged[f"{name}.lora_A.weight"].double()
        worst = max(worst, float((found - change).norm() / change.norm()))
    return worst


def run(options: argparse.Namespace, work: Path) -> dict:
    """Makes the adapters, lets the programs take turns, and checks what they made."""
    base, adapters = work / "base", [work / f"adapter-{number}" for number in range(len(WEIGHTS))]
    build_base(options.size, base)
    for number, folder in enumerate(adapters):
        build_adapter(options.size, options.rank, number, folder)
    commands, ranks = {}, {"peft cat": None, "concatenated": None, "truncated": options.rank}
    for name, kind in (("peft cat", "cat"), *((("peft svd", "svd"),) if options.svd else ())):
        arguments = [work / name, kind, options.rank, ",".join(map(str, WEIGHTS)), base, *adapters]
        commands[name] = [sys.executable, "-c", PEFT, *map(str, arguments)]
    ranks["peft svd"] = options.rank
    for name in ("concatenated", "truncated"):
        recipe = {
            "method": "task_arithmetic",
            "output_kind": "adapter",
            "base_model": str(base),
            "models": [{"path": str(path), "weight": w} for path, w in zip(adapters, WEIGHTS)],
        } | ({"rank": options.rank} if ranks[name] else {})
        file = work / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        commands[name] = [sys.executable, "-m", "hf_fuse", "merge", str(file), "--output", str(work / name)]
    used: dict[str, list[dict]] = {name: [] for name in commands}
    for turn in range(options.repeats):
        for name, command in commands.items():
            if name == "peft svd" and turn:
                continue
            for attempt in range(1, 1 + (ATTEMPTS if options.calm is not None else 1)):
                shutil.rmtree(work / name, ignore_errors=True)
                if options.calm is not None:
                    wait_for_calm(options.calm)
                again = f", again ({attempt})" * (attempt > 1)
                print(f"{turn + 1}/{options.repeats}: {name}{again}", file=sys.stderr)
                usage = measure(command, child_environment(options.threads))
                if options.calm is None or (usage.others or 0.0) <= options.calm:
                    break
            used[name].append(asdict(usage))
    report = {
        "parameters": options.size.parameters,
        "rank": options.rank,
        "file_system": file_system(work),
        "runs": used,
    }
    report["programs"] = {}
    for name, runs in used.items():
        ratios = [one["wall"] / other["wall"] for one, other in zip(runs, used["peft cat"])]
        place = work / name / "merged" if name.startswith("peft") else work / name
        report["programs"][name] = {
            "wall_to_cat": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "wall": statistics.median(run["wall"] for run in runs),
            "peak_anonymous": max((run["anonymous"] or 0 for run in runs), default=0) or None,
            "others": max((run["others"] or 0.0 for run in runs), default=0.0),
            "relative_error": check(place, adapters, ranks[name], options.check) if options.check else None,
        }
    return report


def print_table(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"three adapters of rank {report['rank']}, base of {report['parameters'] / 1e6:.0f} M parameters"
    table = Table(title=title)
    for heading in ("program", "wall / PEFT cat", "aim", "wall s", "anonymous MB", "difference from dense"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for name, row in report["programs"].items():
        ratio, error, memory = row["wall_to_cat"], row["relative_error"], row["peak_anonymous"]
        ours = not name.startswith("peft")
        table.add_row(
            f"hf-fuse, {name}" if ours else name,
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            f"{'' if ratio['median'] <= TARGET else 'over '}{TARGET}" if ours else "",
            f"{row['wall']:.1f}",
            "?" if memory is None else f"{memory / MB:.0f}",
            "" if error is None else f"{error:.1e}",
        )
    busy = max(row["others"] for row in report["programs"].values())
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(
        f"{cores()} cores, files on {report['file_system']}; other processes kept at most {busy:.2f} cores busy. Whole "
        "processes with imports and loading; ratios of neighbouring runs: median (least-greatest).",
        soft_wrap=True,
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    size = FamilySize()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab"):
        default = getattr(size, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--rank", type=int, default=16, help="of each adapter, and of the truncated result (default 16)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default 3)")
    parser.add_argument("--check", type=int, default=3, help="modules compared with dense SVDs (default 3; 0: none)")
    parser.add_argument("--svd", action="store_true", help="also PEFT's svd, once; takes a minute or more")
    parser.add_argument("--calm", type=float, metavar="CORES", help="as in merge.py: wait until others are quiet")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all programs (default: as it is)")
    parser.add_argument("--work-dir", type=Path, help="kept (default: a folder that is removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures, single runs included")
    options = parser.parse_args(arguments)
    if min(options.rank, options.repeats) < 1 or options.check < 0:
        parser.error("--rank and --repeats must be at least 1, --check at least 0")
    names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")
    options.size = FamilySize(**{name: getattr(options, name) for name in names})
    return options


def main(arguments: list[str] | None = None) -> int:
    import hf_fuse

    options = parse_arguments(arguments)
    compileall.compile_dir(Path(hf_fuse.__file__).parent, quiet=2)
    with work_folder(options.work_dir, options.size.nbytes) as work:
        report = run(options, work)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
