"""mergekit's YAML: what it is translated to, what stops, and that the merged numbers follow mergekit's formulas."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_fuse
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.merge.parameters import resolve_value
from hf_fuse.recipe import load_recipe, read_yaml
from hf_fuse.recipe_mergekit import translate
from hf_fuse.recipe_mergekit_parameters import METHODS, UNSUPPORTED, first_found
from hf_fuse.registry import get

LAYERS, WIDTH, VOCABULARY = 4, 8, 12
State = dict[str, Tensor]


def recipe_of(text: str) -> dict[str, Any]:
    """What is translated, after the recipe's own validation has accepted it."""
    data = read_yaml(text)
    load_recipe(data)
    return translate(data, "file.yml")


# --- translation -----------------------------------------------------------------------------------------


def test_slerp_starts_from_the_base_wherever_it_is_listed():
    recipe = recipe_of("""
        merge_method: slerp
        base_model: org/first
        slices:
          - sources:
              - {model: org/second, layer_range: [0, 8]}
              - {model: org/first, layer_range: [2, 10]}
        parameters:
          t:
            - {filter: attn, value: [0, 1]}
            - {filter: "*", value: 0.5}
            - {filter: never, value: 1}
        dtype: bfloat16
    """)
    assert recipe["slices"] == [
        {
            "sources": [
                {"model": {"path": "org/first"}, "layers": [2, 10]},
                {"model": {"path": "org/second"}, "layers": [0, 8]},
            ]
        }
    ]
    assert recipe["parameters"] == {"t": [{"filter": "attn", "value": [0.0, 1.0]}, {"value": 0.5}]}
    assert recipe["out_dtype"] == "bfloat16" and "dtype" not in recipe
    assert recipe["dialect"] == "mergekit"


def test_slerp_in_models_form_gets_the_base_that_is_not_listed():
    recipe = recipe_of("{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.3}}")
    assert recipe["models"] == [{"path": "a"}, {"path": "b"}]


def test_ties_gets_mergekits_formula_and_defaults():
    recipe = recipe_of("""
        merge_method: ties
        base_model: base
        models:
          - model: base
          - {model: a, parameters: {weight: 1, density: [1, 0.5]}}
          - {model: b, parameters: {weight: "1e-1"}}
        parameters: {int8_mask: true, normalize: "no", rescale: false}
        dtype: torch.float16
    """)
    assert recipe["models"] == [
        {"path": "a", "weight": 1.0, "parameters": {"density": [1.0, 0.5]}},
        {"path": "b", "weight": 0.1},
    ]
    assert recipe["parameters"] == {
        "normalize": False, "density": 1.0, "scope": "tensor", "trim": "exact", "tie": "positive",
    }  # fmt: skip
    assert recipe["out_dtype"] == "float16"


def test_linear_counts_the_base_as_a_model():
    recipe = recipe_of("{merge_method: linear, base_model: a, models: [{model: b}], parameters: {weight: 2}}")
    assert recipe["models"] == [{"path": "b"}, {"path": "a"}]
    assert recipe["base_model"] == {"path": "a"}


@pytest.mark.parametrize(
    ("flags", "axis"),
    [
        ("", None),
        ("nuslerp_flatten: true, nuslerp_row_wise: true", "tensor"),
        ("nuslerp_flatten: false", "rows"),
        ("nuslerp_flatten: false, nuslerp_row_wise: true", "columns"),
        (
            "nuslerp_flatten: [{filter: mlp, value: false}], nuslerp_row_wise: true",
            [{"filter": "mlp", "value": "columns"}, {"value": "tensor"}],
        ),
        ("nuslerp_flatten: false, nuslerp_row_wise: [no, yes]", ["rows", "columns"]),
    ],
)
def test_nuslerp_flags_become_an_axis(flags: str, axis: Any):
    text = "{merge_method: nuslerp, models: [{model: a}, {model: b}], parameters: {weight: 1, FLAGS}}"
    assert recipe_of(text.replace("FLAGS", flags))["parameters"].get("axis") == axis


def test_a_slice_sees_the_files_nuslerp_flags():
    recipe = recipe_of("""
        merge_method: nuslerp
        slices:
          - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
            parameters: {nuslerp_row_wise: true}
        parameters: {weight: 1, nuslerp_flatten: false}
    """)
    assert recipe["slices"][0]["parameters"] == {"axis": "columns"}
    assert recipe["parameters"]["axis"] == "rows"


