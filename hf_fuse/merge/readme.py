"""Renews the table of methods in README.md from the code: ``python -m hf_fuse.merge.readme``."""

from __future__ import annotations

import re
from pathlib import Path

from hf_fuse import registry
from hf_fuse.merge.report import method_facts

README = Path(__file__).parents[2] / "README.md"
BASE = {"required": "yes", "no": "", "optional": "if given"}


def method_table() -> str:
    """All merge methods as a Markdown table."""
    lines = ["| method | what it does | models | base | parameters |", "|---|---|---|---|---|"]
    for name in registry.names("merge"):
        facts = method_facts(registry.get("merge", name))
        title = f"[`{name}`]({facts['paper']})" if facts["paper"] else f"`{name}`"
        options = ", ".join(f"`{option}`" for option in facts["parameters"])
        lines.append(f"| {title} | {facts['summary']} | {facts['models']} | {BASE[facts['base']]} | {options} |")
    lines += ["", "Steps for a recipe's `post`:", "", "| step | what it does | parameters |", "|---|---|---|"]
    for name in registry.names("post"):
        facts = method_facts(registry.get("post", name))
        options = ", ".join(f"`{option}`" for option in facts["parameters"])
        lines.append(f"| [`{name}`]({facts['paper']}) | {facts['summary']} | {options} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README's text with the table between its markers renewed."""
    start, end = "<!-- methods:start -->", "<!-- methods:end -->"
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{method_table()}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
