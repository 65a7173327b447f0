"""Defense-aware merging: a mask on all task vectors under which the merge is sure of inputs that were meddled with too.

Parameters that a backdoor needs matter to few inputs, and a small change of the input shows them. So a mask is learned
together with one perturbation per task that is to change as many predictions as it can; then the coefficients are
learned inside the mask, as in AdaMerging. This is the authors' code with its one mask; the paper describes two.

That it takes backdoors out could not be shown. On tiny ViTs for digits, two of three with a patch in a corner for class
0 (three seeds, ``mask_steps`` 80, ``mask_rate`` 0.02), attacks that succeeded were 0.93, 0.72 and 0.32 at accuracies of
0.37, 0.48 and 0.44. Task arithmetic at 0.3 had 0.83, 0.70 and 0.48 at 0.53, 0.53 and 0.50; AdaMerging 0.88, 0.69 and
0.20 at 0.46, 0.53 and 0.52. Nothing in what is minimised asks for the right class, nor keeps the mask from collapsing:
150 steps of rate 0.1 gave class 0 for every attacked image.

Shapes: K models, G coefficients, N elements of a tensor, B examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_fuse.merge.columns import columns
from hf_fuse.merge.family import Family, Task
from hf_fuse.merge.learn._predictions import entropy, predictions
from hf_fuse.merge.learn.ada_merging import surest
from hf_fuse.merge.learned_output import LearnedCoefficients
from hf_fuse.merge.units import Unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2410.13910"  # recalled


def defense_aware(
    family: Family,
    *,
    granularity: Literal["task", "block", "tensor"] = "tensor",
    blocks: str | None = None,
    init: float = 0.3,
    mask_steps: Annotated[int, Between(0)] = 1000,
    mask_rate: Annotated[float, Between(0, open_low=True)] = 1e-3,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.5,
    inner_rate: Annotated[float, Between(0)] = 1e-3,
    perturbed: Annotated[float, Between(0)] = 0.1,
    perturbation_rate: Annotated[float, Between(0)] = 1e-4,
    steps: Annotated[int, Between(1)] = 1000,
    learning_rate: Annotated[float, Between(0, open_low=True)] = 1e-3,
    clamp: bool = False,
    check_every: Annotated[int, Between(1)] = 25,
    collapse: Annotated[float, Between(0, 1)] = 0.1,
) -> LearnedCoefficients:
    """``theta_0 + sum_k c_k m * tau_k``, with m of mean 1 in every tensor and shared by all models.

    m is a relaxed Bernoulli draw. Each step of its training first moves the coefficients one step towards low entropy,
    then moves each task's perturbation d towards more changed predictions, and then m towards low
    ``sum_k mean_x H(f(x)) + perturbed * H(f(x + d_k))``. Needs no triggers, no labels and no clean model, but memory
    for five more models in fp32: logits of the mask, their gradient and Adam's two moments, and the mask.

    Args:
        family: base, models, and unlabelled examples of each; heads are the models' own.
        granularity: of the coefficients: one per model, per layer (``block``), or per tensor.
        blocks: regular expression that says which tensors make a block; by default a layer.
        init: of all coefficients.
        mask_steps: of the mask; 0 draws it untrained.
        mask_rate: of Adam on the mask's logits, which start at 0.
        temperature: of the relaxed draws.
        inner_rate: of the coefficients' one step of Adam per step of the mask. The authors' code has 1, with which a
            coefficient would move by 1.
        perturbed: weight of the entropy of perturbed inputs.
        perturbation_rate: of Adam on the perturbations: of all pixels, or of the embedding of every token alike.
        steps: of the coefficients in the end, as in AdaMerging.
        learning_rate: of Adam on them.
        clamp: keep them in [0, 1]; the authors' code does not.
        check_every: steps between two looks at whether predictions collapse.
        collapse: largest fall of the entropy of the mean prediction, relative to the start.
    """
    layout, count = columns(family.units, granularity, blocks=blocks)
    coefficients_KG = torch.full((len(family.models), count), init)
    mask = ElementMask(family.units, layout, temperature, family.recipe.seed, mask_rate)
    size, seed = family.recipe.batch_size, family.recipe.seed
    sources = [task.drawn(size, family.device, seed + number) for number, task in enumerate(family.tasks)]
    attackers = [Perturbation(family, perturbation_rate) for _ in family.tasks]
    rows = []
    with family.contraction(layout, count, change=mask.change, watch=mask.watch) as contraction:
        for step in tqdm(range(mask_steps), desc="mask", unit="step", disable=None):
            batches = [next(source) for source in sources]
            mask.draw()
            moved_KG = coefficients_KG.clone()
            contraction.write(moved_KG, everything=True)
            for task, batch in zip(family.tasks, batches):
                _entropy(family, task, batch).backward()
            optimizer = torch.optim.Adam([moved_KG], lr=inner_rate)
            moved_KG.grad = contraction.taken_gradient()
            optimizer.step()
            contraction.write(moved_KG)
            row = {"step": step, "entropy": 0.0, "perturbed entropy": 0.0, "changed predictions": 0.0}
            with mask.watching(moved_KG):
                for task, batch, attacker in zip(family.tasks, batches, attackers):
                    family.put_head(task.model)
                    changed = attacker.step(batch)
                    clean = _entropy(family, task, batch)
                    clean.backward()
                    with attacker.applied():
                        meddled = _entropy(family, task, attacker.of(batch))
                        (perturbed * meddled).backward()
                    figures = (clean.item(), meddled.item(), changed)
                    for name, value in zip(list(row)[1:], figures):
                        row[name] += value / len(family.tasks)
            contraction.taken_gradient()  # of the coefficients, which this step is not about
            mask.step()
            rows.append(row)
        mask.draw()
        contraction.write(coefficients_KG, everything=True)
        kept_KG, history, facts = surest(
            family, contraction, coefficients_KG, steps=steps, learning_rate=learning_rate, clamp=clamp,
            check_every=check_every, collapse=collapse,
        )  # fmt: skip
    shaped = {unit.name: mask.values[unit.name].view(unit.shape) for unit in family.units}
    return LearnedCoefficients(kept_KG, layout, facts=facts, history=[*rows, *history], mask=shaped)


def _entropy(family: Family, task: Task, batch: dict[str, Tensor]) -> Tensor:
    family.put_head(task.model)
    logits_BC, _ = predictions(family.model, batch, prompts=True)
    return entropy(logits_BC).mean()


class ElementMask:
    """One factor per element, the same for all models: a relaxed Bernoulli draw over its mean, tensor by tensor."""

    def __init__(self, units: list[Unit], layout: dict, temperature: float, seed: int, rate: float):
        self.layout, self.temperature = layout, temperature
        self.logits = {unit.name: torch.zeros(unit.numel) for unit in units}
        self.values = {name: torch.ones_like(logits_N) for name, logits_N in self.logits.items()}
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=rate)
        self._means: dict[str, Tensor] = {}  # of what was drawn, which the values were divided by
        self._coefficients_KG: Tensor | None = None  # while gradients are collected

    def draw(self) -> None:
        """New values, of mean 1 in every tensor."""
        for name, logits_N in self.logits.items():
            uniform_N = torch.rand(logits_N.shape, generator=self.random).clamp_(1e-6, 1 - 1e-6)
            drawn_N = ((logits_N + uniform_N.logit()) / self.temperature).sigmoid()
            self._means[name] = drawn_N.mean()
            self.values[name] = drawn_N / self._means[name]

    def change(self, unit: Unit, start: int, deltas_KN: Tensor) -> Tensor:
        """The task vectors inside the mask."""
        return deltas_KN * self.values[unit.name][start : start + deltas_KN.shape[1]].to(deltas_KN)

    @contextmanager
    def watching(self, coefficients_KG: Tensor) -> Iterator[None]:
        """Collects dL/dm while the live model holds these coefficients."""
        for logits_N in self.logits.values():
            logits_N.grad = torch.zeros_like(logits_N)
        self._coefficients_KG = coefficients_KG
        try:
            yield
        finally:
            self._coefficients_KG = None

    def watch(self, unit: Unit, start: int, gradient_N: Tensor, deltas_KN: Tensor) -> None:
        """``dL/dm = (sum_k c_k tau_k) * dL/dtheta``, kept in the place of the logits' gradient until :meth:`step`."""
        if self._coefficients_KG is not None:
            coefficients_K = self._coefficients_KG[:, self.layout[unit.name].first].to(deltas_KN)
            found_N = (coefficients_K @ deltas_KN) * gradient_N
            self.logits[unit.name].grad[start : start + len(found_N)] += found_N.float().cpu()

    def step(self) -> None:
        """One step of Adam on the logits."""
        for name, logits_N in self.logits.items():
            logits_N.grad = self._to_logits(name, logits_N.grad)
        self.optimizer.step()

    def _to_logits(self, name: str, gradient_N: Tensor) -> Tensor:
        """From dL/dm to the logits, through the division by the mean and the relaxed draw."""
        values_N, mean = self.values[name], self._means[name]
        drawn_N = values_N * mean
        inner_N = (gradient_N - (gradient_N * values_N).mean()) / mean
        return inner_N * drawn_N * (1 - drawn_N) / self.temperature


