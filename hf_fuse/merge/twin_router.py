"""Trains the router of a :class:`~hf_fuse.merge.twin_model.TwinModel` to tell the tasks apart.

Shapes: N examples, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_fuse.errors import RecipeError
from hf_fuse.merge.twin_model import TwinModel


def train_router(
    model: TwinModel,
    examples: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    epochs: int = 50,
    batch_size: int = 256,
    learning_rate: float = 5e-4,
    held_out: float = 0.1,
    seed: int = 0,
) -> float:
    """Trains the router alone, on hidden states of the merged model that are computed once. No labels are needed.

    The epoch that tells most of the held-out examples apart is kept (the authors' code looks at the test set).

    Args:
        model: changed in place.
        examples: task -> batches of inputs, as the merged model takes them (a DataLoader). A thousand examples per task
            are plenty.
        epochs: passes over the hidden states.
        batch_size: hidden states per step.
        learning_rate: of AdamW.
        held_out: share of each task's examples that chooses the epoch.
        seed: of the split, the order and the dropout.

    Returns:
        The share of held-out examples whose task is told rightly.

    Raises:
        RecipeError: tasks are missing or unknown, or have fewer than four examples.
    """
    tasks = model.config.tasks
    if strange := sorted(set(examples) ^ set(tasks)):
        raise RecipeError(f"examples: expected some of each task ({', '.join(tasks)}), wrong is {strange[0]!r}.")
    if not 0 < held_out < 1:
        raise RecipeError(f"held_out is {held_out}, expected a share between 0 and 1.")
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "held_out": []}
    random = torch.Generator().manual_seed(seed)
    model.eval()
    for number, task in enumerate(tasks):
        parts = [
            model.features({name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)})
            for batch in tqdm(examples[task], desc=task, unit="batch", disable=None)
        ]
        features_ND = torch.cat(parts) if parts else torch.empty(0, 1)
        if len(features_ND) < 4:
            raise RecipeError(f"examples: {task} has {len(features_ND)}, expected at least 4.")
        features_ND = features_ND[torch.randperm(len(features_ND), generator=random)]
        count = max(1, round(held_out * len(features_ND)))
        for part, chosen_ND in (("held_out", features_ND[:count]), ("train", features_ND[count:])):
            kept[part].append((chosen_ND, torch.full((len(chosen_ND),), number, device=model.device)))
    (train_ND, train_N), (test_ND, test_N) = (map(torch.cat, zip(*kept[part])) for part in ("train", "held_out"))
    return _fit(model, (train_ND, train_N), (test_ND, test_N), epochs, batch_size, learning_rate, random)


def _fit(
    model: TwinModel,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    random: torch.Generator,
) -> float:
    router, best, state = model.router, (-1.0, 0.0), {}
    optimizer = torch.optim.AdamW(router.parameters(), learning_rate)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(random.initial_seed())
        for _ in tqdm(range(epochs), desc="router", unit="epoch", disable=None):
            router.train()
            for rows in torch.randperm(len(train[0]), generator=random).split(batch_size):
                if len(rows) == 1:
                    continue  # batch normalisation has nothing to compare
                optimizer.zero_grad()
                cross_entropy(router(train[0][rows]), train[1][rows]).backward()
                optimizer.step()
            router.eval()
            with torch.no_grad():
                logits_NK = router(test[0])
            right = (logits_NK.argmax(1) == test[1]).float().mean().item()
            # Of equally right epochs the surer one.
            found = (right, -cross_entropy(logits_NK, test[1]).item())
            if found > best:
                best, state = found, {name: value.clone() for name, value in router.state_dict().items()}
    router.load_state_dict(state)
    return best[0]
