"""Evaluation of one or several models side by side: perplexity on texts, accuracy and F1 of classifiers, lm-eval tasks.

Everything that can be checked without weights is checked before the first model is loaded. Models are loaded one at a
time, so memory is that of the largest one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError
from hf_fuse.evaluation_data import (
    LabelledSet,
    TextSet,
    class_ids,
    labelled_set,
    load_rows,
    read_text_files,
    text_set,
)
from hf_fuse.evaluation_models import Candidate, candidates, check_device, check_dtype, loaded
from hf_fuse.evaluation_report import EvaluationReport, EvaluationRow
from hf_fuse.perplexity import PerplexityResult, perplexity, window_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvaluationReport", "EvaluationRow", "PerplexityResult", "evaluate_models", "perplexity"]

METRICS = Path(__file__).parent / "metrics"


def evaluate_models(
    models: Sequence[str | Path | PreTrainedModel],
    *,
    texts: Sequence[str | Path] = (),
    dataset: str | Path | None = None,
    subset: str | None = None,
    split: str = "test",
    text_column: str = "text",
    label_column: str | None = None,
    tasks: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> EvaluationReport:
    """Measures every model on the same data.

    Args:
        models: local folders (models or LoRA adapters of causal language models), Hub ids, or live models.
        texts: UTF-8 text files; each gives the perplexity of a causal language model.
        dataset: a local file or folder, or a Hub id. Without ``label_column`` it gives the perplexity of its text
            column (blank rows left out), with it the accuracy and macro-averaged F1 of classifiers.
        subset: the dataset's configuration, where it has several.
        split: the dataset's split.
        text_column: column of texts, or of images for image classifiers.
        label_column: column of class ids or class names.
        tasks: names of lm-eval tasks, or their .yaml files (which may run code of their own folder: use your own only).
        batch_size: windows, texts or images per forward pass. Does not change the figures.
        max_length: tokens per window (perplexity) or per text (classification); default: the model's, at most 2048.
        stride: tokens between window starts; default: half of ``max_length``.
        limit: first rows of the dataset and first examples of each task only. Text files are read whole.
        device: where models loaded here run: "cpu", "cuda", "cuda:1", "mps", or "auto" (spread over what there is).
        dtype: dtype in which they run: "auto" (as stored), "float32", "bfloat16" ... Live models stay as they are.
        tokenizer: used for all models instead of each one's own; for image classifiers, an image processor.

    Returns:
        A report with a row per model, dataset and metric.

    Raises:
        FuseError: something named here does not exist or does not fit; before any model is loaded wherever possible.
    """
    models = [models] if isinstance(models, (str, Path)) or hasattr(models, "forward") else list(models)
    _check_request(models, texts, dataset, label_column, tasks)
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise FuseError(f"{name} is {value}; expected 1 or more.")
    check_device(device)
    dtype = check_dtype(dtype)
    if tasks:
        from hf_fuse.lm_eval_tasks import find_tasks

        tasks, manager = find_tasks(tasks)
    text_sets, labelled, name = read_text_files(texts), None, None
    if dataset is not None:
        name, rows = load_rows(dataset, subset=subset, split=split, limit=limit)
        if name in [texts.name for texts in text_sets]:
            raise FuseError(f"{name}: is given both as a text file and as the dataset. Remove one.")
        if label_column is None:
            text_sets.append(text_set(name, rows, text_column))
        else:
            labelled = labelled_set(name, rows, text_column, label_column)
    kind = "causal" if labelled is None else labelled.kind
    tested = candidates(models, kind, tokenizer)
    references = {}
    for candidate in tested:
        if labelled is not None:
            references[candidate.name] = class_ids(labelled, candidate.config, candidate.name)
        elif text_sets:
            window_lengths(candidate.config, candidate.processor, max_length, stride)

    settings = {
        "dataset": name.removesuffix(f":{subset}") if name else None,
        "subset": subset,
        "split": None if dataset is None or Path(dataset).expanduser().is_file() else split,
        "max_length": max_length,
        "stride": stride,
        "limit": limit,
        "dtype": str(dtype).removeprefix("torch."),
    }
    report = EvaluationReport(
        folders={candidate.name: candidate.folder for candidate in tested if candidate.folder}, settings=settings
    )
    with _progress(tested) as begin:
        for candidate in tested:
            begin(candidate, "loading")
            model = loaded(candidate, kind, device=device, dtype=dtype)
            for texts_of_one in text_sets:
                advance = begin(candidate, texts_of_one.name, "tokens")
                report.rows += _perplexity_rows(candidate, model, texts_of_one, max_length, stride, batch_size, advance)
            if labelled is not None:
                advance = begin(candidate, labelled.name, "examples")
                true = references[candidate.name]
                report.rows += _classification_rows(candidate, model, labelled, true, max_length, batch_size, advance)
            if tasks:
                begin(candidate, ", ".join(tasks), live=False)
                report.rows += _task_rows(candidate, model, tasks, manager, max_length, batch_size, limit)
            del model
            _free_memory()
    return report


def _check_request(models: list, texts: Sequence, dataset, label_column: str | None, tasks: Sequence[str]) -> None:
    if not models:
        raise FuseError("evaluate: no model is given. Name at least one folder or Hub id.")
    for name, value in (("texts", texts), ("tasks", tasks)):
        if isinstance(value, (str, Path)):
            raise FuseError(f"{name} is {str(value)!r}; expected a list, such as [{str(value)!r}].")
    if not texts and dataset is None and not tasks:
        raise FuseError("evaluate: nothing to evaluate on. Give text files, a dataset or lm-eval tasks.")
    if label_column is not None and dataset is None:
        raise FuseError(f"label column {label_column!r}: names a column of a dataset, but no dataset is given.")
    if label_column is not None and (texts or tasks):
        raise FuseError(
            f"label column {label_column!r}: asks for classifiers, which have no perplexity and run no lm-eval tasks. "
            "Evaluate the texts and tasks in a run of their own."
        )


def _perplexity_rows(
    candidate: Candidate,
    model: PreTrainedModel,
    texts: TextSet,
    max_length: int | None,
    stride: int | None,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[EvaluationRow]:
    try:
        result = perplexity(
            model,
            candidate.processor,
            texts,
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            on_scored=advance,
        )
    except FuseError as error:
        raise FuseError(f"{candidate.name} on {texts.name}: {error}") from error
    return [
        EvaluationRow(candidate.name, texts.name, "perplexity", result.perplexity, result.tokens, False),
        EvaluationRow(candidate.name, texts.name, "bits_per_byte", result.bits_per_byte, result.bytes, False),
    ]


def _classification_rows(
    candidate: Candidate,
    model: PreTrainedModel,
    data: LabelledSet,
    references: list[int],
    max_length: int | None,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[EvaluationRow]:
    import evaluate

    from hf_fuse.classification import NOT_FINITE, can_pad, image_encoder, predict_classes, text_encoder

    if data.kind == "image":
        encode = image_encoder(candidate.processor, model.config, model.dtype)
    else:
        encode = text_encoder(candidate.processor, model, max_length)
        batch_size = batch_size if can_pad(candidate.processor, model.config) else 1
    predictions = predict_classes(model, data.inputs, encode, batch_size=batch_size, on_scored=advance)
    rows, task = [], f"{data.kind}-classification"
    for metric, module, options in (("accuracy", "accuracy", {}), ("macro_f1", "f1", {"average": "macro"})):
        value = math.nan
        if NOT_FINITE not in predictions:
            measure = evaluate.load(str(METRICS / module), keep_in_memory=True)
            value = measure.compute(predictions=predictions, references=references, **options)[module]
        rows.append(EvaluationRow(candidate.name, data.name, metric, value, len(references), True, task))
    return rows


def _task_rows(
    candidate: Candidate,
    model: PreTrainedModel,
    tasks: Sequence[str],
    manager,
    max_length: int | None,
    batch_size: int,
    limit: int | None,
) -> list[EvaluationRow]:
    from hf_fuse.lm_eval_tasks import run_tasks

    scores = run_tasks(
        model, candidate.processor, tasks, manager, batch_size=batch_size, max_length=max_length, limit=limit
    )
    return [
        EvaluationRow(
            candidate.name,
            score.task,
            score.metric,
            score.value,
            score.n,
            score.higher_is_better,
            stderr=score.stderr,
        )
        for score in scores
    ]


@contextmanager
def _progress(tested: list[Candidate]) -> Iterator[Callable]:
    """Shows on stderr, where it is a terminal, which model is measured on what and how far it got."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        line = bar.add_task("", total=None, count="")

        def begin(candidate: Candidate, what: str, unit: str = "", live: bool = True) -> Callable[[int], None]:
            description = f"[{tested.index(candidate) + 1}/{len(tested)}] {candidate.name} · {what}"
            done = 0
            bar.update(line, description=escape(description), count="")
            if live:
                bar.start()
            else:
                # What runs next draws bars of its own.
                bar.stop()
                if console.is_terminal:
                    console.print(description, markup=False)

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.update(line, count=f"{done:,} {unit}")

            return advance

        yield begin


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
