"""Features of texts and images from an encoder of transformers, as a step of a scikit-learn pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from hf_fuse.checkpoint.tokenizer import tokenizer_files
from hf_fuse.errors import FuseError
from hf_fuse.heads.head import InputError
from hf_fuse.heads.saved import BaseEstimator
from hf_fuse.model_features import classifier_inputs, sample_features
from hf_fuse.perplexity import context_length

# After `saved`, which says what to install where scikit-learn is missing.
from sklearn.base import TransformerMixin  # isort: skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 512  # tokens of a text, unless said otherwise


class EncoderFeatures(TransformerMixin, BaseEstimator):
    """Texts or images in, one vector per sample out: ``make_pipeline(EncoderFeatures(model), NearestMean())``.

    Of a classifier of whole samples, the features are what its last layer takes; of any other model, the mean of the
    last hidden state over the attention mask. The model is used as it is and never trained.

    Args:
        model: folder, Hub id or a live model. Folders are loaded as the class in their config.
        processor: tokenizer or image processor; default: the model's own.
        batch_size: samples per forward pass.
        max_length: in tokens; longer texts are cut off. Default: the model's context, at most 512.
        device: of a model that is loaded.
        tokens: all of the last hidden states ``(N, T, D)`` instead of one vector, for MomentProbing; padding is NaN.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        processor: Any = None,
        batch_size: int = 32,
        max_length: int | None = None,
        device: str = "cpu",
        tokens: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device
        self.tokens = tokens

    def fit(self, X: Any = None, y: Any = None) -> EncoderFeatures:
        """Nothing to learn."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @torch.no_grad()
    def transform(self, X: Sequence) -> np.ndarray:
        """Features ``(N, D)``, fp32 (``tokens``: ``(N, T, D)``, T of the longest sample).

        Args:
            X: texts, or images (PIL, or arrays as the image processor takes them).

        Raises:
            FuseError: no samples, no such model, or one without a tokenizer or image processor.
        """
        samples = list(X) if not isinstance(X, str) else []
        if not samples:
            raise InputError("X is empty or one text: there is nothing to take features of. Give a list of samples.")
        model, processor = self._live()
        was_training = model.training
        model.eval()
        try:
            rows = []
            for start in tqdm(range(0, len(samples), self.batch_size), desc="features", unit="batch", disable=None):
                rows.append(self._batch(model, processor, samples[start : start + self.batch_size]))
        finally:
            model.train(was_training)
        if self.tokens:
            longest = max(states.shape[1] for states in rows)
            wide = [(0, 0), (0, 0), (0, 0)]
            rows = [np.pad(s, [wide[0], (0, longest - s.shape[1]), wide[2]], constant_values=np.nan) for s in rows]
        return np.concatenate(rows)

    def _batch(self, model: PreTrainedModel, processor: Any, samples: list) -> np.ndarray:
        if isinstance(samples[0], str):
            limit = self.max_length or min(context_length(model.config) or LONGEST, processor.model_max_length, LONGEST)
            # Without a token to pad with, texts are read one by one, and the features joined.
            if processor.pad_token is None and len(samples) > 1:
                if self.tokens:
                    raise FuseError(f"{type(processor).__name__}: has no pad_token, which features of tokens need.")
                return np.concatenate([self._batch(model, processor, [sample]) for sample in samples])
            inputs = processor(
                samples, padding=len(samples) > 1, truncation=True, max_length=limit, return_tensors="pt"
            )
            if not inputs["input_ids"].numel():
                raise InputError("X holds texts without any token. Leave them out.")
        else:
            inputs = processor(samples, return_tensors="pt")
        inputs = {name: values.to(model.device) for name, values in inputs.items()}
        with classifier_inputs(model) as seen:
            outputs = model(**inputs, output_hidden_states=True)
        if not self.tokens:
            return sample_features(model, inputs, outputs, seen).float().cpu().numpy()
        states_BTD = outputs.hidden_states[-1]
        if states_BTD.dim() != 3:
            raise FuseError(f"{type(model).__name__}: its hidden states are no sequence of tokens.")
        mask_BT = inputs.get("attention_mask", torch.ones(states_BTD.shape[:2], device=states_BTD.device))
        return states_BTD.float().masked_fill(mask_BT[..., None] == 0, torch.nan).cpu().numpy()

    def _live(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoTokenizer

        model = self.model
        if isinstance(model, (str, Path)):
            if getattr(self, "_loaded", (None,))[0] != str(model):
                self._loaded = (str(model), _load(str(model)))
            model = self._loaded[1].to(self.device)
        if self.processor is not None:
            return model, self.processor
        source = model.name_or_path
        if getattr(self, "_processor", (None,))[0] != source:
            pixels = model.main_input_name == "pixel_values"
            if Path(source).is_dir() and not tokenizer_files(Path(source)):
                # transformers would make an empty tokenizer up.
                raise FuseError(f"{source}: holds neither a tokenizer nor an image processor. Pass one as processor.")
            try:
                found = (AutoImageProcessor if pixels else AutoTokenizer).from_pretrained(
                    source, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                kind = "image processor" if pixels else "tokenizer"
                reason = str(error).strip().split("\n")[0].rstrip(".")
                raise FuseError(f"{source}: its {kind} can't be loaded ({reason}). Pass one as processor.") from None
            self._processor = (source, found)
        return model, self._processor[1]

    def __getstate__(self) -> dict[str, Any]:
        # The live model is not part of what scikit-learn copies or stores.
        return {name: value for name, value in super().__getstate__().items() if name not in ("_loaded", "_processor")}


def _load(source: str) -> PreTrainedModel:
    """The model as the class that its config names; never runs code of the repository, never reads pickles."""
    import transformers

    from hf_fuse.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(source)
    kind = getattr(transformers, checkpoint.architecture or "", transformers.AutoModel)
    return kind.from_pretrained(checkpoint.folder, use_safetensors=True, trust_remote_code=False, local_files_only=True)
