"""CoLoR-Filter: keeps the texts that a model of the target finds easier than the model it was fine-tuned from.

A text's score is its mean loss per token under the prior minus that under the conditional model, which is the prior
fine-tuned on a little target data. Both may be far smaller than the model that is to be trained.

To prefer over n-grams (DSIR) where a model of the target domain exists: two forward passes over all of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2406.10670"
DRAWN = False


def color_filter(
    texts: Sequence[str],
    prior: Any,
    conditional: Any,
    *,
    batch_size: Annotated[int, Between(1)] = 8,
    max_length: Annotated[int, Between(2)] | None = None,
) -> np.ndarray:
    """Score of each text, fp64 [N]; -inf for texts of fewer than two tokens.

    Args:
        texts: to choose from; read once per model.
        prior: function that loads the model before the target, and its tokenizer: ``() -> (model, tokenizer)``. The
            two models are not held at once.
        conditional: the same for the model after the target.
        batch_size: windows per forward pass.
        max_length: window length in tokens; default: the model's context, at most 2048. Longer texts are scored in
            overlapping windows, in full.
    """
    from hf_fuse.perplexity import text_losses

    losses = []
    for name, load in (("prior", prior), ("conditional", conditional)):
        model, tokenizer = load()
        with tqdm(desc=f"score by {name}", unit="token", unit_scale=True, disable=None) as bar:
            found = text_losses(
                model, tokenizer, texts, max_length=max_length, batch_size=batch_size, on_scored=bar.update
            )
        losses.append(found)
        del model
    scores = np.subtract(*losses)
    return np.where(np.isnan(scores), -np.inf, scores)
