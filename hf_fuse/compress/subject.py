"""The model to compress: its files, the live model for measurements, and its calibration text as token ids.

Shapes: T tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint
from hf_fuse.compress.recipe import CompressRecipe, TextEntry
from hf_fuse.errors import FuseError
from hf_fuse.evaluation_data import load_rows, read_text_files, text_set
from hf_fuse.evaluation_models import Candidate, candidates, check_device, loaded
from hf_fuse.perplexity import DEFAULT_WINDOW, context_length

PROBE_TOKENS = 128  # enough to tell two models apart


@dataclass
class Subject:
    """What a compression method works on.

    Attributes:
        checkpoint: the files; a method that needs no forward pass reads only these.
        candidate: config and tokenizer.
        kind: ``causal`` or ``seq2seq``.
        calibration: sequences of token ids, ``[1, T]`` each.
        evaluation: texts for the perplexity.
        seed: for methods that draw.
    """

    checkpoint: Checkpoint
    candidate: Candidate
    kind: str
    device: str
    dtype: Any
    seed: int
    calibration: list[Tensor] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        """The live model, in evaluation mode. A method may change it: it is not used for anything afterwards."""
        return self.load(self.checkpoint.folder)

    def load(self, folder: Path) -> Any:
        """The model in ``folder`` (the input or the output), as this subject's is loaded."""
        candidate = self.candidate
        if folder != candidate.source:
            candidate = candidates([str(folder)], self.kind, tokenizer=candidate.processor)[0]
        return loaded(candidate, self.kind, device=self.device, dtype=self.dtype).eval()

    def run(self, model: Any, ids_1T: Tensor) -> Any:
        """One forward pass. An encoder-decoder reads the first half and is to write the second."""
        ids_1T = ids_1T.to(model.device)
        if self.kind == "seq2seq":
            half = ids_1T.shape[1] // 2
            return model(input_ids=ids_1T[:, :half], decoder_input_ids=ids_1T[:, half:])
        return model(input_ids=ids_1T, use_cache=False)

    @torch.no_grad()
    def probe(self, model: Any) -> Tensor:
        """Logits on a few fixed tokens, fp32 on the CPU: what decides whether two models compute the same."""
        if self.calibration:
            ids_1T = self.calibration[0][:, :PROBE_TOKENS]
        else:
            rows = model.get_input_embeddings().weight.shape[0]
            length = min(PROBE_TOKENS, context_length(model.config) or PROBE_TOKENS)
            ids_1T = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(self.seed))
        return self.run(model, ids_1T).logits.float().cpu()


def open_subject(recipe: CompressRecipe) -> Subject:
    """Finds the model and reads config, tokenizer and texts, but no weights.

    Raises:
        CheckpointError: no such model, damaged, or of a kind that is not supported.
        FuseError: texts that are missing or too short, or an unknown device.
    """
    check_device(recipe.device)
    checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision)
    kind = "seq2seq" if checkpoint.config.get("is_encoder_decoder") else "causal"
    candidate = candidates([str(checkpoint.folder)], kind)[0]
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    subject = Subject(checkpoint, candidate, kind, recipe.device, dtype, recipe.seed)
    if recipe.calibration:
        subject.calibration = sequences(read_texts(recipe.calibration), recipe.calibration, candidate)
    if recipe.evaluation:
        subject.evaluation = list(read_texts(recipe.evaluation))
    return subject


def read_texts(entry: TextEntry) -> Iterable[str]:
    path = Path(entry.path).expanduser()
    if path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"):
        return read_text_files([path])[0]
    name, rows = load_rows(entry.path, subset=entry.subset, split=entry.split)
    return text_set(name, rows, entry.column)


def sequences(texts: Iterable[str], entry: TextEntry, candidate: Candidate) -> list[Tensor]:
    """Cuts the joined texts into sequences ``[1, T]`` and takes ``entry.sequences`` of them, evenly spread."""
    context = context_length(candidate.config)
    length = entry.length or min(context or DEFAULT_WINDOW, DEFAULT_WINDOW)
    if context and length > context:
        raise FuseError(f"calibration.length is {length}, but the model has {context} positions. Use at most those.")
    ids: list[int] = []
    for text in texts:
        ids += candidate.processor(text, verbose=False)["input_ids"]
    whole = len(ids) // length
    if not whole:
        raise FuseError(
            f"{entry.path}: {len(ids)} tokens of calibration text, less than one sequence of {length}. Give more text, "
            "or a smaller calibration.length."
        )
    count = min(whole, entry.sequences)
    if max(ids) >= candidate.config.get_text_config().vocab_size:
        raise FuseError(
            f"{candidate.name}: its tokenizer has more tokens than the model. Check that they fit together."
        )
    starts = [number * whole // count * length for number in range(count)]
    return [torch.tensor([ids[start : start + length]]) for start in starts]
