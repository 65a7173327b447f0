"""S3T: fine-tuning from which samples can be deleted exactly, by switching off adapters of layers
(https://arxiv.org/abs/2406.16257).

The data is cut into shards, and each shard into slices. A slice trains the LoRA matrices of one group of layers only,
from the top of the model down, on what the slices before have left. Deleting a sample of a slice switches off its
layers and those trained after it: what is left is, bit for bit, what training on the slices before gives. Several
sequences of the same slices in other orders keep more of them: the longest intact prefix serves, and shards vote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from hf_fuse.checkpoint.writer import check_output, exclusive_output
from hf_fuse.errors import CheckpointError, FuseError

PLAN, ADAPTER = "s3t.json", "adapter_config"


def slice_orders(slices: int, sequences: int, rates: Sequence[float] | None = None) -> list[list[int]]:
    """The order of slices in each sequence.

    Args:
        slices: L.
        sequences: B, at most L.
        rates: expected share of deletions in each slice, if known: slices that will stay go first, and no two sequences
            have the same slice at the same place (a matching per place; our reading of the paper). Default: rotations.

    Raises:
        FuseError: more sequences than slices, or not one rate per slice.
    """
    if not 1 <= sequences <= slices:
        raise FuseError(f"sequences is {sequences}; expected 1 to {slices}, the number of slices.")
    if rates is None:
        starts = [round(number * slices / sequences) for number in range(sequences)]
        return [[(start + place) % slices for place in range(slices)] for start in starts]
    if len(rates) != slices:
        raise FuseError(f"rates: {len(rates)} numbers; expected one for each of the {slices} slices.")
    orders: list[list[int]] = [[] for _ in range(sequences)]
    survival = np.ones(sequences)
    for _ in range(slices):
        gain = survival[:, None] * (1 - np.asarray(rates, dtype=float))[None]
        for number, order in enumerate(orders):
            gain[number, order] = -1e9
        for number, chosen in zip(*linear_sum_assignment(gain, maximize=True)):
            orders[number].append(int(chosen))
            survival[number] *= 1 - rates[chosen]
    return orders


@dataclass
class Plan:
    """What was trained on what, and what is left of it.

    Attributes:
        slices: shard -> slice -> row numbers of the training set.
        orders: the order of slices of each sequence, the same in every shard.
        layers: place in a sequence -> indices of the layers that it trains.
        intact: shard -> sequence -> number of places still in use.
        deleted: row numbers deleted so far.
        fingerprint: of the base model's weights.
    """

    slices: list[list[list[int]]]
    orders: list[list[int]]
    layers: list[list[int]]
    intact: list[list[int]]
    deleted: list[int] = field(default_factory=list)
    fingerprint: str = ""

    def serving(self, shard: int) -> tuple[int, int]:
        """The sequence with the longest intact prefix, and how long it is."""
        best = max(range(len(self.orders)), key=lambda number: self.intact[shard][number])
        return best, self.intact[shard][best]

    def delete(self, rows: Sequence[int]) -> None:
        """Takes rows out: sequences end before the slice that has one.

        Raises:
            FuseError: a row that was never trained on.
        """
        known = {
            row: (shard, number) for shard, s in enumerate(self.slices) for number, part in enumerate(s) for row in part
        }
        for row in rows:
            if row not in known:
                raise FuseError(f"row {row}: was not trained on; rows are 0 to {max(known)}.")
        for row in rows:
            shard, number = known[row]
            for sequence, order in enumerate(self.orders):
                self.intact[shard][sequence] = min(order.index(number), self.intact[shard][sequence])
        self.deleted = sorted({*self.deleted, *map(int, rows)})


class S3T:
    """A fine-tuned classifier with exact deletion. Made by :func:`fine_tune`, read with :meth:`from_pretrained`."""

    def __init__(self, folder: Path, model: Any, plan: Plan):
        self.folder, self.model, self.plan = folder, model, plan

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: nn.Module) -> S3T:
        """Reads what :func:`fine_tune` has written, for the base model that it was trained from; ``base`` gets LoRA
        layers, its own weights stay.

        Raises:
            CheckpointError: no such folder, a damaged one, or another base model.
        """
        folder = Path(folder).expanduser()
        plan = _read_plan(folder)
        if plan.fingerprint != fingerprint(base):
            raise CheckpointError(f"{folder}: was trained from a model with other weights than the one given.")
        from peft import LoraConfig, get_peft_model

        return cls(folder, get_peft_model(base, LoraConfig.from_pretrained(folder / ADAPTER)).eval(), plan)

    def delete(self, rows: Sequence[int]) -> None:
        """Deletes rows of the training set by their numbers, and the files of everything trained after them. Exact:
        what is left was never in touch with them. If it is interrupted, delete again: files that were left go then.

        Raises:
            FuseError: a row that was never trained on; nothing is deleted then.
        """
        self.plan = _read_plan(self.folder)  # another process may have deleted since
        self.plan.delete(rows)
        # The plan first: files that it no longer names are never read again.
        _write_plan(self.folder, self.plan)
        for shard, intact in enumerate(self.plan.intact):
            for sequence, kept in enumerate(intact):
                for place in range(kept, len(self.plan.orders[sequence])):
                    _file(self.folder, shard, sequence, place).unlink(missing_ok=True)

    @torch.no_grad()
    def predict_proba(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean probabilities ``(N, C)`` of the shards' longest intact prefixes; the base model's where none is left."""
        inputs = {name: values.to(self.model.device) for name, values in batch.items() if name != "labels"}
        found = []
        for shard in range(len(self.plan.slices)):
            sequence, count = self.plan.serving(shard)
            _reset(self.model)
            for place in range(count):
                _load(self.model, _file(self.folder, shard, sequence, place))
            found.append(self.model(**inputs).logits.float().softmax(-1))
        return torch.stack(found).mean(0)


