"""A family of Llama-like checkpoints for measurements: a base and fine-tunes of it, random, statistics realistic."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class FamilySize:
    """The dimensions of a Llama-like family; the defaults give 501.0 million parameters."""

    layers: int = 16
    hidden: int = 1536
    intermediate: int = 4096
    heads: int = 12
    kv_heads: int = 4
    vocab: int = 32_000
    shards: int = 3
    models: int = 3
    seed: int = 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, as ``LlamaForCausalLM`` names them."""
        head = self.hidden // self.heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm.weight": (self.hidden,),
                prefix + "self_attn.q_proj.weight": (self.heads * head, self.hidden),
                prefix + "self_attn.k_proj.weight": (self.kv_heads * head, self.hidden),
                prefix + "self_attn.v_proj.weight": (self.kv_heads * head, self.hidden),
                prefix + "self_attn.o_proj.weight": (self.hidden, self.heads * head),
                prefix + "post_attention_layernorm.weight": (self.hidden,),
                prefix + "mlp.gate_proj.weight": (self.intermediate, self.hidden),
                prefix + "mlp.up_proj.weight": (self.intermediate, self.hidden),
                prefix + "mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in self.tensors().values())

    @property
    def nbytes(self) -> int:
        """Of one checkpoint in bf16."""
        return 2 * self.parameters

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
        }  # fmt: skip


def build_family(size: FamilySize, folder: Path) -> list[Path]:
    """Writes ``base`` and ``tuned-1..n`` into ``folder``, a few MB in memory at a time; kept if already there.

    Fine-tune = base + a change of about 1 % of the weights' size, larger in later layers, partly shared among the
    fine-tunes: a few steps of bf16 per weight, so rounding shows, and the angles between changes are those of related
    tasks.
    """
    import numpy as np
    import torch

    from hf_fuse.checkpoint.writer import lay_out

    folders = [folder / "base", *(folder / f"tuned-{number}" for number in range(1, size.models + 1))]
    done = folder / "family.json"
    if done.is_file() and json.loads(done.read_text()) == asdict(size):
        return folders
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    shapes = size.tensors()
    largest = max(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    # Shards are closed before they would exceed the limit: half of the largest tensor as slack keeps their number.
    layout = lay_out(
        ((name, "BF16", shape) for name, shape in shapes.items()), size.nbytes // size.shards + largest // 2
    )
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, size.vocab))]
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": word, **plain} for number, word in enumerate(words[:3])],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    for path in folders:
        for file, header in layout.headers.items():
            (path / file).write_bytes(header)
            os.truncate(path / file, layout.sizes[file])
        if layout.index:
            (path / "model.safetensors.index.json").write_bytes(layout.index)
        (path / "config.json").write_text(json.dumps(size.config(), indent=2))
        (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
        )

    def fill(position: int, name: str, shape: tuple[int, ...]) -> None:
        place, norm = layout.places[name], len(shape) == 1
        streams = [np.random.Generator(np.random.SFC64([size.seed, position, k])) for k in range(size.models + 2)]
        depth = int(name.split(".")[2]) / size.layers if ".layers." in name else 0.5
        spread, change = (0.1 if norm else 0.02), 0.0002 * (0.5 + depth)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((path / place.file).open("r+b")) for path in folders]
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            for first in range(0, count, CHUNK_ELEMENTS):
                n = min(CHUNK_ELEMENTS, count - first)
                base, shared, *own = (torch.from_numpy(s.standard_normal(n, dtype=np.float32)) for s in streams)
                base.mul_(spread).add_(1.0 if norm else 0.0)
                shared.mul_(0.6 * change)
                values = [base, *(part.mul_(0.8 * change).add_(shared).add_(base) for part in own)]
                for file, value in zip(files, values):
                    file.seek(place.start + 2 * first)
                    file.write(value.to(torch.bfloat16).view(torch.int16).numpy())

    with ThreadPoolExecutor(2) as pool:
        largest_first = sorted(enumerate(shapes.items()), key=lambda entry: entry[1][1], reverse=True)
        list(pool.map(lambda entry: fill(entry[0], *entry[1]), largest_first))
    done.write_text(json.dumps(asdict(size)))
    return folders
