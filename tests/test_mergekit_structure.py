"""Slices, filters, types, tied weights and vocabularies of mergekit files, in the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mergekit_family import VOCABULARY, WIDTH, State, check, merged, names_of, write, write_family

import hf_fuse
from hf_fuse.errors import FuseError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    return write_family(tmp_path_factory.mktemp("family"))


def test_one_layer_slices_are_at_the_end_of_a_gradient(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: linear
        slices:
          - sources: [{model: ROOT/a, layer_range: [2, 3]}, {model: ROOT/b, layer_range: [0, 1]}]
          - sources:
              - {model: ROOT/a, layer_range: [0, 2]}
              - {model: ROOT/b, layer_range: [1, 3], parameters: {weight: 4}}
            parameters: {weight: [0.5, 0.7]}
        parameters: {weight: [1, 2], normalize: false}
    """,
    )
    weights = {0: (2, 2, 2, 0), 1: (0.5, 4, 0, 1), 2: (0.7, 4, 1, 2)}  # of a and b, their layers
    for layer, (wa, wb, la, lb) in weights.items():
        for part in ("self_attn.q_proj", "input_layernorm"):
            a, b = (m[k][f"model.layers.{i}.{part}.weight"] for k, i in (("a", la), ("b", lb)))
            torch.testing.assert_close(
                result[f"model.layers.{layer}.{part}.weight"].double(), wa * a + wb * b, rtol=2e-6, atol=2e-6
            )
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(result[embedding].double(), m["a"][embedding] + m["b"][embedding], rtol=2e-6, atol=2e-6)
    assert json.loads((tmp_path / "merged/config.json").read_text())["num_hidden_layers"] == 3


def test_base_layers_of_a_slice_are_those_it_is_listed_with(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: task_arithmetic
        base_model: ROOT/base
        slices:
          - sources:
              - {model: ROOT/a, layer_range: [1, 3], parameters: {weight: 0.5}}
              - {model: ROOT/base, layer_range: [0, 2]}
              - {model: ROOT/b, layer_range: [2, 4]}
        parameters: {weight: 2}
    """,
    )
    for layer in (0, 1):
        name = "model.layers.{}.mlp.up_proj.weight"
        base = m["base"][name.format(layer)]
        a, b = m["a"][name.format(layer + 1)], m["b"][name.format(layer + 2)]
        expected = base + 0.5 * (a - base) + 2 * (b - base)
        torch.testing.assert_close(result[name.format(layer)].double(), expected, rtol=2e-6, atol=2e-6)


def test_stack_of_overlapping_layers_with_scale(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: passthrough
        slices:
          - sources: [{model: ROOT/a, layer_range: [0, 3]}]
          - sources:
              - model: ROOT/b
                layer_range: [1, 4]
                parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: up_proj, value: 0.5}, {value: 1.0}]}
        dtype: float32
    """,
    )
    assert sum("q_proj" in name for name in result) == 6
    for layer, (key, source) in enumerate([*(("a", i) for i in range(3)), *(("b", i) for i in range(1, 4))]):
        for part, scale in (("self_attn.o_proj", 0.0), ("mlp.up_proj", 0.5), ("self_attn.q_proj", 1.0)):
            expected = m[key][f"model.layers.{source}.{part}.weight"] * (scale if key == "b" else 1.0)
            assert torch.equal(result[f"model.layers.{layer}.{part}.weight"].double(), expected)
    assert torch.equal(result["model.embed_tokens.weight"].double(), m["a"]["model.embed_tokens.weight"])


def test_tied_weights_are_merged_once(tmp_path: Path):
    random = torch.Generator().manual_seed(3)
    states = {}
    for key in ("base", "a"):
        state = {name: torch.randn(shape, generator=random) for name, shape in names_of(2, head=False).items()}
        states[key] = write(tmp_path / key, state, tied=True)
    result = merged(
        tmp_path,
        tmp_path,
        """
        merge_method: task_arithmetic
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 0.5}}]
    """,
    )
    check(result, {name: (base + states["a"][name]) / 2 for name, base in states["base"].items()})


def test_dtype_is_the_outputs_and_the_result_is_rounded_once(tmp_path: Path):
    random = torch.Generator().manual_seed(4)
    states = {
        key: write(tmp_path / key, {n: torch.randn(s, generator=random) for n, s in names_of(1).items()},
                   dtype=torch.bfloat16)
        for key in "ab"
    }  # fmt: skip
    result = merged(
        tmp_path,
        tmp_path,
        """
        merge_method: linear
        models: [{model: ROOT/a, parameters: {weight: 3}}, {model: ROOT/b, parameters: {weight: 1}}]
        dtype: bfloat16
    """,
    )
    for name, a in states["a"].items():
        assert torch.equal(result[name], (0.75 * a + 0.25 * states["b"][name]).bfloat16()), name


