"""The plan and the list of methods, for people."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hf_fuse import registry

if TYPE_CHECKING:
    from hf_fuse.merge.plan import Plan
    from hf_fuse.registry import Method


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


def find(name: str) -> Method:
    """A merge method, or a step for a recipe's ``post``, by name."""
    return registry.get("post" if name in registry.names("post") else "merge", name)


def listed() -> list[Method]:
    """All merge methods, then all steps."""
    return [registry.get(kind, name) for kind in ("merge", "post") for name in registry.names(kind)]


def method_facts(method: Method) -> dict[str, Any]:
    """What ``hf-fuse list --json`` says about one merge method, or step (``kind`` is ``post``)."""
    from hf_fuse.merge.units import takes_base

    low, high = getattr(method.module, "MODELS", (1, None))
    meanings = described_arguments(method)
    needs_base = True if method.kind == "post" else takes_base(method)
    return {
        "name": method.name,
        "kind": method.kind,
        "summary": method.summary,
        "paper": method.paper,
        "base": {True: "required", False: "no", None: "optional"}[needs_base],
        "models": f"{low}" if low == high else f"{low}+" if high is None else f"{low}-{high}",
        "statistics": getattr(method.module, "STATISTICS", None),
        "parameters": {
            option.name: {
                "type": option.describe(),
                "default": None if option.required else option.default,
                "required": option.required,
                "per_model": option.per_model,
                "by_name": option.name in getattr(method.module, "DEFAULTS", {}),
                "meaning": meanings.get(option.keyword, ""),
            }
            for option in method.options.values()
        },
    }


def described_arguments(method: Method) -> dict[str, str]:
    """The ``Args:`` section of the docstring: ``{argument: its text in one line}``."""
    text = inspect.cleandoc(method.function.__doc__ or "").partition("Args:")[2]
    section = re.split(r"\n(?=\S)", text)[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, flags=re.M | re.S)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def print_methods(console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("needs", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for method in listed():
        facts = method_facts(method)
        base = {"required": "base, ", "optional": "(base), ", "no": ""}[facts["base"]]
        needs = "base, post" if method.kind == "post" else f"{base}{facts['models']}"
        needs += " + data" if facts["statistics"] else ""
        paper = (facts["paper"] or "").removeprefix("https://").replace("arxiv.org/abs/", "arXiv:")
        table.add_row(method.name, facts["summary"].removesuffix("."), needs, paper.split("/")[0])
    console.print(table)
    console.print(
        "needs: models to merge, besides the base; data: statistics of each model, made by hf-fuse learn; post: a step "
        "after any merge of differences from a base. "
        "hf-fuse list METHOD shows parameters and a recipe."
    )


def print_method(name: str, console: Console) -> None:
    method = find(name)
    facts = method_facts(method)
    console.print(f"[bold]{name}[/]: {facts['summary']}", highlight=False)
    if facts["paper"]:
        console.print(facts["paper"])
    formula = inspect.cleandoc(method.function.__doc__ or "").split("\n\n")[0].replace("``", "")
    console.print(formula, highlight=False, markup=False)
    if method.kind == "post":
        console.print("a step after any merge of differences from a base: the recipe's post", highlight=False)
    else:
        statistics = f", statistics of each: {facts['statistics']} (hf-fuse learn)" if facts["statistics"] else ""
        console.print(f"models: {facts['models']}, base: {facts['base']}{statistics}", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("parameter", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, option in facts["parameters"].items():
        default = "required" if option["required"] else str(option["default"])
        default += ", by name" if option["by_name"] else ""
        table.add_row(key, option["type"], default, option["meaning"].replace("``", ""))
    console.print(table)
    console.print("recipe:", style="bold")
    console.print(example_recipe(facts), highlight=False, markup=False)


def example_recipe(facts: dict[str, Any]) -> str:
    """A recipe to paste, with every parameter at its default."""
    count, step = {"1": 1}.get(facts["models"], 2), facts["kind"] == "post"
    lines = [f"method: {'task_arithmetic' if step else facts['name']}"]
    if facts["base"] == "required":
        lines.append("base_model: path/or/org-name")
    lines.append("models:")
    for k in range(1, count + 1):
        lines.append(f"  - path: path/of/model-{k}")
        if facts["statistics"]:
            lines.append(f"    statistics: path/of/{facts['statistics']}-{k}")
    if step:
        lines += ["post:", f"  {facts['name']}:"]
    elif facts["parameters"]:
        lines.append("parameters:")
    if facts["parameters"]:
        for name, option in facts["parameters"].items():
            default = option["default"]
            if option["by_name"]:
                continue  # one value for all tensors would not be the default
            text = str(default).lower() if isinstance(default, bool) else default
            lines.append(f"{'    ' if step else '  '}{name}: {text}")
    return "\n".join(lines)
