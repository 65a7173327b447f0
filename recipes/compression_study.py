# quick
"""Every way of making a model smaller on small text models: what is left of size, quality and time.

    python recipes/compression_study.py            # seconds: one seed, hardly trained; shows that everything runs
    python recipes/compression_study.py --full     # the study: three seeds, several minutes on two cores

A small Llama and a small mixture of experts (Mixtral's make) learn code, docstrings and the language reference of the
standard library. Each is then compressed by ``hf_fuse.compress``, calibrated on training text, and measured on held-out
text before and after. What a method cuts and what it trains differ, so rows of one group are to be compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hf_fuse
from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

DENSE, MIXTURE = "dense model", "mixture of experts"
EXPERTS = 8
FUSE, LORA_ONLY, DELETED = "fuse_gpt, grafted", "fuse_gpt, low-rank only", "fuse_gpt, no tuning"


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    size: ModelSize = ModelSize(layers=6)
    steps: int = 500
    seeds: int = 3
    calibration: int = 64  # sequences
    held_out: int = 24_000  # characters
    epochs: int = 8  # of what trains while it compresses
    train_tokens: int = 300_000
    source_characters: int = 3_500_000
    cuts: tuple[int, ...] = (1, 2)  # parts that a dense model of six layers loses
    groups: tuple[int, ...] = (4, 2)  # of experts that are left


FULL = Effort()
QUICK = Effort(ModelSize(32, 48, 3, 2, 64), 8, 1, 8, 2_000, 1, 20_000, 600_000, (1,), (4,))


@dataclass(frozen=True)
class Case:
    """One compression. ``source``: the model, or the label of the case whose output is compressed further."""

    label: str
    source: str
    method: str
    parameters: dict[str, Any]


@dataclass
class Row:
    """One case of one seed: shares are of the trained model that it started from."""

    group: str
    parameters: float
    perplexity: float
    speed: float


def cases(effort: Effort) -> list[Case]:
    """The dense model loses parts of its layers, the mixture experts, or what experts are made of."""
    tuned = {"epochs": effort.epochs, "batch_size": 8}
    found = []
    for count in effort.cuts:
        parts = f"{count} of {effort.size.layers}"
        for target in ("attention", "mlp", "block"):
            found.append(Case(f"llm_drop {target}, {parts}", DENSE, "llm_drop", {"target": target, "drop": count}))
        found.append(Case(f"llm_drop joint, {2 * count}", DENSE, "llm_drop", {"target": "joint", "drop": 2 * count}))
        fused = {"fuse": count, "group": 4, **tuned}
        found += [
            Case(f"{FUSE}, {parts}", DENSE, "fuse_gpt", fused),
            Case(f"{LORA_ONLY}, {parts}", DENSE, "fuse_gpt", fused | {"inject": False}),
            Case(f"{DELETED}, {parts}", DENSE, "fuse_gpt", fused | {"epochs": 0}),
        ]
    for share in (0.125, 0.25):
        units = {"threshold": 1.0, "most": share}
        found.append(Case(f"feature_merging, {share:.1%} of units", DENSE, "feature_merging", units))
    for groups in effort.groups:
        for weighting in ("usage", "uniform"):
            of = {"groups": groups, "weighting": weighting}
            label = f"expert_merging, {groups} of {EXPERTS}, {weighting}"
            found.append(Case(label, MIXTURE, "expert_merging", of))
    half = f"expert_merging, 4 of {EXPERTS}, usage"
    factored = {"rank": 8, "keep": 0.1, "learning_rate": 1e-3, "teacher": MIXTURE, **tuned}
    found += [
        Case("low_rank_experts, not merged", MIXTURE, "low_rank_experts", factored),
        Case("low_rank_experts after merging to 4", half, "low_rank_experts", factored),
    ]
    return found


def new_mixture(size: ModelSize, tokenizer: Any, seed: int) -> Any:
    """As the dense model, with eight experts of half the width, two per token."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    mark = tokenizer.bos_token_id
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=size.feed_forward // 2,
            num_hidden_layers=size.layers // 2, num_attention_heads=size.heads, num_key_value_heads=size.heads,
            max_position_embeddings=size.context, num_local_experts=EXPERTS, num_experts_per_tok=2,
            initializer_range=0.6 / size.hidden**0.5, router_aux_loss_coef=0.02, tie_word_embeddings=True,
            sliding_window=None, bos_token_id=mark, eos_token_id=mark, pad_token_id=mark,
        )
    )  # fmt: skip


