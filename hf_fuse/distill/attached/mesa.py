"""MESA: the student keeps to the predictions of its own moving average."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from hf_fuse.distill.earlier_self import EarlierSelf, Following, check_start, check_whole
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2205.14083"


class mesa(nn.Module):
    """Mean of ``T^2 KL(average || student)`` over the predictions: one more forward pass, no history, any model.

    The average holds what trains, in fp32. It runs in evaluation mode. Weight in the paper: 0.8.

    Args:
        temperature: divides both logits.
        decay: of the average, per optimizer step. The default is the paper's, for tens of thousands of steps.
        start_epoch: the first epoch that counts, 5 in the paper; the average begins at once.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Between(0, open_low=True)] = 5.0,
        decay: Annotated[float, Between(0, 1)] = 0.9998,
        start_epoch: Annotated[int, Between(0)] = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.decay, self.start_epoch = temperature, decay, start_epoch

    def attach(self, trainer: Any) -> None:
        check_whole(trainer, "objectives.mesa")
        check_start(trainer, "objectives.mesa", self.start_epoch)
        self._trainer = trainer
        self.average = EarlierSelf(trainer.student)
        trainer.add_callback(Following([(self.average, trainer.student)], self.decay))

    def forward(self, logits_NC: Tensor, labels_N: Tensor, inputs: dict[str, Any], epoch: float) -> Tensor:
        """
        Args:
            logits_NC: of the predictions that have a label.
            labels_N: not looked at.
            inputs: the batch.
            epoch: how many are done.
        """
        if epoch < self.start_epoch:
            return logits_NC.sum() * 0
        average_NC, _ = self._trainer.predictions(self.average(self._trainer.student, inputs), inputs)
        return forward_kl(logits_NC, average_NC, temperature=self.temperature) / max(len(logits_NC), 1)