class Perturbation:
    """What is added to all inputs of a task: to their pixels, or to the embedding of every token."""

    def __init__(self, family: Family, rate: float):
        self.family, self.rate = family, rate
        self.delta: Tensor | None = None

    def step(self, batch: dict[str, Tensor]) -> float:
        """One step towards more changed predictions. -> the share that was changed before it."""
        model = self.family.model
        with torch.no_grad():
            believed_B = predictions(model, batch, prompts=True)[0].argmax(-1)
        if self.delta is None:
            pixels = batch.get("pixel_values")
            shape = pixels.shape[1:] if pixels is not None else (self._embedding().weight.shape[1],)
            self.delta = torch.zeros(shape, device=self.family.device, requires_grad=True)
            self.optimizer = torch.optim.Adam([self.delta], lr=self.rate)
        with self.applied():
            logits_BC, _ = predictions(model, self.of(batch), prompts=True)
        # torch.autograd.grad leaves the weights alone, which a backward pass would contract.
        (gradient,) = torch.autograd.grad(-cross_entropy(logits_BC, believed_B), self.delta)
        self.delta.grad = gradient
        self.optimizer.step()
        return (logits_BC.argmax(-1) != believed_B).float().mean().item()

    def of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with changed pixels, which stay in its range; tokens are changed where they are embedded."""
        pixels = batch.get("pixel_values")
        if pixels is None:
            return batch
        return batch | {"pixel_values": (pixels + self.delta.to(pixels)).clamp(pixels.min(), pixels.max())}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, tokens are embedded with the perturbation."""
        if self.delta.dim() > 1:
            yield
            return
        handle = self._embedding().register_forward_hook(lambda _, __, out: out + self.delta.to(out))
        try:
            yield
        finally:
            handle.remove()

    def _embedding(self) -> Any:
        model = self.family.model
        return (model.get_encoder() if model.config.is_encoder_decoder else model).get_input_embeddings()
