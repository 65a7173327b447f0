"""``hf-fuse demo``: train a base and three experts on text that every Python carries, merge them, and compare.

Runs on a CPU without a network. Everything it makes stays in one folder: checkpoints that ``from_pretrained`` loads,
the recipes of the merges, two charts, and ``demo.json`` with all figures.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.demo_report import findings, perplexity_table, with_average
from hf_fuse.demo_training import (
    ModelSize,
    Schedule,
    byte_tokenizer,
    new_model,
    quiet_and_reproducible,
    seconds_per_step,
    token_stream,
    train,
)
from hf_fuse.errors import FuseError, OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from hf_fuse.data.stdlib_text import Domain

BASE, REFERENCE = "base", "mixture"
RECORD, RECIPES, BARS, SIMILARITY = "demo.json", "recipes", "perplexity.png", "task_vectors.png"


@dataclass(frozen=True)
class Settings:
    """Sizes of one demo run.

    Attributes:
        size: the model's shape.
        base: training of the base, on all domains.
        expert: training of each expert from the base; the reference gets the steps of all experts together.
        source_characters: how much of the standard library to read.
        train_tokens: training text per domain.
        held_out_characters: evaluation text per domain.
    """

    size: ModelSize = ModelSize()
    base: Schedule = Schedule(steps=800, learning_rate=4e-3)
    expert: Schedule = Schedule(steps=200, learning_rate=1e-3)
    source_characters: int = 3_500_000
    train_tokens: int = 600_000
    held_out_characters: int = 14_000


QUICK = Settings(
    size=ModelSize(hidden=32, feed_forward=64, layers=2, heads=2, context=64),
    base=Schedule(steps=12, learning_rate=3e-3, batch=4),
    expert=Schedule(steps=4, learning_rate=1e-3, batch=4),
    source_characters=600_000,
    train_tokens=20_000,
    held_out_characters=1_500,
)


@dataclass(frozen=True)
class DemoResult:
    """What a run made and measured.

    Attributes:
        output: the folder.
        perplexities: model -> domain and ``average`` -> perplexity per byte on held-out text.
        families: model -> ``base``, ``expert``, ``merge`` or ``reference``.
        notes: model -> how it was made.
        findings: sentences computed from the figures.
        cosines: model -> model -> cosine between their task vectors.
        steps: optimizer steps of the base, each expert and the reference.
        seconds: wall time of the whole run.
        charts: the pictures.
    """

    output: Path
    perplexities: dict[str, dict[str, float]]
    families: dict[str, str]
    notes: dict[str, str]
    findings: list[str]
    cosines: dict[str, dict[str, float]]
    steps: dict[str, int]
    seconds: float
    charts: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexities,
            "families": self.families,
            "notes": self.notes,
            "findings": self.findings,
            "cosine_between_task_vectors": self.cosines,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "charts": [chart.name for chart in self.charts],
        }


def run_demo(
    output: str | Path = Path("hf-fuse-demo"),
    *,
    seed: int = 0,
    seconds: int | None = None,
    quick: bool = False,
    overwrite: bool = False,
) -> DemoResult:
    """Trains, merges, evaluates and reports. About two minutes on two cores; progress goes to standard error, the
    results to standard output.

    On one machine the same seed gives the same figures, unless ``seconds`` is used.

    Args:
        output: folder to make. It is removed again if the run fails.
        seed: of the weights, the training sequences and the random merges.
        seconds: train for about this long instead of for fixed numbers of steps.
        quick: tiny model and a few steps: every stage runs, the figures mean nothing.
        overwrite: replace the folder of an earlier demo. Other folders are never touched.

    Raises:
        OutputError: the folder exists already, is not a demo's, or can't be written.
        FuseError: this Python lacks the text that the demo reads, or matplotlib is missing.
    """
    from rich.console import Console

    started = time.perf_counter()
    output = Path(output).expanduser()
    settings = QUICK if quick else Settings()
    if seconds is not None and seconds < 1:
        raise FuseError(f"seconds is {seconds}; expected at least 1, or none for the usual number of steps.")
    if not 0 <= seed < 2**31:
        raise FuseError(f"seed is {seed}; expected a whole number from 0 to {2**31 - 1}.")
    _require_matplotlib()
    with _folder(output, overwrite), quiet_and_reproducible():
        with _progress() as progress:
            domains, steps = _train_all(output, settings, seed, seconds, progress)
            notes = _merge_all(output, [f"expert-{domain.name}" for domain in domains], seed, progress)
            families = _families(domains, notes)
            perplexities = _evaluate_all(output, list(families), domains, settings, progress)
        cosines, charts = _draw(output, perplexities, families)
        notes |= _training_notes(domains, steps)
        homes = {f"expert-{domain.name}": domain.name for domain in domains}
        result = DemoResult(
            output,
            perplexities,
            families,
            notes,
            findings(perplexities, families, homes),
            cosines,
            steps,
            time.perf_counter() - started,
            charts,
        )
        _record(
            output,
            {"finished": True, "seed": seed, "quick": quick, "python": platform.python_version(), **result.to_dict()},
        )
    print_demo(result, Console(soft_wrap=False, highlight=False), quick=quick)
    return result


def print_demo(result: DemoResult, console: Console, *, quick: bool = False) -> None:
    """The table, what it shows, and what to do with the files."""
    console.print(perplexity_table(result.perplexities, result.families, result.notes))
    console.print("\n[bold]What the table shows[/bold]")
    warning = ["This was a quick run: the models are hardly trained and the figures mean nothing."] if quick else []
    for sentence in warning + result.findings:
        wrapped = textwrap.fill(sentence, console.width - 1, initial_indent="  - ", subsequent_indent="    ")
        console.print(wrapped, markup=False, soft_wrap=True)
    merged = min(
        (name for name, family in result.families.items() if family == "merge"),
        key=lambda name: result.perplexities[name]["average"],
    )
    folder = shlex.quote(str(result.output))
    lines = [
        ("Charts", ", ".join(str(chart) for chart in result.charts)),
        ("Figures", str(result.output / RECORD)),
        ("Load", f"AutoModelForCausalLM.from_pretrained({str(result.output / merged)!r})"),
        ("Merge again", f"hf-fuse merge {folder}/{RECIPES}/{merged}.yaml --output my-merge"),
        ("Compare", f"hf-fuse inspect {folder}/expert-* --base {folder}/{BASE}"),
    ]
    console.print(f"\n[bold]Files[/bold] ({result.seconds:.0f} s in all)")
    for label, text in lines:
        console.print(f"  {label + ':':13}{text}", markup=False, soft_wrap=True)


def _train_all(
    output: Path, settings: Settings, seed: int, seconds: int | None, progress: Progress
) -> tuple[list[Domain], dict[str, int]]:
    """Base on all domains, one expert per domain from it, and a reference with all their data -> (domains, steps)."""
    import copy

    from hf_fuse.data.stdlib_text import stdlib_domains

    reading = progress.add_task("read the standard library", total=None)
    domains = stdlib_domains(source_characters=settings.source_characters)
    tokenizer = byte_tokenizer(settings.size.context)
    base, expert = settings.base, settings.expert
    streams = [token_stream(tokenizer, domain.train, settings.train_tokens) for domain in domains]
    progress.update(reading, total=1, completed=1)
    if seconds is not None:
        one = seconds_per_step(settings.size, tokenizer, streams[0])
        share = seconds / (one * (base.steps + 2 * len(domains) * expert.steps))
        base, expert = (replace(plan, steps=max(2, round(plan.steps * share))) for plan in (base, expert))
    reference = replace(expert, steps=expert.steps * len(domains))

    def fit(name: str, model: Any, texts: Sequence[Tensor], plan: Schedule, offset: int) -> None:
        task = progress.add_task(f"train {name}", total=plan.steps)
        train(model, texts, plan, seed=seed + offset, on_step=lambda: progress.advance(task))
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)

    start = new_model(settings.size, tokenizer, seed)
    fit(BASE, start, streams, base, 0)
    for offset, (domain, stream) in enumerate(zip(domains, streams), 1):
        fit(f"expert-{domain.name}", copy.deepcopy(start), [stream], expert, offset)
    fit(REFERENCE, start, streams, reference, len(domains) + 1)
    return domains, {BASE: base.steps, "expert": expert.steps, REFERENCE: reference.steps}


def _recipes(output: Path, experts: Sequence[str], seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Folder of each merge -> (what it is, recipe). The settings are those of the papers; none was tuned on the text
    that the table reports."""
    base, models = str(output / BASE), [str(output / name) for name in experts]
    pair = [name.removeprefix("expert-") for name in experts[1:3]]
    from_base = {"base_model": base, "models": models}
    return {
        "merged-linear": ("mean of the experts", {"method": "linear", "models": models}),
        "merged-slerp": (
            " + ".join(pair),
            {"method": "slerp", "models": models[1:3], "parameters": {"t": 0.5}},
        ),
        "merged-task_arithmetic-0.5": (
            "λ 0.5",
            {"method": "task_arithmetic", **from_base, "parameters": {"lambda": 0.5}},
        ),
        "merged-task_arithmetic-1.0": (
            "λ 1.0",
            {"method": "task_arithmetic", **from_base, "parameters": {"lambda": 1.0}},
        ),
        "merged-ties": (
            "density 0.2, λ 1.0",
            {"method": "ties", **from_base, "parameters": {"density": 0.2, "lambda": 1.0}},
        ),
        "merged-dare_ties": (
            "density 0.8, λ 0.5",
            {"method": "dare_ties", **from_base, "parameters": {"density": 0.8, "lambda": 0.5}, "seed": seed},
        ),
        "merged-model_stock": ("ratio from angles", {"method": "model_stock", **from_base}),
    }  # fmt: skip


