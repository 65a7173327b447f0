"""What methods there are, of all kinds, for people and as plain facts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.registry import Method

# Kind -> what it is for. Kinds that are not here are shown under their own names.
TITLES = {
    "merge": "merge: many models into one (hf-fuse merge)",
    "post": "post: steps after a merge of differences from a base",
    "learn": "learn: estimators of what a merge needs to know (hf-fuse learn)",
    "align": "align: units of one model into the order of another's (hf-fuse align)",
    "compress": "compress: one model made smaller (hf-fuse compress)",
    "losses": "losses: objectives of a training (hf-fuse train, FuseTrainer)",
    "distill": "distill: losses against a teacher (DistillTrainer)",
    "attached": "attached: distillation with heads, peers, views or histories (DistillTrainer)",
    "data": "data: choice of training texts (hf-fuse select)",
    "decode": "decode: several models behind one stream of tokens (hf-fuse generate)",
}


def kinds() -> list[str]:
    """All kinds of the registry that have methods, those of ``TITLES`` first."""
    order = dict.fromkeys([*TITLES, *registry.KINDS])
    return [kind for kind in order if kind in registry.KINDS and registry.names(kind)]


def listed(kind: str | None = None) -> list[Method]:
    """All methods of a kind, or of all kinds.

    Raises:
        RecipeError: no such kind.
    """
    if kind is not None and kind not in registry.KINDS:
        raise RecipeError(f"--kind: no kind of method is called {kind!r}. {registry.nearest(kind, kinds())}")
    return [registry.get(one, name) for one in ([kind] if kind else kinds()) for name in registry.names(one)]


def find(name: str, kind: str | None = None) -> list[Method]:
    """The methods of this name; there may be one in several kinds, an estimator and the merge that uses it.

    Raises:
        RecipeError: no such method or kind; the nearest name is given.
    """
    of = {one: registry.names(one) for one in ([kind] if kind in registry.KINDS else kinds())}
    found = [registry.get(one, name) for one, known in of.items() if name in known]
    if kind is not None and kind not in registry.KINDS:
        listed(kind)
    if not found:
        known = dict.fromkeys(one for names in of.values() for one in names)
        raise RecipeError(f"no method is called {name!r}. {registry.nearest(name, known)}")
    return found


def method_facts(method: Method) -> dict[str, Any]:
    """What ``hf-fuse list --json`` says about one method. Those of merges also say which models they take."""
    meanings = described_arguments(method)
    facts = {
        "name": method.name,
        "kind": method.kind,
        "summary": method.summary,
        "paper": _address(method.paper),
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
    return facts | _merge_facts(method) if method.kind in ("merge", "post") else facts


def _merge_facts(method: Method) -> dict[str, Any]:
    from hf_fuse.merge.units import takes_base

    low, high = getattr(method.module, "MODELS", (1, None))
    needs_base = True if method.kind == "post" else takes_base(method)
    return {
        "base": {True: "required", False: "no", None: "optional"}[needs_base],
        "models": f"{low}" if low == high else f"{low}+" if high is None else f"{low}-{high}",
        "statistics": getattr(method.module, "STATISTICS", None),
    }


def _address(paper: str | None) -> str | None:
    return f"https://arxiv.org/abs/{paper}" if paper and not paper.startswith("http") else paper


def described_arguments(method: Method) -> dict[str, str]:
    """The ``Args:`` section of the docstring: ``{argument: its text in one line}``."""
    text = inspect.cleandoc(method.function.__doc__ or "").partition("Args:")[2]
    section = re.split(r"\n(?=\S)", text)[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, flags=re.M | re.S)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def print_methods(methods: Iterable[Method], console: Console) -> None:
    by_kind: dict[str, list[Method]] = {}
    for method in methods:
        by_kind.setdefault(method.kind, []).append(method)
    for kind, of in by_kind.items():
        console.print(f"[bold]{TITLES.get(kind, kind)}[/]", highlight=False)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("method", no_wrap=True)
        table.add_column("what it does")
        if kind == "merge":
            table.add_column("needs", no_wrap=True)
        if wide := console.width >= 110:  # else it would take the room of what matters more; one method shows it
            table.add_column("paper", no_wrap=True)
        for method in of:
            facts = method_facts(method)
            paper = (facts["paper"] or "").removeprefix("https://").replace("arxiv.org/abs/", "arXiv:")
            cells = [method.name, facts["summary"].removesuffix(".")]
            cells += [_needs(facts)] if kind == "merge" else []
            table.add_row(*cells, *([paper.split("/")[0]] if wide else []))
        console.print(table)
        if kind == "merge":
            console.print("needs: models besides the base; data: statistics of each model, made by hf-fuse learn.\n")
    console.print("hf-fuse list METHOD shows parameters and a recipe, hf-fuse list --kind KIND one of these tables.")


def _needs(facts: dict[str, Any]) -> str:
    base = {"required": "base, ", "optional": "(base), ", "no": ""}[facts["base"]]
    return f"{base}{facts['models']}{' + data' if facts['statistics'] else ''}"


def print_method(method: Method, console: Console) -> None:
    facts = method_facts(method)
    console.print(f"[bold]{method.name}[/]: {facts['summary']}", highlight=False)
    if facts["paper"]:
        console.print(facts["paper"])
    formula = inspect.cleandoc(method.function.__doc__ or "").split("\n\n")[0].replace("``", "")
    console.print(formula, highlight=False, markup=False)
    console.print(_place(facts), highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("parameter", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, option in facts["parameters"].items():
        default = "required" if option["required"] else str(option["default"])
        default += ", by name" if option["by_name"] else ""
        table.add_row(key, option["type"], default, option["meaning"].replace("``", ""))
    if facts["parameters"]:
        console.print(table)
    if method.kind in RECIPES:
        console.print("recipe:", style="bold")
        console.print(RECIPES[method.kind](facts, method), highlight=False, markup=False)


def _place(facts: dict[str, Any]) -> str:
    if facts["kind"] != "merge":
        return TITLES.get(facts["kind"], facts["kind"])
    statistics = f", statistics of each: {facts['statistics']} (hf-fuse learn)" if facts["statistics"] else ""
    return f"models: {facts['models']}, base: {facts['base']}{statistics}"


def _parameters(facts: dict[str, Any], indent: str = "  ") -> list[str]:
    """Every parameter at its default, without those that would have no one default for all tensors."""
    return [
        f"{indent}{name}: {_yaml(option['default'])}"
        for name, option in facts["parameters"].items()
        if not option["by_name"]
    ]


def _yaml(value: Any) -> Any:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else value


def _merge_recipe(facts: dict[str, Any], _: Method) -> str:
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
    return "\n".join(lines + _parameters(facts, "    " if step else "  "))


def _compress_recipe(facts: dict[str, Any], method: Method) -> str:
    lines = [f"method: {facts['name']}", "model: path/or/org-name", "parameters:", *_parameters(facts)]
    lines += ["calibration: path/of/text.txt"] if getattr(method.module, "NEEDS_TEXT", True) else []
    return "\n".join([*lines, "evaluation: path/of/other-text.txt"])


def _learn_recipe(facts: dict[str, Any], _: Method) -> str:
    lines = [f"estimator: {facts['name']}", "model: path/or/org-name", "data: path/of/data.jsonl"]
    return "\n".join([*lines, *(["parameters:", *_parameters(facts)] if facts["parameters"] else [])])


def _objective(facts: dict[str, Any], _: Method) -> str:
    """A part of a training recipe."""
    return "\n".join(["objectives:", f"  {facts['name']}:", "    weight: 1.0", *_parameters(facts, "    ")])


RECIPES: dict[str, Callable[[dict[str, Any], Method], str]] = {
    "merge": _merge_recipe, "post": _merge_recipe, "compress": _compress_recipe, "learn": _learn_recipe,
    "losses": _objective, "distill": _objective, "attached": _objective,
}  # fmt: skip
