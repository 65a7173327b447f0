"""Dual-Head Knowledge Distillation: a second head imitates the teacher's logits, so that the classifier need not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from torch import Tensor, nn

from hf_fuse.distill.aligned_gradients import AlignedGradients
from hf_fuse.distill.chunked import chunked_sum
from hf_fuse.distill.head_inputs import head_of
from hf_fuse.distill.methods.dhkd import dhkd
from hf_fuse.distill.top_k import TopK
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2411.08937"
ROWS_OF_LOGITS = 1024  # predictions whose auxiliary logits exist at a time


class dual_head(nn.Module):
    """Mean of :func:`~hf_fuse.distill.methods.dhkd.dhkd` between an auxiliary head and the teacher.

    The head reads what the student's own reads; the classifier itself learns from the labels alone (the task loss), and
    the backbone from both. The auxiliary head is in checkpoints, but not in the saved model. The objective ``dhkd`` is
    the ablation with one head.

    Where the two gradients of the backbone point apart, ``align_gradients`` takes out of the auxiliary one what points
    against the other: what is left has a product of exactly 0 with it. Only parameters that both reach count (the
    reference takes all, which leaves some of the conflict and inflates the classifier's gradient), and the gradients
    are those of the whole batch of an optimizer step. It costs a second backward pass and a copy of the gradients.

    Args:
        head: ``linear``; ``nonlinear``, the paper's for teachers of another architecture: two layers with normalisation
            (LayerNorm instead of BatchNorm, which would see micro-batches) and ReLU, without dropout; ``low_rank``, two
            layers without anything between, for vocabularies, where a linear head is as large as the output layer.
        size: of what is between two layers; 200 in the paper.
        temperature: T; 2 in the paper's CIFAR recipes.
        mean_over_classes: see dhkd; set it for vocabularies.
        align_gradients: the paper's setting for other architectures, off for the same.
    """

    takes_top_k = True

    def __init__(
        self,
        *,
        head: Literal["linear", "nonlinear", "low_rank"] = "linear",
        size: Annotated[int, Between(1)] = 200,
        temperature: Annotated[float, Between(0, open_low=True)] = 2.0,
        mean_over_classes: bool = False,
        align_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.size, self.temperature = head, size, temperature
        self.mean_over_classes, self.align_gradients = mean_over_classes, align_gradients

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        classes, width = head_of(model).weight.shape
        if self.kind == "linear":
            self.head = nn.Linear(width, classes)
        elif self.kind == "nonlinear":
            self.head = nn.Sequential(
                nn.Linear(width, self.size), nn.LayerNorm(self.size), nn.ReLU(), nn.Linear(self.size, classes)
            )
        else:
            self.head = nn.Sequential(nn.Linear(width, self.size, bias=False), nn.Linear(self.size, classes))

    def attach(self, trainer: Any) -> None:
        if self.align_gradients:
            self._aligned = AlignedGradients(trainer.student, trainer.accelerator)

    def before_step(self) -> None:
        """Called when the gradients of a whole batch are there."""
        if self.align_gradients:
            self._aligned.add()

    def forward(self, head_inputs_ND: Tensor, teacher_logits_NC: Tensor | TopK, labels_N: Tensor) -> Tensor:
        """
        Args:
            head_inputs_ND: what the student's own head took for each prediction.
            teacher_logits_NC: of these predictions.
            labels_N: class or token ids.
        """
        hidden_ND = self._aligned.apart(head_inputs_ND) if self.align_gradients else head_inputs_ND
        given = teacher_logits_NC.tensors if isinstance(teacher_logits_NC, TopK) else (teacher_logits_NC,)

        def loss(hidden_ND: Tensor, labels_N: Tensor, *teacher: Tensor) -> Tensor:
            auxiliary_NC = self.head(hidden_ND.to(next(self.head.parameters()).dtype))
            if isinstance(teacher_logits_NC, TopK):
                said = TopK.from_tensors(teacher, teacher_logits_NC.temperature).within(auxiliary_NC.shape[-1])
            else:
                width = min(auxiliary_NC.shape[-1], teacher[0].shape[-1])
                auxiliary_NC, said = auxiliary_NC[:, :width], teacher[0][:, :width]
            options = {"temperature": self.temperature, "mean_over_classes": self.mean_over_classes}
            return dhkd(auxiliary_NC, said, labels_N, **options)

        return chunked_sum(loss, hidden_ND, labels_N, *given, chunk_size=ROWS_OF_LOGITS) / max(len(labels_N), 1)
