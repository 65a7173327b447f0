# quick
"""Every merge method on small real data: accuracy beside the length of the merged change, over several seeds.

    python recipes/merge_study.py                 # seconds: one seed, hardly trained; shows that everything runs
    python recipes/merge_study.py --full          # ten to fifteen minutes on two cores: the study

``digits``: a small vision transformer learns some of scikit-learn's handwritten digits in many guises, not very well;
eight experts then continue with more digits in one guise each (turned, mirrored, inverted, patches shuffled ...).
``pairs``: six experts from the same base see two or three of the ten classes each. ``text``: the demo's three domains.
Every method of the registry runs once with its defaults (data-free) and once with the best of a small grid, chosen on
validation data that no table shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fuse import FuseError, merge_state_dicts, registry

State = dict[str, Tensor]

# Values tried for every method that has a parameter of this name, unless GRIDS says otherwise for the method. They go
# below 1/K for all suites: a grid that ends above it would lose to the mean for no other reason.
COMMON = {"lambda": (0.05, 0.1, 0.15, 0.25, 0.4, 0.7, 1.0, 1.5), "density": (0.1, 0.4)}
# Method -> parameter -> values. Named here where a common grid would miss the method's own scale or main parameter.
GRIDS: dict[str, dict[str, tuple]] = {
    "consensus": {"lambda": COMMON["lambda"], "mask_scale": (0.2, 0.5)},
    "dare_linear": {"lambda": COMMON["lambda"], "density": (0.5, 0.8)},
    "dare_ties": {"lambda": COMMON["lambda"], "density": (0.5, 0.8)},
    "della": {"lambda": COMMON["lambda"], "density": (0.4, 0.7)},
    "della_linear": {"lambda": COMMON["lambda"], "density": (0.4, 0.7)},
    "sce": {"density": (0.1, 0.3, 0.6, 1.0)},
}
SUBSPACE = ("tsv_m", "iso_c", "iso_cts", "subspace_boosting")
QUICK_GRID = 1  # values kept of each grid


@dataclass
class Suite:
    """One base, its experts, and a way to score a state dict on each task (higher is better, between 0 and 1)."""

    name: str
    unit: str
    tasks: list[str]
    base: State
    experts: list[State]
    reference: State
    score: Callable[[State, str], list[float]]  # (state, "validation" or "test") -> one score per task


@dataclass
class Row:
    """One model of one seed: scores per task on test data, and the length of its change."""

    scores: list[float]
    norm: float  # |model - base| over the mean |expert - base|
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    base_steps: int = 500
    expert_steps: int = 160
    text_steps: tuple[int, int] = (400, 120)
    seeds: int = 3
    grid: int | None = None
    methods: tuple[str, ...] = ()  # all, if empty


FULL, QUICK = Effort(), Effort(base_steps=60, expert_steps=8, text_steps=(12, 4), seeds=1, grid=QUICK_GRID)


# -- digits ----------------------------------------------------------------------------------------------------------


def guises(seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to show images ``[N, 1, 8, 8]`` with values from -1 to 1."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(16, generator=random)
    board = 1 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float()

    def shuffled(images_N: Tensor) -> Tensor:
        patches = images_N.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 16, 2, 2)[:, order]
        return patches.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)

    def noisy(images_N: Tensor) -> Tensor:
        same = torch.Generator().manual_seed(len(images_N))
        return images_N + 0.7 * torch.randn(images_N.shape, generator=same)

    return {
        "turned 90": lambda images: images.rot90(1, (2, 3)),
        "turned 180": lambda images: images.rot90(2, (2, 3)),
        "mirrored": lambda images: images.flip(3),
        "inverted": lambda images: -images,
        "rolled": lambda images: images.roll((4, 4), (2, 3)),
        "shuffled": shuffled,
        "checkered": lambda images: images * board,
        "noisy": noisy,
    }


LABEL_SETS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (1, 4, 7))  # the last overlaps: six tasks of ten classes


def digit_suites(seed: int, effort: Effort, wanted: Sequence[str] = ("digits", "pairs")) -> list[Suite]:
    """``digits`` (eight guises of all classes) and ``pairs`` (six label sets), from one base, as far as wanted."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(data.target)[order]
    # The base's images are its own; experts share theirs; nobody learns from validation or test images.
    ends = {"base": (0, 500), "train": (500, 1150), "validation": (1150, 1350), "test": (1350, 1797)}
    parts = {name: (images[a:b], labels[a:b]) for name, (a, b) in ends.items()}

    base = new_vit(seed)
    fit(base, *parts["base"], effort.base_steps, 2e-3, seed, shows=[lambda images: images, *guises(seed).values()])
    start = {name: value.clone() for name, value in base.state_dict().items()}
    shown = {name: {part: (show(x), y) for part, (x, y) in parts.items()} for name, show in guises(seed).items()}
    chosen = {}
    for classes in LABEL_SETS:
        name = "+".join(map(str, classes))
        chosen[name] = {part: _only(x, y, classes) for part, (x, y) in parts.items()}
    suites = []
    if "digits" in wanted:
        suites.append(_trained("digits", shown, base, start, seed, effort))
    if "pairs" in wanted:
        suites.append(_trained("pairs", chosen, base, start, seed, effort))
    return suites