def _merge_all(output: Path, experts: Sequence[str], seed: int, progress: Progress) -> dict[str, str]:
    """Writes each recipe to a file and runs that file -> name of the merge: how it was made."""
    import yaml

    from hf_fuse.merge.engine import merge

    recipes = _recipes(output, experts, seed)
    task = progress.add_task("merge", total=len(recipes))
    (output / RECIPES).mkdir()
    for name, (note, recipe) in recipes.items():
        file = output / RECIPES / f"{name}.yaml"
        head = f"# {note}. Paths are relative to the folder in which the demo ran; run it there again with\n"
        head += f"# hf-fuse merge {shlex.quote(str(file))} --output my-merge\n"
        file.write_text(head + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        merge(file, output=output / name)
        progress.advance(task)
    return {name: note for name, (note, _) in recipes.items()}


def _evaluate_all(
    output: Path, names: Sequence[str], domains: Sequence[Domain], settings: Settings, progress: Progress
) -> dict[str, dict[str, float]]:
    """Loads every checkpoint as a user would and measures it on the held-out text of each domain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_fuse.evaluation import perplexity

    context = settings.size.context
    task = progress.add_task("evaluate", total=len(names) * len(domains))
    found: dict[str, dict[str, float]] = {}
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(output / name)
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        found[name] = {}
        for domain in domains:
            texts = domain.excerpts(settings.held_out_characters)
            measured = perplexity(model, tokenizer, texts, stride=context * 3 // 4, batch_size=16)
            found[name][domain.name] = measured.perplexity
            progress.advance(task)
    return {name: with_average(by_domain) for name, by_domain in found.items()}


def _families(domains: Sequence[Domain], merges: Mapping[str, str]) -> dict[str, str]:
    """Every model in the order of the table -> what kind it is."""
    experts = {f"expert-{domain.name}": "expert" for domain in domains}
    return {BASE: "base", **experts, **dict.fromkeys(merges, "merge"), REFERENCE: "reference"}


def _training_notes(domains: Sequence[Domain], steps: Mapping[str, int]) -> dict[str, str]:
    experts = {f"expert-{domain.name}": domain.description for domain in domains}
    return {BASE: f"all, {steps[BASE]} steps", **experts, REFERENCE: f"all, {steps[REFERENCE]} more steps"}


def _draw(
    output: Path, perplexities: Mapping[str, Mapping[str, float]], families: Mapping[str, str]
) -> tuple[dict[str, dict[str, float]], list[Path]]:
    """Bar chart and heat map -> (cosines between the task vectors, files)."""
    from hf_fuse.diagnostics.task_vectors import inspect_models
    from hf_fuse.plots import bar_chart

    bars = bar_chart(
        perplexities,
        path=output / BARS,
        title="Perplexity on held-out text",
        ylabel="perplexity per byte (lower is better)",
        lower_is_better=True,
        families=families,
    )
    names = [name for name in families if name != BASE]
    inspection = inspect_models([str(output / name) for name in names], str(output / BASE))
    cosines = {
        name: {other: round(value, 4) for other, value in zip(names, row)}
        for name, row in zip(names, inspection.total.cosines.tolist())
    }
    return cosines, [bars, inspection.plot(output / SIMILARITY)]


@contextmanager
def _folder(output: Path, overwrite: bool):
    """The folder to fill, marked as a demo's; what the run made is removed if it fails or is stopped."""
    from hf_fuse.data.stdlib_text import DOMAIN_NAMES

    experts = [f"expert-{name}" for name in DOMAIN_NAMES]
    made = [BASE, REFERENCE, RECIPES, BARS, SIMILARITY, RECORD, *experts, *_recipes(output, experts, 0)]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise OutputError(
                f"{output}: exists already. Pass --overwrite to replace it, or another folder as --output."
            )
        if not (output / RECORD).is_file():
            raise OutputError(
                f"{output}: is not the folder of an earlier demo (no {RECORD} in it), so it is not overwritten. "
                "Pass another folder as --output."
            )

    def clear() -> None:
        # Only what a demo makes, by name: files that a user put beside it stay.
        for path in (output / name for name in made):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    existed = output.exists()
    try:
        if existed:
            clear()
        output.mkdir(parents=True, exist_ok=True)
        _record(output, {"finished": False})
    except OSError as error:
        raise OutputError(f"{output}: can't be written ({error.strerror}). Pass another folder as --output.") from None
    try:
        yield
    except BaseException:
        clear()
        if not existed and not any(output.iterdir()):
            output.rmdir()
        raise


def _record(output: Path, content: Mapping[str, Any]) -> None:
    from hf_fuse import __version__

    text = json.dumps({"made_by": f"hf-fuse demo {__version__}", **content}, indent=2)
    (output / RECORD).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _progress():
    """Bars on standard error: one line per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FuseError(
            'the demo draws charts with matplotlib, which is not installed. Run: pip install "hf-fuse[plot]"'
        ) from None
