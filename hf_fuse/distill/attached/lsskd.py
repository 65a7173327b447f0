"""LSSKD: stage classifiers tell class and rotation, and everything keeps to the student of the last epoch."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fuse.batch_counts import IGNORED
from hf_fuse.distill.attached._views import VIEWS, Transform, check_images, further_views, joint_labels
from hf_fuse.distill.earlier_self import EarlierSelf, Following, check_whole
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2506.07055"


class lsskd(nn.Module):
    """``sum_l CE(joint_l) + a sum_l T^2 KL(past_l || joint_l) + b T^2 KL(past || student)``, means over all views.

    The joint heads l read the pooled hidden states of ``stages`` layers, evenly spaced up to the last, and tell
    ``class * M + view``, as the teacher's heads do in HSAKD (whose temperature and unit weights are the defaults here;
    the paper's own are unverified). The past is the student with its heads at the end of the last epoch, so the
    divergences count from the second epoch on. Heads and past are dropped when the student is saved; the classifier's
    cross-entropy is the task loss. Takes 2 M passes, M of them without gradient.

    Args:
        stages: number of heads; at most one per layer.
        transform: ``rotation`` by quarter turns (M = 4, square images), ``colors``: orders of three channels (M = 6).
        temperature: T, divides the logits in the divergences.
        stage_weight: a, of the heads' divergences.
        final_weight: b, of the classifier's divergence.
    """

    def __init__(
        self,
        *,
        stages: Annotated[int, Between(1)] = 3,
        transform: Transform = "rotation",
        temperature: Annotated[float, Between(0, open_low=True)] = 3.0,
        stage_weight: Annotated[float, Between(0)] = 1.0,
        final_weight: Annotated[float, Between(0)] = 1.0,
    ) -> None:
        super().__init__()
        self.stages, self.transform, self.temperature = stages, transform, temperature
        self.stage_weight, self.final_weight = stage_weight, final_weight

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        check_images(model, "objectives.lsskd")
        config = model.config
        widths = getattr(config, "hidden_sizes", None) or [config.hidden_size] * config.num_hidden_layers
        self.heads = StageHeads(widths, self.stages, config.num_labels * VIEWS[self.transform])

    def attach(self, trainer: Any) -> None:
        check_whole(trainer, "objectives.lsskd")
        self._trainer = trainer
        self.past, self.past_heads = EarlierSelf(trainer.student), EarlierSelf(self.heads)
        trainer.add_callback(Following([(self.past, trainer.student), (self.past_heads, self.heads)]))

    def forward(
        self, logits_NC: Tensor, labels_N: Tensor, inputs: dict[str, Any], model: nn.Module, hidden_states: tuple
    ) -> Tensor:
        """
        Args:
            logits_NC: the classifier's, of the images that have a label.
            labels_N: classes.
            inputs: the batch, with ``pixel_values`` and ``labels``.
            model: the student.
            hidden_states: of all layers for the whole batch, embeddings first.
        """
        labelled_B = inputs["labels"] != IGNORED
        turned = {"pixel_values": further_views(inputs, self.transform), "output_hidden_states": True}
        outputs, _ = self._trainer.further_pass(model, turned)
        states = tuple(torch.cat([own[labelled_B], other]) for own, other in zip(hidden_states, outputs.hidden_states))
        joint = self.heads(states)
        targets_B = joint_labels(labels_N, VIEWS[self.transform])
        total = sum(F.cross_entropy(stage_BK.float(), targets_B, reduction="sum") for stage_BK in joint)
        if self.past.updates:
            pixels = torch.cat([inputs["pixel_values"][labelled_B], turned["pixel_values"]])
            past = self.past(self._trainer.student, turned | {"pixel_values": pixels})
            past_joint = self.past_heads(self.heads, {"hidden_states": past.hidden_states})
            for now_BK, then_BK in zip(joint, past_joint, strict=True):
                total = total + self.stage_weight * forward_kl(now_BK, then_BK, temperature=self.temperature)
            now_BC = torch.cat([logits_NC, outputs.logits])
            total = total + self.final_weight * forward_kl(now_BC, past.logits, temperature=self.temperature)
        return total / max(len(targets_B), 1)


class StageHeads(nn.Module):
    """Linear classifiers on the pooled hidden states of evenly spaced layers.

    Args:
        widths: of the layers, embeddings left out.
        stages: how many heads; at most one per layer.
        outcomes: of each head.
    """

    def __init__(self, widths: list[int], stages: int, outcomes: int) -> None:
        super().__init__()
        stages = min(stages, len(widths))
        self.layers = [round((stage + 1) * len(widths) / stages) for stage in range(stages)]
        self.heads = nn.ModuleList(nn.Linear(widths[layer - 1], outcomes) for layer in self.layers)

    def forward(self, hidden_states: tuple[Tensor, ...]) -> list[Tensor]:
        """Per head ``(B, outcomes)``; states are ``(B, T, D)`` of tokens or ``(B, D, height, width)`` of maps."""
        pooled = [
            states.mean(1) if states.dim() == 3 else states.flatten(2).mean(-1)
            for states in (hidden_states[layer] for layer in self.layers)
        ]
        return [head(features_BD) for head, features_BD in zip(self.heads, pooled)]