def _only(images: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    kept = torch.isin(labels, torch.tensor(classes))
    return images[kept], labels[kept]


def _trained(name: str, tasks: dict[str, dict], model: Any, start: State, seed: int, effort: Effort) -> Suite:
    """Experts from ``start``, one per task, and a reference that sees all tasks for as many steps as all experts."""
    experts = []
    for number, task in enumerate(tasks):
        model.load_state_dict(start)
        # A new label set with the head of ten: all ten stay in the softmax, as in the merged model.
        fit(model, *tasks[task]["train"], effort.expert_steps, 4e-4, seed + number)
        experts.append({key: value.clone() for key, value in model.state_dict().items()})
    model.load_state_dict(start)
    images, labels = (torch.cat([tasks[task]["train"][k] for task in tasks]) for k in (0, 1))
    fit(model, images, labels, effort.expert_steps * len(tasks), 4e-4, seed)
    reference = {key: value.clone() for key, value in model.state_dict().items()}

    def score(state: State, part: str) -> list[float]:
        model.load_state_dict(state)
        model.eval()
        images, labels = (torch.cat([tasks[task][part][k] for task in tasks]) for k in (0, 1))
        with torch.no_grad():
            right = (model(images).logits.argmax(1) == labels).float()
        return [piece.mean().item() for piece in right.split([len(tasks[task][part][1]) for task in tasks])]

    return Suite(name, "accuracy", list(tasks), start, experts, reference, score)


def new_vit(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def fit(
    model: Any, images: Tensor, labels: Tensor, steps: int, rate: float, seed: int, *,
    shows: Sequence[Callable[[Tensor], Tensor]] = (), batch: int = 64,
) -> None:  # fmt: skip
    """AdamW, linear warm-up over a tenth of the steps, cosine to zero. ``shows``: guises, one drawn per step."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, s / steps)))
    )
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=random)
        shown = images[rows]
        if shows:
            shown = shows[int(torch.randint(len(shows), (), generator=random))](shown)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(shown).logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# -- text ------------------------------------------------------------------------------------------------------------


def text_suite(seed: int, effort: Effort) -> Suite:
    """The demo's domains and tiny Llama. The score is the geometric mean probability of a byte: 1 / perplexity."""
    from hf_fuse.data.stdlib_text import stdlib_domains
    from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

    size = ModelSize(hidden=64, feed_forward=128, layers=2, heads=4, context=128)
    tokenizer = byte_tokenizer(size.context)
    domains = stdlib_domains(source_characters=1_200_000)
    streams = [token_stream(tokenizer, domain.train, 200_000) for domain in domains]
    base_steps, steps = effort.text_steps
    model = new_model(size, tokenizer, seed)
    train(model, streams, Schedule(base_steps, 4e-3), seed=seed)
    start = _copied(model)
    experts = []
    for number, stream in enumerate(streams):
        model.load_state_dict(start)
        train(model, [stream], Schedule(steps, 1e-3), seed=seed + number)
        experts.append(_copied(model))
    model.load_state_dict(start)
    train(model, streams, Schedule(steps * len(streams), 1e-3), seed=seed)
    reference = _copied(model)
    windows = {}
    for domain in domains:
        held = token_stream(tokenizer, domain.held_out, 40_000)[: 64 * size.context].view(-1, size.context)
        # Held-out documents are longer than what is read: even windows choose, odd ones test.
        windows[domain.name] = {"validation": held[0::2], "test": held[1::2]}

    def score(state: State, part: str) -> list[float]:
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            return [math.exp(-model(input_ids=w[part], labels=w[part]).loss.item()) for w in windows.values()]

    return Suite("text", "probability per byte", list(windows), start, experts, reference, score)


def _copied(model: Any) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -- merging ---------------------------------------------------------------------------------------------------------


def length(state: State, base: State) -> float:
    return math.sqrt(sum(float((state[name].double() - base[name].double()).square().sum()) for name in base))


def grid(method: Any, limit: int | None) -> list[dict[str, Any]]:
    """Sets of parameters to choose from; empty where the method has nothing that the study knows how to tune."""
    values = GRIDS.get(method.name) or {name: COMMON[name] for name in COMMON if name in method.options}
    values = {name: tried for name, tried in values.items() if name in method.options}
    if limit:
        values = {name: tried[1 : 1 + limit] for name, tried in values.items()}
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())] if values else []


