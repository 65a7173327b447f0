"""HPM: a masked autoencoder tells which patches are hard to reconstruct, and is given more of these to reconstruct.

For pre-training ViTMAE on images of one's own. Costs a second decoder, and with ``hardest`` above 0 another forward
pass of encoder and decoder without gradient.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2304.05919"


class hpm(nn.Module):
    """Mean over pairs of masked patches with different losses of ``softplus(-(p_j - p_i))``, where patch j has the
    larger true loss, and p is what the second decoder predicts.

    Up to ``hardest * progress`` of the masked patches are those of which the largest loss is predicted, the others are
    random. The paper predicts with a moving average of the model, here it is the model itself, from another random
    mask, which saves a copy of it. A batch with a column ``noise`` keeps its own masks.

    Args:
        hardest: share of the masked patches that are chosen at the end of the training; 0: none.
    """

    def __init__(self, *, hardest: Annotated[float, Between(0, 1)] = 0.5) -> None:
        super().__init__()
        self.hardest, self.share = hardest, 0.0

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEForPreTraining

        if not isinstance(model, ViTMAEForPreTraining):
            raise FuseError(f"hpm: the model is a {type(model).__name__}, expected a ViTMAEForPreTraining.")
        self.patch_size, self.normalised = model.config.patch_size, model.config.norm_pix_loss
        self.mask_ratio = model.config.mask_ratio
        self.decoder = ViTMAEDecoder(model.config, model.vit.embeddings.patch_embeddings.num_patches)
        self.decoder.decoder_pred = nn.Linear(model.config.decoder_hidden_size, 1)
        if self.hardest:
            model.register_forward_pre_hook(self._choose_masks, with_kwargs=True)

    def forward(
        self,
        hidden_states: tuple[Tensor, ...],
        logits_BLP: Tensor,
        ids_restore_BL: Tensor,
        pixel_values: Tensor,
        progress: float = 0.0,
    ) -> Tensor:
        self.share = self.hardest * progress
        # The other patches have been seen, and come first in the shuffled order.
        masked_BL = ids_restore_BL >= hidden_states[-1].shape[1] - 1
        targets_BLP = patches(pixel_values.float(), self.patch_size)
        if self.normalised:
            deviation_BL1 = (targets_BLP.var(-1, keepdim=True) + 1e-6).sqrt()
            targets_BLP = (targets_BLP - targets_BLP.mean(-1, keepdim=True)) / deviation_BL1
        true_BL = (logits_BLP.detach().float() - targets_BLP).square().mean(-1)
        predicted_BL = self.decoder(hidden_states[-1], ids_restore_BL).logits.squeeze(-1).float()
        return ranking(predicted_BL, true_BL, masked_BL)

    @torch.no_grad()
    def _choose_masks(
        self, model: nn.Module, args: tuple, given: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not (model.training and self.share and given.get("noise") is None):
            return None
        # Not last_hidden_state, which is normalised: the decoder learns from hidden states as the model returns them.
        encoded = model.vit(given["pixel_values"], output_hidden_states=True)
        predicted_BL = self.decoder(encoded.hidden_states[-1], encoded.ids_restore).logits.squeeze(-1).float()
        random_BL = torch.rand(predicted_BL.shape).to(predicted_BL.device)
        chosen = round(self.share * self.mask_ratio * predicted_BL.shape[1])
        return args, given | {"noise": mining_noise(predicted_BL, random_BL, chosen)}


def ranking(predicted_BL: Tensor, true_BL: Tensor, masked_BL: Tensor) -> Tensor:
    """Mean over samples of the mean over pairs of masked patches, of which ``true`` is larger for the second."""
    pair_BLL = masked_BL[:, :, None] & masked_BL[:, None, :] & (true_BL[:, None, :] > true_BL[:, :, None])
    loss_BLL = softplus(predicted_BL[:, :, None] - predicted_BL[:, None, :])
    counts_B = pair_BLL.sum((1, 2)).clamp(min=1)
    return mean(torch.where(pair_BLL, loss_BLL, 0).sum((1, 2)) / counts_B)


def mining_noise(predicted_BL: Tensor, random_BL: Tensor, chosen: int) -> Tensor:
    """What ViTMAE orders patches by, the last ones being masked: ``chosen`` hardest ones last, others at random."""
    hardest_BK = predicted_BL.topk(chosen, dim=-1).indices
    return random_BL.scatter_add(-1, hardest_BK, torch.ones_like(predicted_BL))


def patches(pixels_BCHW: Tensor, size: int) -> Tensor:
    """``(B, L, size * size * C)``, in the order of ViTMAE's predictions: rows, columns, channels."""
    batch, channels, height, width = pixels_BCHW.shape
    parts = pixels_BCHW.reshape(batch, channels, height // size, size, width // size, size)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)
