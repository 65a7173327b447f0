"""FLAD: few-shot training with many auxiliary data sets, of which a bandit finds out while training which ones help.

(https://arxiv.org/abs/2302.00674.) Each optimizer step adds the loss of one auxiliary data set to that of the target
data; the reward of the data set is the cosine of both gradients on some parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_fuse.data.bandits import Bandit, Exp3, Ucb1, flattened
from hf_fuse.errors import FuseError
from hf_fuse.replay import ReplayStream
from hf_fuse.trainer import FuseTrainer
from hf_fuse.trainer_config import FuseConfig

STATE = "flad.json"
POLICIES: dict[str, type[Bandit]] = {"exp3": Exp3, "ucb1": Ucb1}


class FladTrainer(FuseTrainer):
    """A FuseTrainer whose ``train_dataset`` is the target and whose replay stream is an auxiliary data set per step.

    The arm is chosen once per optimizer step, so how a batch is split changes nothing. Extra cost: forward and backward
    of the auxiliary batch, two gradients of the reward parameters, and memory for them.

    Args:
        auxiliary_datasets: name -> rows as those of ``train_dataset``, of known length.
        policy: ``exp3`` or ``ucb1``.
        reward_parameters: regular expression on the names of trained parameters. Default: the output layer, or the last
            trained matrix where that is frozen (the last layer's LoRA).
        flatten: draws as the published sampler does, which nearly ignores what the bandit has learned.
        arguments: of :class:`~hf_fuse.FuseTrainer`. Without an objective ``replay`` in ``args``, its weight is 1.

    Raises:
        FuseError: no data sets, no parameters for the reward, or parameters split over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FuseConfig,
        *,
        auxiliary_datasets: Mapping[str, Any],
        policy: Literal["exp3", "ucb1"] = "exp3",
        reward_parameters: str | None = None,
        flatten: bool = False,
        **arguments: Any,
    ):
        if not auxiliary_datasets:
            raise FuseError("auxiliary_datasets: is empty. Expected name -> data set, at least one.")
        for name, rows in auxiliary_datasets.items():
            if not hasattr(rows, "__len__") or not len(rows):
                raise FuseError(f"auxiliary_datasets: {name}: is empty or a stream. Give one of known length.")
        if policy not in POLICIES:
            raise FuseError(f"policy is {policy!r}; expected {' or '.join(POLICIES)}.")
        args.objectives = {"replay": 1.0, **(args.objectives or {})}
        super().__init__(model, args, replay_dataset=next(iter(auxiliary_datasets.values())), **arguments)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise FuseError("FLAD compares whole gradients: it can't train parameters that are split over processes.")
        self.arms = list(auxiliary_datasets)
        self.bandit = POLICIES[policy](len(self.arms), seed=args.seed)
        if flatten:
            learned = self.bandit.probabilities
            self.bandit.probabilities = lambda: flattened(learned())
        self._reward_parameters = _reward_parameters(self.model, reward_parameters)
        self._gradients: list[list[Tensor]] = [[], []]
        one = self._passes.replay
        self._passes.replay = ArmStream({name: one.of(rows) for name, rows in auxiliary_datasets.items()}, self.bandit)

    def _total(self, terms: dict[str, tuple[float, Tensor, str]], counts_U: Tensor) -> Tensor:
        if "replay" not in terms:  # its weight is 0 at this step
            return super()._total(terms, counts_U)
        parts = [super(FladTrainer, self)._total({name: terms[name]}, counts_U) for name in ("task_loss", "replay")]
        for number, part in enumerate(parts):
            found = torch.autograd.grad(part, self._reward_parameters, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._reward_parameters)]
            before = self._gradients[number] or found
            self._gradients[number] = found if before is found else [a + b for a, b in zip(before, found)]
        return super()._total(terms, counts_U)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._gradients[0]:
            target, auxiliary = (
                torch.cat([g.float().flatten() for g in self.accelerator.reduce(found, "mean")])
                for found in self._gradients
            )
            reward = torch.nn.functional.cosine_similarity(target, auxiliary, dim=0)
            self.bandit.update(self._passes.replay.arm, reward.item())
            self._gradients = [[], []]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            whole = max(sum(self.bandit.pulls), 1)
            logs |= {f"{name}_share": count / whole for name, count in zip(self.arms, self.bandit.pulls)}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            said = {"arms": self.arms, **self.bandit.state()}
            Path(output_dir, STATE).write_text(json.dumps(said), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (file := Path(checkpoint, STATE)).is_file():
            return
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["arms"] != self.arms:
            raise FuseError(
                f"{checkpoint}: was trained with the auxiliary data sets {', '.join(said['arms'])}, not "
                f"{', '.join(self.arms)}. Go on with those, in their order."
            )
        self.bandit.restore(said)


class ArmStream:
    """Micro-batches of the arm that the bandit chooses for each optimizer step."""

    def __init__(self, streams: Mapping[str, ReplayStream], bandit: Bandit):
        self._streams, self._bandit = list(streams.values()), bandit
        self.arm = 0

    def micro_batches(self, step: int, count: int) -> list[dict[str, Any]]:
        self.arm = self._bandit.choose()
        return self._streams[self.arm].micro_batches(self._bandit.pulls[self.arm], count)


def _reward_parameters(model: nn.Module, pattern: str | None) -> list[nn.Parameter]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if pattern is not None:
        found = [parameter for name, parameter in trained.items() if re.search(pattern, name)]
        if not found:
            raise FuseError(f"reward_parameters: {pattern!r} fits none of the {len(trained)} trained parameters.")
        return found
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and head.weight.requires_grad:
        return [head.weight]
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    if not matrices:
        raise FuseError("FLAD needs a trained matrix to compare gradients on; the model has none.")
    return matrices[-1:]
