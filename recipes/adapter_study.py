# quick
"""LoRA, MixLoRA, DynMoLE and MoLA with equally many trainable parameters, on several tasks at once.

    python recipes/adapter_study.py            # under a minute: one seed, hardly trained; shows that everything runs
    python recipes/adapter_study.py --full     # the study: three seeds, several minutes on two cores

A small Llama learns docstrings of the standard library. Adapters on the frozen model then learn five kinds of text at
once: docstrings, code, the language reference, docstrings in capitals, and the reference read backwards. Every method
tries the same learning rates; validation text decides, and the tables show test text that neither has seen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_fuse
from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE, WHOLE = "base", "whole model"


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    size: ModelSize = ModelSize()
    base_steps: int = 500
    steps: int = 150
    rates: tuple[float, ...] = (3e-3, 1e-2)
    seeds: int = 3
    windows: int = 48  # held-out sequences per task
    train_tokens: int = 300_000
    source_characters: int = 3_500_000


FULL = Effort()
QUICK = Effort(ModelSize(32, 64, 2, 2, 64), 20, 8, (3e-3,), 1, 8, 20_000, 600_000)


@dataclass
class Row:
    """One model of one seed."""

    perplexities: list[float]  # per task, on test text
    trainable: int
    rate: float | None
    seconds: float  # per training step
    usage: dict[str, list[list[float]]]  # layer -> tasks x experts: shares of the router's choices


# -- methods ---------------------------------------------------------------------------------------------------------


def adapters(layers: int) -> dict[str, Callable[[int], Any]]:
    """Method -> rank -> config, with the routing defaults of the papers and four experts per layer on average."""
    import peft

    def of(config: Callable[..., Any], **options: Any) -> Callable[[int], Any]:
        return lambda r: config(r=r, lora_alpha=2 * r, target_modules=EVERYWHERE, task_type="CAUSAL_LM", **options)

    growing = [2 + round(4 * layer / max(layers - 1, 1)) for layer in range(layers)]  # MoLA: few below, many above
    still = {"lora_dropout": 0.0}
    return {
        "LoRA": of(peft.LoraConfig, **still),
        "MixLoRA": of(hf_fuse.MixLoraConfig, num_experts=4, top_k=2, router_aux_loss_coef=1e-2, **still),
        "DynMoLE": of(hf_fuse.DynMoleConfig, num_experts=4, **still),
        "MoLA": of(hf_fuse.MolaConfig, num_experts=growing, top_k=2, **still),
    }


def equal_ranks(size: ModelSize) -> dict[str, int]:
    """Ranks with which all methods train about equally many parameters; LoRA's is between 4 and 16."""
    methods = adapters(size.layers)

    def count(name: str, rank: int) -> int:
        return trainable(with_adapter(new_model(size, byte_tokenizer(size.context), 0), methods[name](rank)))

    counts = {name: {rank: count(name, rank) for rank in range(1, 9)} for name in methods if name != "LoRA"}
    per_rank = count("LoRA", 1)
    best: tuple[float, dict[str, int]] = (math.inf, {})
    for lora_rank in range(4, 17):
        budget = per_rank * lora_rank
        ranks = {name: min(of, key=lambda rank: abs(of[rank] - budget)) for name, of in counts.items()}
        spread = max(abs(counts[name][rank] / budget - 1) for name, rank in ranks.items())
        best = min(best, (spread, {"LoRA": lora_rank, **ranks}), key=lambda found: found[0])
    return best[1]


