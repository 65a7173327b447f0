"""A model behind another one's tokenizer: it reads the text that the other's tokens stand for and predicts its tokens.

B sequences, S positions, V the other's vocabulary, U its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicLayer, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fuse.decode.vocabularies import check_decoder, named
from hf_fuse.distill.vocabulary_map import Kind, vocabulary_map
from hf_fuse.errors import FuseError

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what tokens that end within a character are decoded to


@dataclass
class Row:
    """What the model has read of one sequence.

    Attributes:
        theirs: token ids of the other model.
        own: the same text's, of which the last has been read too.
        cache: of ``own``.
        logits_V: the prediction behind ``own``.
    """

    theirs: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    cache: Any = None
    logits_V: Tensor | None = None


class TextCache:
    """One row per sequence: texts of equal length in one tokenizer's tokens differ in another's."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def get_seq_length(self) -> int:
        return len(self.rows[0].theirs)

    def reorder_cache(self, beams: Tensor) -> None:
        self.rows = [copy.deepcopy(self.rows[beam]) for beam in beams.tolist()]


class TranslatedModel(nn.Module):
    """To be fused with the model whose tokenizer it speaks (see :class:`hf_fuse.decode.FusedModels`).

    Each new token is read as text: tokens at the end that the new text has changed are forgotten, and the model goes on
    from there, one sequence at a time. Its prediction of its own tokens is handed on to the tokens that stand for
    them; what has no partner has no say. Special tokens count as no text, so prompts are best plain ones.

    Args:
        model: the model.
        tokenizer: its own.
        other: the model whose token ids come in and go out.
        other_tokenizer: that one's.
        kind: how tokens find their partners, see :func:`hf_fuse.distill.vocabulary_map.vocabulary_map`.

    Raises:
        FuseError: no decoder-only model, or tokenizers that don't tell what their tokens stand for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        other: nn.Module,
        other_tokenizer: PreTrainedTokenizerBase,
        kind: Kind,
    ) -> None:
        super().__init__()
        check_decoder(model)
        self.model, self.tokenizer, self.other_tokenizer = model, tokenizer, other_tokenizer
        self.config = other.config
        partners_U = vocabulary_map(tokenizer, other_tokenizer, kind).ids_V
        self.register_buffer("known_U", (partners_U >= 0).nonzero().squeeze(1).to(model.device), persistent=False)
        self.register_buffer("partners_U", partners_U.to(model.device)[self.known_U], persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def can_generate(self) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, 1, V)`` behind the last position.

        Raises:
            FuseError: predictions of other positions are asked for, which the tokenizers don't share.
        """
        if logits_to_keep != 1 and input_ids.shape[1] > 1:
            raise FuseError(
                f"{named(self.model)}: has another tokenizer, so it has no prediction for every position of the first "
                "model. It can only generate."
            )
        cache = past_key_values or TextCache([Row() for _ in input_ids])
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        for row, ids_S, mask_S in zip(cache.rows, input_ids, mask_BS):
            row.theirs += ids_S[mask_S.bool()].tolist()
            self._read(row)
        logits_B1V = torch.stack([row.logits_V for row in cache.rows]).unsqueeze(1)
        return CausalLMOutputWithPast(logits=logits_B1V, past_key_values=cache)

    def _read(self, row: Row) -> None:
        text = self.other_tokenizer.decode(
            row.theirs, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).rstrip(BROKEN)
        own = self.tokenizer(text, verbose=False)["input_ids"] or [self._start()]
        if own == row.own:
            return  # nothing but a part of a character, or a special token
        same = next((n for n, (old, new) in enumerate(zip(row.own, own)) if old != new), min(len(row.own), len(own)))
        kept = min(same, len(own) - 1)  # the last token is read anew, for its prediction
        if kept < len(row.own):
            if all(type(layer) is DynamicLayer for layer in row.cache.layers):
                row.cache.crop(kept - len(row.own))
            else:
                row.cache, kept = None, 0  # what a window or a state has forgotten can't be brought back
        outputs = self.model(
            input_ids=torch.tensor([own[kept:]], device=self.device), past_key_values=row.cache, use_cache=True
        )
        row.own, row.cache = own, outputs.past_key_values
        log_p_U = outputs.logits[0, -1].float().log_softmax(-1)[self.known_U]
        row.logits_V = self._handed_on(log_p_U)

    def _handed_on(self, log_p_U: Tensor) -> Tensor:
        """Logarithms of the sums of probabilities, -inf for tokens that stand for none of the model's."""
        size = self.config.get_text_config().vocab_size
        p_V = torch.zeros(size, device=log_p_U.device, dtype=torch.float64)
        return p_V.index_add_(0, self.partners_U, log_p_U.double().exp()).log().float()

    def _start(self) -> int:
        for number in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if number is not None:
                return number
        raise FuseError(f"{named(self.model)}: there is no text yet to go on from. Give a prompt.")
