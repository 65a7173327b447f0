# quick
"""Every merge method on small real data: accuracy beside the length of the merged change, over several seeds.

    python recipes/merge_study.py                 # a minute: one seed, hardly trained; shows that everything runs
    python recipes/merge_study.py --full          # three seeds, whole grids: the study

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
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study.merging import run_suite
from study.report import LEGEND, report
from study.suites import FULL, QUICK, Effort, digit_suites, text_suite

from hf_fuse import registry


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models, whole grids (minutes)")
    parser.add_argument("--suites", nargs="+", default=["digits", "pairs", "text"], choices=["digits", "pairs", "text"])
    parser.add_argument("--methods", nargs="+", default=[], help="only these, instead of all that are registered")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("merge-study"), help="folder for tables and plots")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    # The soup is what all are held against.
    methods = dict.fromkeys(["linear", *given.methods]) if given.methods else ()
    effort = replace(effort, methods=tuple(registry.get("merge", name).name for name in methods))
    seeds = range(given.seeds or effort.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort), itertools.repeat(given.suites)))
    else:
        runs = [run_seed(seed, effort, given.suites) for seed in seeds]
    given.output.mkdir(parents=True, exist_ok=True)
    reported = {name: report(name, [run[name] for run in runs], given.output) for name in given.suites}
    facts = {
        "command": shlex.join(["python", "recipes/merge_study.py", *sys.argv[1:]]), "full": given.full,
        "seeds": len(seeds), "versions": versions(), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    (given.output / "study.json").write_text(
        json.dumps(facts | {"suites": {name: part for name, (part, _) in reported.items()}}, indent=2) + "\n"
    )
    warning = "This was a quick run: the models are hardly trained and the figures mean nothing. Use --full."
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    heading = (
        f"# Every merge method on small real data\n\n`{facts['command']}` (seeds: {len(seeds)}; {used})\n\n{LEGEND}\n"
    )
    sections = [heading, *([] if given.full else [warning + "\n"]), *(part for _, part in reported.values())]
    (given.output / "study.md").write_text("\n".join(sections), encoding="utf-8")
    if not given.full:
        print(f"\n{warning}")
    print(f"\n{given.output}: study.md, study.json and plots ({facts['seconds']:.0f} s)")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name).split("+")[0] for name in ("hf-fuse", "torch", "transformers")}


if __name__ == "__main__":
    main()
