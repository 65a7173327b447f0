"""LLM-Drop: leaves out the attentions, MLPs or blocks that change the residual stream least.

A sub-layer's similarity is the mean over tokens of the cosine between the residual stream before and after it (fp32).
The most similar are dropped, their norms with them. The cosine is blind to scale: what only stretches the stream counts
as redundant.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from hf_fuse.compress.edit import Edit, the_stack
from hf_fuse.compress.importance_chart import importance_chart
from hf_fuse.compress.subject import Subject
from hf_fuse.compress.sublayers import DROP_KEYS, Family, decoder_layers, family_of, one_layer_type, skip
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.merge.parameters import layer_of
from hf_fuse.registry import Between

PAPER = "2406.15786"
NEEDS_TEXT = True
KINDS = {"attention": ("attention",), "mlp": ("mlp",), "joint": ("attention", "mlp"), "block": ("block",)}
Part = tuple[str, int]  # kind of sub-layer, layer


def llm_drop(
    subject: Subject,
    *,
    drop: Annotated[int, Between(0)],
    target: Literal["attention", "mlp", "joint", "block"] = "attention",
    rounds: Annotated[int, Between(1)] = 1,
    consecutive: bool = False,
) -> Edit:
    """One-shot depth pruning by similarity; no training.

    Dropped blocks are gone from the output. Dropped attentions and MLPs have a zero output projection there, which any
    loader reads, and are listed in ``config.json``; :func:`hf_fuse.load_compressed` leaves them out.

    Args:
        drop: how many to drop.
        target: of what. ``joint`` takes attentions and MLPs from one ranking.
        rounds: drop in so many steps, measuring anew before each.
        consecutive: drop one run of blocks, the one whose input and output are most similar.

    Raises:
        RecipeError: more to drop than there is, or options that exclude each other.
        FuseError: the layers are not built of attention and MLP in sequence.
    """
    stack, height = the_stack(subject.checkpoint)
    kinds = KINDS[target]
    if consecutive and (target != "block" or rounds > 1):
        raise RecipeError("parameters: consecutive is for target: block, in one round. Remove it, or change those.")
    model = subject.model
    layers = decoder_layers(model)
    family = family_of(layers)
    if family is None and target != "block":
        raise FuseError(
            f"{subject.candidate.name}: its layers ({type(layers[0]).__name__}) are not attention and MLP in sequence, "
            "as far as is known here. Use target: block."
        )
    gone = {kind: subject.checkpoint.config.get(key, []) for kind, key in DROP_KEYS.items()}
    open_parts = [
        (kind, index)
        for kind in kinds
        for index in range(height)
        if index not in gone.get(kind, ()) and _may_go(kind, index, model.config)
    ]
    most = min(len(open_parts), height - 1) if target == "block" else len(open_parts)
    if drop > most:
        raise RecipeError(f"parameters: drop is {drop}, but at most {most} of target {target} can be dropped here.")

    first = similarities(subject, layers, family, span=drop if consecutive and drop else 1)
    dropped: list[Part] = []
    if consecutive and drop:
        runs = {index: first["run", index] for index in range(height - drop + 1)}
        start = max(runs, key=lambda index: (runs[index], -index))
        dropped = [("block", start + offset) for offset in range(drop)]
        _skip_all(layers, dropped, family)
    for step in range(0 if consecutive else rounds):
        count = drop * (step + 1) // rounds - drop * step // rounds
        scores = first if not dropped else similarities(subject, layers, family)
        left = [part for part in open_parts if part not in dropped]
        chosen = sorted(left, key=lambda part: (-scores[part], part[1], part[0]))[:count]
        dropped += chosen
        _skip_all(layers, chosen, family)

    by_kind = {kind: sorted(index for found, index in dropped if found == kind) for kind in kinds}
    importance = {kind: [1 - first[kind, index] for index in range(height)] for kind in kinds}
    said = [f"{kind} of layers {', '.join(map(str, found)) or 'none'}" for kind, found in by_kind.items()]
    edit = Edit(
        expected=subject.probe(model),
        summary=f"Dropped {'; '.join(said)}.",
        facts={"dropped": by_kind, "importance": importance},
        chart=partial(importance_chart, importance, by_kind),
    )
    if target == "block":
        if drop:
            edit.layers = [index for index in range(height) if index not in by_kind["block"]]
        return edit
    for kind, indices in by_kind.items():
        if indices:
            edit.config[DROP_KEYS[kind]] = sorted([*gone[kind], *indices])
            edit.tensors |= _silenced(subject, stack, family, kind, indices)
    return edit


def _may_go(kind: str, index: int, config: Any) -> bool:
    """Where layers differ in their kind of cache, masks are made by the first of each kind: its attention stays."""
    text = config.get_text_config()
    if kind != "attention" or one_layer_type(text):
        return True
    return index != text.layer_types.index(text.layer_types[index])


def _skip_all(layers: nn.ModuleList, parts: list[Part], family: Family | None) -> None:
    for kind, index in parts:
        skip(layers[index], kind, family)


def _silenced(subject: Subject, stack: str, family: Family, kind: str, indices: list[int]) -> dict[str, Any]:
    """Zeros for the stored output projections of these sub-layers."""
    found = {}
    for name, info in subject.checkpoint.tensors.items():
        layer = layer_of(name)
        if layer and layer[1] in indices and family.output(kind).fullmatch(name.removeprefix(f"{stack}.{layer[1]}.")):
            found[name] = lambda read, shape=info.shape: torch.zeros(shape)
    if {layer_of(name)[1] for name in found} != set(indices):
        raise FuseError(f"{subject.candidate.name}: where its {kind} output projections are stored is not known here.")
    return found


@torch.no_grad()
def similarities(
    subject: Subject, layers: nn.ModuleList, family: Family | None, span: int = 1
) -> dict[tuple[str, int], float]:
    """Mean cosine of the residual stream before and after each ``(kind, layer)``, in one pass over the text.

    ``("run", i)`` is that of the ``span`` blocks from ``i`` on. Blocks that are skipped already count as block only.
    """
    meter = _Meter(len(layers), span)
    with meter.watching(layers, family):
        for ids_1T in tqdm(subject.calibration, desc="similarity", unit="sequence", disable=None):
            subject.run(subject.model, ids_1T)
    return {part: total / meter.tokens for part, total in meter.sums.items()}


class _Meter:
    """Running sums of cosines; of the stream itself no more is kept than one sequence needs."""

    def __init__(self, height: int, span: int):
        self.sums: dict[tuple[str, int], float] = {}
        self.tokens = 0
        self.height = height
        self.before: deque[Tensor] = deque(maxlen=span)  # inputs of the last layers
        self.middle: Tensor | None = None

    def _add(self, kind: str, index: int, one_1TD: Tensor, other_1TD: Tensor) -> None:
        cosine = cosine_similarity(one_1TD.float(), other_1TD.float(), dim=-1).double().sum().item()
        self.sums[kind, index] = self.sums.get((kind, index), 0.0) + cosine

    def _enter(self, index: int, stream_1TD: Tensor) -> None:
        if index == 0:
            self.before.clear()
            self.tokens += stream_1TD.shape[:-1].numel()
        self.before.append(stream_1TD)

    def _between(self, index: int, stream_1TD: Tensor) -> None:
        self.middle = stream_1TD
        self._add("attention", index, self.before[-1], stream_1TD)

    def _leave(self, index: int, stream_1TD: Tensor) -> None:
        if self.middle is not None:
            self._add("mlp", index, self.middle, stream_1TD)
            self.middle = None
        self._add("block", index, self.before[-1], stream_1TD)
        if len(self.before) == self.before.maxlen:
            self._add("run", index + 1 - len(self.before), self.before[0], stream_1TD)

    @contextlib.contextmanager
    def watching(self, layers: nn.ModuleList, family: Family | None) -> Iterator[None]:
        def given(args: tuple, kwargs: dict) -> Tensor:
            return args[0] if args else kwargs["hidden_states"]

        handles = []
        for index, layer in enumerate(layers):
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: self._enter(index, given(args, kwargs)), with_kwargs=True
                )
            )
            if family is not None:
                handles.append(
                    getattr(layer, family.mlp_norm).register_forward_pre_hook(
                        lambda _, args, index=index: self._between(index, args[0])
                    )
                )
            handles.append(
                layer.register_forward_hook(
                    lambda _, __, out, index=index: self._leave(index, out[0] if isinstance(out, tuple) else out)
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
