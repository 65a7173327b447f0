"""SAF: the student keeps to what it predicted for the same sample epochs ago, which flattens the loss landscape."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_fuse.distill.earlier_self import check_start
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.errors import FuseError
from hf_fuse.losses._sample_table import SampleTable
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2205.14083"


class saf(nn.Module):
    """Mean of ``T^2 KL(logits of `gap` epochs ago || logits)``, for the samples that were seen then; else 0.

    For classifiers that are trained for several epochs, at no extra pass: the history takes ``2 (gap + 1) C`` bytes per
    sample. Not for mixed samples (mixup). For language models, ``mesa``. Weight in the paper: 0.3.

    Args:
        temperature: divides both logits.
        gap: how many epochs ago.
        start_epoch: the first epoch that counts; the history begins at once.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Between(0, open_low=True)] = 5.0,
        gap: Annotated[int, Between(1)] = 3,
        start_epoch: Annotated[int, Between(0)] = 5,
    ) -> None:
        super().__init__()
        self.temperature, self.gap, self.start_epoch = temperature, gap, start_epoch

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        if model.get_output_embeddings() is not None:
            raise FuseError("objectives.saf: the history of a language model's logits is too large. Use mesa.")
        if not hasattr(train_dataset, "__len__"):
            raise FuseError("objectives.saf: remembers each sample, so it needs a training set that has a length.")
        slots = self.gap + 1
        self.past = SampleTable(len(train_dataset), slots, model.config.num_labels, dtype=torch.float16)
        # With the number of its epoch, from 1 on: a slot may hold an older one, or none.
        self.epochs = SampleTable(len(train_dataset), slots, dtype=torch.int32)

    def attach(self, trainer: Any) -> None:
        check_start(trainer, "objectives.saf", max(self.start_epoch, self.gap))

    def forward(self, logits_NC: Tensor, labels_N: Tensor, sample_ids_B: Tensor, epoch: float) -> Tensor:
        """
        Args:
            logits_NC: of the samples, all of which have a label.
            labels_N: not looked at.
            sample_ids_B: their numbers.
            epoch: how many are done.
        """
        if len(logits_NC) != len(sample_ids_B):
            raise FuseError("objectives.saf: every sample needs a label, and one prediction.")
        now = int(epoch)
        past_BSC, epochs_BS = (table.read(sample_ids_B)[0].clone() for table in (self.past, self.epochs))
        then = (now - self.gap) % (self.gap + 1)
        seen_B = epochs_BS[:, then] == now - self.gap + 1
        if now < max(self.start_epoch, self.gap):
            seen_B = torch.zeros_like(seen_B)
        loss = forward_kl(logits_NC[seen_B], past_BSC[seen_B, then].float(), temperature=self.temperature)
        past_BSC[:, now % (self.gap + 1)] = logits_NC.detach().half()
        epochs_BS[:, now % (self.gap + 1)] = now + 1
        self.past.write(sample_ids_B, past_BSC)
        self.epochs.write(sample_ids_B, epochs_BS)
        return loss / max(len(logits_NC), 1)
