"""Tiny model families on disk: a base and fine-tunes of it, for tests that merge real folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "tree", "house", "soon"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
VOCABULARY = 32  # rows of the embedding: a few more than tokens, as in most real models
WIDTH, LAYERS, HEADS = 16, 3, 4

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu",
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Folders of a base and its fine-tunes."""

    base: Path
    tuned: list[Path]

    @property
    def all(self) -> list[Path]:
        return [self.base, *self.tuned]


def llama_shapes(*, layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY) -> dict[str, tuple]:
    """Names and shapes as ``LlamaForCausalLM`` has them."""
    inner = width * 3 // 2
    shapes: dict[str, tuple] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "mlp.down_proj.weight": (width, inner),
            prefix + "mlp.gate_proj.weight": (inner, width),
            prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "self_attn.k_proj.weight": (width // 2, width),
            prefix + "self_attn.o_proj.weight": (width, width),
            prefix + "self_attn.q_proj.weight": (width, width),
            prefix + "self_attn.v_proj.weight": (width // 2, width),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, Tensor]:
    random = seeded(seed)
    return {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}


def changed(state: dict[str, Tensor], seed: int, scale: float = 0.02) -> dict[str, Tensor]:
    """A fine-tune: every float moved a little, everything else as it was."""
    random = seeded(1000 + seed)
    return {
        name: (value + scale * torch.randn(value.shape, generator=random)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in state.items()
    }


def save_weights(folder: Path, state: dict[str, Tensor], shards: int = 1) -> None:
    """safetensors as the library writes them, with an index if there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def save_tokenizer(folder: Path, words: list[str] = WORDS, added: list[str] | None = None) -> None:
    """A word-level tokenizer; ids follow the order of ``words``, then of ``added`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(added or [])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "<pad>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_llama(
    folder: Path,
    state: dict[str, Tensor],
    *,
    shards: int = 1,
    tokenizer: bool = True,
    words: list[str] = WORDS,
    **config: Any,
) -> Path:
    save_weights(folder, state, shards)
    (folder / "config.json").write_text(json.dumps(LLAMA | config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if tokenizer:
        save_tokenizer(folder, words)
    return folder


def llama_family(
    folder: Path,
    *,
    models: int = 3,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
) -> Family:
    """Built without transformers, in milliseconds."""
    base = random_state(llama_shapes(layers=layers, width=width, vocabulary=vocabulary))
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width * 3 // 2,
        "vocab_size": vocabulary, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    folders = []
    for number in range(models + 1):
        state = changed(base, number) if number else base
        state = {name: value.to(dtype) for name, value in state.items()}
        path = folder / (f"tuned-{number}" if number else "base")
        folders.append(save_llama(path, state, shards=shards, **config))
    return Family(folders[0], folders[1:])


def _architectures() -> dict[str, Callable[[], Any]]:
    """Tiny random models of several kinds, by transformers itself."""
    import transformers as t

    text = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    encoder = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    }  # fmt: skip
    image = {"image_size": 8, "patch_size": 4}

    def llama(tied: bool = False) -> Any:
        settings = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type", "dtype")}
        return t.LlamaForCausalLM(t.LlamaConfig(**settings | {"tie_word_embeddings": tied}))

    def gpt2() -> Any:
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32, **text))

    def bert() -> Any:
        return t.BertForMaskedLM(t.BertConfig(**text, **encoder, max_position_embeddings=32))

    def t5() -> Any:
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=HEADS)
        )

    def vit() -> Any:
        return t.ViTForImageClassification(t.ViTConfig(**encoder, **image, num_labels=5))

    def clip() -> Any:
        words = t.CLIPTextConfig(**text, **encoder, max_position_embeddings=16, projection_dim=8)
        pictures = t.CLIPVisionConfig(**encoder, **image, projection_dim=8)
        return t.CLIPModel(t.CLIPConfig(text_config=words, vision_config=pictures, projection_dim=8))

    return {"llama": llama, "llama_tied": lambda: llama(True), "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit,
            "clip": clip}  # fmt: skip


ARCHITECTURES = ("llama", "llama_tied", "gpt2", "bert", "t5", "vit", "clip")


def transformers_family(kind: str, folder: Path, models: int = 2) -> Family:
    """A base of one of ``ARCHITECTURES`` and fine-tunes, written by ``save_pretrained``."""
    torch.manual_seed(0)
    model = _architectures()[kind]()
    folders = []
    for number in range(models + 1):
        if number:
            random = seeded(number)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
        folders.append(folder / (f"tuned-{number}" if number else "base"))
        model.save_pretrained(folders[-1])
    return Family(folders[0], folders[1:])


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> content hash, for everything below ``folder``; ``folder`` need not exist."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }
