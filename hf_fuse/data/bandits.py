"""Which of several data sets to draw from next: EXP3 and UCB1, as FLAD uses them (https://arxiv.org/abs/2302.00674).

K arms; rewards are in [-1, 1]; step t counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_fuse.errors import FuseError


class Bandit:
    """What has been drawn how often, and with which reward.

    Args:
        arms: K.
        seed: of the draws; each step's draw follows from the seed and the step alone.
    """

    def __init__(self, arms: int, *, seed: int = 0):
        if arms < 1:
            raise FuseError(f"{arms} data sets to draw from; expected at least one.")
        self.seed = seed
        self.pulls = [0] * arms
        self.rewards = [0.0] * arms

    @property
    def step(self) -> int:
        """t, of the next draw."""
        return sum(self.pulls) + 1

    def probabilities(self) -> np.ndarray:
        """Of drawing each arm now, ``(K,)``."""
        raise NotImplementedError

    def choose(self) -> int:
        """The arm of this step; asking again gives the same one until :meth:`update`."""
        draw = np.random.default_rng([self.seed, self.step])
        return int(draw.choice(len(self.pulls), p=self.probabilities()))

    def update(self, arm: int, reward: float) -> None:
        """Says what drawing an arm has brought."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"pulls": self.pulls, "rewards": self.rewards}

    def restore(self, state: dict[str, Any]) -> None:
        self.pulls, self.rewards = list(state["pulls"]), list(state["rewards"])


class Exp3(Bandit):
    """Draws at random, the more often the more an arm has brought in all; exploration shrinks with time."""

    def probabilities(self) -> np.ndarray:
        return exp3_probabilities(self.rewards, self.step)

    def update(self, arm: int, reward: float) -> None:
        # Rare arms count for more, so that the sums are what drawing every arm each time would have given on average.
        self.rewards[arm] += reward / self.probabilities()[arm]
        self.pulls[arm] += 1


class Ucb1(Bandit):
    """Draws the arm that may be the best: its mean reward and how little is known of it.

    Args:
        smoothing: weight of the newest reward in an arm's mean.
    """

    def __init__(self, arms: int, *, seed: int = 0, smoothing: float = 0.1):
        super().__init__(arms, seed=seed)
        self.smoothing = smoothing

    def probabilities(self) -> np.ndarray:
        chosen = np.zeros(len(self.pulls))
        chosen[np.argmax(ucb1_bounds(self.rewards, self.pulls, self.step))] = 1.0
        return chosen

    def update(self, arm: int, reward: float) -> None:
        first = self.pulls[arm] == 0
        weight = 1.0 if first else self.smoothing
        self.rewards[arm] += weight * (reward - self.rewards[arm])
        self.pulls[arm] += 1


def exp3_probabilities(rewards: Sequence[float], step: int) -> np.ndarray:
    """``(1 - K eps_t) softmax(eps_{t-1} R) + eps_t`` with ``eps_t = min(1/K, sqrt(ln K / (K t)))``.

    Args:
        rewards: R, summed, each divided by the probability at which it was drawn.
        step: t, from 1.
    """
    arms = len(rewards)
    now, before = (min(1 / arms, math.sqrt(math.log(arms) / (arms * t))) for t in (step, max(step - 1, 1)))
    raised = np.exp(before * (np.asarray(rewards, dtype=float) - max(rewards)))
    found = (1 - arms * now) * raised / raised.sum() + now
    return found / found.sum()


def ucb1_bounds(means: Sequence[float], pulls: Sequence[int], step: int) -> np.ndarray:
    """``mean + sqrt(2 ln t / n)``; infinite for arms never drawn."""
    return np.array([m + math.sqrt(2 * math.log(step) / n) if n else math.inf for m, n in zip(means, pulls)])


def flattened(probabilities: np.ndarray) -> np.ndarray:
    """What the published sampler makes of probabilities: a softmax of them, which is nearly uniform for many arms."""
    raised = np.exp(probabilities)
    return raised / raised.sum()
