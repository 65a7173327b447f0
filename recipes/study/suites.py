"""What the study merges: experts from one base on small real data, and how well a state dict does on each task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Suite:
    """One base, its experts, and a way to score a state dict on each task (higher is better, between 0 and 1).

    Attributes:
        model: what all states are of; it holds the one that was scored last.
        parts: of each task, by name: ``train`` (its expert's), ``validation`` and ``test``; images and labels of
            classifiers, rows of token ids of language models.
    """

    name: str
    unit: str
    tasks: list[str]
    base: State
    experts: list[State]
    reference: State | None
    score: Callable[[State, str], list[float]]  # (state, "validation" or "test") -> one score per task
    model: Any = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    base_steps: int = 500
    expert_steps: int = 160
    text_steps: tuple[int, int] = (400, 120)
    seeds: int = 3
    grid: int | None = None  # values kept of each grid; all, if None
    methods: tuple[str, ...] = ()  # all, if empty
    tasks: int | None = None  # the first of each suite; all, if None
    reference: bool = True  # whether a model is trained on all tasks


FULL, QUICK = Effort(), Effort(base_steps=60, expert_steps=8, text_steps=(12, 4), seeds=1, grid=1)


def guises(seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to show images ``[N, 1, 8, 8]`` with values from -1 to 1."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(16, generator=random)
    board = 1 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float()

    def shuffled(images_N: Tensor) -> Tensor:
        patches = images_N.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 16, 2, 2)[:, order]
        return patches.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)

    def noisy(images_N: Tensor) -> Tensor:
        same = torch.Generator().manual_seed(len(images_N))
        return images_N + 0.7 * torch.randn(images_N.shape, generator=same)

    return {
        "turned 90": lambda images: images.rot90(1, (2, 3)),
        "turned 180": lambda images: images.rot90(2, (2, 3)),
        "mirrored": lambda images: images.flip(3),
        "inverted": lambda images: -images,
        "rolled": lambda images: images.roll((4, 4), (2, 3)),
        "shuffled": shuffled,
        "checkered": lambda images: images * board,
        "noisy": noisy,
    }


LABEL_SETS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (1, 4, 7))  # the last overlaps: six tasks of ten classes


def digit_suites(seed: int, effort: Effort, wanted: Sequence[str] = ("digits", "pairs")) -> list[Suite]:
    """``digits`` (eight guises of all classes) and ``pairs`` (six label sets), from one base, as far as wanted."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(data.target)[order]
    # The base's images are its own; experts share theirs; nobody learns from validation or test images.
    ends = {"base": (0, 500), "train": (500, 1150), "validation": (1150, 1350), "test": (1350, 1797)}
    parts = {name: (images[a:b], labels[a:b]) for name, (a, b) in ends.items()}

    base = new_vit(seed)
    fit(base, *parts["base"], effort.base_steps, 2e-3, seed, shows=[lambda images: images, *guises(seed).values()])
    start = {name: value.clone() for name, value in base.state_dict().items()}
    shown = {name: {part: (show(x), y) for part, (x, y) in parts.items()} for name, show in guises(seed).items()}
    chosen = {}
    for classes in LABEL_SETS:
        name = "+".join(map(str, classes))
        chosen[name] = {part: _only(x, y, classes) for part, (x, y) in parts.items()}
    suites = []
    if "digits" in wanted:
        suites.append(_trained("digits", shown, base, start, seed, effort))
    if "pairs" in wanted:
        suites.append(_trained("pairs", chosen, base, start, seed, effort))
    return suites


def _only(images: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    kept = torch.isin(labels, torch.tensor(classes))
    return images[kept], labels[kept]


def _trained(name: str, tasks: dict[str, dict], model: Any, start: State, seed: int, effort: Effort) -> Suite:
    """Experts from ``start``, one per task, and a reference that sees all tasks for as many steps as all experts."""
    tasks, experts = dict(itertools.islice(tasks.items(), effort.tasks)), []
    for number, task in enumerate(tasks):
        model.load_state_dict(start)
        # A new label set with the head of ten: all ten stay in the softmax, as in the merged model.
        fit(model, *tasks[task]["train"], effort.expert_steps, 4e-4, seed + number)
        experts.append({key: value.clone() for key, value in model.state_dict().items()})
    reference = None
    if effort.reference:
        model.load_state_dict(start)
        images, labels = (torch.cat([tasks[task]["train"][k] for task in tasks]) for k in (0, 1))
        fit(model, images, labels, effort.expert_steps * len(tasks), 4e-4, seed)
        reference = {key: value.clone() for key, value in model.state_dict().items()}

    def score(state: State, part: str) -> list[float]:
        model.load_state_dict(state)
        model.eval()
        images, labels = (torch.cat([tasks[task][part][k] for task in tasks]) for k in (0, 1))
        with torch.no_grad():
            right = (model(images).logits.argmax(1) == labels).float()
        return [piece.mean().item() for piece in right.split([len(tasks[task][part][1]) for task in tasks])]

    return Suite(name, "accuracy", list(tasks), start, experts, reference, score, model, tasks)


def new_vit(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def fit(
    model: Any, images: Tensor, labels: Tensor, steps: int, rate: float, seed: int, *,
    shows: Sequence[Callable[[Tensor], Tensor]] = (), batch: int = 64,
) -> None:  # fmt: skip
    """AdamW, linear warm-up over a tenth of the steps, cosine to zero. ``shows``: guises, one drawn per step."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, s / steps)))
    )
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=random)
        shown = images[rows]
        if shows:
            shown = shows[int(torch.randint(len(shows), (), generator=random))](shown)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(shown).logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def text_suite(seed: int, effort: Effort) -> Suite:
    """The demo's domains and tiny Llama. The score is the geometric mean probability of a byte: 1 / perplexity."""
    from hf_fuse.data.stdlib_text import stdlib_domains
    from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

    size = ModelSize(hidden=64, feed_forward=128, layers=2, heads=4, context=128)
    tokenizer = byte_tokenizer(size.context)
    domains = stdlib_domains(source_characters=1_200_000)[: effort.tasks]
    streams = [token_stream(tokenizer, domain.train, 200_000) for domain in domains]
    base_steps, steps = effort.text_steps
    model = new_model(size, tokenizer, seed)
    train(model, streams, Schedule(base_steps, 4e-3), seed=seed)
    start = _copied(model)
    experts = []
    for number, stream in enumerate(streams):
        model.load_state_dict(start)
        train(model, [stream], Schedule(steps, 1e-3), seed=seed + number)
        experts.append(_copied(model))
    reference = None
    if effort.reference:
        model.load_state_dict(start)
        train(model, streams, Schedule(steps * len(streams), 1e-3), seed=seed)
        reference = _copied(model)
    windows = {}
    for domain, stream in zip(domains, streams):
        own = stream[: len(stream) // size.context * size.context].view(-1, size.context)
        held = token_stream(tokenizer, domain.held_out, 40_000)[: 64 * size.context].view(-1, size.context)
        # Held-out documents are longer than what is read: even windows choose, odd ones test.
        windows[domain.name] = {"train": own, "validation": held[0::2], "test": held[1::2]}

    def score(state: State, part: str) -> list[float]:
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            return [math.exp(-model(input_ids=w[part], labels=w[part]).loss.item()) for w in windows.values()]

    return Suite("text", "probability per byte", list(windows), start, experts, reference, score, model, windows)


def _copied(model: Any) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
