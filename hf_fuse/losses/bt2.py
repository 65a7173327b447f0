"""BT2: a rotation of the new features whose first part lives in the old space, with some dimensions to spare.

For a new encoder that is to match an independently trained one and still search an old gallery, which ``bct`` and
``oca`` trade against each other. Its layers stay part of the embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.nn.utils.parametrizations import orthogonal

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.model_features import feature_size
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2211.03989"


class bt2(nn.Module):
    """Mean of ``independent (1 - cos(f, f')) + classification CE(cos(b, M)) + alignment (1 - cos(b, f_old))``.

    f are the features of length 1, ``o = W relu(f)`` a branch of the old size,
    ``u = [o[:extra] / |o[:extra]|, P(c f)]``, ``b = R u[:old_size]`` with P and R orthogonal, and the embedding is
    ``[b, u[old_size:]]``: compare its first ``old_size`` numbers with an old gallery, and all with a new one.
    :meth:`embed` computes it, and :meth:`from_checkpoint` loads the layers of a checkpoint for that.

    Args:
        old_size: numbers of the old model's features; 0: as many as the new model has.
        extra: dimensions to spare; 32 in the reference.
        scale: c; 2 in the reference.
        independent: weight of the column ``independent_features`` ``(N, D)``, f' of a model that was trained without
            regard to the old one; nothing without such a column.
        classification: weight of the cross-entropy with the old model's class means M.
        alignment: weight of the old features.
    """

    extra: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        old_size: Annotated[int, Between(0)] = 0,
        extra: Annotated[int, Between(1)] = 32,
        scale: Annotated[float, Between(0, open_low=True)] = 2.0,
        independent: Annotated[float, Between(0)] = 1.0,
        classification: Annotated[float, Between(0)] = 10.0,
        alignment: Annotated[float, Between(0)] = 5.0,
    ) -> None:
        super().__init__()
        self.old_size = old_size
        self.weights = independent, classification, alignment
        self.register_buffer("extra", torch.tensor(extra))
        self.register_buffer("scale", torch.tensor(scale))

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        self._make_layers(feature_size(model))

    def embed(self, features_ND: Tensor) -> Tensor:
        """``(N, extra + D)`` of the model's features."""
        unit_ND, extra = normalize(features_ND.float(), dim=-1), int(self.extra)
        spare_NE = normalize(self.branch(unit_ND.relu())[:, :extra], dim=-1)
        turned = torch.cat([spare_NE, self.rotation(self.scale * unit_ND)], dim=-1)
        return torch.cat([self.old_rotation(turned[:, : self.old_size]), turned[:, self.old_size :]], dim=-1)

    def forward(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        old_features_NO: Tensor,
        old_class_means_CO: Tensor,
        independent_features_ND: Tensor | None = None,
    ) -> Tensor:
        if old_features_NO.shape[-1] != self.old_size:
            raise FuseError(
                f"bt2: old_size is {self.old_size}, the old model's features have {old_features_NO.shape[-1]}."
            )
        independent, classification, alignment = self.weights
        old_NO = self.embed(features_ND)[:, : self.old_size]
        known_C = ~old_class_means_CO.isnan().any(-1)
        cosines_NC = normalize(old_NO, dim=-1) @ normalize(old_class_means_CO.float().nan_to_num(), dim=-1).T
        logits_NC = cosines_NC.masked_fill(~known_C, torch.finfo(torch.float32).min)
        of_class_N = cross_entropy(logits_NC, class_indices(labels_N), reduction="none")
        loss_N = classification * torch.where(known_C[labels_N], of_class_N, 0)
        loss_N = loss_N + alignment * (1 - cosine_similarity(old_NO, old_features_NO.float(), dim=-1))
        if independent_features_ND is not None:
            loss_N = loss_N + independent * (
                1 - cosine_similarity(features_ND.float(), independent_features_ND, dim=-1)
            )
        return mean(loss_N)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> bt2:
        """The layers of a FuseTrainer's checkpoint, for :meth:`embed`.

        Raises:
            CheckpointError: it has none.
        """
        path = Path(folder, "objective_states_0.safetensors")
        stored = load_file(path) if path.is_file() else {}
        own = {name.removeprefix("bt2."): value for name, value in stored.items() if name.startswith("bt2.")}
        if not own:
            raise CheckpointError(f"{path}: has no layers of bt2. Give a checkpoint-* folder of a training with it.")
        old_size, size = own["branch.weight"].shape
        made = cls(old_size=old_size, extra=int(own["extra"]))
        made._make_layers(size)
        made.load_state_dict(own)
        return made.eval()

    def _make_layers(self, size: int) -> None:
        self.old_size, extra = self.old_size or size, int(self.extra)
        if not extra <= self.old_size <= extra + size:
            raise FuseError(
                f"bt2: old_size is {self.old_size}, expected from extra ({extra}) to extra and the {size} new features "
                "together."
            )
        self.branch = nn.Linear(size, self.old_size)
        self.rotation = orthogonal(nn.Linear(size, size, bias=False))
        self.old_rotation = orthogonal(nn.Linear(self.old_size, self.old_size, bias=False))
