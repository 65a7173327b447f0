"""The plan, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hf_fuse.merge.plan import Plan


def size(count: float) -> str:
    """``1234567890`` -> ``1.23 GB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def print_plan(plan: Plan, console: Console) -> None:
    facts = plan.to_dict()
    paper = f"  {plan.method.paper}" if plan.method.paper else ""
    console.print(f"[bold]{plan.method.name}[/]: {plan.method.summary}{paper}", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("role", "model", "commit", "tensors", "size", "dtypes", "tokenizer"):
        table.add_column(column, justify="right" if column in ("tensors", "size") else "left", overflow="fold")
    for parent in facts["parents"]:
        table.add_row(
            parent["role"],
            parent["ref"] + (f"\n(LoRA on {parent['adapter']['targets']} tensors)" if "adapter" in parent else ""),
            (parent["commit"] or "local")[:10],
            str(parent["tensors"]),
            size(parent["bytes"]),
            ", ".join(f"{dtype} {count}" for dtype, count in parent["dtypes"].items()),
            parent["tokenizer"],
        )
    console.print(table)
    rows = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(facts):
        rows.add_row(f"[dim]{name}[/]", value)
    console.print(rows)
    for warning in plan.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    tensors = ", ".join(f"{count} {action}" for action, count in facts["tensors"].items())
    dtypes = ", ".join(f"{dtype} {count}" for dtype, count in facts["out_dtypes"].items())
    passes = f"{facts['passes']} pass{'es' if facts['passes'] > 1 else ''} of {size(facts['bytes_read'])}"
    lines = [
        ("tensors", f"{tensors} ({facts['parameters']:,} parameters)"),
        ("reads", f"at most {passes}" if facts["passes"] > 2 else passes),
        ("writes", f"{size(facts['bytes_written'])} in {len(facts['files'])} file(s), {dtypes}"),
        ("memory", f"about {size(facts['peak_memory'])} at the peak"),
    ]
    if adapter := facts.get("adapter"):
        lines.insert(1, ("adapter", f"{adapter['modules']} modules, {adapter['way']}"))
    if facts["tied"]:
        lines.append(("head", "tied to the embedding"))
    if facts["vocabulary"]:
        lines.append(("vocabulary", f"{facts['vocabulary']} tokens ({facts['tokenizer']})"))
    if facts["output"]:
        lines.append(("output", f"{facts['output']} ({size(facts['free_disk'])} free)"))
    if facts["push"]:
        lines.append(("push", facts["push"]))
    return lines
