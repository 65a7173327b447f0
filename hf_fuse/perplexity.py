"""Perplexity of a causal language model on texts of any length, with bounded memory.

Long texts are cut into overlapping windows. Window ``i`` begins at token ``i * stride`` and scores only the tokens that
no earlier window scored, so every token but the first of a text is scored exactly once, and all but those of the first
window have at least ``max_length - stride`` tokens of context. The aggregate is the sum of all losses over the number
of scored tokens (a mean of per-window means would favour short windows).

Shapes: B windows, L tokens per window, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Longest window chosen unasked: more context changes the figure little, and its cost grows with the square.
DEFAULT_WINDOW = 2048
# Largest block of fp32 logits held at once.
LOGIT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp(loss)``. Comparable only between models that share a tokenizer.
        loss: mean negative log-likelihood, in nats per scored token.
        tokens: number of scored tokens.
        bits_per_byte: negative log-likelihood in bits per UTF-8 byte. Comparable between tokenizers.
        bytes: UTF-8 bytes of the text that the scored tokens cover.
    """

    perplexity: float
    loss: float
    tokens: int
    bits_per_byte: float
    bytes: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class _Window:
    text: int  # number of the text that it is cut from
    ids: torch.Tensor  # [L]
    first: int  # position of the first token to score; at least 1, because position 0 has no context


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    on_scored: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``texts``, each text scored on its own.

    Neither ``batch_size`` nor padding changes the result (up to the rounding of the model's dtype).

    Args:
        model: a causal language model on any device. Left as it was (training mode included).
        tokenizer: its tokenizer, used with the special tokens it adds by itself. Where it adds no beginning-of-sequence
            token, the first token of each text has no context and is not scored.
        texts: strings; read once, lazily.
        max_length: window length in tokens; default: the model's context, at most 2048.
        stride: tokens from one window's start to the next, 1 to ``max_length - 1``; default: half of ``max_length``.
        batch_size: windows per forward pass.
        on_scored: called after every batch with the number of tokens just scored.

    Raises:
        FuseError: a text is empty, no text holds a token that can be scored, or a length is out of range.
    """
    size = _Size()
    scored = _scored(model, tokenizer, texts, max_length, stride, batch_size, size, on_scored)
    total = sum(losses_B.sum().item() for _, losses_B in scored)
    if not size.tokens:
        raise FuseError(
            f"perplexity: nothing to score in {len(size.per_text)} text(s): each needs at least two tokens, because "
            "the first one has no context. Pass longer texts."
        )
    loss = total / size.tokens
    # exp overflows a float above 709 nats; NaN stays NaN.
    value = math.inf if loss > 700 else math.exp(loss)
    return PerplexityResult(value, loss, size.tokens, total / math.log(2) / max(size.bytes, 1), size.bytes)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    on_scored: Callable[[int], None] | None = None,
) -> list[float]:
    """Mean negative log-likelihood of each text, in nats per token; NaN for a text without a token that can be scored.

    Arguments and errors as for :func:`perplexity`.
    """
    size = _Size()
    totals: dict[int, float] = {}
    for windows, losses_B in _scored(model, tokenizer, texts, max_length, stride, batch_size, size, on_scored):
        for window, loss in zip(windows, losses_B.tolist()):
            totals[window.text] = totals.get(window.text, 0.0) + loss
    return [totals.get(text, 0.0) / tokens if tokens else math.nan for text, tokens in enumerate(size.per_text)]


def _scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None,
    stride: int | None,
    batch_size: int,
    size: _Size,
    on_scored: Callable[[int], None] | None,
) -> Iterator[tuple[list[_Window], torch.Tensor]]:
    """Batches of windows with the summed loss of each, fp64 [B]; ``size`` counts what they score."""
    import torch

    max_length, stride = window_lengths(model.config, tokenizer, max_length, stride)
    if batch_size < 1:
        raise FuseError(f"batch_size is {batch_size}; expected 1 or more windows per forward pass.")
    windows = _windows(tokenizer, texts, max_length, stride, model.get_input_embeddings().weight.shape[0], size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            head = _bare_head(model)
            # Windows of similar length share a batch, so that a column of short rows is not mostly padding.
            while pool := sorted(islice(windows, 32 * batch_size), key=lambda window: len(window.ids)):
                for start in range(0, len(pool), batch_size):
                    batch = pool[start : start + batch_size]
                    yield batch, _batch_losses(model, head, batch)
                    if on_scored:
                        on_scored(sum(len(window.ids) - window.first for window in batch))
    finally:
        model.train(was_training)


@dataclass
class _Size:
    per_text: list[int] = field(default_factory=list)  # scored tokens
    bytes: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.per_text)


def window_lengths(config, tokenizer, max_length: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """The (max_length, stride) that ``perplexity`` uses for a model of this config; FuseError if they do not fit."""
    context = context_length(config)
    if max_length is None:
        # Tokenizers without a limit report a huge number.
        max_length = min(context or DEFAULT_WINDOW, tokenizer.model_max_length, DEFAULT_WINDOW)
    elif context and max_length > context:
        raise FuseError(f"max_length is {max_length}, but the model has {context} positions. Pass at most {context}.")
    if max_length < 2:
        raise FuseError(f"max_length is {max_length}; expected at least 2: one token of context and one to score.")
    if stride is None:
        stride = max(1, max_length // 2)
    if not 1 <= stride < max_length:
        raise FuseError(
            f"stride is {stride}; expected 1 to {max_length - 1} (max_length - 1), so that each window's first scored "
            "token has context."
        )
    return max_length, stride


def context_length(config) -> int | None:
    """Number of positions a model has, or None when it sets no limit (state-space models)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _windows(
    tokenizer, texts: Iterable[str], max_length: int, stride: int, vocabulary: int, size: _Size
) -> Iterator[_Window]:
    """Cuts every text into windows and counts in ``size`` what they score."""
    import torch

    for number, text in enumerate(texts):
        if not text:
            raise FuseError(f"perplexity: text {number} (counted from 0) is empty: nothing to score. Remove it.")
        # verbose=False: the warning about a text longer than the model does not apply to windows.
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        if len(ids) and int(ids.max()) >= vocabulary:
            raise FuseError(
                f"perplexity: the tokenizer gives token id {int(ids.max())} in text {number} (counted from 0), but the "
                f"model embeds ids below {vocabulary} only. Pass the tokenizer that belongs to the model."
            )
        size.per_text.append(max(len(ids) - 1, 0))
        size.bytes += len(text.encode()) - _first_token_bytes(tokenizer, ids)
        end = 1  # first token not scored yet
        for begin in range(0, len(ids), stride):
            if end >= len(ids):
                break
            window = ids[begin : begin + max_length]
            yield _Window(number, window, end - begin)
            end = begin + len(window)


def _first_token_bytes(tokenizer, ids: torch.Tensor) -> int:
    """UTF-8 bytes of the first token, which is not scored; 0 for a beginning-of-sequence token."""
    if not len(ids) or int(ids[0]) in tokenizer.all_special_ids:
        return 0
    # Part of a multi-byte character decodes to U+FFFD, which is three bytes long; the part itself is one byte.
    return len(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False).replace("\ufffd", "?").encode())