@pytest.mark.parametrize("rescale", [None, True, False])
def test_dare_keeps_mergekits_l1_rescaling(rescale: bool | None):
    given_ = "" if rescale is None else f", rescale: {rescale}"
    text = "{merge_method: dare_ties, base_model: a, models: [{model: b}], parameters: {weight: 1" + given_ + "}}"
    parameters = recipe_of(text)["parameters"]
    assert parameters["rescale"] == ("none" if rescale is False else "l1_norm")
    assert parameters["density"] == 1.0


def test_filters_without_a_last_word_keep_mergekits_default_and_ask_for_what_has_none():
    recipe = recipe_of("""
        merge_method: dare_linear
        base_model: base
        models: [{model: a, parameters: {weight: [{filter: mlp, value: 1}]}}]
        parameters: {density: {filter: mlp, value: 0.5}}
    """)
    assert recipe["parameters"]["density"] == [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    assert recipe["parameters"]["weight"] == [{"value": "given by no filter"}]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("org/name", {"path": "org/name"}),
        ("org/name@v1", {"path": "org/name", "revision": "v1"}),
        ("org/n@v1+me/lora@v2", {"path": "org/n", "revision": "v1", "adapter": "me/lora", "adapter_revision": "v2"}),
        ("{model: org/n@v1, lora: me/lora}", {"path": "org/n", "revision": "v1", "adapter": "me/lora"}),
        (
            "{model: {path: org/n, revision: v1}, lora: {path: l}, override_architecture: null}",
            {"path": "org/n", "revision": "v1", "adapter": "l"},
        ),
    ],
)
def test_model_references(written: str, meant: dict[str, str]):
    quoted = written if written.startswith("{") else f'"{written}"'
    recipe = recipe_of(f"{{merge_method: passthrough, models: [{{model: {quoted}}}]}}")
    assert recipe["models"] == [meant]


def test_a_folder_with_plus_and_at_in_its_name_is_a_folder(tmp_path: Path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    recipe = recipe_of(f'{{merge_method: passthrough, models: [{{model: "{folder}"}}]}}')
    assert recipe["models"] == [{"path": str(folder)}]


def test_modules_of_the_whole_model_stand_between_slices_and_file():
    recipe = recipe_of("""
        merge_method: linear
        modules:
          default:
            models: [{model: a}, {model: b}]
            parameters: {weight: [{filter: mlp, value: 3}]}
        parameters: {weight: 2}
    """)
    assert recipe["parameters"]["weight"] == [{"filter": "mlp", "value": 3.0}, {"value": 2.0}]


def test_tokenizer_settings():
    recipe = recipe_of("""
        merge_method: linear
        models: [{model: a+l, parameters: {weight: 1}}, {model: b@v, parameters: {weight: 1}}]
        tokenizer:
          source: a
          tokens:
            <x>: {source: b@v, force: true}
            <y>: {source: {kind: zero}}
            <z>: {source: {kind: model_token, model: b@v, token_id: 3}}
          pad_to_multiple_of: 64
        chat_template: chatml
    """)
    assert recipe["tokenizer"] == {
        "source": "a+l",
        "tokens": {
            "<x>": {"source": "b@v", "force": True},
            "<y>": {"source": {"kind": "zero"}},
            "<z>": {"source": {"kind": "model_token", "model": "b@v", "token_id": 3}},
        },
        "pad_to_multiple_of": 64,
    }
    assert recipe["chat_template"] == "chatml"


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("dtype: float64", {"dtype": "float64", "out_dtype": "float64"}),
        ("dtype: float32, out_dtype: bfloat16", {"out_dtype": "bfloat16"}),
        ("out_dtype: float16", {"out_dtype": "float16"}),
        ("dtype: null", {}),
    ],
)
def test_types(types: str, expected: dict[str, str]):
    recipe = recipe_of(f"{{merge_method: passthrough, models: [{{model: a}}], {types}}}")
    assert {key: value for key, value in recipe.items() if "dtype" in key} == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_translated_parameter_is_an_option_of_our_method(method: str):
    rule, options = METHODS[method], get("merge", method).options
    targets = {p.target for p in rule.parameters.values() if p.only is None} | set(rule.fixed)
    if method == "nuslerp":
        targets = targets - {"nuslerp_flatten", "nuslerp_row_wise"} | {"axis"}
    assert targets <= set(options)
    for name, parameter in rule.parameters.items():
        if parameter.per_model and parameter.target == "weight":
            assert options["weight"].per_model, name