def test_a_tensor_that_no_filter_gives_a_weight_stops(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    text = """
        merge_method: linear
        models: [{model: ROOT/a, parameters: {weight: [{filter: layers, value: 2}, {filter: norm, value: 1}REST]}}]
    """
    with pytest.raises(FuseError, match=r"\.weight\): weight is 'given by no filter'"):
        merged(tmp_path, root, text.replace("REST", ""))
    check(merged(tmp_path, root, text.replace("REST", ", {filter: embed, value: 1}, {filter: head, value: 1}")), m["a"])


def test_the_resolved_recipe_gives_the_same_bytes(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, _ = family
    merged(
        tmp_path,
        root,
        """
        merge_method: dare_ties
        base_model: ROOT/base
        slices:
          - sources:
              - {model: ROOT/base, layer_range: [0, 3]}
              - {model: ROOT/a, layer_range: [1, 4], parameters: {weight: [{filter: mlp, value: [0.1, 1]}, {value: 2}]}}
        parameters: {density: 0.6}
        seed: 11
    """,
    )
    first = tmp_path / "merged"
    again = hf_fuse.merge(first / "fuse_recipe.yaml", output=tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def add_tokenizer(folder: Path, tokens: list[str]) -> None:
    """Words ``w0`` to ``w11`` and the given added tokens after them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_union_of_tokenizers_with_a_token_override_and_padding(tmp_path: Path):
    random = torch.Generator().manual_seed(5)
    states = {}
    for key, tokens in (("base", []), ("a", ["<x>", "<y>"]), ("b", ["<y>"])):
        shapes = names_of(1)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            shapes[name] = (VOCABULARY + len(tokens), WIDTH)
        state = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        states[key] = write(tmp_path / key, state, vocabulary=VOCABULARY + len(tokens))
        add_tokenizer(tmp_path / key, tokens)
    result = merged(
        tmp_path,
        tmp_path,
        """
        merge_method: linear
        models: [{model: ROOT/a, parameters: {weight: 1}}, {model: ROOT/b, parameters: {weight: 3}}]
        base_model: ROOT/base
        parameters: {weight: 4}
        tokenizer:
          source: union
          tokens: {<y>: {source: {kind: model_token, model: ROOT/base, token: w3}, force: true}}
          pad_to_multiple_of: 8
    """,
    )
    made = json.loads((tmp_path / "merged/tokenizer.json").read_text())
    ids = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    assert len(ids) == VOCABULARY + 2
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == VOCABULARY + 4
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base, a, b = (states[key][name] for key in ("base", "a", "b"))
        expected = {f"w{i}": (a[i] + 3 * b[i] + 4 * base[i]) / 8 for i in range(VOCABULARY)}
        expected |= {"<x>": a[VOCABULARY], "<y>": base[3]}  # the only owner's row; the forced one
        for token, row in expected.items():
            torch.testing.assert_close(result[name][ids[token]].double(), row, rtol=2e-6, atol=2e-6, msg=token)
        mean = result[name][: VOCABULARY + 2].mean(0).expand(2, WIDTH)  # rows of padding, as mergekit has them
        torch.testing.assert_close(result[name][VOCABULARY + 2 :], mean, rtol=2e-6, atol=2e-6)


def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last(
    tmp_path: Path, family: tuple[Path, dict[str, State]]
):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: passthrough
        slices:
          - sources: [{model: ROOT/a, layer_range: [0, 2]}]
          - sources: [{model: ROOT/b, layer_range: [1, 2]}]
          - sources: [{model: ROOT/c, layer_range: [3, 4], parameters: {scale: [{filter: lm_head, value: 2}]}}]
        """,
    )
    for name, expected in {
        "model.embed_tokens.weight": m["a"]["model.embed_tokens.weight"],
        "model.norm.weight": m["c"]["model.norm.weight"],
        "lm_head.weight": 2 * m["c"]["lm_head.weight"],
    }.items():
        assert torch.equal(result[name].double(), expected), name


def test_filters_of_a_models_own_parameters_see_the_names_it_has(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: passthrough
        slices:
          - sources: [{model: ROOT/a, layer_range: [2, 4]}]
          - sources: [{model: ROOT/a, layer_range: [0, 2]}]
        parameters: {scale: [{filter: layers.2.mlp, value: 0.5}]}
        """,
    )
    for layer, source in enumerate((2, 3, 0, 1)):
        expected = m["a"][f"model.layers.{source}.mlp.up_proj.weight"] * (0.5 if source == 2 else 1)
        assert torch.equal(result[f"model.layers.{layer}.mlp.up_proj.weight"].double(), expected)


def test_without_a_dtype_the_widest_input_counts(tmp_path: Path):
    state = {name: torch.full(shape, 0.5) for name, shape in names_of(1).items()}
    write(tmp_path / "a", state, dtype=torch.bfloat16)
    write(tmp_path / "b", state, dtype=torch.float32)
    result = merged(
        tmp_path,
        tmp_path,
        "{merge_method: linear, models: [{model: ROOT/a}, {model: ROOT/b}], parameters: {weight: 1}}",
    )
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
