"""GB-NN: a hidden layer that grows stage by stage, each fitted to what is left.

(https://arxiv.org/abs/1909.12098.) Gradient boosting whose stages are a few units wide. Together they are one hidden
layer; its first stages are a smaller classifier of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from hf_fuse.heads.head import Head, one_hot, softmax


class GbNn(Head):
    """Stages of J sigmoid units on features.

    Args:
        stages: T.
        units: J per stage.
        shrinkage: nu, of each stage's step (recalled).
        steps: of L-BFGS per stage.
        weight_decay: of each stage's fit.
        seed: of the start values.
    """

    STATE = ("start_", "inner_", "inner_bias_", "outer_", "outer_bias_", "mean_", "spread_")

    def __init__(
        self,
        stages: int = 20,
        units: int = 4,
        shrinkage: float = 0.5,
        steps: int = 30,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        self.stages = stages
        self.units = units
        self.shrinkage = shrinkage
        self.steps = steps
        self.weight_decay = weight_decay
        self.seed = seed

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> GbNn:
        """Adds ``stages`` more stages, fitted to what the present ones leave of these samples."""
        X, numbers = self._samples(X, y)
        targets_NC = one_hot(numbers, len(self.classes_))
        if not hasattr(self, "start_"):
            width, classes = X.shape[1], len(self.classes_)
            self.mean_, self.spread_ = X.mean(0), np.where(X.std(0) > 0, X.std(0), 1)
            self.start_ = np.log(targets_NC.mean(0))
            self.inner_, self.inner_bias_ = np.zeros((0, self.units, width)), np.zeros((0, self.units))
            self.outer_, self.outer_bias_ = np.zeros((0, classes, self.units)), np.zeros((0, classes))
        scores_NC, scaled = self.scores(X), (X - self.mean_) / self.spread_
        for _ in range(self.stages):
            residual_NC = targets_NC - softmax(scores_NC)
            layers = _stage(
                scaled, residual_NC, self.units, self.steps, self.weight_decay, self.seed + len(self.inner_)
            )
            found_NC = _sigmoid(scaled @ layers[0].T + layers[1]) @ layers[2].T + layers[3]
            step = self.shrinkage * _newton(scores_NC, found_NC, targets_NC)
            scores_NC = scores_NC + step * found_NC
            for name, values in zip(("inner_", "inner_bias_", "outer_", "outer_bias_"), layers):
                values = step * values if name.startswith("outer") else values
                setattr(self, name, np.concatenate([getattr(self, name), values[None]]))
        return self

    def scores(self, X: Any, stages: int | None = None) -> np.ndarray:
        """Logits ``(N, C)`` of the first ``stages``, by default of all."""
        X = (self._features(X) - self.mean_) / self.spread_
        inner, outer = self.inner_[:stages], self.outer_[:stages]
        hidden = _sigmoid(np.einsum("nd,tjd->ntj", X, inner) + self.inner_bias_[:stages])
        return self.start_ + np.einsum("ntj,tcj->nc", hidden, outer) + self.outer_bias_[:stages].sum(0)

    def _make_room(self, classes: np.ndarray, places: np.ndarray) -> None:
        self._no_new_classes()

    def network(self) -> nn.Sequential:
        """All stages as one hidden layer of ``T * J`` units: a module with the same logits."""
        self._fitted()
        width, classes = len(self.mean_), len(self.classes_)
        inner = self.inner_.reshape(-1, width) / self.spread_
        layers = [nn.Linear(width, len(inner)), nn.Sigmoid(), nn.Linear(len(inner), classes)]
        outer = self.outer_.transpose(1, 0, 2).reshape(classes, -1)
        values = [inner, self.inner_bias_.reshape(-1) - inner @ self.mean_, outer]
        values.append(self.start_ + self.outer_bias_.sum(0))
        for parameter, value in zip([*layers[0].parameters(), *layers[2].parameters()], values):
            parameter.data.copy_(torch.as_tensor(value))
        return nn.Sequential(*layers)


def _stage(
    X: np.ndarray, residual_NC: np.ndarray, units: int, steps: int, weight_decay: float, seed: int
) -> list[np.ndarray]:
    """Weights and biases of a hidden layer that fits the residual by least squares."""
    draw = torch.Generator().manual_seed(seed)
    inputs, wanted = torch.as_tensor(X), torch.as_tensor(residual_NC)
    shapes = [(units, X.shape[1]), (units,), (wanted.shape[1], units), (wanted.shape[1],)]
    start = [torch.randn(shape, generator=draw, dtype=torch.float64) / max(shape[-1], 1) ** 0.5 for shape in shapes]
    layers = [values.requires_grad_() for values in start]
    optimizer = torch.optim.LBFGS(layers, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.sigmoid(inputs @ layers[0].T + layers[1]) @ layers[2].T + layers[3]
        loss = ((found - wanted) ** 2).mean() + weight_decay * (layers[0] ** 2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [values.detach().numpy() for values in layers]


def _newton(scores_NC: np.ndarray, found_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    """One Newton step of the cross-entropy along the stage, halved until the loss does not rise."""
    probabilities = softmax(scores_NC)
    slope = ((targets_NC - probabilities) * found_NC).sum()
    spread = (probabilities * found_NC**2).sum() - ((probabilities * found_NC).sum(1) ** 2).sum()
    step, loss = slope / max(spread, 1e-12), _loss(scores_NC, targets_NC)
    for _ in range(40):
        if _loss(scores_NC + step * found_NC, targets_NC) <= loss:
            return step
        step /= 2
    return 0.0


def _loss(scores_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    return float(-(targets_NC * np.log(np.maximum(softmax(scores_NC), 1e-300))).sum(1).mean())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))