def test_defaults_that_the_translation_relies_on():
    """Where no default is written into the recipe, ours must be mergekit's."""
    ours = {(m, o.name): o.default for m in METHODS for o in get("merge", m).options.values()}
    mergekits = {
        ("linear", "normalize"): True, ("task_arithmetic", "normalize"): False, ("task_arithmetic", "lambda"): 1.0,
        ("ties", "normalize"): True, ("ties", "lambda"): 1.0, ("dare_linear", "normalize"): False,
        ("dare_ties", "normalize"): False, ("dare_ties", "lambda"): 1.0, ("nuslerp", "axis"): "tensor",
        ("model_stock", "rows"): False, ("passthrough", "scale"): 1.0, ("slerp", "threshold"): 0.9995,
    }  # fmt: skip
    assert {key: ours[key] for key in mergekits} == mergekits


# --- what stops ------------------------------------------------------------------------------------------

TA = "{merge_method: task_arithmetic, base_model: base"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TA + ", models: [{model: a}], paramters: {}}", ["'paramters'", "'parameters'"]),
        (TA + ", models: [{model: a, weight: 1}]}", ["models.0", "weight belongs under 'parameters'"]),
        (TA + ", models: [{model: a, parameters: {weigth: 1}}]}", ["models.0.parameters", "'weigth'", "'weight'"]),
        (TA + ", models: [{model: a}]}", ["models.0", "'weight'", "for a"]),
        (TA + ", models: [{model: a}, {model: a}], parameters: {weight: 1}}", ["models.1", "twice"]),
        (TA + ", models: [{model: base}], parameters: {weight: 1}}", ["at least 1", "besides the base", "found 0"]),
        (TA + "}", ["exactly one of models, slices and modules", "none"]),
        (TA + ", models: [{model: a}], slices: [{}]}", ["models and slices"]),
        (TA + ", models: [{parameters: {weight: 1}}]}", ["models.0", "'model' is missing"]),
        ("{merge_method: ties, models: [{model: a}], parameters: {weight: 1}}", ["ties needs base_model"]),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {weight: 1, rescale: true}}",
            ["rescale: false only"],
        ),
        ("{merge_method: slerp, base_model: b, models: [{model: a}]}", ["slerp", "'t'"]),
        ("{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 1}}", ["found 2"]),
        ("{merge_method: model_stock, base_model: b, models: [{model: a}]}", ["at least 2", "found 1"]),
        ("{merge_method: passthrough, base_model: b, models: [{model: a}]}", ["takes 1", "found 2"]),
        ("{merge_method: linear, base_model: b, models: [{model: a, parameters: {weight: 1}}]}",
         ["base_model, which mergekit adds", "'weight'"]),
        (
            "{merge_method: ties, base_model: b, slices: [{sources: [{model: a, layer_range: [0, 2]}]}],"
            " parameters: {weight: 1}}",
            ["slices.0.sources", "needs the base model b among them"],
        ),
        (
            "{merge_method: linear, parameters: {weight: 1}, slices: [{sources: [{model: a, layer_range: [0, 2]},"
            " {model: b, layer_range: [1, 2]}]}]}",
            ["same length", "[2, 1]"],
        ),
        ("{merge_method: passthrough, slices: [{sources: [{model: a}]}]}", ["layer_range", "None"]),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [3, 3]}]}]}", ["holds no layers"]),
        ("{merge_method: passthrough, modules: {text_decoder: {models: [{model: a}]}}}", ["modules", "text_decoder"]),
        (
            "{merge_method: passthrough, models: [{model: {model: {path: a}, override_architecture: X}}]}",
            ["models.0.model", "override_architecture is not supported"],
        ),
        ("{merge_method: passthrough, models: [{model: a+b+c}]}", ["more than one '+'"]),
        ("{merge_method: passthrough, models: [{model: a@b@c}]}", ["a@b@c"]),
        ("{merge_method: passthrough, models: [{model: a}], dtype: fp16}", ["dtype", "'fp16'", "float16"]),
        ("{merge_method: passthrough, models: [{model: a}], tokenizer_source: b}", ["tokenizer_source", "b is none"]),
        (
            "{merge_method: passthrough, models: [{model: a}], tokenizer_source: base, tokenizer: {source: base}}",
            ["either tokenizer or tokenizer_source"],
        ),
        (
            "{merge_method: passthrough, models: [{model: a}], tokenizer: {tokens: {x: {source: {kind: mean}}}}}",
            ["tokenizer.tokens.x.source.kind", "'mean'"],
        ),
        ("{merge_method: passthrough, models: [{model: a}], chat_template: none}", ["chat_template", "chatml"]),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: nine}}]}", ["weight", "'nine'", "number"]),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: .nan}}]}", ["weight", "number"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: []}}", ["weight", "empty"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: [1, {value: 2}]}}", ["weight.0", "mixed"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: [{filter: a}]}}", ["weight.0", "'value'"]),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {weight: [{filtr: a, value: 1}]}}",
            ["weight.0", "'filtr'", "'filter'"],
        ),
        (
            "{merge_method: nuslerp, models: [{model: a}, {model: b}], parameters: {weight: 1,"
            " nuslerp_flatten: [true, false], nuslerp_row_wise: [true, false]}}",
            ["nuslerp_flatten and nuslerp_row_wise can't both vary"],
        ),
        ("{merge_method: tise, models: [{model: a}]}", ["'tise'", "'ties'"]),
        ("{merge_method: [ties], models: [{model: a}]}", ["merge_method", "['ties']"]),
    ],
)  # fmt: skip
def test_what_stops_names_place_and_feature(text: str, said: list[str]):
    with pytest.raises(RecipeError) as caught:
        load_recipe(read_yaml(text))
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


