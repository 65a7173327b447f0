"""LAF: forgets samples without labels, by what autoencoders find typical of their features
(https://arxiv.org/abs/2404.00506).

One autoencoder learns the features of all samples, another those of the samples to forget. The encoder is then moved so
that the second no longer recognises them, while the first goes on recognising the rest; and the features of what is
retained are pulled back to where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import default_data_collator

from hf_fuse.diagnostics.callbacks import collect_features
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_inputs, classifier_of, sample_features

LATENT = 16  # numbers that a sample is squeezed into


class FeatureAutoencoder(nn.Module):
    """A variational autoencoder of features ``(N, D)``."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 2, LATENT)
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, features_ND: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and log-variance; without ``noise``, of the mean."""
        mean, log_variance = self.encoder(features_ND).chunk(2, dim=-1)
        drawn = mean if noise is None else mean + noise * (0.5 * log_variance).exp()
        return self.decoder(drawn), mean, log_variance

    def error(self, features_ND: Tensor) -> Tensor:
        """Squared error per sample ``(N,)``, as a mean over D: a sum would saturate what is made of it."""
        return (self(features_ND)[0] - features_ND).square().mean(-1)


def laf(
    model: nn.Module,
    retain: Any,
    forget: Any,
    *,
    data_collator: Callable = default_data_collator,
    epochs: int = 20,
    extraction_rate: float = 2e-5,
    alignment_rate: float = 5e-5,
    temperature: float = 10.0,
    autoencoder_epochs: int = 10,
    repair_epochs: int = 0,
    repair_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> nn.Module:
    """Changes a classifier so that it treats the samples of ``forget`` as ones it has never seen; one process.

    Labels are needed only for ``repair_epochs``.

    Args:
        model: classifier of whole samples, on its device. Its last layer stays as it is, but for the repair.
        retain: rows to go on knowing; a sample of them will do.
        forget: rows to forget.
        data_collator: rows -> a batch.
        epochs: of both steps. 20 to 40 in the reference.
        extraction_rate, alignment_rate: learning rates of the two steps (reference: 1e-5 to 5e-5, and 4e-5 to 1e-4).
        temperature: of the forgotten samples' part in the alignment (reference: 5 to 20).
        autoencoder_epochs: of both autoencoders, with Adam at 1e-3.
        repair_epochs: afterwards, of cross-entropy on ``retain`` for the last layer alone.
        batch_size: rows of each kind per step.
        seed: of everything random.

    Returns:
        ``model``.

    Raises:
        FuseError: not a classifier of whole samples, a frozen one, or nothing to retain or forget.
    """
    classifier = classifier_of(model)
    if classifier is None:
        raise FuseError(f"{type(model).__name__}: LAF needs a classifier of whole samples.")
    if not len(retain) or not len(forget):
        raise FuseError("LAF needs samples to retain and samples to forget; one of the two sets is empty.")
    random = torch.Generator().manual_seed(seed)
    whole, _ = collect_features(model, DataLoader([*retain, *forget], batch_size, collate_fn=data_collator))
    forgotten = whole[len(retain) :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        knows_all, knows_forgotten = (
            _autoencoder(rows.to(model.device), autoencoder_epochs, random) for rows in (whole, forgotten)
        )
    head = {id(parameter) for parameter in classifier.parameters()}
    encoder = [p for p in model.parameters() if p.requires_grad and id(p) not in head]
    if not encoder:
        raise FuseError(f"{type(model).__name__}: LAF moves the encoder, but all of its parameters are frozen.")
    extraction = torch.optim.AdamW(encoder, lr=extraction_rate, weight_decay=0.0)
    alignment = torch.optim.AdamW(encoder, lr=alignment_rate, weight_decay=0.0)
    was_training = model.training
    model.eval()  # features of the start are compared with; dropout would move them
    for _ in tqdm(range(epochs), desc="laf", unit="epoch", disable=None):
        for batches in _pairs(retain, forget, data_collator, batch_size, random):
            retained, gone = (features_of(model, batch) for batch, _ in batches)
            errors = knows_all.error(retained), knows_forgotten.error(gone)
            loss = _saturating(errors[0]).mean() - _saturating(errors[1]).mean()
            _step(loss, extraction)
        for (kept, kept_rows), (lost, lost_rows) in _pairs(retain, forget, data_collator, batch_size, random):
            near = 1 - _cosine(features_of(model, kept), whole[kept_rows].to(model.device))
            far = 1 - _cosine(features_of(model, lost), forgotten[lost_rows].to(model.device))
            _step((near - (far / temperature).logsumexp(0)).mean(), alignment)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=repair_rate)
    for _ in tqdm(range(repair_epochs), desc="laf: repair", unit="epoch", disable=None):
        for batch, _ in _batches(retain, data_collator, batch_size, random):
            logits = model(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"}).logits
            _step(nn.functional.cross_entropy(logits.float(), batch["labels"].to(model.device)), optimizer)
    model.zero_grad(set_to_none=True)
    return model.train(was_training)


def features_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """``(B, D)`` with gradient, fp32: what the classifier takes."""
    inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
    with classifier_inputs(model) as seen:
        outputs = model(**inputs)
    return sample_features(model, inputs, outputs, seen).float()


def _autoencoder(rows: Tensor, epochs: int, random: torch.Generator) -> FeatureAutoencoder:
    network = FeatureAutoencoder(rows.shape[1]).to(rows.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows), generator=random).split(32):
            batch = rows[numbers.to(rows.device)]
            made, mean, log_variance = network(batch, torch.randn(len(batch), LATENT, generator=random).to(batch))
            divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
            _step((made - batch).square().sum() + 0.025 * divergence, optimizer)
    return network.requires_grad_(False)


def _saturating(errors: Tensor) -> Tensor:
    return (errors / (errors + 1)).exp()


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(first, second, dim=-1)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _batches(rows: Any, collate: Callable, size: int, random: torch.Generator) -> Iterator[tuple[dict, Tensor]]:
    for numbers in torch.randperm(len(rows), generator=random).split(size):
        yield collate([rows[number] for number in numbers.tolist()]), numbers


def _pairs(retain: Any, forget: Any, collate: Callable, size: int, random: torch.Generator) -> Iterator:
    """All of ``retain`` in batches, each with one of ``forget``, which is gone through again and again."""
    lost = iter(())
    for kept in _batches(retain, collate, size, random):
        pair = next(lost, None)
        if pair is None:
            lost = _batches(forget, collate, size, random)
            pair = next(lost)
        yield kept, pair
