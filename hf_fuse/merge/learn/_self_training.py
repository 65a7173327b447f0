"""Learning from unlabelled examples of a classifier: its surest predictions, and agreement of two views (UFM of aTLAS).

N examples, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_fuse.merge.family import Family
from hf_fuse.merge.learn._predictions import predictions

MOST_TRUSTED = 100  # of each class
TRUSTED_SHARE = 4  # one of so many examples of a batch
SURE = 0.9  # how sure the softened prediction has to be at first; at the end 1
HIDDEN = 0.15  # share of a text's tokens that the strong view leaves out


class SelfTraining:
    """``CE(trusted, their class) + CE(strong view, softened prediction for the weak view)`` where that one is sure.

    Trusted are the ``min(N / C, 100)`` examples of each class that the model is surest of, found anew for every epoch.
    The softened prediction is ``p^0.5 / sum p^0.5``; it counts where its largest part exceeds a bound that rises from
    0.9 to 1. The weak view is the example itself. The strong view of an image is noisy and lacks a random square; that
    of a text lacks 15% of its tokens. (The paper augments images with RandAugment; views of texts are ours.)
    """

    def __init__(self, family: Family, _: str, steps: int):
        self.family, self.steps, self.done = family, steps, 0
        (self.task,) = family.tasks
        self.random = torch.Generator().manual_seed(family.recipe.seed)
        self.size = family.recipe.batch_size
        self.source = self.task.drawn(max(1, self.size - self.size // TRUSTED_SHARE), family.device, family.recipe.seed)
        self.trusted: list[tuple[int, int]] = []  # (example, class)

    def begin_epoch(self) -> None:
        """Finds the trusted examples."""
        model, family = self.family.model, self.family
        with torch.no_grad():
            parts = [predictions(model, b)[0].softmax(-1) for b in self.task.batches(self.size, family.device)]
        probs_NC = torch.cat(parts).cpu()
        count, classes = probs_NC.shape
        most = max(1, min(count // classes, MOST_TRUSTED))
        best: dict[int, tuple[float, int]] = {}
        for label in range(classes):
            for number in probs_NC[:, label].topk(most).indices.tolist():
                best[number] = max(best.get(number, (-1.0, 0)), (probs_NC[number, label].item(), label))
        self.trusted = [(number, label) for number, (_, label) in sorted(best.items())]

    def backward(self) -> None:
        """One batch, a quarter of it trusted examples."""
        model, family = self.family.model, self.family
        bound = SURE + (1 - SURE) * self.done / self.steps
        self.done += 1
        drawn = torch.randint(len(self.trusted), (max(1, self.size // TRUSTED_SHARE),), generator=self.random).tolist()
        labels_B = torch.tensor([self.trusted[place][1] for place in drawn], device=family.device)
        batch = self.task.batch([self.trusted[place][0] for place in drawn], family.device)
        cross_entropy(predictions(model, batch)[0], labels_B).backward()
        batch = next(self.source)
        with torch.no_grad():
            soft_BC = (0.5 * predictions(model, batch)[0].log_softmax(-1)).softmax(-1)
        sure_B = soft_BC.amax(-1) > bound
        if sure_B.any():
            logits_BC, _ = predictions(model, self._strong(batch))
            (cross_entropy(logits_BC, soft_BC, reduction="none") * sure_B).mean().backward()

    def _strong(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = dict(batch)
        if "pixel_values" in seen:
            seen["pixel_values"] = self._damaged(seen["pixel_values"])
        else:
            mask_BT = seen["attention_mask"]
            kept_BT = torch.rand(mask_BT.shape, generator=self.random).to(mask_BT.device) >= HIDDEN
            kept_BT[:, 0] = True  # where a text begins, which many models read the class from
            seen["attention_mask"] = mask_BT * kept_BT
        return seen

    def _damaged(self, pixels_BCHW: Tensor) -> Tensor:
        noise = torch.randn(pixels_BCHW.shape, generator=self.random).to(pixels_BCHW)
        pixels = pixels_BCHW + 0.1 * pixels_BCHW.std() * noise
        height, width = pixels.shape[-2:]
        top, left = (int(torch.randint(side - side // 3 + 1, (), generator=self.random)) for side in (height, width))
        pixels[..., top : top + height // 3, left : left + width // 3] = 0
        return pixels
