from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Device, Json, app


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="One or several models: folders or Hub ids.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text file for perplexity; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data file, folder or Hub id.", show_default=False)] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of the data set.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    text_column: Annotated[str, typer.Option(help="Column with the text or image.")] = "text",
    label_column: Annotated[str | None, typer.Option(help="Column with labels: accuracy and F1.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval task; repeatable (extra: eval).")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens per window.", show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N examples.", show_default=False)] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer for all models.", show_default=False)] = None,
    as_json: Json = False,
    chart: Annotated[Path | None, typer.Option(help="Save a bar chart here.", show_default=False)] = None,
    write_card: Annotated[bool, typer.Option("--write-card", help="Put the figures into the models' cards.")] = False,
) -> None:
    """Evaluate models side by side: perplexity, accuracy and F1, or lm-eval tasks."""
    from hf_fuse.evaluation import evaluate_models

    report = evaluate_models(
        models, texts=text or [], dataset=dataset, subset=subset, split=split, text_column=text_column,
        label_column=label_column, tasks=tasks or [], batch_size=batch_size, max_length=max_length, stride=stride,
        limit=limit, device=device, dtype=dtype, tokenizer=tokenizer,
    )  # fmt: skip
    # Printed first: what was measured must not be lost to a missing plot library or a read-only card.
    print(report.to_json()) if as_json else report.print()
    if write_card:
        report.write_card()
    if chart:
        report.chart(chart)