@pytest.mark.parametrize("method", UNSUPPORTED)
def test_methods_that_are_not_supported_say_so(method: str):
    with pytest.raises(RecipeError, match=f"'{method}' of mergekit is not supported"):
        load_recipe({"merge_method": method, "models": [{"model": "a"}]})


def test_what_mergekit_does_not_read_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        recipe = recipe_of("""
            merge_method: task_arithmetic
            base_model: base
            slices:
              - sources:
                  - {model: base, layer_range: [0, 2], parameters: {weight: 9}}
                  - {model: a, layer_range: [0, 2], parameters: {weight: 1, lambda: 0.5}}
                residual_weight: 0.1
            parameters: {density: 0.5, int8_mask: true}
        """)
    assert recipe["slices"][0]["sources"][1] == {"model": {"path": "a"}, "layers": [0, 2], "weight": 1.0}
    assert recipe["slices"][0]["sources"][0] == {"model": {"path": "base"}, "layers": [0, 2]}
    assert "parameters" not in recipe
    for place in ("residual_weight", "parameters.density", "sources.1.parameters.lambda", "sources.0: mergekit"):
        assert place in caplog.text
    assert "int8_mask" not in caplog.text


# --- settings in several scopes --------------------------------------------------------------------------

NUMBERS = st.floats(-2, 2, allow_nan=False)
LEAVES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=3))
CONDITIONS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"filter": st.sampled_from(["mlp", "attn", "layers.1", "norm"]), "value": LEAVES}),
        st.fixed_dictionaries({"value": LEAVES}),
    ),
    min_size=1,
    max_size=3,
)
SETTINGS = st.one_of(st.none(), LEAVES, CONDITIONS)
NAMES = st.sampled_from(["layers.0.mlp.w", "layers.1.mlp.w", "layers.1.attn.w", "layers.2.norm.w", "embed.w"])


@given(st.lists(SETTINGS, min_size=1, max_size=4), NAMES, st.sampled_from([0.0, 0.25, 1.0]))
def test_settings_joined_over_scopes_resolve_like_scope_after_scope(scopes: list, name: str, depth: float):
    expected = None
    for setting in scopes:
        if expected is None and setting is not None:
            expected = resolve_value(setting, name, depth, "mergekit")
    joined = first_found(*scopes)
    assert (None if joined is None else resolve_value(joined, name, depth, "mergekit")) == expected


# --- merged numbers --------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    """Folder and fp64 states of a base, three models near it and one that has nothing to do with it."""
    root = tmp_path_factory.mktemp("family")
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