def fine_tune(
    model: nn.Module,
    rows: Any,
    output: str | Path,
    *,
    data_collator: Callable,
    slices: int = 4,
    shards: int = 1,
    sequences: int = 1,
    rates: Sequence[float] | None = None,
    rank: int = 8,
    target_modules: str | list[str] = "all-linear",
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> S3T:
    """Fine-tunes a classifier so that samples can be deleted from it exactly. Costs ``sequences`` times a plain LoRA;
    one process.

    The classifier's last layer is not trained: give a model that has one, from :func:`hf_fuse.install_head` of public
    data, or whose own may stay.

    Args:
        model: the base, on its device. The result is made of it: it gets LoRA layers, its own weights stay.
        rows: training set, of known length, with labels.
        output: folder to make, with one file per slice.
        data_collator: rows -> a batch.
        slices: L, of each shard. The model needs as many layers at least.
        shards: S, of the data; each is trained on its own.
        sequences: B, of each shard.
        rates: as of :func:`slice_orders`.
        rank, target_modules: of LoRA, with ``alpha = 2 rank``.
        epochs, learning_rate, batch_size: of each slice, with AdamW.
        seed: of everything random. The same prefix of slices is trained in the same way whatever follows.
        overwrite: replace an existing output when the new one is complete.

    Raises:
        FuseError: too few rows or layers, or the output exists.
    """
    from peft import LoraConfig, get_peft_model

    folder = Path(output).expanduser().absolute()
    check_output(folder, overwrite)
    depth = len({number for name, _ in model.named_parameters() if (number := _layer(name)) is not None})
    if depth < slices:
        raise FuseError(
            f"slices is {slices}, but {type(model).__name__} has {depth} layers. Use at most as many slices."
        )
    if len(rows) < shards * slices:
        raise FuseError(f"{len(rows)} rows are too few for {shards} shards of {slices} slices.")
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = [
        [sorted(map(int, part)) for part in np.array_split(shard, slices)] for shard in np.array_split(order, shards)
    ]
    groups = [sorted(map(int, group)) for group in np.array_split(np.arange(depth)[::-1], slices)]
    orders = slice_orders(slices, sequences, rates)
    plan = Plan(parts, orders, groups, [[slices] * sequences for _ in range(shards)], [], fingerprint(model))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules, exclude_modules=_heads(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(model, config)
    start = {name: values.detach().clone() for name, values in tuned.named_parameters() if "lora_" in name}
    with exclusive_output(folder, overwrite=overwrite) as partial:
        partial.folder.mkdir()
        config.save_pretrained(partial.folder / ADAPTER)
        bar = tqdm(total=shards * sequences * slices, desc="s3t", unit="slice", disable=None)
        for shard in range(shards):
            for sequence, numbers in enumerate(orders):
                _reset(tuned)
                for place, number in enumerate(numbers):
                    trained = _train_slice(
                        tuned, start, groups[place], [rows[row] for row in parts[shard][number]], data_collator,
                        epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
                        # Of the slices so far, so that nothing depends on what comes later.
                        seed=_seed(seed, shard, numbers[: place + 1]),
                    )  # fmt: skip
                    file = _file(partial.folder, shard, sequence, place)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_file(trained, file)
                    bar.update()
        bar.close()
        _write_plan(partial.folder, plan)
        partial.publish()
    tuned.unload()
    return S3T.from_pretrained(folder, tuned.base_model.model)


def fingerprint(model: nn.Module) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for name, values in model.state_dict().items():
        if "lora_" not in name:
            found.update(name.replace("base_layer.", "").encode())
            found.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _train_slice(
    tuned: nn.Module,
    start: dict[str, Tensor],
    layers: list[int],
    rows: list,
    collate: Callable,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Trains the LoRA matrices of some layers, from their start values; all others stay as they are."""
    trained = {}
    for name, values in tuned.named_parameters():
        # Whole numbers: layer 3 is not layer 30.
        chosen = "lora_" in name and _layer(name) in layers
        values.requires_grad_(chosen)
        if chosen:
            values.data.copy_(start[name])
            trained[name] = values
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    tuned.train()
    with torch.random.fork_rng(devices=[]):  # of dropout
        torch.manual_seed(seed)
        for _ in range(epochs):
            for numbers in torch.randperm(len(rows), generator=random).split(batch_size):
                batch = collate([rows[number] for number in numbers.tolist()])
                optimizer.zero_grad()
                tuned(**{name: values.to(tuned.device) for name, values in batch.items()}).loss.backward()
                optimizer.step()
    tuned.eval()
    return {name: values.detach().cpu().contiguous() for name, values in trained.items()}


def _layer(name: str) -> int | None:
    """Index of the layer that a parameter belongs to."""
    found = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def _heads(model: nn.Module) -> str:
    """Linear layers outside the stack of layers, as an expression."""
    outside = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _layer(f"{name}.") is None
    ]
    return "|".join(map(re.escape, outside)) or "$^"


def _reset(tuned: nn.Module) -> None:
    """Switches all LoRA matrices off."""
    for name, values in tuned.named_parameters():
        if "lora_B" in name:
            values.data.zero_()


def _load(tuned: nn.Module, file: Path) -> None:
    parameters = {name: values for name, values in tuned.named_parameters() if "lora_" in name}
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Fine-tune again.") from None
    for name, values in stored.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise CheckpointError(f"{file}: its {name} is no LoRA matrix of this model. Fine-tune again.")
        parameters[name].data.copy_(values)


def _seed(seed: int, shard: int, numbers: Sequence[int]) -> int:
    text = f"{seed}/{shard}/{','.join(map(str, numbers))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _file(folder: Path, shard: int, sequence: int, place: int) -> Path:
    return folder / f"shard-{shard}" / f"sequence-{sequence}" / f"slice-{place}.safetensors"


def _read_plan(folder: Path) -> Plan:
    try:
        return Plan(**json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except OSError:
        raise CheckpointError(
            f"{folder}: holds no {PLAN}. Expected a folder made by hf_fuse.unlearn.s3t.fine_tune."
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / PLAN}: is damaged ({error}). Fine-tune again.") from None


def _write_plan(folder: Path, plan: Plan) -> None:
    """In one step: a killed deletion leaves the old plan or the new one."""
    new = folder / f"{PLAN}.new"
    new.write_text(json.dumps(asdict(plan)) + "\n", encoding="utf-8")
    new.replace(folder / PLAN)