def with_adapter(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# -- tasks -----------------------------------------------------------------------------------------------------------


def texts_of(effort: Effort) -> dict[str, tuple[list[str], list[str]]]:
    """Task -> training and held-out documents."""
    from hf_fuse.data.stdlib_text import stdlib_domains

    domains = {domain.name: domain for domain in stdlib_domains(source_characters=effort.source_characters)}

    def shown(name: str, show: Callable[[str], str]) -> tuple[list[str], list[str]]:
        return [show(text) for text in domains[name].train], [show(text) for text in domains[name].held_out]

    return {
        "docs": shown("docs", str),
        "source": shown("source", str),
        "manual": shown("manual", str),
        "docs in capitals": shown("docs", str.upper),
        "manual backwards": shown("manual", lambda text: text[::-1]),
    }


def perplexity(model: Any, windows_NL: Tensor) -> float:
    with torch.no_grad():
        loss = model(input_ids=windows_NL, labels=windows_NL, use_cache=False).loss
    return math.exp(loss.item())


def usage_of(model: Any, windows: Sequence[Tensor]) -> dict[str, list[list[float]]]:
    """Layer -> tasks x experts: where each task's tokens go, as a mean over the routers of the layer."""
    found: dict[str, list[list[float]]] = {}
    model.train()  # routers keep statistics in training only; nothing here is random
    for windows_NL in windows:
        with torch.no_grad():
            model(input_ids=windows_NL, labels=windows_NL, use_cache=False)
        loads: dict[str, list[Tensor]] = {}
        for name, statistics_of in hf_fuse.router_statistics(model).items():
            loads.setdefault(f"layer {re.search(r'[.]([0-9]+)[.]', name)[1]}", []).append(statistics_of["load"])
        for layer, of_routers in loads.items():
            found.setdefault(layer, []).append(torch.stack(of_routers).mean(0).tolist())
    model.eval()
    return found


# -- one seed --------------------------------------------------------------------------------------------------------


def run_seed(seed: int, effort: Effort) -> dict[str, Any]:
    """One seed, start to end, in a process of its own with one thread."""
    from hf_fuse.demo_training import quiet_and_reproducible

    with quiet_and_reproducible():
        tokenizer = byte_tokenizer(effort.size.context)
        tasks = texts_of(effort)
        streams = [token_stream(tokenizer, learnt, effort.train_tokens) for learnt, _ in tasks.values()]
        parts: dict[str, list[Tensor]] = {"validation": [], "test": []}
        for _, held_out in tasks.values():
            length = 2 * effort.windows * effort.size.context
            windows_NL = token_stream(tokenizer, held_out, length)[:length].view(-1, effort.size.context)
            for number, part in enumerate(parts.values()):
                part.append(windows_NL[number::2])
        base = new_model(effort.size, tokenizer, seed)
        train(base, streams[:1], Schedule(effort.base_steps, 4e-3), seed=seed)

        def scores(model: Any, part: str) -> list[float]:
            return [perplexity(model, windows_NL) for windows_NL in parts[part]]

        rows = {BASE: Row(scores(base, "test"), 0, None, 0.0, {})}
        ranks, methods = equal_ranks(effort.size), adapters(effort.size.layers)
        starts = {name: partial(with_adapter, config=methods[name](ranks[name])) for name in methods}
        for name, start in {**starts, WHOLE: lambda model: model}.items():
            lowest = math.inf
            for rate in effort.rates:
                torch.manual_seed(seed)
                model = start(copy.deepcopy(base))
                before = time.perf_counter()
                train(model, streams, Schedule(effort.steps, rate), seed=seed)
                seconds = (time.perf_counter() - before) / effort.steps
                reached = statistics.mean(map(math.log, scores(model, "validation")))
                if reached < lowest:
                    lowest = reached
                    usage = {} if name in ("LoRA", WHOLE) else usage_of(model, parts["test"])
                    rows[name] = Row(scores(model, "test"), trainable(model), rate, seconds, usage)
            print(f"seed {seed}: {name} done", file=sys.stderr)
    return {"tasks": list(tasks), "ranks": ranks, "rows": rows}


# -- report ----------------------------------------------------------------------------------------------------------


def average(row: Row) -> float:
    """Geometric mean over the tasks: no task counts more for being harder."""
    return math.exp(statistics.mean(map(math.log, row.perplexities)))


def separation(usage: dict[str, list[list[float]]]) -> float:
    """How differently two tasks are routed: total variation distance, mean over pairs of tasks and layers, 0 to 1."""
    distances = [
        sum(abs(a - b) for a, b in zip(one, other)) / 2
        for of_tasks in usage.values()
        for one, other in itertools.combinations(of_tasks, 2)
    ]
    return statistics.mean(distances)


def findings(runs: list[dict[str, Any]]) -> list[str]:
    """Sentences computed from the figures."""
    of = {name: [average(run["rows"][name]) for run in runs] for name in runs[0]["rows"]}
    gap = [base - whole for base, whole in zip(of[BASE], of[WHOLE])]
    said = []
    for name in ("MixLoRA", "DynMoLE", "MoLA"):
        better = [lora - other for lora, other in zip(of["LoRA"], of[name])]
        wins = sum(value > 0 for value in better)
        verdict = "ahead of" if wins == len(runs) else "behind" if wins == 0 else "neither ahead of nor behind"
        part = statistics.mean(value / whole for value, whole in zip(better, gap))
        apart = statistics.mean(separation(run["rows"][name].usage) for run in runs)
        said.append(
            f"{name} is {verdict} LoRA: better in {wins} of {len(runs)} seeds, by {part:+.1%} of what training the "
            f"whole model gains. Two tasks differ by {apart:.2f} in where their tokens go (0: not at all, 1: to other "
            "experts)."
        )
    counts = [runs[0]["rows"][name].trainable for name in of if name not in (BASE, WHOLE)]
    said.append(
        f"The methods train {min(counts):,} to {max(counts):,} parameters of {runs[0]['rows'][WHOLE].trainable:,}. A "
        "model this small, on texts this short, says which method learns faster here, not which is better at scale."
    )
    return said


def report(runs: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Prints the table and what follows from it, draws the charts, and returns the study's JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_fuse.plots import bar_chart, heat_map

    tasks, names = runs[0]["tasks"], list(runs[0]["rows"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="perplexity per byte on test text (lower is better)")
    table.add_column("task")
    means, notes = {}, {"± seeds": [], "parameters": [], "learning rate": [], "ms per step": []}
    for name in names:
        table.add_column(name, justify="right")
        rows = [run["rows"][name] for run in runs]
        averages = [average(row) for row in rows]
        means[name] = {
            task: statistics.mean(row.perplexities[number] for row in rows) for number, task in enumerate(tasks)
        } | {"average": statistics.mean(averages)}
        notes["± seeds"].append(f"{statistics.stdev(averages) if len(runs) > 1 else 0:.2f}")
        notes["parameters"].append(f"{rows[0].trainable:,}")
        notes["learning rate"].append(", ".join(f"{rate:g}" for rate in sorted({row.rate for row in rows if row.rate})))
        notes["ms per step"].append(f"{1000 * statistics.mean(row.seconds for row in rows):.0f}")
    for task in (*tasks, "average"):
        table.add_row(task, *(f"{means[name][task]:.2f}" for name in names), style="bold" if task == "average" else "")
    for note, values in notes.items():
        table.add_row(note, *values, style="dim")
    console = Console(highlight=False)
    console.print(table)
    said = findings(runs)
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    families = {
        name: "reference" if name in (BASE, WHOLE) else "LoRA" if name == "LoRA" else "experts" for name in names
    }
    charts = [
        bar_chart(
            means, path=output / "perplexity.png", title="Perplexity on several tasks at once, equally many parameters",
            ylabel="perplexity per byte (lower is better)", lower_is_better=True, families=families,
        )
    ]  # fmt: skip
    for name in names:
        if usage := runs[0]["rows"][name].usage:
            columns = [f"{layer}: expert {k}" for layer, rows in usage.items() for k in range(len(rows[0]))]
            matrix = [[share for rows in usage.values() for share in rows[number]] for number in range(len(tasks))]
            charts.append(
                heat_map(
                    matrix, row_labels=tasks, column_labels=columns, path=output / f"experts_{name.lower()}.png",
                    title=f"{name}: share of each task's choices per layer and expert", value_range=(0, 1),
                )
            )  # fmt: skip
    return {
        "tasks": tasks, "ranks": runs[0]["ranks"], "means": means, "findings": said,
        "charts": [chart.name for chart in charts],
        "seeds": [{name: asdict(row) for name, row in run["rows"].items()} for run in runs],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("adapter-study"), help="folder for study.json and charts")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    seeds = range(given.seeds or effort.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort)))
    else:
        runs = [run_seed(seed, effort) for seed in seeds]
    facts = {"full": given.full, "seconds": round(time.perf_counter() - started, 1), **report(runs, given.output)}
    (given.output / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if not given.full:
        print("\nThis was a quick run: the models are hardly trained and the figures mean nothing. Use --full.")
    print(f"\n{given.output / 'study.json'} and charts in {given.output} ({facts['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
