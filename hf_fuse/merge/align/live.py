"""Both models running on the same data: what their units do, and whether two models compute the same.

Shapes: N tokens or patches, m, n units of the model that moves and of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_fuse.checkpoint.reader import Checkpoint
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.merge.align.maps import Maps, carried
from hf_fuse.merge.align.recipe import AlignRecipe
from hf_fuse.merge.align.spaces import RESIDUAL, Group, Part, Spaces
from hf_fuse.perplexity import context_length
from hf_fuse.training_data import Rows, TrainingData, encode, encode_images

PROBE_SEQUENCES, PROBE_TOKENS = 2, 32  # enough to tell two models apart
# Largest difference of logits, relative to the largest logit, that the order of sums explains.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MEMORY = 2 << 30  # bytes of sums that one pass over the data may hold; more takes more passes


def load_model(folder: Path, architecture: str, device: str, dtype: str, ref: str) -> Any:
    """A model as its own class, in evaluation mode. Never runs code of a repository, never reads pickles.

    Raises:
        CheckpointError: it can't be loaded, or weights are missing.
    """
    import transformers
    from transformers.utils import logging

    showed_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{ref}: cannot be loaded as {architecture}: {reason}.") from error
    finally:
        if showed_bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise CheckpointError(f"{ref}: lacks weights of a {architecture}, first {sorted(info['missing_keys'])[0]!r}.")
    return model.to(device).eval()


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """One forward pass without labels. An encoder-decoder writes what it reads."""
    batch = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
        batch["decoder_attention_mask"] = batch.get("attention_mask")
    return model(**batch)


def sample_inputs(config: Any, seed: int) -> dict[str, Tensor]:
    """Random tokens or pixels: an aligned model has to agree on any."""
    random = torch.Generator().manual_seed(seed)
    if hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(PROBE_SEQUENCES, config.num_channels, size, size, generator=random)}
    text = config.get_text_config()
    length = min(PROBE_TOKENS, context_length(config) or PROBE_TOKENS)
    # Some models count positions from the padding's number on, and none needs it here.
    allowed = torch.tensor([number for number in range(text.vocab_size) if number != text.pad_token_id])
    length = max(2, length - 2)
    return {"input_ids": allowed[torch.randint(len(allowed), (PROBE_SEQUENCES, length), generator=random)]}


@torch.no_grad()
def logits(model: Any, seed: int) -> Tensor:
    batch = sample_inputs(model.config, seed)
    batch = {name: values.to(model.dtype) if values.is_floating_point() else values for name, values in batch.items()}
    return forward(model, batch).logits.float().cpu()


def check_same(expected: Tensor, found: Tensor, dtype: torch.dtype, ref: str) -> float:
    """-> the largest difference of logits, relative to the largest logit.

    Raises:
        FuseError: it is more than the order of sums explains.
    """
    difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not difference <= TOLERANCE[dtype]:
        raise FuseError(
            f"{ref}: the aligned model does not compute what it did before (logits differ by {difference:.2g} of the "
            "largest), so nothing is saved. This model may bind its units in a way that is not known here."
        )
    return difference


def reorder(model: Any, spaces: Spaces, maps: Maps) -> None:
    """Puts the units of a live model into another order, in place."""
    done: set[int] = set()
    for stored, parameter in parameters_by_stored_name(model).items():
        if stored in spaces.axes and id(parameter) not in done:
            parameter.data = carried(parameter.data.cpu(), spaces.axes[stored], maps).to(parameter.device)
            done.add(id(parameter))


@dataclass
class Moments:
    """Sums over all tokens of the activations of two spaces, fp64."""

    count: int
    sum_m: Tensor
    sum_n: Tensor
    square_m: Tensor
    square_n: Tensor
    product_mn: Tensor

    @classmethod
    def empty(cls, m: int, n: int) -> Moments:
        zeros = [torch.zeros(size, dtype=torch.float64) for size in (m, n, m, n)]
        return cls(0, *zeros, torch.zeros(m, n, dtype=torch.float64))

    def add(self, one_Nm: Tensor, other_Nn: Tensor) -> None:
        self.count += len(one_Nm)
        self.sum_m += one_Nm.sum(0, dtype=torch.float64).cpu()
        self.sum_n += other_Nn.sum(0, dtype=torch.float64).cpu()
        self.square_m += one_Nm.square().sum(0, dtype=torch.float64).cpu()
        self.square_n += other_Nn.square().sum(0, dtype=torch.float64).cpu()
        self.product_mn += (one_Nm.T @ other_Nn).cpu()

    @property
    def correlation_mn(self) -> Tensor:
        """Of the two models' units; that of a unit which never changes is zero."""
        count = max(self.count, 1)
        covariance_mn = self.product_mn / count - self.sum_m[:, None] * self.sum_n / count**2
        spread_m = (self.square_m / count - (self.sum_m / count) ** 2).clamp_min(0).sqrt()
        spread_n = (self.square_n / count - (self.sum_n / count) ** 2).clamp_min(0).sqrt()
        scale_mn = spread_m[:, None] * spread_n
        return torch.where(scale_mn > 1e-12, covariance_mn / scale_mn.clamp_min(1e-12), 0).clamp(-1, 1).float()


