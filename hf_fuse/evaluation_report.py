"""What an evaluation found: rows, and their rendering as a table, JSON, bar chart and model-card metadata."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Metrics that the charts and tables call by another name.
_TITLES = {"bits_per_byte": "bits per byte", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class EvaluationRow:
    """One figure.

    Attributes:
        model: name as in the report.
        dataset: text file, dataset or lm-eval task.
        metric: for example "perplexity", "bits_per_byte", "accuracy", "macro_f1".
        value: NaN or infinite where the model's output is not finite.
        n: what it was measured over: tokens for perplexity, bytes for bits per byte, examples otherwise.
        higher_is_better: direction of the metric.
        task: "text-generation", "text-classification" or "image-classification".
        stderr: standard error of ``value``, where it is known.
    """

    model: str
    dataset: str
    metric: str
    value: float
    n: int
    higher_is_better: bool
    task: str = "text-generation"
    stderr: float | None = None


@dataclass
class EvaluationReport:
    """Figures of several models side by side.

    Attributes:
        rows: in the order in which they were measured: model by model.
        folders: model name -> its local folder, for those that were given as one.
        settings: how it was measured.
    """

    rows: list[EvaluationRow] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def tokenizers_differ(self) -> bool:
        """Whether some text was cut into a different number of tokens by different models.

        Their perplexities are then not comparable; bits per byte are.
        """
        sizes: dict[str, set[int]] = {}
        for row in self.rows:
            if row.metric == "perplexity":
                sizes.setdefault(row.dataset, set()).add(row.n)
        return any(len(found) > 1 for found in sizes.values())

    def to_dict(self) -> dict:
        """Plain data; figures that are not finite become None."""
        rows = [{**asdict(row), "value": row.value if math.isfinite(row.value) else None} for row in self.rows]
        return {"settings": self.settings, "rows": rows}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def print(self, console: Console | None = None) -> None:
        """Prints a table: a line per model, a column per dataset and metric, the best figure of each column in bold."""
        from rich.console import Console

        console = console or Console()
        columns = self._columns()
        tables = [self._table_of_models(columns), self._table_of_metrics(columns)]
        unlimited = console.options.update(max_width=10_000)
        widths = [console.measure(table, options=unlimited).maximum for table in tables]
        console.print(tables[0] if widths[0] <= max(console.width, widths[1]) else tables[1])
        for note in self._notes():
            console.print(note, style="dim", highlight=False)

    def chart(self, path: str | Path) -> list[Path]:
        """Draws bars per dataset, one colour per model -> the files written.

        Perplexities (bits per byte where tokenizers differ) and scores between 0 and 1 do not share an axis: where a
        report has several kinds, the first goes to ``path`` and each other to a file named after its metric beside it.

        Raises:
            FuseError: there is no finite figure to draw, or matplotlib is missing.
        """
        from hf_fuse.plots import bar_chart

        path, charts = Path(path), self._charts()
        if not charts:
            raise FuseError(f"{path}: nothing to draw: the evaluation has no finite figure.")
        written = []
        for index, (metric, values) in enumerate(charts.items()):
            target = path if index == 0 else path.with_name(f"{path.stem}-{metric.replace(' ', '-')}{path.suffix}")
            lower = metric in ("perplexity", "bits per byte", "error")
            ylabel = f"{metric} ({'lower' if lower else 'higher'} is better)"
            # A score has its metrics in the group names, everything else in the title.
            title = "Scores by model" if metric == "score" else f"{metric[0].upper()}{metric[1:]} by model"
            written.append(bar_chart(values, path=target, title=title, ylabel=ylabel, lower_is_better=lower))
        return written

    def write_card(self) -> list[Path]:
        """Writes the figures of each local model into the ``model-index`` of its README.md -> the cards written.

        A folder without README.md gets one with a title. Figures that are not finite are left out.

        Raises:
            FuseError: no evaluated model is a local folder, or a README.md cannot be understood.
        """
        from hf_fuse.card import write_metrics

        if not self.folders:
            raise FuseError(
                "write_card: none of the evaluated models is a local folder, so there is no README.md to write. "
                "Evaluate the folder, then push it."
            )
        written = []
        for model, folder in self.folders.items():
            found = [row for row in self.rows if row.model == model and math.isfinite(row.value)]
            if not found:
                continue
            card = folder / "README.md"
            if not card.exists():
                library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
                card.write_text(f"---\nlibrary_name: {library}\n---\n\n# {folder.name}\n", encoding="utf-8")
            write_metrics(card, [self._card_result(row) for row in found])
            written.append(card)
        return written

    def _card_result(self, row: EvaluationRow) -> dict:
        result = {"task": row.task, "dataset": row.dataset, "metric": row.metric, "value": row.value}
        dataset, subset = self.settings.get("dataset"), self.settings.get("subset")
        if dataset and row.dataset == (f"{dataset}:{subset}" if subset else dataset):
            # The Hub knows datasets by their id alone; subset and split have fields of their own.
            result |= {"dataset": dataset, "config": subset, "split": self.settings.get("split")}
        return result

    def _columns(self) -> list[tuple[str, str]]:
        """(dataset, metric) pairs of the table. Bits per byte only where perplexities cannot be compared."""
        pairs = dict.fromkeys((row.dataset, row.metric) for row in self.rows)
        # lm-eval tasks have a metric of that name without a perplexity beside it: those stay.
        spare = [] if self.tokenizers_differ else [(dataset, "bits_per_byte") for dataset in self._texts()]
        return [pair for pair in pairs if pair not in spare]

    def _texts(self) -> list[str]:
        """The datasets whose perplexity was measured here."""
        return list(dict.fromkeys(row.dataset for row in self.rows if row.metric == "perplexity"))

    def _table_of_models(self, columns: list[tuple[str, str]]) -> Table:
        """A line per model."""
        from rich.text import Text

        table = _empty_table()
        table.add_column(Text("model", style="bold"))
        for dataset, metric in columns:
            label, n = self._label((dataset, metric)), self._size((dataset, metric))
            heading = Text.assemble((dataset, "bold cyan"), f"\n{label}", (f"\nn={n}" if n else "", "dim"))
            table.add_column(heading, justify="right")
        for model in self.models:
            table.add_row(Text(model), *(self._cell(model, column) for column in columns))
        return table

    def _table_of_metrics(self, columns: list[tuple[str, str]]) -> Table:
        """The same with a line per dataset and metric: for many metrics or a narrow terminal."""
        from rich.text import Text

        table = _empty_table()
        table.add_column(Text("evaluated on", style="bold"), overflow="fold")
        table.add_column(Text("metric", style="bold"), overflow="fold")
        table.add_column(Text("n", style="bold"), justify="right")
        for model in self.models:
            table.add_column(Text(model, style="bold"), justify="right", overflow="fold")
        for dataset, metric in columns:
            column = (dataset, metric)
            cells = [self._cell(model, column) for model in self.models]
            table.add_row(Text(dataset, style="cyan"), self._label(column), Text(self._size(column), "dim"), *cells)
        return table

    def _label(self, column: tuple[str, str]) -> str:
        """The metric's name with an arrow in the direction of better."""
        higher = next(row.higher_is_better for row in self.rows if (row.dataset, row.metric) == column)
        return f"{_TITLES.get(column[1], column[1])} {'↑' if higher else '↓'}"

    def _size(self, column: tuple[str, str]) -> str:
        """What a column was measured over, or nothing where that differs between the models."""
        sizes = {row.n for row in self.rows if (row.dataset, row.metric) == column}
        return f"{sizes.pop():,}" if len(sizes) == 1 else ""

    def _cell(self, model: str, column: tuple[str, str]) -> Text:
        from rich.text import Text

        row = next((row for row in self.rows if (row.model, row.dataset, row.metric) == (model, *column)), None)
        if row is None:
            return Text("–", style="dim")
        if not math.isfinite(row.value):
            return Text("not finite", style="red")
        text = Text(_figure(row.value), style="bold green" if row.value == self._best(column) else "")
        if row.stderr:
            text.append(f" ±{_figure(row.stderr)}", style="not bold dim")
        return text

    def _best(self, column: tuple[str, str]) -> float | None:
        """The best figure of a column, or None where there is nothing to choose or no fair comparison."""
        if len(self.models) < 2 or (column[1] == "perplexity" and self.tokenizers_differ):
            return None
        found = [row for row in self.rows if (row.dataset, row.metric) == column and math.isfinite(row.value)]
        values = [row.value for row in found]
        return (max if found[0].higher_is_better else min)(values) if values else None

    def _notes(self) -> list[str]:
        notes = []
        if any(row.metric == "perplexity" for row in self.rows):
            notes.append("perplexity: exp of the mean loss per token; n counts scored tokens")
        if self.tokenizers_differ:
            notes.append("the models cut the text into different tokens: compare bits per byte, not perplexity")
        if any(not math.isfinite(row.value) for row in self.rows):
            notes.append("not finite: the model's output overflows or holds NaN; its weights may be damaged")
        if self.settings.get("limit"):
            notes.append(f"limited to the first {self.settings['limit']} rows or examples of each dataset and task")
        return notes

    def _charts(self) -> dict[str, dict[str, dict[str, float]]]:
        """Metric -> model -> group of bars -> value."""
        shown = self._columns()
        if self.tokenizers_differ:
            shown = [column for column in shown if column[1] != "perplexity"]
        rows = [row for row in self.rows if (row.dataset, row.metric) in shown and math.isfinite(row.value)]
        score_metrics = {row.metric for row in rows if row.higher_is_better}
        score_datasets = {row.dataset for row in rows if row.higher_is_better}
        charts: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            title = _TITLES.get(row.metric, row.metric)
            if not row.higher_is_better or len(score_metrics) == 1:
                metric, group = title, row.dataset
            else:
                metric, group = "score", title if len(score_datasets) == 1 else f"{row.dataset}\n{title}"
            charts.setdefault(metric, {}).setdefault(row.model, {})[group] = row.value
        return charts


def _empty_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, header_style="", pad_edge=False)


def _figure(value: float) -> str:
    """Four significant digits, without exponents for ordinary sizes."""
    if value == 0 or 1e-4 <= abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if 1 <= abs(value) < 1e6 else f"{value:.3e}"
