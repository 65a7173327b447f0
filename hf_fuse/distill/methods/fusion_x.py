"""Fusion-X: as FuseLLM, but a small network learns which of the teachers to listen to for which text."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_fuse.distill.methods.fuse_llm import Support, Unaligned, among, fused_loss
from hf_fuse.distill.sources import Source, label_probability
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2505.23844"


class fusion_x(nn.Module):
    """Sum over N of ``KL(fused || student) + selection * -log sum_k g_k P_k(label) + balance * CV^2``.

    The gate ``g = softmax(MLP(exp(-cross-entropies)))`` sees how well each teacher predicts the row. Teachers with
    ``g_k <= threshold`` are left out (the one with the largest g never), the others' weights are normalised, and mix
    the teachers. The student gets no gradient into the gate: it would prefer the teacher that says what the student
    says already. What trains the gate is how likely the mixture finds the text, and the variation of how much the
    teachers are used in the micro-batch (variance over squared mean, unbiased), which keeps it from using one alone.
    (The released code makes the gate anew in every step and trains it nowhere; formulas from there, the gate's own
    loss is ours.) The paper's weights: ``{task: 0.9, fusion_x: 0.1}``, with ``balance`` 5 for its 0.5.

    Args:
        threshold: of the gate.
        selection: weight of the gate's likelihood. It trains the gate alone.
        balance: weight of CV^2.
        support: see :func:`~hf_fuse.distill.methods.fuse_llm.fuse_llm`.
        unaligned: likewise.
    """

    def __init__(
        self,
        *,
        threshold: Annotated[float, Between(0, 1)] = 0.15,
        selection: Annotated[float, Between(0)] = 1.0,
        balance: Annotated[float, Between(0)] = 0.5,
        support: Support = "tail",
        unaligned: Unaligned = "skip",
    ) -> None:
        super().__init__()
        self.threshold, self.selection, self.balance = threshold, selection, balance
        self.support, self.unaligned = support, unaligned

    def attach(self, trainer: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trainer.args.seed)  # the same on every process
            self.make_gate(len(trainer.teachers))

    def make_gate(self, count: int) -> None:
        """The network for ``count`` teachers: count -> 2 count -> count -> count."""
        self.gate = nn.Sequential(
            nn.Linear(count, 2 * count), nn.GELU(), nn.Linear(2 * count, count), nn.GELU(), nn.Linear(count, count)
        )

    def forward(self, student_NV: Tensor, sources: list[Source], labels_N: Tensor) -> Tensor:
        """
        Args:
            student_NV: logits.
            sources: what the teachers predict.
            labels_N: token ids.
        """
        if self.gate[0].in_features != len(sources):
            raise FuseError(f"fusion_x: its gate is for {self.gate[0].in_features} teachers, not for {len(sources)}.")
        rewards_NS = torch.stack([(-source.cross_entropy_N.float()).exp() for source in sources], dim=-1)
        gate_NS = self.gate(rewards_NS).softmax(-1)
        has_NS = torch.stack([source.has_N for source in sources], dim=-1)
        weights_NS = among(selected(gate_NS, self.threshold), has_NS)
        loss = fused_loss(
            student_NV, sources, weights_NS.detach(), labels_N, support=self.support, unaligned=self.unaligned,
            teacher_temperature=1.0,
        )  # fmt: skip
        vocabulary = student_NV.shape[-1]
        labels_NS = torch.stack([label_probability(s.everywhere(), labels_N, vocabulary) for s in sources], dim=-1)
        taught_N = (weights_NS > 0).any(-1)
        mixture_N = (weights_NS * labels_NS).sum(-1)[taught_N].clamp(min=torch.finfo(torch.float32).tiny)
        loss = loss - self.selection * mixture_N.log().sum()
        return loss + self.balance * len(labels_N) * variation(gate_NS.sum(0))


def selected(gate_NS: Tensor, threshold: float) -> Tensor:
    """The gate without what is at or below the threshold, normalised; its largest entry stays in any case."""
    largest_NS = torch.zeros_like(gate_NS, dtype=torch.bool).scatter(-1, gate_NS.argmax(-1, keepdim=True), True)
    kept_NS = gate_NS * ((gate_NS > threshold) | largest_NS)
    return kept_NS / kept_NS.sum(-1, keepdim=True)


def variation(importance_S: Tensor) -> Tensor:
    """``var / mean^2`` with the unbiased variance; 0 for a single entry, or where all are 0."""
    if len(importance_S) < 2:
        return importance_S.sum() * 0
    return importance_S.var() / importance_S.mean().square().clamp(min=torch.finfo(torch.float32).tiny)
