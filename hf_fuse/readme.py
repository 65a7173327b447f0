"""Renews the tables in README.md from the code: ``python -m hf_fuse.readme``."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

from hf_fuse import registry
from hf_fuse.method_list import method_facts

README = Path(__file__).parents[1] / "README.md"
BASE = {"required": "a base", "no": "", "optional": "(a base)"}


def merge_table() -> str:
    """All merge methods, and the steps that may follow."""
    rows = [method_facts(registry.get("merge", name)) for name in registry.names("merge")]
    steps = [method_facts(registry.get("post", name)) for name in registry.names("post")]
    return "\n".join(
        [
            "| method | what it does | models | also needs | parameters |",
            "|---|---|---|---|---|",
            *(
                f"| {_linked(row['name'], row['paper'])} | {row['summary']} | {row['models']} | {_needed(row)} | "
                f"{_listed(row['parameters'])} |"
                for row in rows
            ),
            "",
            "Steps for a recipe's `post`:",
            "",
            "| step | what it does | parameters |",
            "|---|---|---|",
            *(f"| {_linked(s['name'], s['paper'])} | {s['summary']} | {_listed(s['parameters'])} |" for s in steps),
        ]
    )


def adapter_table() -> str:
    """All adapters, by the first line and the first arXiv number of their modules."""
    from hf_fuse.adapters._peft import METHODS

    lines = ["| adapter | what it is |", "|---|---|"]
    for name in METHODS:
        module = import_module(f"hf_fuse.adapters.{name}")
        summary = inspect.cleandoc(module.__doc__).split("\n\n")[0].replace("\n", " ")
        number = re.search(r"arXiv (\d{4}\.\d{5})", module.__doc__)
        summary = re.sub(r" \(arXiv [^)]*\)", "", summary)
        lines.append(f"| {_linked(name, number and f'https://arxiv.org/abs/{number[1]}')} | {summary} |")
    return "\n".join(lines)


def loss_table() -> str:
    """All losses: when to prefer them (the second paragraph of their modules), what they need, and their options."""
    from hf_fuse.objectives import read_objectives

    lines = ["| loss | what it does | when to prefer it | needs | options |", "|---|---|---|---|---|"]
    for name in registry.names("losses"):
        loss = registry.get("losses", name)
        _, (objective,) = read_objectives({name: 1.0})
        needs = [tensor for keyword, tensor in objective.needs.items() if keyword not in objective.optional]
        needs += ["whole batches"] if getattr(loss.module, "IN_BATCH", False) else []
        when = " ".join(inspect.cleandoc(loss.module.__doc__).split("\n\n")[1].split()).replace("``", "`")
        lines.append(
            f"| {_linked(name, loss.paper)} | {loss.summary} | {_unlinked(when)} | {', '.join(needs)} "
            f"| {_listed(loss.options)} |"
        )
    return "\n".join(lines)


def distillation_table() -> str:
    """All distillation methods and their options; those that attach something to the training come last."""
    methods = [registry.get(kind, name) for kind in ("distill", "attached") for name in registry.names(kind)]
    rows = [f"| {_linked(m.name, m.paper)} | {m.summary} | {_listed(m.options)} |" for m in methods]
    return "\n".join(["| method | what it does | options |", "|---|---|---|", *rows])


def selection_table() -> str:
    """All methods that choose training data: what they compare with, and their options."""
    rows = []
    for name in registry.names("data"):
        method = registry.get("data", name)
        needs = list(inspect.signature(method.function).parameters)[1 : -len(method.options)]
        rows.append(
            f"| {_linked(name, method.paper)} | {method.summary} | {_listed(needs)} | {_listed(method.options)} |"
        )
    return "\n".join(["| method | what it does | needs | options |", "|---|---|---|---|", *rows])


def decoding_table() -> str:
    """All methods of fusion while decoding: their models by the keys of a recipe, and their parameters."""
    from hf_fuse.decode.recipe import model_keys

    lines = ["| method | what it does | models | parameters |", "|---|---|---|---|"]
    for name in registry.names("decode"):
        method = registry.get("decode", name)
        models = ", ".join(f"(`{key}`)" if optional else f"`{key}`" for key, optional in model_keys(method).items())
        lines.append(f"| {_linked(name, method.paper)} | {method.summary} | {models} | {_listed(method.options)} |")
    return "\n".join(lines)


def head_table() -> str:
    """All heads, by the first paragraph and the first paper of their modules."""
    from hf_fuse.heads import HEADS, OTHERS

    lines = ["| head | what it does | module |", "|---|---|---|"]
    for name, module_name in {**HEADS, **OTHERS}.items():
        text = inspect.cleandoc(import_module(f"hf_fuse.heads.{module_name}").__doc__)
        paper = re.search(r"https://arxiv\.org/abs/[\d.]+\d", text)
        summary = text.split("\n\n")[0].replace("\n", " ")
        lines.append(f"| {_linked(name, paper and paper[0])} | {summary} | `hf_fuse.heads.{module_name}` |")
    return "\n".join(lines)


def _needed(row: dict) -> str:
    return ", ".join(filter(None, (BASE[row["base"]], row["statistics"] and "statistics of each")))


def _linked(name: str, paper: str | None) -> str:
    return f"[`{name}`]({paper})" if paper else f"`{name}`"


def _unlinked(text: str) -> str:
    """Sphinx's ``:func:`name``` as a plain name."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)


def _listed(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


TABLES = {
    "selection": selection_table,
    "heads": head_table,
    "methods": merge_table,
    "adapters": adapter_table,
    "losses": loss_table,
    "distillation": distillation_table,
    "decoding": decoding_table,
}


def with_tables(text: str) -> str:
    """The README's text with each table between its markers renewed."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        text = re.sub(f"{start}.*?{end}", lambda _, t=table, s=start, e=end: f"{s}\n{t()}\n{e}", text, flags=re.S)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