@dataclass(frozen=True)
class _Watch:
    """Where the activations of a space are seen: what a module reads, or makes."""

    module: str
    inputs: bool
    part: Part


def batches(data: TrainingData, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(data.train), size):
        numbers = range(start, min(start + size, len(data.train)))
        yield data.collator([data.train[number] for number in numbers])


@dataclass
class LivePair:
    """Both models with data for both. They read the same batches, so they must have one vocabulary or image size."""

    models: tuple[Any, Any]
    spaces: tuple[Spaces, Spaces]
    data: TrainingData
    batch_size: int
    stored: tuple[dict[str, nn.Module], dict[str, nn.Module]] = field(init=False)

    def __post_init__(self):
        self.stored = tuple(map(modules_by_stored_name, self.models))

    def batches(self, what: str) -> Iterator[dict[str, Tensor]]:
        """All examples in batches, under a progress bar that counts them."""
        bar = tqdm(total=math.ceil(len(self.data.train) / self.batch_size), desc=what, unit="batch", disable=None)
        with bar:
            for batch in batches(self.data, self.batch_size):
                yield batch
                bar.update()

    @torch.no_grad()
    def moments(self, groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Moments]]]:
        """Joint moments of all spaces of every group, in as many passes over the data as memory asks for."""
        for some in _passes(groups, self.spaces):
            names = [space for group in some for space in group.spaces]
            found = {name: Moments.empty(*(spaces.sizes[name] for spaces in self.spaces)) for name in names}
            for name, one_Nm, other_Nn in self._activations(names):
                found[name].add(one_Nm, other_Nn)
            for group in some:
                yield group, {space: found[space] for space in group.spaces}

    @torch.no_grad()
    def differences(self, names: Sequence[str]) -> dict[str, Tensor]:
        """For spaces of equal size the mean squared difference of every unit's activations in the two models."""
        total = {name: torch.zeros(self.spaces[1].sizes[name], dtype=torch.float64) for name in names}
        count = dict.fromkeys(names, 0)
        for name, one_Nn, other_Nn in self._activations(names):
            total[name] += (one_Nn - other_Nn).square().sum(0, dtype=torch.float64).cpu()
            count[name] += len(one_Nn)
        return {name: total[name] / count[name] for name in names}

    def _activations(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(space, activations in the one model, those in the other), batch after batch."""
        watches = [{name: _watches(spaces, name) for name in names} for spaces in self.spaces]
        for batch in self.batches("activations"):
            mask_BT = batch.get("attention_mask")
            seen = [self._seen(side, watches[side], batch) for side in (0, 1)]
            for name in names:
                for one, other in zip(seen[0][name], seen[1][name]):
                    yield name, tokens(one, mask_BT), tokens(other, mask_BT)

    def _seen(self, side: int, watches: dict[str, list[_Watch]], batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        caught: dict[tuple[str, int], Tensor] = {}
        handles = []
        for space, some in watches.items():
            for number, watch in enumerate(some):

                def look(_: nn.Module, args: tuple, output: Any, key=(space, number), watch=watch) -> None:
                    values = args[0] if watch.inputs else output
                    caught[key] = values.narrow(-1, watch.part.start, watch.part.size).float()

                handles.append(self.stored[side][watch.module].register_forward_hook(look))
        try:
            forward(self.models[side], batch)
        finally:
            for handle in handles:
                handle.remove()
        return {space: [caught[space, k] for k in range(len(some))] for space, some in watches.items()}


def _passes(groups: Sequence[Group], spaces: tuple[Spaces, Spaces]) -> Iterator[list[Group]]:
    some: list[Group] = []
    used = 0
    for group in groups:
        size = sum(8 * spaces[0].sizes[space] * spaces[1].sizes[space] for space in group.spaces)
        if some and used + size > MEMORY:
            yield some
            some, used = [], 0
        some.append(group)
        used += size
    yield some


def _watches(spaces: Spaces, space: str) -> list[_Watch]:
    """Units are seen where they are read; queries, keys and values where they are made; the stream in front of norms.

    What T5 adds to the scores of its heads is no activation.
    """
    slots = [slot for slot in spaces.slots(space) if slot.tensor.endswith(".weight")]
    if space == RESIDUAL:
        norms = [slot for slot in slots if len(spaces.axes[slot.tensor]) == 1]
        return [_Watch(slot.tensor, True, slot.part) for slot in norms]
    if space.endswith(".heads"):
        return []
    reading = [slot for slot in slots if slot.part.reads]
    if reading:
        return [_Watch(reading[0].tensor, True, reading[0].part)]
    making = [slot for slot in slots if len(spaces.axes[slot.tensor]) == 2]
    return [_Watch(slot.tensor, False, slot.part) for slot in making[:1]]


def tokens(values: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Activations as rows ``[N, n]`` without those of padding, where they are laid out as the mask is."""
    if mask_BT is not None and values.shape[:-1] == mask_BT.shape:
        return values[mask_BT.bool().to(values.device)]
    return values.flatten(0, -2)


def parameters_by_stored_name(model: Any) -> dict[str, nn.Parameter]:
    """Name under which a parameter is stored -> the parameter; a shared one under all of its names."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found |= dict.fromkeys(revert_weight_conversion(model, {name: parameter.detach()}), parameter)
    return found


def modules_by_stored_name(model: Any) -> dict[str, nn.Module]:
    """Name under which a weight is stored -> the module that has it; one that others share belongs to the first."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), module)
    return {name: owners[id(parameter)] for name, parameter in parameters_by_stored_name(model).items()}


def encoded(rows: Rows, recipe: AlignRecipe, checkpoint: Checkpoint) -> TrainingData:
    """As many of the rows as the recipe wants, drawn with its seed, in the vocabulary of one of the models.

    Raises:
        FuseError: rows that can't be read, or no tokenizer to read them with.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    image = hasattr(config, "image_size")
    if image != rows.has_images:
        raise FuseError(f"{checkpoint.ref}: reads {'images' if image else 'text'}, but data holds none.")
    processor = _processor(checkpoint, image)
    if image:
        dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else config.dtype or torch.float32
        data = encode_images(rows, processor, config, dtype)
    else:
        if (checkpoint.architecture or "").endswith("ForSequenceClassification") and rows.format == "text":
            parts = [replace(part, rows=part.rows.add_column("label", [0] * len(part.rows))) for part in rows.train]
            rows = Rows("classification", parts, [])
        data = encode(rows, recipe.data_entry, processor, config)
    random = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(data.train), generator=random)[: recipe.examples].tolist()
    return replace(data, train=data.train.select(chosen))


def _processor(checkpoint: Checkpoint, image: bool) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    if image and not (checkpoint.folder / "preprocessor_config.json").exists():
        return None
    try:
        return (AutoImageProcessor if image else AutoTokenizer).from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # missing files, missing packages and damaged files all raise differently
        what = "image processor" if image else "tokenizer"
        raise FuseError(f"{checkpoint.ref}: its {what} cannot be loaded. Expected one beside the weights.") from error
