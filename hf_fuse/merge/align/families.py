"""Which axes of which tensors belong together, by architecture: data only.

A tensor's axes are listed as in its stored shape. ``-`` is an axis whose order has a meaning (tokens, positions,
pixels, classes); any other word is a set of units that can be put into another order as long as every axis with that
word follows. ``<`` marks an axis that reads units which other tensors make; ``a+b`` is an axis on which units lie one
after the other, and ``|`` parts alternatives, of which the one that fits the shape holds. ``*`` in a name stands for a
layer's number, and words of such a tensor are that layer's own, except ``residual``, the stream that all layers read
and write.

``query``, ``key``, ``value`` and ``mixed`` (what the heads put together, before the output projection) are bound by
heads: whole groups of heads that share keys can change places, heads inside a group, and dimensions inside heads. Under
rotary positions the dimensions of queries and keys can't: each turns at a speed of its own.

A name stands for a weight and its bias, which lies along the first axis that is not read; ``?`` in it is any one part.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Models built alike.

    Attributes:
        title: for messages.
        models: beginnings of their classes' names.
        prefix: of the stored names of all but the head; alternatives are parted by ``|``.
        axes: see the module.
        heads, key_heads: keys of ``config.json``.
        rotary: positions are rotations of queries and keys.
        width: key of ``config.json`` with the number of units of a feed-forward layer, if there is one.
        free_heads: the heads' number does not follow from the width of the residual stream.
        fixed: tensors that are the same in every order.
    """

    title: str
    models: tuple[str, ...]
    prefix: str
    axes: dict[str, str]
    heads: str
    key_heads: str | None = None
    rotary: bool = False
    width: str | None = None
    free_heads: bool = False
    fixed: tuple[str, ...] = field(default=())


BERT = Family(
    "BERT",
    ("Bert", "Roberta"),
    "bert.|roberta.",
    {
        "embeddings.word_embeddings": "- residual",
        "embeddings.position_embeddings": "- residual",
        "embeddings.token_type_embeddings": "- residual",
        "embeddings.LayerNorm": "residual",
        "encoder.layer.*.attention.self.query": "query <residual",
        "encoder.layer.*.attention.self.key": "key <residual",
        "encoder.layer.*.attention.self.value": "value <residual",
        "encoder.layer.*.attention.output.dense": "residual <mixed",
        "encoder.layer.*.attention.output.LayerNorm": "residual",
        "encoder.layer.*.intermediate.dense": "inner <residual",
        "encoder.layer.*.output.dense": "residual <inner",
        "encoder.layer.*.output.LayerNorm": "residual",
        "pooler.dense": "pooled <residual",
        "classifier": "- <pooled",
        "cls.seq_relationship": "- <pooled",
        # The head is tied to the token embeddings, so what it reads is in the order of the residual stream.
        "cls.predictions.transform.dense": "residual <residual",
        "cls.predictions.transform.LayerNorm": "residual",
        "cls.predictions.decoder": "- <residual",
        "lm_head.dense": "residual <residual",
        "lm_head.layer_norm": "residual",
        "lm_head.decoder": "- <residual",
        "classifier.dense": "pooled <residual",
        "classifier.out_proj": "- <pooled",
    },
    heads="num_attention_heads",
    width="intermediate_size",
    fixed=("cls.predictions.bias", "lm_head.bias", "embeddings.position_ids"),
)

GPT2 = Family(
    "GPT-2",
    ("GPT2",),
    "transformer.",
    {
        "wte": "- residual",
        "wpe": "- residual",
        "h.*.ln_1": "residual",
        "h.*.attn.c_attn": "<residual query+key+value",
        "h.*.attn.c_proj": "<mixed residual",
        "h.*.ln_2": "residual",
        "h.*.mlp.c_fc": "<residual inner",
        "h.*.mlp.c_proj": "<inner residual",
        "ln_f": "residual",
        "lm_head": "- <residual",
        "score": "- <residual",
    },
    heads="n_head",
    width="n_inner",
    fixed=("h.*.attn.bias", "h.*.attn.masked_bias"),
)

LLAMA = Family(
    "Llama",
    ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Olmo2"),
    "model.",
    {
        "embed_tokens": "- residual",
        "layers.*.input_layernorm": "residual",
        "layers.*.self_attn.q_proj": "query <residual",
        "layers.*.self_attn.k_proj": "key <residual",
        "layers.*.self_attn.v_proj": "value <residual",
        "layers.*.self_attn.qkv_proj": "query+key+value <residual",
        "layers.*.self_attn.q_norm": "query | -",  # Olmo2 over all heads, Qwen3 inside each
        "layers.*.self_attn.k_norm": "key | -",
        "layers.*.self_attn.o_proj": "residual <mixed",
        "layers.*.post_attention_layernorm": "residual",
        "layers.*.pre_feedforward_layernorm": "residual",
        "layers.*.mlp.gate_proj": "inner <residual",
        "layers.*.mlp.up_proj": "inner <residual",
        "layers.*.mlp.gate_up_proj": "inner+inner <residual",
        "layers.*.mlp.down_proj": "residual <inner",
        "layers.*.post_feedforward_layernorm": "residual",
        "norm": "residual",
        "lm_head": "- <residual",
        "score": "- <residual",
    },
    heads="num_attention_heads",
    key_heads="num_key_value_heads",
    rotary=True,
    width="intermediate_size",
    free_heads=True,
    fixed=("layers.*.self_attn.rotary_emb.inv_freq",),
)

T5 = Family(
    "T5",
    ("T5", "MT5"),
    "",
    {
        "shared": "- residual",
        "encoder.embed_tokens": "- residual",
        "decoder.embed_tokens": "- residual",
        # Computed in the first layer and used in all: so their heads can only change places together.
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "- encoder.heads",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "- decoder.heads",
        "?.block.*.layer.0.SelfAttention.q": "query <residual",
        "?.block.*.layer.0.SelfAttention.k": "key <residual",
        "?.block.*.layer.0.SelfAttention.v": "value <residual",
        "?.block.*.layer.0.SelfAttention.o": "residual <mixed",
        "?.block.*.layer.0.layer_norm": "residual",
        "decoder.block.*.layer.1.EncDecAttention.q": "cross.query <residual",
        "decoder.block.*.layer.1.EncDecAttention.k": "cross.key <residual",
        "decoder.block.*.layer.1.EncDecAttention.v": "cross.value <residual",
        "decoder.block.*.layer.1.EncDecAttention.o": "residual <cross.mixed",
        "?.block.*.layer.1.layer_norm": "residual",
        "?.block.*.layer.2.layer_norm": "residual",
        "?.block.*.layer.?.DenseReluDense.wi": "inner <residual",
        "?.block.*.layer.?.DenseReluDense.wi_0": "inner <residual",
        "?.block.*.layer.?.DenseReluDense.wi_1": "inner <residual",
        "?.block.*.layer.?.DenseReluDense.wo": "residual <inner",
        "?.final_layer_norm": "residual",
        "lm_head": "- <residual",
    },
    heads="num_heads",
    width="d_ff",
    free_heads=True,
)

VIT = Family(
    "ViT",
    ("ViT", "Dinov2"),
    "vit.|dinov2.",
    {
        "embeddings.cls_token": "- - residual",
        "embeddings.mask_token": "- residual | - - residual",  # Dinov2's, ViT's
        "embeddings.position_embeddings": "- - residual",
        "embeddings.patch_embeddings.projection": "residual - - -",
        "encoder.layer.*.layernorm_before": "residual",
        "encoder.layer.*.norm1": "residual",
        "encoder.layer.*.attention.attention.query": "query <residual",
        "encoder.layer.*.attention.attention.key": "key <residual",
        "encoder.layer.*.attention.attention.value": "value <residual",
        "encoder.layer.*.attention.output.dense": "residual <mixed",
        "encoder.layer.*.layer_scale1.lambda1": "residual",
        "encoder.layer.*.layernorm_after": "residual",
        "encoder.layer.*.norm2": "residual",
        "encoder.layer.*.intermediate.dense": "inner <residual",
        "encoder.layer.*.output.dense": "residual <inner",
        "encoder.layer.*.mlp.fc1": "inner <residual",
        "encoder.layer.*.mlp.fc2": "residual <inner",
        "encoder.layer.*.mlp.weights_in": "inner+inner <residual",
        "encoder.layer.*.mlp.weights_out": "residual <inner",
        "encoder.layer.*.layer_scale2.lambda1": "residual",
        "layernorm": "residual",
        "pooler.dense": "pooled <residual",
        # Dinov2 puts the class token and the mean of the patches side by side.
        "classifier": "- <residual | - <residual+<residual",
    },
    heads="num_attention_heads",
    width="intermediate_size",
)

FAMILIES = (BERT, GPT2, LLAMA, T5, VIT)
# Ends of the classes' names. A model without a head shows the residual stream itself, whose order then has a meaning.
TASKS = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining",
    "ForSequenceClassification", "ForImageClassification",
)  # fmt: skip


def family_of(architecture: str | None) -> Family | None:
    """The family of a class, ``"MistralForCausalLM"``; None if it is in none."""
    for family in FAMILIES:
        if any(architecture == model + task for model in family.models for task in TASKS):
            return family
    return None