def arc(v0: Tensor, v1: Tensor, t: float, threshold: float = 0.9995) -> Tensor:
    cosine = (v0 * v1).sum() / v0.norm() / v1.norm()
    if cosine.abs() > threshold:
        return (1 - t) * v0 + t * v1
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * v0 + torch.sin(t * angle) * v1) / torch.sin(angle)


def elect(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    weighted = torch.stack([delta * weight for delta, weight in zip(deltas, weights)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    total = (weighted * agree).sum(0)
    share = sum(mask * weight for mask, weight in zip(agree, weights))
    return total / torch.where(share == 0, 1.0, share) if normalize else total


def trim(delta: Tensor, density: float) -> Tensor:
    keep = max(1, int(density * delta.numel()))
    threshold = delta.abs().flatten().sort(descending=True).values[keep - 1]
    return delta * (delta.abs() >= threshold)


def test_linear_with_gradients_and_filters(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(tmp_path, root, """
        merge_method: linear
        models:
          - {model: ROOT/a, parameters: {weight: [{filter: self_attn, value: [0.1, 0.9, 0.4]},
                                                  {filter: layers.2, value: 0}, {value: [1, 2]}]}}
          - {model: ROOT/b, parameters: {weight: [0.2, 0.6]}}
        dtype: float32
    """)  # fmt: skip
    expected = {}
    for name in m["a"]:
        t = depth(name)
        wa = along([0.1, 0.9, 0.4], t) if "self_attn" in name else 0 if "layers.2" in name else along([1, 2], t)
        wb = along([0.2, 0.6], t)
        expected[name] = (wa * m["a"][name] + wb * m["b"][name]) / (wa + wb)
    check(result, expected)


def test_linear_with_a_base_that_mergekit_adds(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: linear
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 1.5}}]
        parameters: {weight: -0.25, normalize: [{filter: norm, value: true}, {value: false}]}
    """,
    )
    check(result, {
        name: (1.5 * m["a"][name] - 0.25 * m["base"][name]) / (1.25 if "norm" in name else 1) for name in m["a"]
    })  # fmt: skip


def test_slerp_with_t_by_layer_and_part(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: slerp
        base_model: ROOT/base
        slices:
          - sources: [{model: ROOT/far, layer_range: [0, 4]}, {model: ROOT/base, layer_range: [0, 4]}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float32
    """,
    )
    expected = {}
    for name in m["base"]:
        t = 0.5
        if "self_attn" in name:
            t = along([0, 0.5, 0.3, 0.7, 1], depth(name))
        elif "mlp" in name:
            t = along([1, 0.5, 0.7, 0.3, 0], depth(name))
        expected[name] = arc(m["base"][name], m["far"][name], t)
    check(result, expected)


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


def test_task_arithmetic_with_lambda_and_a_negative_weight(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: task_arithmetic
        base_model: ROOT/base
        models:
          - {model: ROOT/base}
          - {model: ROOT/a, parameters: {weight: 0.8}}
          - {model: ROOT/b, parameters: {weight: [-0.5, 0.5, 0.1]}}
        parameters: {lambda: [{filter: mlp, value: [0.5, 1.5]}, {value: 0.9}], int8_mask: true}
        dtype: float32
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        t = depth(name)
        scale = along([0.5, 1.5], t) if "mlp" in name else 0.9
        wb = along([-0.5, 0.5, 0.1], t)
        expected[name] = base + scale * (0.8 * (m["a"][name] - base) + wb * (m["b"][name] - base))
    check(result, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_each_tensor(tmp_path: Path, family: tuple[Path, dict[str, State]], normalize: bool):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: ties
        base_model: ROOT/base
        models:
          - {{model: ROOT/a, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}
          - {{model: ROOT/b, parameters: {{density: 0.5, weight: [0, 0.3, 0.7, 1]}}}}
          - {{model: ROOT/c, parameters: {{weight: [{{filter: mlp, value: 0.5}}, {{value: 0.2}}]}}}}
        parameters: {{normalize: {str(normalize).lower()}, lambda: 0.8}}
        dtype: float32
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        t = depth(name)
        deltas = [
            trim(m["a"][name] - base, along([1, 0.7, 0.1], t)), trim(m["b"][name] - base, 0.5), m["c"][name] - base,
        ]  # fmt: skip
        weights = [1.0, along([0, 0.3, 0.7, 1], t), 0.5 if "mlp" in name else 0.2]
        expected[name] = base + 0.8 * elect(deltas, weights, normalize)
    check(result, expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one_drops_nothing(tmp_path: Path, family: tuple[Path, dict[str, State]], method: str):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: {method}
        base_model: ROOT/base
        models: [{{model: ROOT/a, parameters: {{weight: 0.3}}}}, {{model: ROOT/b, parameters: {{weight: 0.9}}}}]
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        deltas = [m["a"][name] - base, m["b"][name] - base]
        total = elect(deltas, [0.3, 0.9], False) if "ties" in method else 0.3 * deltas[0] + 0.9 * deltas[1]
        expected[name] = base + total
    check(result, expected)


def test_dare_keeps_the_l1_norm_of_each_task_vector(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: dare_linear
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 1, density: 0.5}}]
    """,
    )
    dropped = 0
    for name, base in m["base"].items():
        got, delta = result[name].double() - base, m["a"][name] - base
        torch.testing.assert_close(got.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=1e-5)
        dropped += (got.abs() < 1e-6).sum().item()
    assert 0.4 < dropped / sum(base.numel() for base in m["base"].values()) < 0.6


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock_is_not_clamped(tmp_path: Path, family: tuple[Path, dict[str, State]], rows: bool):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: model_stock
        base_model: ROOT/base
        models: [{{model: ROOT/a}}, {{model: ROOT/b}}, {{model: ROOT/c}}]
        parameters: {{filter_wise: {str(rows).lower()}}}
    """,
    )
    expected, ratios = {}, []
    for name, base in m["base"].items():
        shape = base.shape if rows and base.ndim > 1 else (1, -1)
        d = [(m[key][name] - base).reshape(shape) for key in "abc"]
        cosines = [
            (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1) for x, y in ((d[0], d[1]), (d[0], d[2]), (d[1], d[2]))
        ]
        cosine = sum(cosines) / 3
        t = (3 * cosine / (1 + 2 * cosine))[:, None]
        ratios.append(t.min().item())
        expected[name] = base + (t * sum(d) / 3).reshape(base.shape)
    assert min(ratios) < 0  # else the test could not tell
    check(result, expected)


@pytest.mark.parametrize(("flags", "axis"), [
    ("", None), ("nuslerp_flatten: false", -1), ("nuslerp_flatten: false, nuslerp_row_wise: true", 0),
])  # fmt: skip
def test_nuslerp(tmp_path: Path, family: tuple[Path, dict[str, State]], flags: str, axis: int | None):
    root, m = family
    text = """
        merge_method: nuslerp
        models: [{model: ROOT/a, parameters: {weight: 0.3}}, {model: ROOT/far, parameters: {weight: [1, 0.5]}}]
        parameters: {FLAGS}
    """
    result = merged(tmp_path, root, text.replace("FLAGS", flags))
    expected = {}
    for name, first in m["a"].items():
        second = m["far"][name]
        w = along([1, 0.5], depth(name))
        t = w / (w + 0.3)
        if axis is None or first.ndim == 1:
            expected[name] = arc(first, second, t, threshold=2)
        else:
            vectors = [arc(x, y, t, threshold=2) for x, y in zip(first.unbind(1 + axis), second.unbind(1 + axis))]
            expected[name] = torch.stack(vectors, dim=1 + axis)
    check(result, expected)


def test_nuslerp_of_task_vectors(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: nuslerp
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 0.3}}, {model: ROOT/b, parameters: {weight: 0.5}}]
    """,
    )
    check(result, {
        name: base + arc(m["a"][name] - base, m["b"][name] - base, 0.625, threshold=2)
        for name, base in m["base"].items()
    })  # fmt: skip


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


def test_union_of_tokenizers_with_a_token_override(tmp_path: Path):
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
    """,
    )
    made = json.loads((tmp_path / "merged/tokenizer.json").read_text())
    ids = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    assert len(ids) == VOCABULARY + 2
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == VOCABULARY + 2
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base, a, b = (states[key][name] for key in ("base", "a", "b"))
        expected = {f"w{i}": (a[i] + 3 * b[i] + 4 * base[i]) / 8 for i in range(VOCABULARY)}
        expected |= {"<x>": a[VOCABULARY], "<y>": base[3]}  # the only owner's row; the forced one
        for token, row in expected.items():
            torch.testing.assert_close(result[name][ids[token]].double(), row, rtol=2e-6, atol=2e-6, msg=token)


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