def train_models(folder: Path, effort: Effort, seed: int) -> dict[str, str]:
    """Name -> folder of the trained models; writes the texts to calibrate and to evaluate on beside them."""
    from hf_fuse.data.stdlib_text import stdlib_domains

    tokenizer = byte_tokenizer(effort.size.context)
    domains = stdlib_domains(source_characters=effort.source_characters)
    streams = [token_stream(tokenizer, domain.train, effort.train_tokens) for domain in domains]
    for name, part in (("calibration", "train"), ("held_out", "held_out")):
        texts = [text[: effort.held_out // 8] for domain in domains for text in getattr(domain, part)[-8:]]
        most = effort.held_out if part == "held_out" else effort.calibration * effort.size.context * 4
        (folder / f"{name}.txt").write_text("\n\n".join(texts)[:most], encoding="utf-8")
    models = {DENSE: new_model(effort.size, tokenizer, seed), MIXTURE: new_mixture(effort.size, tokenizer, seed)}
    for name, model in models.items():
        model.config.output_router_logits = name == MIXTURE  # its balance loss counts while it learns
        train(model, streams, Schedule(effort.steps, 4e-3), seed=seed)
        model.config.output_router_logits = False
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"seed {seed}: {name} trained", file=sys.stderr)
    return {name: str(folder / name) for name in models}


def run_seed(seed: int, effort: Effort) -> dict[str, Any]:
    """One seed, start to end, in a process of its own with one thread."""
    from hf_fuse.demo_training import quiet_and_reproducible

    rows, before = {}, {}
    with quiet_and_reproducible(), tempfile.TemporaryDirectory(prefix="hf-fuse-study-") as scratch:
        folder = Path(scratch)
        models = train_models(folder, effort, seed)
        group = {DENSE: DENSE, MIXTURE: MIXTURE}
        for number, case in enumerate(cases(effort)):
            made = hf_fuse.compress(
                {
                    "method": case.method, "model": models[case.source], "seed": seed, "dtype": "float32",
                    "parameters": {key: models.get(value, value) for key, value in case.parameters.items()},
                    "calibration": {"path": str(folder / "calibration.txt"), "sequences": effort.calibration},
                    "evaluation": str(folder / "held_out.txt"),
                },
                folder / str(number),
            )  # fmt: skip
            models[case.label], group[case.label] = str(made.output), group[case.source]
            first = before.setdefault(group[case.label], made.before)
            rows[case.label] = Row(
                group[case.label],
                made.after["parameters"] / first["parameters"],
                made.after["perplexity"] / first["perplexity"],
                # Both were measured a moment ago, so what else the machine does counts for both.
                made.after["tokens_per_second"]
                / made.before["tokens_per_second"]
                * (rows[case.source].speed if case.source in rows else 1.0),
            )
            print(f"seed {seed}: {case.label}: {rows[case.label].perplexity:.3f}", file=sys.stderr)
    return {"before": before, "rows": rows}


# -- report ----------------------------------------------------------------------------------------------------------


def findings(runs: Sequence[dict[str, Any]], effort: Effort) -> list[str]:
    """Sentences computed from the figures: which of two ways loses less, seed by seed."""

    def compared(one: str, other: str, what: str) -> str:
        gaps = [math.log(run["rows"][other].perplexity / run["rows"][one].perplexity) for run in runs]
        wins = sum(gap > 0 for gap in gaps)
        verdict = "ahead of" if wins == len(runs) else "behind" if wins == 0 else "neither ahead of nor behind"
        change = math.exp(-statistics.mean(gaps)) - 1
        return f"{what}: {one} is {verdict} {other} ({wins} of {len(runs)} seeds, perplexity {change:+.1%})."

    said = []
    for count in effort.cuts:
        parts = f"{count} of {effort.size.layers}"
        said += [
            compared(f"llm_drop attention, {parts}", f"llm_drop mlp, {parts}", "Which half of a layer can go"),
            compared(f"{FUSE}, {parts}", f"{LORA_ONLY}, {parts}", "What the deleted block's weights give"),
            compared(f"{LORA_ONLY}, {parts}", f"{DELETED}, {parts}", "What tuning gives"),
        ]
    said += [
        compared(f"expert_merging, {n} of {EXPERTS}, usage", f"expert_merging, {n} of {EXPERTS}, uniform",
                 "What weighting by use gives")
        for n in effort.groups
    ]  # fmt: skip
    merged, after = f"expert_merging, 4 of {EXPERTS}, usage", "low_rank_experts after merging to 4"
    said.append(compared(after, merged, "Merged, then trained as low rank"))
    said.append(
        "Training while compressing also adapts to the calibration text, which rows without training do not see. A "
        "model this small says which method loses less here, not which does at scale; its speed is mostly overhead."
    )
    return said


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label -> group, means over the seeds, and the spread of the perplexity."""
    found = {}
    for label, first in runs[0]["rows"].items():
        rows = [run["rows"][label] for run in runs]
        perplexities = [row.perplexity for row in rows]
        found[label] = {
            "group": first.group,
            "parameters": statistics.mean(row.parameters for row in rows),
            "perplexity": math.exp(statistics.mean(map(math.log, perplexities))),
            "spread": statistics.stdev(perplexities) if len(runs) > 1 else 0.0,
            "speed": math.exp(statistics.mean(math.log(row.speed) for row in rows)),
        }
    return found


def report(runs: list[dict[str, Any]], effort: Effort, command: str, output: Path) -> dict[str, Any]:
    """Prints tables and findings, writes them as Markdown, draws the chart, and returns the study's JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_fuse.plot_points import scatter

    console, found, said = Console(highlight=False), summary(runs), findings(runs, effort)
    columns = ("method", "parameters", "perplexity", "± seeds", "speed")
    lines = [f"# Smaller models\n\n`{command}`, {len(runs)} seed{'s' if len(runs) > 1 else ''}. All figures are shares "
             "of the trained model's; perplexity is per byte of held-out text.\n"]  # fmt: skip
    for group in (DENSE, MIXTURE):
        firsts = [run["before"][group] for run in runs]
        title = (
            f"{group}: {firsts[0]['parameters']:,} parameters, "
            f"perplexity {statistics.mean(one['perplexity'] for one in firsts):.2f}"
        )
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        lines += [f"## {title}\n", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
        for label, row in found.items():
            if row["group"] == group:
                cells = (label, f"{row['parameters']:.2f}", f"{row['perplexity']:.3f}", f"{row['spread']:.3f}",
                         f"{row['speed']:.2f}")  # fmt: skip
                table.add_row(*cells)
                lines.append(f"| {' | '.join(cells)} |")
        console.print(table)
        lines.append("")
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    lines += [*(f"- {sentence}" for sentence in said), ""]
    (output / "study.md").write_text("\n".join(lines), encoding="utf-8")
    method_of = {case.label: case.method for case in cases(effort)}
    short = {label: label.removeprefix(method).strip(" ,") for label, method in method_of.items()}
    charts = [
        scatter(
            {short[k]: (row["parameters"], row["perplexity"]) for k, row in found.items() if row["group"] == group},
            path=output / f"{group.replace(' ', '_')}.png", title=f"What compression costs: {group}",
            xlabel="parameters left", ylabel="perplexity / perplexity before (lower is better)",
            families={short[label]: method for label, method in method_of.items()},
            spread={short[label]: row["spread"] for label, row in found.items()},
        ).name
        for group in (DENSE, MIXTURE)
    ]  # fmt: skip
    return {
        "means": found, "findings": said, "charts": charts,
        "seeds": [
            {"before": run["before"], "rows": {label: asdict(row) for label, row in run["rows"].items()}}
            for run in runs
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("compression-study"), help="folder for tables and charts")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    seeds = range(given.seeds or effort.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort)))
    else:
        runs = [run_seed(seed, effort) for seed in seeds]
    command = f"python recipes/compression_study.py{' --full' if given.full else ''}"
    facts = report(runs, effort, command, given.output) | {
        "full": given.full, "seconds": round(time.perf_counter() - started, 1)
    }  # fmt: skip
    (given.output / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if not given.full:
        print("\nThis was a quick run: the models are hardly trained and the figures mean nothing. Use --full.")
    print(f"\n{given.output}: study.md, study.json and charts ({facts['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