def _batch_losses(model, head: torch.nn.Module | None, batch: list[_Window]) -> torch.Tensor:
    """Summed negative log-likelihood of the tokens to score in each window, in nats, fp64 [B]."""
    import torch

    device = model.get_input_embeddings().weight.device
    longest = max(len(window.ids) for window in batch)
    ids_BL = torch.zeros(len(batch), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    scored_BL = torch.zeros(len(batch), longest, dtype=torch.bool)  # marks the position that predicts a scored token
    for row, window in enumerate(batch):
        # Padding goes to the right, where causal attention never sees it: any id will do.
        ids_BL[row, : len(window.ids)] = window.ids
        mask_BL[row, : len(window.ids)] = 1
        scored_BL[row, window.first - 1 : len(window.ids) - 1] = True
    targets_BL = ids_BL.roll(-1, dims=1)
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    if head is not None:
        hidden_BLD, _ = _one_position_through(head, model, ids_BL, mask_BL)
        losses = [_losses(head, hidden_BLD[scored_BL.to(hidden_BLD.device)], targets_BL[scored_BL])]
    else:
        # A few rows at a time: the logits are L x V per row.
        rows, losses = max(1, LOGIT_BYTES // (longest * model.config.get_text_config().vocab_size)), []
        for part in (slice(start, start + rows) for start in range(0, len(batch), rows)):
            logits_BLV = model(input_ids=ids_BL[part], attention_mask=mask_BL[part], use_cache=False).logits
            scored_logits_NV = logits_BLV[scored_BL[part].to(logits_BLV.device)]
            del logits_BLV
            losses.append(_losses(lambda logits_CV: logits_CV, scored_logits_NV, targets_BL[part][scored_BL[part]]))
    rows_N = torch.arange(len(batch)).repeat_interleave(scored_BL.sum(dim=1))
    return torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows_N, torch.cat(losses))


def _bare_head(model) -> torch.nn.Module | None:
    """The output head, if the model's logits are exactly what it returns; None if more follows it (scaling, soft cap).

    With a bare head, losses need the last hidden states [B, L, D] and a block of logits at a time; without one, the
    model has to be asked for all logits [B, L, V].
    """
    import torch

    head = model.get_output_embeddings()
    if head is None:
        return None
    ids_BL = torch.arange(2, device=model.get_input_embeddings().weight.device)[None]
    hidden_BLD, logits_B1V = _one_position_through(head, model, ids_BL, torch.ones_like(ids_BL))
    if hidden_BLD is None or hidden_BLD.shape[:2] != ids_BL.shape:
        return None
    return head if torch.equal(logits_B1V, head(hidden_BLD[:, :1]).to(logits_B1V)) else None


def _one_position_through(
    head: torch.nn.Module, model, ids_BL: torch.Tensor, mask_BL: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Runs ``model`` with only position 0 let through its head -> (what the head was given, logits [B, 1, V])."""
    given: list[torch.Tensor] = []

    def keep_first(_module, inputs):
        given.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    handle = head.register_forward_pre_hook(keep_first)
    try:
        logits_B1V = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    finally:
        handle.remove()
    return (given[0] if len(given) == 1 else None), logits_B1V


def _losses(
    head: Callable[[torch.Tensor], torch.Tensor], inputs_NX: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of each of N tokens, fp64 on the CPU; the softmax in fp32 and over a block of tokens at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    if not len(inputs_NX):
        return torch.zeros(0, dtype=torch.float64)
    vocabulary = head(inputs_NX[:1]).shape[-1]
    block = max(1, LOGIT_BYTES // (4 * vocabulary))
    found = []
    for start in range(0, len(inputs_NX), block):
        logits_CV = head(inputs_NX[start : start + block]).float()
        targets_C = targets_N[start : start + block].to(logits_CV.device)
        found.append(cross_entropy(logits_CV, targets_C, reduction="none").double().cpu())
    return torch.cat(found)
