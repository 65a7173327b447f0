"""PLeaS: two aligned models become one of a chosen width; least squares on data mend what merging broke.

Units that match well are merged, the others kept side by side, and then every linear layer is solved for in closed
form: of merged inputs it has to make what the two models made of their own.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from hf_fuse.checkpoint.reader import text_part
from hf_fuse.errors import RecipeError
from hf_fuse.merge.align.alignment import Alignment, Fused
from hf_fuse.merge.align.least_squares import linears, solved
from hf_fuse.merge.align.live import reorder
from hf_fuse.merge.align.maps import carried, read_fp32
from hf_fuse.merge.align.methods.activation_matching import activation_matching
from hf_fuse.merge.align.methods.weight_matching import weight_matching
from hf_fuse.merge.align.pair import Pair, same_ends
from hf_fuse.merge.align.partial_merge import Split, merged_shape, partial_merge, split
from hf_fuse.merge.align.spaces import BOUND, Heads
from hf_fuse.registry import Between

PAPER = "2407.02447"
FUSES = True
SHARE = Annotated[float, Between(0, 1)]


def needs_data(options: dict) -> bool:
    return True


def check(pair: Pair, *, width: float, head_width: float, **_: object) -> None:
    """Raises RecipeError or CheckpointError if the models can't be merged, or not to these widths."""
    same_ends(pair)
    family, config = pair.spaces[1].family, text_part(pair.reference.config)
    if width and family.width not in config:
        raise RecipeError(
            f"parameters: width is {width:g}, but {pair.reference.architecture} has no setting of its own for the "
            "width of feed-forward layers. Leave it at 0."
        )
    if head_width and not family.free_heads:
        raise RecipeError(
            f"parameters: head_width is {head_width:g}, but in {pair.reference.architecture} the heads share out the "
            "width of the residual stream. Leave it at 0."
        )
    wanted = _config(pair, width, head_width)
    try:
        type(AutoConfig.for_model(pair.reference.config["model_type"])).from_dict(pair.reference.config | wanted)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[-1].strip().removeprefix("ValueError: ").rstrip(".")
        raise RecipeError(
            f"parameters: {pair.reference.architecture} can't have these widths ({reason}). Choose another "
            f"{'head_width' if head_width else 'width'}, such as {'1 or 0' if head_width else '0'}."
        ) from None


def pleas(
    pair: Pair,
    *,
    width: SHARE = 0.0,
    head_width: SHARE = 0.0,
    match: Literal["activations", "weights"] = "activations",
    residual: bool = True,
    least_squares: bool = True,
    ridge: Annotated[float, Between(0)] = 0.01,
) -> Alignment:
    """Merges in the residual stream, which norms bind together, and widens what lies between: neurons and heads.

    All layers get one width, as stock checkpoints need it. The authors choose one for each layer by a solver that needs
    a licence; they solve the least squares by gradient steps. Needs both models in memory, and the merged one in fp32.

    Args:
        width: share of the neurons of every feed-forward layer to keep apart: those whose activations differ most.
            0 is a merge in the model's own width, 1 keeps both models' layers.
        head_width: the same of heads, in whole groups that share keys, where the family allows it.
        match: how units are matched.
        residual: also the residual stream's units change places. Models with a common ancestor need not.
        least_squares: off for the merge without the last step.
        ridge: pulls the solution towards the merged weights, relative to the mean square of a layer's inputs.
    """
    found = (activation_matching if match == "activations" else weight_matching)(pair, residual=residual)
    difference = pair.same_function(found.maps)
    reorder(pair.live.models[0], pair.spaces[0], found.maps)
    splits = _splits(pair, width, head_width) if width or head_width else {}
    axes = pair.spaces[1].axes

    def merged(name: str) -> Tensor:
        ours = carried(read_fp32(pair.moved.tensors[name], pair.pool), axes[name], found.maps)
        return partial_merge(read_fp32(pair.reference.tensors[name], pair.pool), ours, axes[name], splits)

    better: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"units_apart": {space: len(one.apart) for space, one in splits.items()}}
    if least_squares:
        errors = []
        for layer, weight, bias, before, after in solved(pair.live, linears(pair.live), splits, merged, ridge):
            better[layer.name] = weight
            if bias is not None:
                better[layer.bias] = bias
            errors.append((layer.name, before, after))
        facts["squared_errors"] = {name: [before, after] for name, before, after in errors}
        facts["squared_error_before"] = math.fsum(before for _, before, _ in errors) / len(errors)
        facts["squared_error_after"] = math.fsum(after for *_, after in errors) / len(errors)

    def make(name: str) -> Tensor:
        return better[name] if name in better else merged(name)

    shapes = {name: merged_shape(pair.reference.tensors[name].shape, one, splits) for name, one in axes.items()}
    fused = Fused(make, shapes, _config(pair, width, head_width))
    return Alignment(found.maps, found.measure, found.groups, fused, difference, facts)


def _splits(pair: Pair, width: float, head_width: float) -> dict[str, Split]:
    """Keeps those units apart whose activations differ most, once they are matched."""
    neurons = [group.name for group in pair.groups if group.name.endswith("inner")] if width else []
    heads = [group for group in pair.groups if group.blocks] if head_width else []
    mixed = [block + "mixed" for group in heads for block in group.blocks]
    differences = pair.live.differences([*neurons, *mixed])
    found = {}
    for space in neurons:
        found[space] = split(-differences[space], round(width * len(differences[space])))
    for group in heads:
        one = pair.spaces[1].heads[group.blocks[0]]
        score = -sum(differences[block + "mixed"].view(one.groups, -1).sum(1) for block in group.blocks)
        chosen = split(score, round(head_width * one.groups))
        for block in group.blocks:
            found |= {block + word: _units(chosen, one, word) for word in BOUND}
        if group.heads:
            found[group.heads] = chosen
    return found


def _units(groups: Split, heads: Heads, word: str) -> Split:
    """Units of one of attention's spaces that belong to groups of heads."""
    size = heads.size * (heads.per_group if word in ("query", "mixed") else 1)

    def all_of(chosen: Tensor) -> Tensor:
        return (chosen[:, None] * size + torch.arange(size)).flatten()

    return Split(all_of(groups.merged), all_of(groups.apart))


def _config(pair: Pair, width: float, head_width: float) -> dict[str, Any]:
    """Keys of ``config.json`` that say how wide the merged model is."""
    spaces, changed = pair.spaces[1], {}
    if width:
        inner = next(size for space, size in spaces.sizes.items() if space.endswith("inner"))
        changed[spaces.family.width] = inner + round(width * inner)
    if head_width:
        heads = next(iter(spaces.heads.values()))
        groups = heads.groups + round(head_width * heads.groups)
        changed[spaces.family.heads] = groups * heads.per_group
        if spaces.family.key_heads:
            changed |= {spaces.family.key_heads: groups, "head_dim": heads.size}
    return changed
