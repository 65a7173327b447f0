"""Which experts a token uses, and with which weights.

Axes: T tokens (batch and sequence flattened), E experts, K choices per token, d hidden.
A strategy is a function of the gate's logits; its keyword-only arguments are its options. All of it is fp32: with
weights in bf16 two of them need not sum to 1, and a mixture of unchanged experts would not be the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fuse.adapters.precise_linear import precise_linear
from hf_fuse.errors import RecipeError
from hf_fuse.losses.router_entropy import normalized_entropy
from hf_fuse.registry import nearest

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "sigmoid": torch.sigmoid}


class Routes(NamedTuple):
    """Decision of a router for T tokens.

    ``weights_TE`` is what expert outputs are multiplied with, exactly 0 where an expert was not chosen;
    ``probabilities_TE`` is the softmax of ``logits_TE``, the gate's logits after activation and temperature.
    """

    weights_TE: Tensor
    probabilities_TE: Tensor
    logits_TE: Tensor
    chosen_TK: Tensor | None = None  # None where the number of experts varies from token to token
    passed_T: Tensor | None = None  # weight of the unchanged input: tokens beyond a switch's capacity


def router_logits(x_Td: Tensor, weight_Ed: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Logits in fp32 (fp64 for fp64), also under autocast, which would round them to half precision."""
    dtype = torch.promote_types(torch.promote_types(x_Td.dtype, weight_Ed.dtype), torch.float32)
    logits_TE = precise_linear(x_Td, weight_Ed, dtype)
    return logits_TE if bias_E is None else logits_TE + bias_E.to(dtype)


def jittered(x_Td: Tensor, amount: float) -> Tensor:
    """A copy of the input times uniform noise in ``[1 - amount, 1 + amount]``; for training only."""
    return x_Td * torch.empty_like(x_Td).uniform_(1 - amount, 1 + amount) if amount else x_Td


def route(
    logits_TE: Tensor,
    strategy: str = "mixlora",
    *,
    router_activation: Literal["tanh", "gelu", "sigmoid"] | None = None,
    router_temperature: float = 1.0,
    ranks: Sequence[int] | None = None,
    **options: Any,
) -> Routes:
    """Routes by the strategy of that name (see :data:`STRATEGIES`), with its options.

    Args:
        logits_TE: from :func:`router_logits`.
        strategy: a name or one of MoE-PEFT's (``mixlora``, ``mixlora-dynamic``, ``mixlora-switch``).
        router_activation: nonlinearity of the gate before the softmax; without one, a learned or annealed
            temperature makes estimation as slow as 1/log n (arXiv 2405.13997, recalled).
        router_temperature: divides the activated logits; annealed from high to low it turns dense into sparse.
        ranks: override for inference: use only the experts at these places of the token's ranking (0 is the
            likeliest), their weights normalised to 1. The third-ranked alone, ``[2]``, is SCMoE's weak routing.
        options: of the strategy; :func:`routing_options` lists them.

    Raises:
        RecipeError: no such strategy, activation or rank, or an option out of its range.
    """
    if strategy not in STRATEGIES:
        raise RecipeError(f"routing_strategy: there is no {strategy!r}. {nearest(strategy, STRATEGIES)}")
    if not router_temperature > 0:
        raise RecipeError(f"router_temperature is {router_temperature}, expected a number > 0.")
    if router_activation is not None:
        if router_activation not in _ACTIVATIONS:
            raise RecipeError(
                f"router_activation: there is no {router_activation!r}. {nearest(router_activation, _ACTIVATIONS)}"
            )
        logits_TE = _ACTIVATIONS[router_activation](logits_TE)
    if router_temperature != 1:
        logits_TE = logits_TE / router_temperature
    if ranks is not None:
        return ranked(logits_TE, ranks)
    return STRATEGIES[strategy](logits_TE, **options)


