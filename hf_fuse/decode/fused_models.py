"""Several causal language models that generate as one: their logits are fused before anything else sees them.

Temperature, penalties, top-p and whatever else ``generate()`` does to logits come after the fusion, and beam search
gets the fusion's normalised probabilities. A logits processor could not do that: ``generate()`` calls those that a user
passes after its own, and doesn't tell them which beams go on.

B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fuse.decode.vocabularies import plain_model, shared_vocabulary
from hf_fuse.errors import FuseError

Fusion = Callable[[list[Tensor]], Tensor]
# Arguments of generate() that make no sense for several models.
REFUSED = {
    "assistant_model": "assisted decoding rolls the cache back",
    "prompt_lookup_num_tokens": "prompt lookup rolls the cache back",
    "assistant_early_exit": "assisted decoding rolls the cache back",
    "cache_implementation": "each model keeps its own default cache",
    "inputs_embeds": "each model has embeddings of its own (give input_ids)",
    "output_attentions": "there are several",
    "output_hidden_states": "there are several",
}


class FusedCache:
    """The caches of all models, in their order. Each model makes its own in its first forward pass."""

    is_compileable = False
    is_croppable = False

    def __init__(self, models: int) -> None:
        self.caches: list[Any] = [None] * models

    def get_seq_length(self) -> int:
        return 0 if self.caches[0] is None else self.caches[0].get_seq_length()

    def reorder_cache(self, beams: Tensor) -> None:
        for cache in self.caches:
            cache.reorder_cache(beams)


class FusedModels(nn.Module, GenerationMixin):
    """Causal language models with one tokenizer, whose fused logits are one model's.

    Whatever works with a model's forward pass or ``generate()`` works with it: batches (padded on the left, as always),
    sampling, beam search, streamers. Each model keeps its own key-value cache, so each token costs one forward pass of
    one position per model. Attributes that it doesn't have are the first model's (``config``, ``device``, ...).

    Args:
        models: the first one's config and generation config count. A model may be there twice.
        fuse: gets each model's logits ``(B, S, V)``, cut to the vocabulary that all models have, in fp32 on the first
            model's device; returns fused ones.
        contexts: entered around each model's forward pass, to change what it does there.

    Raises:
        FuseError: models of another kind, or with different tokenizers.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        fuse: Fusion,
        contexts: Sequence[Callable[[], AbstractContextManager]] | None = None,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.fuse = fuse
        self.contexts = contexts or [nullcontext] * len(models)
        self.vocabulary = shared_vocabulary(models)
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.generation_config.cache_implementation = None  # some checkpoints ask for one that suits a single model
        self.accepted = [set(inspect.signature(plain_model(model).forward).parameters) for model in models]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("models")[0], name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Fused logits ``(B, S, V)`` in fp32, or of the last ``logits_to_keep`` positions.

        Entries beyond the shared vocabulary are -inf: rows of padding that no token stands for.
        """
        if past_key_values is None and use_cache:
            past_key_values = FusedCache(len(self.models))
        if past_key_values is not None and not isinstance(past_key_values, FusedCache):
            raise FuseError(
                f"past_key_values is a {type(past_key_values).__name__}, which is the cache of one model. Leave it "
                "out, or pass one that an earlier generate() of these fused models has returned."
            )
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"use_cache": past_key_values is not None, "logits_to_keep": logits_to_keep, **kwargs}
        logits = []
        for number, model in enumerate(self.models):
            own = {name: _on(model, value) for name, value in given.items() if name in self.accepted[number]}
            own["return_dict"] = True
            if past_key_values is not None:
                own["past_key_values"] = past_key_values.caches[number]
            with self.contexts[number]():
                outputs = model(**own)
            if past_key_values is not None:
                past_key_values.caches[number] = outputs.past_key_values
            if number == 0:
                padding = outputs.logits.shape[-1] - self.vocabulary
            # Not all models know logits_to_keep; 0 keeps all.
            logits.append(outputs.logits[:, -logits_to_keep:, : self.vocabulary].to(self.device, torch.float32))
        fused_BSV = F.pad(self.fuse(logits), (0, padding), value=-torch.inf)
        return CausalLMOutputWithPast(logits=fused_BSV, past_key_values=past_key_values)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As ``generate()`` of transformers.

        Raises:
            FuseError: a way of decoding that several models can't do together.
        """
        settings = generation_config or self.generation_config
        for name, reason in REFUSED.items():
            said = kwargs.get(name, getattr(settings, name, None))
            if said is not None and said is not False:
                raise FuseError(f"{name}: not possible with fused models, because {reason}. Leave it out.")
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", settings.use_cache) is not False:
            kwargs["past_key_values"] = FusedCache(len(self.models))
        return super().generate(inputs, generation_config, **kwargs)

    def get_output_embeddings(self) -> None:
        """None: fused logits are not what one layer returns."""

    @staticmethod
    def _reorder_cache(cache: FusedCache, beams: Tensor) -> FusedCache:
        # Some models have a method of this name for their own cache, which would be found instead.
        cache.reorder_cache(beams)
        return cache


def _on(model: nn.Module, value: Any) -> Any:
    return value.to(model.device) if isinstance(value, Tensor) else value
