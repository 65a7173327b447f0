"""What the demo measured, as a table, charts, and sentences whose every figure is computed from the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

AVERAGE = "average"


def with_average(by_domain: Mapping[str, float]) -> dict[str, float]:
    """The perplexities of one model plus their arithmetic mean."""
    return {**by_domain, AVERAGE: sum(by_domain.values()) / len(by_domain)}


def perplexity_table(
    perplexities: Mapping[str, Mapping[str, float]], families: Mapping[str, str], notes: Mapping[str, str]
) -> Table:
    """Models as rows in the order given, a line between families, the best of each column in bold.

    Args:
        perplexities: model -> domain (and ``average``) -> perplexity.
        families: model -> ``base``, ``expert``, ``merge`` or ``reference``.
        notes: model -> a few words on how it was made.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    columns = list(next(iter(perplexities.values())))
    best = {column: min(values[column] for values in perplexities.values()) for column in columns}
    table = Table(
        title="Perplexity per byte on held-out text (lower is better; best in bold)",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    # On a narrow terminal only the last column, which may be broken into lines, gives way.
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("made from", style="dim")
    names = list(perplexities)
    for name, following in zip(names, [*names[1:], None]):
        cells = []
        for column in columns:
            value = perplexities[name][column]
            cells.append(Text(figure(value), style="bold" if value == best[column] else ""))
        last = following is not None and families[following] != families[name]
        table.add_row(Text(name), *cells, Text(notes.get(name, "")), end_section=last)
    return table


def figure(value: float) -> str:
    """About four digits: 4.996, 17.32, 126.8."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def findings(
    perplexities: Mapping[str, Mapping[str, float]], families: Mapping[str, str], homes: Mapping[str, str]
) -> list[str]:
    """Sentences on what merging bought and what it cost, from the figures alone.

    Args:
        perplexities: model -> domain and ``average`` -> perplexity.
        families: model -> ``base``, ``expert``, ``merge`` or ``reference``; one base, at least one expert and merge.
        homes: expert -> its own domain.
    """
    family = {kind: [name for name in perplexities if families[name] == kind] for kind in set(families.values())}
    base, experts, merges = family["base"][0], family["expert"], family["merge"]
    average = {name: values[AVERAGE] for name, values in perplexities.items()}
    winner, expert = min(merges, key=average.__getitem__), min(experts, key=average.__getitem__)
    return [
        _specialisation(perplexities, base, experts, homes),
        _average(average, merges, winner, expert, base),
        _per_domain(perplexities, winner, base, homes),
        *_losers(average, merges, base),
        *(_reference(average, winner, name) for name in family.get("reference", ())),
    ]


def _specialisation(
    perplexities: Mapping[str, Mapping[str, float]], base: str, experts: Sequence[str], homes: Mapping[str, str]
) -> str:
    home = sum(
        perplexities[name][homes[name]] == min(perplexities[other][homes[name]] for other in (base, *experts))
        for name in experts
    )
    foreign = [(name, homes[other]) for name in experts for other in experts if other != name]
    worse = sum(perplexities[name][domain] > perplexities[base][domain] for name, domain in foreign)
    return (
        f"Specialisation: on its own domain, {home} of {len(experts)} experts beat the base and the other experts; "
        f"on a foreign domain an expert is worse than the base in {worse} of {len(foreign)} cases."
    )


def _average(average: Mapping[str, float], merges: Sequence[str], winner: str, expert: str, base: str) -> str:
    better = sum(average[name] < average[expert] for name in merges)
    return (
        f"Gain: {better} of {len(merges)} merges beat every single expert on the average of the domains. The best "
        f"one, {winner}, has {figure(average[winner])} ({_change(average[winner], average[expert])} against the "
        f"best expert, {expert}; {_change(average[winner], average[base])} against the base)."
    )


def _per_domain(
    perplexities: Mapping[str, Mapping[str, float]], winner: str, base: str, homes: Mapping[str, str]
) -> str:
    costs = ", ".join(
        f"{_change(perplexities[winner][domain], perplexities[expert][domain])} on {domain}"
        for expert, domain in homes.items()
    )
    better = sum(perplexities[winner][domain] < perplexities[base][domain] for domain in homes.values())
    return (
        f"Price: against the expert of each domain, {winner} has {costs}. It is better than the base on "
        f"{better} of {len(homes)} domains."
    )


def _losers(average: Mapping[str, float], merges: Sequence[str], base: str) -> list[str]:
    losers = [f"{name} ({_change(average[name], average[base])})" for name in merges if average[name] >= average[base]]
    return [f"No gain: not better than the base on average: {', '.join(losers)}."] if losers else []


def _reference(average: Mapping[str, float], winner: str, name: str) -> str:
    if average[winner] < average[name]:
        verdict = f"the best merge is better than that ({_change(average[winner], average[name])})"
    else:
        verdict = f"the best merge does not reach that ({_change(average[winner], average[name])})"
    return (
        f"Reference: {name}, trained on all domains at once for as many steps as the experts together, has "
        f"{figure(average[name])}; {verdict}. It needs all the data in one place, a merge only the finished experts."
    )


def _change(value: float, reference: float) -> str:
    """Relative change with its sign: ``-2.6 %``; a lower perplexity is better."""
    return f"{100 * (value / reference - 1):+.1f} %"
