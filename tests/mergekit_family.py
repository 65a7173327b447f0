"""A family of tiny Llama checkpoints on disk for the tests of mergekit's YAML, and what merges of them are held to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_fuse

LAYERS, WIDTH, VOCABULARY = 4, 8, 12
State = dict[str, Tensor]


def names_of(layers: int, head: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (WIDTH,),
            f"model.layers.{i}.self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"model.layers.{i}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"model.layers.{i}.mlp.up_proj.weight": (2 * WIDTH, WIDTH),
        }
    shapes["model.norm.weight"] = (WIDTH,)
    return shapes | ({"lm_head.weight": (VOCABULARY, WIDTH)} if head else {})


def write(
    folder: Path,
    state: State,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> State:
    folder.mkdir(parents=True)
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": vocabulary,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in state), "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {name: tensor.double() for name, tensor in stored.items()}


def write_family(root: Path) -> tuple[Path, dict[str, State]]:
    """Folder and fp64 states of a base, three models near it and one that has nothing to do with it."""
    random = torch.Generator().manual_seed(7)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=random)

    base = {name: noise(shape) for name, shape in names_of(LAYERS).items()}
    states = {"base": base, "far": {name: noise(t.shape) for name, t in base.items()}}
    for key in "abc":
        states[key] = {name: t + 0.3 * noise(t.shape) for name, t in base.items()}
    return root, {key: write(root / key, state) for key, state in states.items()}


def merged(tmp_path: Path, root: Path, text: str) -> State:
    """The tensors that a file gives; ``ROOT`` in it stands for the family's folder."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "merge.yml"
    path.write_text(text.replace("ROOT", str(root)))
    output = hf_fuse.merge(path, output=tmp_path / "merged")
    return load_file(output / "model.safetensors")


def check(result: State, expected: State) -> None:
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name].double(), tensor, rtol=2e-6, atol=2e-6, msg=name)


def depth(name: str, layers: int = LAYERS) -> float:
    return int(name.split(".")[2]) / (layers - 1) if ".layers." in name else 0.0


def along(values: list[float], t: float) -> float:
    position = t * (len(values) - 1)
    left = min(int(position), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (position - left)
