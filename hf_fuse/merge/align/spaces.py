"""The symmetries of one checkpoint: sets of units (spaces), where they lie, and what binds them (groups)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hf_fuse.checkpoint.reader import Checkpoint, text_part
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.merge.align.families import FAMILIES, TASKS, Family, family_of

RESIDUAL = "residual"
BOUND = ("query", "key", "value", "mixed")


@dataclass(frozen=True)
class Part:
    """Units of one space on an axis: ``size`` of them from ``start`` on. ``reads``: the tensor does not make them."""

    space: str
    start: int
    size: int
    reads: bool


Words = list[list[str]]  # for every axis of a tensor the spaces on it
Axes = tuple[tuple[Part, ...], ...]  # for every axis of a tensor its parts; none: the order has a meaning


@dataclass(frozen=True)
class Slot:
    """A place where the units of a space lie."""

    tensor: str
    axis: int
    part: Part


@dataclass(frozen=True)
class Heads:
    """How attention is divided: ``groups`` of ``per_group`` query heads of ``size`` units that share a key."""

    groups: int
    per_group: int
    size: int


@dataclass(frozen=True)
class Group:
    """Spaces that are matched together. ``blocks`` are prefixes of an attention's four spaces; there is one but where
    several layers share what belongs to their heads, which is then the space ``heads``."""

    name: str
    spaces: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    heads: str | None = None


@dataclass
class Spaces:
    """What is known of one checkpoint.

    Attributes:
        axes: of every tensor.
        sizes: units in each space.
        groups: the residual stream first, then by layer.
        heads: of each block.
    """

    family: Family
    axes: dict[str, Axes]
    sizes: dict[str, int]
    groups: list[Group]
    heads: dict[str, Heads]
    _slots: dict[str, list[Slot]] = field(default_factory=dict)

    def __post_init__(self):
        for name, axes in self.axes.items():
            for axis, parts in enumerate(axes):
                for part in parts:
                    self._slots.setdefault(part.space, []).append(Slot(name, axis, part))

    def slots(self, space: str) -> list[Slot]:
        return self._slots.get(space, [])


def spaces_of(checkpoint: Checkpoint) -> Spaces:
    """Reads off names and shapes where the units of every space lie.

    Raises:
        FuseError: an architecture that is not known, or a tensor that it should not have.
        CheckpointError: shapes that do not fit each other.
    """
    family = family_of(checkpoint.architecture)
    if family is None:
        known = ", ".join(f"{model}" for one in FAMILIES for model in one.models)
        raise FuseError(
            f"{checkpoint.ref}: which units of {checkpoint.architecture} can change places is not known. Known are the "
            f"models {known}, with a head ({', '.join(TASKS)})."
        )
    said = {name: _said(checkpoint, family, name) for name in checkpoint.tensors}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    sizes = _sizes(checkpoint, {name: choices[0] for name, choices in said.items() if len(choices) == 1})
    heads = _heads(checkpoint, family, sizes)
    axes = {name: _axes(checkpoint, name, shapes[name], choices, sizes) for name, choices in said.items()}
    return Spaces(family, axes, sizes, _groups(sizes, heads), heads)


def _said(checkpoint: Checkpoint, family: Family, name: str) -> list[Words]:
    """For every axis of a tensor its words, those of a layer with its prefix; alternatives if there are any."""
    rank = len(checkpoint.tensors[name].shape)
    if any(re.fullmatch(_regex(family, pattern), name) for pattern in family.fixed):
        return [[[] for _ in range(rank)]]
    stem, _, leaf = name.rpartition(".")
    for pattern, said in family.axes.items():
        regex = _regex(family, pattern)
        match = re.fullmatch(regex, name) or (leaf in ("weight", "bias") and re.fullmatch(regex, stem))
        if not match:
            continue
        choices = []
        for one in said.split(" | "):
            axes = [[] if word == "-" else word.split("+") for word in one.split()]
            if leaf == "bias" and len(axes) > 1:
                axes = [next(words for words in axes if not any(word.startswith("<") for word in words))]
            if len(axes) == rank:
                choices.append([[_scoped(word, match["layer"] or "") for word in words] for words in axes])
        if choices:
            return choices
    raise FuseError(
        f"{checkpoint.ref}: tensor {name} is none that {checkpoint.architecture} is known to have, so what an "
        "alignment would do to it is not known."
    )


def _regex(family: Family, pattern: str) -> str:
    layer, star, rest = re.escape(pattern).replace(r"\?", r"\w+").partition(r"\*\.")
    prefix = "|".join(map(re.escape, family.prefix.split("|")))
    return rf"(?:{prefix})?" + (rf"(?P<layer>{layer}\d+\.){rest}" if star else rf"(?P<layer>){layer}")


def _scoped(word: str, layer: str) -> str:
    reads, word = ("<", word[1:]) if word.startswith("<") else ("", word)
    return reads + (word if word == RESIDUAL else layer + word)


def _bare(word: str) -> str:
    return word.removeprefix("<")


def _sizes(checkpoint: Checkpoint, words: dict[str, Words]) -> dict[str, int]:
    """Units of each space; those that only lie beside others are found from the rest."""
    sizes: dict[str, int] = {}
    for name, axes in words.items():
        for length, found in zip(checkpoint.tensors[name].shape, axes):
            if len({*found}) == 1:
                size = length // len(found)
                if sizes.setdefault(_bare(found[0]), size) != size:
                    raise CheckpointError(
                        f"{checkpoint.ref}: tensor {name} has {size} units of {_bare(found[0])}, others "
                        f"{sizes[_bare(found[0])]}. Expected equal numbers; is the checkpoint damaged?"
                    )
    for name, axes in words.items():
        for length, found in zip(checkpoint.tensors[name].shape, axes):
            if len({*found}) == 3:  # query, key and value in one matrix
                query, key, value = found
                sizes[query] = sizes[query.removesuffix("query") + "mixed"]
                sizes[key] = sizes[value] = (length - sizes[query]) // 2
    return sizes


def _axes(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], choices: list[Words], sizes: dict[str, int]
) -> Axes:
    for words in choices:
        found, fits = [], True
        for length, axis in zip(shape, words):
            parts, start = [], 0
            for word in axis:
                parts.append(Part(_bare(word), start, sizes.get(_bare(word), 0), word.startswith("<")))
                start += parts[-1].size
            fits = fits and (not axis or start == length)
            found.append(tuple(parts))
        if fits:
            return tuple(found)
    raise CheckpointError(f"{checkpoint.ref}: tensor {name} is {list(shape)}, which does not fit the other tensors.")


def _heads(checkpoint: Checkpoint, family: Family, sizes: dict[str, int]) -> dict[str, Heads]:
    config = text_part(checkpoint.config)
    heads = config.get(family.heads)
    groups = config.get(family.key_heads) or heads
    found = {}
    for space, size in sizes.items():
        if not space.endswith("mixed"):
            continue
        block = space.removesuffix("mixed")
        if not isinstance(heads, int) or not isinstance(groups, int) or heads < 1 or heads % groups or size % heads:
            raise CheckpointError(
                f"{checkpoint.ref}: config.json says {heads} heads in {groups} groups, which does not fit {size} units "
                f"of {space}."
            )
        one = Heads(groups, heads // groups, size // heads)
        wanted = {"query": size, "key": groups * one.size, "value": groups * one.size}
        if wrong := next((word for word, count in wanted.items() if sizes.get(block + word) != count), None):
            raise CheckpointError(
                f"{checkpoint.ref}: {block}{wrong} has {sizes.get(block + wrong)} units, expected {wanted[wrong]}."
            )
        found[block] = one
    return found


def _groups(sizes: dict[str, int], heads: dict[str, Heads]) -> list[Group]:
    shared = [space for space in sizes if space.endswith(".heads")]
    groups = []
    for space in shared:
        stack = space.removesuffix("heads")
        blocks = tuple(sorted((b for b in heads if b.startswith(stack) and b[-2].isdigit()), key=_natural))
        groups.append(Group(space, (*(b + word for b in blocks for word in BOUND), space), blocks, space))
    taken = {block for group in groups for block in group.blocks}
    groups += [Group(b + "attention", tuple(b + word for word in BOUND), (b,)) for b in heads if b not in taken]
    bound = {space for group in groups for space in group.spaces}
    groups += [Group(space, (space,)) for space in sizes if space not in bound]
    return sorted(groups, key=lambda group: (group.name != RESIDUAL, _natural(group.name)))


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"(\d+)", name)]
