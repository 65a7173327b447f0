"""Predicted classes of a text or image classifier, in batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError
from hf_fuse.perplexity import DEFAULT_WINDOW, context_length

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel

# What stands for "no class": the model gave logits that are not finite.
NOT_FINITE = -1


def predict_classes(
    model: PreTrainedModel,
    inputs: Sequence,
    encode: Callable[[list], dict[str, torch.Tensor]],
    *,
    batch_size: int = 8,
    on_scored: Callable[[int], None] | None = None,
) -> list[int]:
    """The most probable class id of every input, in order; ``NOT_FINITE`` where the logits are not finite.

    Args:
        model: returns ``logits`` of shape [batch, classes]. Left as it was (training mode included).
        inputs: whatever ``encode`` takes; read lazily.
        encode: a list of inputs -> the model's keyword arguments. See ``text_encoder`` and ``image_encoder``.
        on_scored: called after every batch with its number of inputs.
    """
    import torch

    device, was_training = next(model.parameters()).device, model.training
    predictions: list[int] = []
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(inputs, batch_size):
                arguments = {key: value.to(device) for key, value in encode(batch).items()}
                logits = model(**arguments).logits
                best = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), NOT_FINITE)
                predictions += best.tolist()
                if on_scored:
                    on_scored(len(batch))
    finally:
        model.train(was_training)
    return predictions


def text_encoder(
    tokenizer, model: PreTrainedModel, max_length: int | None = None
) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    """Tokenises with padding to the longest of a batch, cut off at ``max_length`` or the model's context."""
    context = context_length(model.config) or DEFAULT_WINDOW
    max_length = min(max_length or DEFAULT_WINDOW, context, tokenizer.model_max_length)
    accepted = inspect.signature(model.forward).parameters

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=max_length, return_tensors="pt")
        # Generic tokenizers also return token types, which many models refuse.
        return {key: value for key, value in encoded.items() if key in accepted or "input_ids" not in accepted}

    return encode


def can_pad(tokenizer, config) -> bool:
    """Whether texts can share a batch: decoders classify at the last token before the padding, so they must know it."""
    return tokenizer.pad_token_id is not None and tokenizer.pad_token_id == config.get_text_config().pad_token_id


def image_encoder(processor, model_config, dtype: torch.dtype) -> Callable[[list[Image]], dict[str, torch.Tensor]]:
    """Pixels as the model's image processor makes them. Without one (None), images are resized to the config's
    ``image_size`` and scaled to 0..1."""

    def encode(images: list[Image]) -> dict[str, torch.Tensor]:
        channels = getattr(model_config, "num_channels", 3)
        images = [image.convert("L" if channels == 1 else "RGB") for image in images]
        if processor is not None:
            return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"].to(dtype)}
        return {"pixel_values": _scaled_pixels(images, model_config).to(dtype)}

    return encode


def _scaled_pixels(images: list[Image], config) -> torch.Tensor:
    import numpy as np
    import torch

    size = getattr(config, "image_size", None)
    if size is None:
        raise FuseError(
            "the image model has neither preprocessor_config.json nor an image_size in its config, so the size of its "
            "input is not known. Add the file that was saved with the model it comes from."
        )
    height, width = (size, size) if isinstance(size, int) else size
    pixels = [np.asarray(image.resize((width, height)), dtype=np.float32) / 255 for image in images]
    arrays = [pixel[None] if pixel.ndim == 2 else pixel.transpose(2, 0, 1) for pixel in pixels]
    return torch.from_numpy(np.stack(arrays))


def _batches(inputs: Sequence, size: int) -> Iterator[list]:
    reading = iter(inputs)
    while batch := list(islice(reading, size)):
        yield batch