def run_suite(suite: Suite, seed: int, effort: Effort) -> dict[str, Any]:
    """Scores base, experts, reference and every method -> rows by label, skipped methods with the reason, conflicts."""
    from hf_fuse.merge.units import takes_base

    mean_length = statistics.mean(length(expert, suite.base) for expert in suite.experts)

    def row(state: State, parameters: dict[str, Any] | None = None) -> Row:
        return Row(suite.score(state, "test"), length(state, suite.base) / mean_length, parameters or {})

    rows, skipped = {"base": row(suite.base)}, {}
    own = [suite.score(expert, "test") for expert in suite.experts]
    rows["experts, each on its own"] = Row([scores[k] for k, scores in enumerate(own)], 1.0)
    rows["experts, on all tasks"] = Row([statistics.mean(column) for column in zip(*own)], 1.0)
    rows["trained on all tasks"] = row(suite.reference)
    for name in effort.methods or registry.names("merge"):
        method = registry.get("merge", name)
        low, high = getattr(method.module, "MODELS", (1, None))
        if not low <= len(suite.experts) <= (high or len(suite.experts)):
            skipped[name] = f"merges {high} model{'s' if high > 1 else ''}, not {len(suite.experts)}"
            continue

        def merged(parameters: dict[str, Any], name: str = name, method: Any = method) -> State:
            base = None if takes_base(method) is False else suite.base
            return merge_state_dicts(suite.experts, name, base=base, parameters=parameters, seed=seed, workers=1)

        try:
            state, best, tried = merged({}), {}, grid(method, effort.grid)
            rows[name] = row(state)
            if tried:
                highest = statistics.mean(suite.score(state, "validation"))
                for parameters in tried:
                    other = merged(parameters)
                    score = statistics.mean(suite.score(other, "validation"))
                    if score > highest:
                        state, best, highest = other, parameters, score
                rows[f"{name} (tuned)"] = row(state, best or {"defaults": ""})
        except FuseError as error:
            skipped[name] = str(error)
    return {"rows": rows, "skipped": skipped, "conflict": conflict(suite)}


def conflict(suite: Suite) -> dict[str, float]:
    """Mean cosine of two task vectors, and the share of elements in which two have opposite signs."""
    flat_KN = torch.stack([torch.cat([(e[n] - suite.base[n]).flatten() for n in suite.base]) for e in suite.experts])
    unit_KN = torch.nn.functional.normalize(flat_KN, dim=1)
    pairs = list(itertools.combinations(range(len(flat_KN)), 2))
    return {
        "cosine": statistics.mean(float(unit_KN[i] @ unit_KN[j]) for i, j in pairs),
        "opposite signs": statistics.mean(float((flat_KN[i] * flat_KN[j] < 0).float().mean()) for i, j in pairs),
    }