def routing_options(strategy: str) -> dict[str, Any]:
    """Names and defaults of a strategy's options."""
    parameters = inspect.signature(STRATEGIES[strategy]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def ranked(logits_TE: Tensor, ranks: Sequence[int]) -> Routes:
    """The experts at the given places of each token's ranking, weights renormalised over them."""
    experts = logits_TE.shape[-1]
    if not ranks or len({*ranks}) < len(ranks) or not all(0 <= rank < experts for rank in ranks):
        raise RecipeError(f"ranks: got {list(ranks)}, expected different numbers from 0 to {experts - 1}.")
    order_TK = logits_TE.topk(max(ranks) + 1, dim=-1).indices
    chosen_TK = torch.stack([order_TK[:, rank] for rank in ranks], dim=1)
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    # The softmax over the chosen logits: equal to p / sum of the chosen p, also where these underflow.
    weights_TE = logits_TE.masked_fill(~chosen_TE, float("-inf")).softmax(-1)
    return Routes(weights_TE, logits_TE.softmax(-1), logits_TE, chosen_TK)


def top_k(logits_TE: Tensor, *, top_k: int = 2) -> Routes:
    """The k likeliest experts, probabilities renormalised to sum 1 (Mixtral, MixLoRA arXiv 2404.15159, MoLA)."""
    experts = logits_TE.shape[-1]
    if not 1 <= top_k <= experts:
        raise RecipeError(f"top_k is {top_k}, expected 1 to num_experts = {experts}.")
    return ranked(logits_TE, range(top_k))


def dense(logits_TE: Tensor) -> Routes:
    """All experts by their probability (LoRAMoE, HydraLoRA)."""
    probabilities_TE = logits_TE.softmax(-1)
    return Routes(probabilities_TE, probabilities_TE, logits_TE)


def top_p(logits_TE: Tensor, *, top_p: float = 0.8) -> Routes:
    """The fewest experts whose probabilities sum to more than ``top_p``; weights are not renormalised."""
    probabilities_TE = logits_TE.softmax(-1)
    kept_TE = _nucleus(probabilities_TE, top_p, with_crossing=True)
    return Routes(probabilities_TE * kept_TE, probabilities_TE, logits_TE)


def tsallis(
    logits_TE: Tensor,
    *,
    top_p: float = 0.75,
    keep_top_k: int = 2,
    entropy_threshold: float = 0.9,
    entropy_index: float = 1.1,
    entropy_type: Literal["tsallis", "renyi"] = "tsallis",
) -> Routes:
    """DynMoLE (arXiv 2504.00661): undecided tokens use all experts, the others the few that they are sure of.

    A token whose entropy, scaled to [0, 1], is above ``entropy_threshold`` keeps all experts; any other the largest
    whose probabilities together stay within ``top_p`` (the one that crosses it is left out), and at least
    ``keep_top_k``. Weights are the probabilities, not renormalised.
    """
    experts = logits_TE.shape[-1]
    if not 1 <= keep_top_k <= experts:
        raise RecipeError(f"keep_top_k is {keep_top_k}, expected 1 to num_experts = {experts}.")
    probabilities_TE = logits_TE.softmax(-1)
    kept_TE = _nucleus(probabilities_TE, top_p, with_crossing=False, at_least=keep_top_k)
    entropy_T = normalized_entropy(logits_TE.detach().log_softmax(-1), entropy_index, entropy_type)
    # Rounding takes uniform tokens above 1, where the threshold may lie to keep this from happening.
    kept_TE = kept_TE | (entropy_T.clamp(max=1) > entropy_threshold).unsqueeze(-1)
    return Routes(probabilities_TE * kept_TE, probabilities_TE, logits_TE)


def switch(logits_TE: Tensor, *, capacity: int | None = None, sequence_length: int | None = None) -> Routes:
    """The likeliest expert, its output times its probability (Switch Transformer, arXiv 2101.03961).

    Args:
        logits_TE: tokens of whole sequences, one after the other.
        capacity: tokens that an expert takes from a sequence, first come first served; those beyond are passed on
            unchanged, times the probability (MoE-PEFT: 32). None: no limit, which is right outside training, as
            decoding token by token cannot count. (MoE-PEFT returns the input in evaluation, without any expert.)
        sequence_length: tokens per sequence; None: all are one sequence.
    """
    probabilities_TE = logits_TE.softmax(-1)
    highest_T, chosen_T = probabilities_TE.max(-1)
    chosen_TE = chosen_T.unsqueeze(-1) == torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    passed_T = None
    if capacity is not None:
        tokens = len(logits_TE)
        length = sequence_length or tokens
        if capacity < 1:
            raise RecipeError(f"capacity is {capacity}, expected a number of tokens >= 1, or None for no limit.")
        if tokens and tokens % length:
            raise RecipeError(f"sequence_length: {tokens} tokens are no whole number of sequences of {length}.")
        place_TE = chosen_TE.long().view(-1, length, chosen_TE.shape[1]).cumsum(1).view_as(chosen_TE)
        chosen_TE = chosen_TE & (place_TE <= capacity)
        passed_T = highest_T * ~chosen_TE.any(-1)
    return Routes(highest_T.unsqueeze(-1) * chosen_TE, probabilities_TE, logits_TE, chosen_T.unsqueeze(-1), passed_T)


def _nucleus(probabilities_TE: Tensor, top_p: float, *, with_crossing: bool, at_least: int = 1) -> Tensor:
    """Mask of the likeliest experts up to a cumulative probability, without or with the one that crosses it."""
    if not 0 <= top_p <= 1:
        raise RecipeError(f"top_p is {top_p}, expected a number in [0, 1].")
    sorted_TE, order_TE = probabilities_TE.detach().sort(dim=-1, descending=True, stable=True)
    reached_TE = sorted_TE.cumsum(-1)
    if with_crossing:
        reached_TE = reached_TE - sorted_TE
    # A sum of probabilities may round to more than 1.
    kept_TE = reached_TE <= (top_p if top_p < 1 else float("inf"))
    kept_TE[:, :at_least] = True
    return torch.zeros_like(kept_TE).scatter(-1, order_TE, kept_TE)


STRATEGIES: dict[str, Callable[..., Routes]] = {
    "top_k": top_k,
    "dense": dense,
    "top_p": top_p,
    "tsallis": tsallis,
    "switch": switch,
    "mixlora": top_k,
    "mixlora-dynamic": top_p,
    "mixlora-switch": switch,
    "mola": top_k,
    "loramoe": dense,
    "hydralora": dense,
    "dynmole": tsallis,
}
