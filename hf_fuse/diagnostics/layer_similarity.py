"""Two models side by side on the same texts: how alike their layers are, and whether their units match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.diagnostics.unit_matching import cka_of_layers, match_units
from hf_fuse.errors import FuseError
from hf_fuse.perplexity import context_length

if TYPE_CHECKING:
    from rich.console import Console

TOKENS = 1024  # positions compared: memory of CKA grows with their square


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity of the layers of two models.

    Attributes:
        names: of the two models.
        cka: ``(L1, L2)``, debiased linear CKA of every layer with every other; layer 0 are the embeddings.
        matching: one row per layer that both have with equal width: ``layer``, ``one_to_one`` (mean correlation of
            units matched one to one), ``best``, ``redundancy``, ``in_place`` (share of units matched to themselves).
        positions: tokens compared.
    """

    names: tuple[str, str]
    cka: Tensor
    matching: list[dict[str, float]]
    positions: int

    def to_dict(self) -> dict[str, Any]:
        return {"models": self.names, "positions": self.positions, "cka": self.cka.tolist(), "matching": self.matching}

    def plot(self, path: str | Path) -> Path:
        """Draws CKA as a heat map.

        Raises:
            FuseError: unknown file format, or matplotlib is missing.
        """
        from hf_fuse.plots import heat_map

        rows, columns = ([f"layer {n}" for n in range(size)] for size in self.cka.shape)
        first, second = self.names
        return heat_map(
            self.cka.tolist(), row_labels=rows, column_labels=columns, path=path,
            title=f"CKA of {first} (rows) and {second}",
            value_range=(0.0, 1.0),
        )  # fmt: skip

    def print(self, console: Console) -> None:
        from rich.table import Table

        table = Table(title=f"{self.names[0]} and {self.names[1]}, {self.positions} tokens", title_style="bold")
        for name in ("layer", "CKA", "correlation one to one", "best", "redundancy", "units in place"):
            table.add_column(name, justify="right")
        for row in self.matching:
            layer = int(row["layer"])
            numbers = [
                self.cka[layer, layer].item(),
                row["one_to_one"],
                row["best"],
                row["redundancy"],
                row["in_place"],
            ]
            table.add_row(str(layer), *(f"{value:.3f}" for value in numbers))
        console.print(table)


@torch.no_grad()
def compare_layers(
    first: str,
    second: str,
    texts: Sequence[str],
    *,
    positions: int = TOKENS,
    max_length: int = 256,
    device: str = "cpu",
) -> LayerSimilarity:
    """Compares two causal language models that share a tokenizer, layer by layer, on the same tokens.

    Args:
        first, second: folders or Hub ids.
        texts: what both read.
        positions: at most so many tokens, evenly spread over the texts, are compared.
        max_length: of a text, in tokens, within the models' contexts; the rest is cut off.

    Raises:
        FuseError: no such model, another tokenizer, or too little text.
    """
    from hf_fuse.evaluation_models import candidates, check_device, loaded

    check_device(device)
    pair = candidates([first, second], "causal")
    max_length = min([max_length, *filter(None, (context_length(candidate.config) for candidate in pair))])
    encoded = [
        candidate.processor(list(texts), truncation=True, max_length=max_length)["input_ids"] for candidate in pair
    ]
    if encoded[0] != encoded[1]:
        raise FuseError(
            f"{first}, {second}: their tokenizers cut the texts differently, so positions can't be compared."
        )
    total = sum(len(ids) for ids in encoded[0])
    if total < 8:
        raise FuseError(f"the texts hold {total} tokens, too few to compare models on. Give longer ones.")
    chosen = torch.linspace(0, total - 1, min(positions, total)).long()
    states = []
    for candidate in pair:
        model = loaded(candidate, "causal", device=device, dtype="auto").eval()
        layers: list[list[Tensor]] = []
        start = 0
        for ids in tqdm(encoded[0], desc=candidate.name, unit="text", disable=None):
            own = chosen[(chosen >= start) & (chosen < start + len(ids))] - start
            start += len(ids)
            if not len(own):
                continue
            hidden = model(input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True).hidden_states
            layers.append([layer_1TD[0, own.to(layer_1TD.device)].float().cpu() for layer_1TD in hidden])
        states.append([torch.cat(rows) for rows in zip(*layers)])
        del model
    cka = cka_of_layers(*states)
    matching = []
    pairs = tqdm(list(zip(*states)), desc="match units", unit="layer", disable=None)
    for number, (a, b) in enumerate(pairs):
        if a.shape[1] != b.shape[1]:
            continue
        found = match_units(a, b)
        in_place = (found.one_to_one == torch.arange(len(found.one_to_one))).double().mean().item()
        matching.append({"layer": number, **found.to_dict(), "in_place": in_place})
    return LayerSimilarity((pair[0].name, pair[1].name), cka, matching, len(chosen))