def run_seed(seed: int, effort: Effort, suites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One seed, start to end, in a process of its own with one thread: sums do not depend on the number of cores."""
    from hf_fuse.demo_training import quiet_and_reproducible

    found = {}
    with quiet_and_reproducible():
        made = digit_suites(seed, effort, suites) if {"digits", "pairs"} & set(suites) else []
        made += [text_suite(seed, effort)] if "text" in suites else []
        for suite in made:
            if suite.name in suites:
                started = time.perf_counter()
                found[suite.name] = run_suite(suite, seed, effort) | {"tasks": suite.tasks, "unit": suite.unit}
                spent = time.perf_counter() - started
                print(f"seed {seed}: {suite.name} merged and scored in {spent:.0f} s", file=sys.stderr)
    return found


# -- report ----------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """One label over all seeds: mean and sample standard deviation."""

    label: str
    mean: float
    spread: float
    normalised: float
    worst: float
    norm: float
    seeds: list[float]  # mean over tasks, seed by seed
    parameters: list[dict[str, Any]]


def summarise(runs: list[dict[str, Any]]) -> list[Summary]:
    found = []
    labels = [label for label in runs[0]["rows"] if all(label in run["rows"] for run in runs)]
    for label in labels:
        rows = [run["rows"][label] for run in runs]
        own = [run["rows"]["experts, each on its own"].scores for run in runs]
        means = [statistics.mean(row.scores) for row in rows]
        shares = [statistics.mean(s / max(e, 1e-9) for s, e in zip(row.scores, best)) for row, best in zip(rows, own)]
        found.append(
            Summary(
                label, statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0,
                statistics.mean(shares), statistics.mean(min(row.scores) for row in rows),
                statistics.mean(row.norm for row in rows), means, [row.parameters for row in rows],
            )
        )  # fmt: skip
    return found


def findings(summaries: list[Summary], conflicts: list[dict[str, float]]) -> list[str]:
    """Sentences about known orderings, computed from the figures: they hold, fail or stay open."""
    by = {summary.label: summary for summary in summaries}
    said = [
        f"Task vectors of two experts have a mean cosine of {statistics.mean(c['cosine'] for c in conflicts):.2f} and "
        f"opposite signs in {statistics.mean(c['opposite signs'] for c in conflicts):.0%} of the elements."
    ]
    chain = ["linear", "task_arithmetic (tuned)", "ties (tuned)"]
    said += [compared(by, low, high) for low, high in itertools.pairwise(chain) if {low, high} <= set(by)]
    if {"task_arithmetic (tuned)", "consensus (tuned)"} <= set(by):
        said.append(compared(by, "task_arithmetic (tuned)", "consensus (tuned)"))
    for name in SUBSPACE:
        for label in (name, f"{name} (tuned)"):
            if label in by:
                rival = "linear" if label == name else "task_arithmetic (tuned)"
                said.append(compared(by, label, rival, warning=True))
    merges = [summary for summary in summaries if summary.label not in NOT_MERGES]
    free = [summary for summary in merges if "(tuned)" not in summary.label]
    tuned = [summary for summary in merges if "(tuned)" in summary.label]
    for kind, group in (("with defaults", free), ("tuned", tuned)):
        if group:
            best = max(group, key=lambda summary: summary.mean)
            ahead = by["trained on all tasks"].mean - best.mean
            said.append(
                f"Best {kind}: {best.label}, {best.mean:.3f}, {best.normalised:.0%} of the experts; training on all "
                f"tasks gives {by['trained on all tasks'].mean:.3f} ({ahead:+.3f})."
            )
    long = [summary for summary in free if summary.norm > 1.5]
    if long:
        names = ", ".join(summary.label for summary in long)
        below = sum(summary.mean < by["linear"].mean for summary in long)
        said.append(
            f"Defaults that move further than 1.5 expert lengths: {names}; {below} of {len(long)} score below the soup."
        )
    return said


NOT_MERGES = ("base", "experts, each on its own", "experts, on all tasks", "trained on all tasks")


def compared(by: dict[str, Summary], low: str, high: str, *, warning: bool = False) -> str:
    """Whether ``low`` < ``high``, judged seed by seed."""
    gaps = [b - a for a, b in zip(by[low].seeds, by[high].seeds)]
    wins = sum(gap > 0 for gap in gaps)
    verdict = "holds" if wins == len(gaps) else "does not hold" if not any(gap > 0 for gap in gaps) else "is open"
    what = "The warning about subspace methods, " if warning else "The order "
    return (
        f"{what}{low} < {high}, {verdict} here: {by[low].mean:.3f} and {by[high].mean:.3f}, the second ahead in {wins} "
        f"of {len(gaps)} seed{'s' if len(gaps) > 1 else ''}."
    )


def report(name: str, runs: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Prints one suite's table and findings, draws its picture, and returns its part of the JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hf_fuse.plot_points import scatter

    summaries, unit, tasks = summarise(runs), runs[0]["unit"], runs[0]["tasks"]
    console = Console(highlight=False)
    console.print(f"\n[bold]{name}[/]: {unit} on held-out data, {len(tasks)} tasks ({', '.join(tasks)})")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("mean", "± seeds", "of experts", "worst task", "change"):
        table.add_column(heading, justify="right")
    table.add_column("chosen on validation data", overflow="fold")
    fixed = [summary for summary in summaries if summary.label in NOT_MERGES]
    merges = sorted((s for s in summaries if s.label not in NOT_MERGES), key=lambda s: -s.mean)
    for summary in [*fixed, *merges]:
        chosen = sorted(
            {", ".join(f"{key} {value}".strip() for key, value in p.items()) for p in summary.parameters if p}
        )
        label = "linear (the soup)" if summary.label == "linear" else summary.label
        table.add_row(
            escape(label), f"{summary.mean:.3f}", f"{summary.spread:.3f}", f"{summary.normalised:.0%}",
            f"{summary.worst:.3f}", f"{summary.norm:.2f}", "; ".join(chosen),
            style="bold" if summary is merges[0] else "dim" if summary in fixed else "",
        )  # fmt: skip
        if summary is fixed[-1]:
            table.add_section()
    console.print(table)
    said = findings(summaries, [run["conflict"] for run in runs])
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    for method, reason in runs[0]["skipped"].items():
        console.print(f"  - Left out: {method} ({reason})", markup=False, style="dim")
    families = {s.label: "reference" if s.label in NOT_MERGES else "tuned" if "(tuned)" in s.label else "defaults"
                for s in summaries}  # fmt: skip
    picture = scatter(
        {summary.label: (summary.norm, summary.mean) for summary in summaries}, path=output / f"{name}.png",
        title=f"{name}: {unit} against the length of the merged change", ylabel=f"{unit}, mean over tasks",
        xlabel="|merged - base| / mean |expert - base|", families=families, best=merges[0].label,
        spread={summary.label: summary.spread for summary in summaries},
    )  # fmt: skip
    return {
        "unit": unit, "tasks": tasks, "summaries": [asdict(summary) for summary in summaries], "findings": said,
        "skipped": runs[0]["skipped"], "conflict": [run["conflict"] for run in runs], "plot": picture.name,
        "scores": [{label: asdict(row) for label, row in run["rows"].items()} for run in runs],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models, whole grids (minutes)")
    parser.add_argument("--suites", nargs="+", default=["digits", "pairs", "text"], choices=["digits", "pairs", "text"])
    parser.add_argument("--methods", nargs="+", default=[], help="only these, instead of all that are registered")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("merge-study"), help="folder for study.json and plots")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    methods = (
        dict.fromkeys(["linear", *given.methods]) if given.methods else ()
    )  # the soup is what all are held against
    effort = replace(effort, methods=tuple(registry.get("merge", name).name for name in methods))
    seeds = range(given.seeds or effort.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort), itertools.repeat(given.suites)))
    else:
        runs = [run_seed(seed, effort, given.suites) for seed in seeds]
    given.output.mkdir(parents=True, exist_ok=True)
    study = {name: report(name, [run[name] for run in runs], given.output) for name in given.suites}
    facts = {"full": given.full, "seeds": len(seeds), "seconds": round(time.perf_counter() - started, 1)}
    (given.output / "study.json").write_text(json.dumps(facts | {"suites": study}, indent=2) + "\n")
    if not given.full:
        print("\nThis was a quick run: the models are hardly trained and the figures mean nothing. Use --full.")
    print(f"\n{given.output / 'study.json'} and plots in {given.output} ({facts['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
