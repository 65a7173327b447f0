"""Every fault that merging can meet: one row each. A row says what is broken and what the message must hold.

Each row runs from Python and through the command line, without an output and over an old one. Whatever the fault: one
message, no output, no leftovers, inputs untouched, an old output byte for byte as it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import (
    LLAMA,
    VOCABULARY,
    WORDS,
    Family,
    digests,
    load_weights,
    random_state,
    save_llama,
    save_tokenizer,
    save_weights,
)

import hf_fuse
from hf_fuse import cli
from hf_fuse.checkpoint import reader, writer
from hf_fuse.errors import CheckpointError, FuseError, HubError, OutputError, RecipeError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass
class Case:
    """Private copies of a family, a recipe that merges them, and a place for the output."""

    folder: Path
    patch: pytest.MonkeyPatch
    recipe: Any = None
    options: dict[str, Any] = field(default_factory=dict)  # of hf_fuse.merge, and as flags of the command line
    old_output: bool = False

    @property
    def base(self) -> Path:
        return self.folder / "models" / "base"

    @property
    def one(self) -> Path:
        return self.folder / "models" / "one"

    @property
    def two(self) -> Path:
        return self.folder / "models" / "two"

    @property
    def output(self) -> Path:
        return self.folder / "work" / "merged"

    def rewrite(self, model: Path, change: Callable[[dict[str, torch.Tensor]], Any], shards: int = 2) -> None:
        """Saves a model again with its tensors changed."""
        state = load_weights(model)
        for path in [*model.glob("*.safetensors"), *model.glob(INDEX)]:
            path.unlink()
        save_weights(model, change(state) or state, shards)

    def edit_json(self, path: Path, **changes: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_index(self, model: Path, **entries: Any) -> None:
        path = model / INDEX
        index = json.loads(path.read_text())
        index["weight_map"] |= entries
        path.write_text(json.dumps(index))

    def edit_header(self, path: Path, change: Callable[[dict], Any]) -> None:
        """Rewrites a file's header; a change that returns bytes gives the header as it is."""
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        raw = change(header) or json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    def make_old_output(self) -> None:
        state = random_state({"model.norm.weight": (16,)}, 9)
        save_llama(self.output, state)
        (self.output / "notes.txt").write_text("kept by the user")


@dataclass(frozen=True)
class Row:
    name: str
    breaks: Callable[[Case], None]
    fragments: tuple[str, ...]
    error: type[FuseError]
    own_output: bool = False  # the row itself decides what is at the output
    inputs_change: bool = False  # by somebody else, during the run


ROWS: list[Row] = []


def fault(error: type[FuseError], *fragments: str, **flags: bool) -> Callable:
    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        ROWS.append(Row(function.__name__, function, fragments, error, **flags))
        return function

    return register


# -- damaged files ----------------------------------------------------------------------------------------------------


@fault(CheckpointError, f"one/{FIRST}: truncated", "the header describes", "the file has", "hf cache verify")
def truncated_shard(case: Case) -> None:
    os.truncate(case.one / FIRST, (case.one / FIRST).stat().st_size - 100)


@fault(CheckpointError, f"one/{FIRST}: truncated: the header needs", "hf cache verify")
def shard_cut_inside_its_header(case: Case) -> None:
    os.truncate(case.one / FIRST, 50)


@fault(CheckpointError, f"two/{SECOND}: only 0 bytes long", "Download it again")
def empty_shard(case: Case) -> None:
    os.truncate(case.two / SECOND, 0)


@fault(CheckpointError, f"base/{SECOND}: has trailing bytes", "the file has", "hf cache verify")
def trailing_junk(case: Case) -> None:
    with (case.base / SECOND).open("ab") as file:
        file.write(b"junk")


@fault(CheckpointError, "one: 2 missing shard(s)", FIRST, SECOND, "hf cache verify")
def missing_shards_are_all_listed(case: Case) -> None:
    (case.one / FIRST).unlink()
    (case.one / SECOND).unlink()


@fault(CheckpointError, f"one/{FIRST}: header claims", "limit of 100000000")
def header_larger_than_the_format_allows(case: Case) -> None:
    with (case.one / FIRST).open("r+b") as file:
        file.write((2**60).to_bytes(8, "little"))


@fault(CheckpointError, f"one/{FIRST}: the header is not valid JSON")
def header_is_not_json(case: Case) -> None:
    case.edit_header(case.one / FIRST, lambda header: b'{"a": ')


@fault(CheckpointError, f"one/{FIRST}: the header is not valid JSON")
def header_is_not_utf8(case: Case) -> None:
    case.edit_header(case.one / FIRST, lambda header: json.dumps(header).encode("utf-16"))


@fault(CheckpointError, f"one/{FIRST}", "overlap or are missing", "expected")
def overlapping_offsets(case: Case) -> None:
    def overlap(header: dict) -> None:
        first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
        low = header[first]["data_offsets"][0]
        size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        header[second]["data_offsets"] = [low, low + size]

    case.edit_header(case.one / FIRST, overlap)


@fault(CheckpointError, f"one/{FIRST}", "'model.embed_tokens.weight' appears twice")
def a_name_twice_in_one_header(case: Case) -> None:
    def twice(header: dict) -> bytes:
        entry = json.dumps(header["model.embed_tokens.weight"])
        return f'{{"model.embed_tokens.weight": {entry}, '.encode() + json.dumps(header).encode()[1:]

    case.edit_header(case.one / FIRST, twice)


@fault(CheckpointError, f"one/{FIRST}", "model.embed_tokens.weight", "bytes, but F32 [31, 16] needs")
def size_disagrees_with_shape(case: Case) -> None:
    case.edit_header(case.one / FIRST, lambda h: h["model.embed_tokens.weight"].update(shape=[31, 16]))


@fault(CheckpointError, f"one/{FIRST}", "'model.embed_tokens.weight' is malformed")
def malformed_entry(case: Case) -> None:
    case.edit_header(case.one / FIRST, lambda h: h["model.embed_tokens.weight"].update(dtype=["F32"]))


@fault(CheckpointError, f"one/{FIRST}", "'Q7'", "not supported")
def unknown_dtype(case: Case) -> None:
    case.edit_header(case.one / FIRST, lambda h: h["model.embed_tokens.weight"].update(dtype="Q7"))


@fault(CheckpointError, "one/config.json: not valid JSON", "hf cache verify")
def config_is_not_json(case: Case) -> None:
    (case.one / "config.json").write_text("{")


# -- indexes ----------------------------------------------------------------------------------------------------------


def _points_to(*targets: Any) -> Callable:
    def register(function: Callable) -> Callable:
        for number, target in enumerate(targets):

            def breaks(case: Case, target: Any = target) -> None:
                save_weights(case.folder / "outside", random_state({UP: (24, 16)}))
                case.edit_index(case.one, **{UP: target.format(case.folder) if isinstance(target, str) else target})

            ROWS.append(Row(f"{function.__name__}_{number}", breaks,
                            (f"one/{INDEX}", f"'{UP}'", "not trusted", "same folder"), CheckpointError))  # fmt: skip
        return function

    return register


@_points_to(
    "../../outside/model.safetensors", "{}/outside/model.safetensors", "C:\\model.safetensors", "C:model.safetensors",
    "..\\..\\outside\\model.safetensors", "..", "../model.bin", "model.bin", "", None, 7, ["model.safetensors"],
    "model\n.safetensors", "sub/model.safetensors",
)  # fmt: skip
def index_leaves_its_folder() -> None: ...


@fault(CheckpointError, f"one/{INDEX}", "'weight_map' is not a filled JSON object")
def index_without_a_mapping(case: Case) -> None:
    (case.one / INDEX).write_text('{"weight_map": ["a"]}')


@fault(CheckpointError, f"one/{INDEX}: not an index", "weight_map", "hf cache verify")
def index_is_not_json(case: Case) -> None:
    (case.one / INDEX).write_text("no")


@fault(CheckpointError, f"one/{INDEX}", "more than an index may have (10000)")
def index_is_oversized(case: Case) -> None:
    case.patch.setattr(reader, "MAX_INDEX_BYTES", 10_000)
    with (case.one / INDEX).open("a") as file:
        file.write(" " * 10_000)


@fault(CheckpointError, f"one/{INDEX}: cannot be read", "directory")
def index_is_a_folder(case: Case) -> None:
    (case.one / INDEX).unlink()
    (case.one / INDEX).mkdir()


@fault(CheckpointError, SECOND, "'lm_head.weight'", "index lists in nowhere", "disagree")
def tensor_in_a_shard_but_not_in_the_index(case: Case) -> None:
    index = json.loads((case.one / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (case.one / INDEX).write_text(json.dumps(index))


@fault(CheckpointError, f"one/{INDEX}", "lists 1 tensor(s) that no shard holds", "'extra.weight'")
def tensor_in_the_index_but_in_no_shard(case: Case) -> None:
    case.edit_index(case.one, **{"extra.weight": FIRST})


@fault(CheckpointError, "'lm_head.weight'", f"lists in {FIRST}", "disagree")
def index_names_the_wrong_shard(case: Case) -> None:
    case.edit_index(case.one, **{"lm_head.weight": FIRST})


@fault(CheckpointError, "one: holds both model.safetensors and an index", "Delete the stale one")
def single_file_and_index(case: Case) -> None:
    save_weights(case.one, load_weights(case.one))


@fault(CheckpointError, "one: several .safetensors files but no model.safetensors.index.json", "Download")
def shards_without_an_index(case: Case) -> None:
    (case.one / INDEX).unlink()


# -- not a model ------------------------------------------------------------------------------------------------------


@fault(CheckpointError, "one: holds only pickled weights (pytorch_model.bin)", "run code", "--allow-pickle")
def pickled_weights(case: Case) -> None:
    torch.save(load_weights(case.one), case.one / "pytorch_model.bin")
    for path in [*case.one.glob("*.safetensors"), case.one / INDEX]:
        path.unlink()


@fault(CheckpointError, "one: no model.safetensors or index found", "save_pretrained")
def empty_folder(case: Case) -> None:
    shutil.rmtree(case.one)
    case.one.mkdir()


@fault(CheckpointError, "models/nowhere: no such folder", "org/name")
def no_such_folder(case: Case) -> None:
    case.recipe["models"][0] = str(case.folder / "models" / "nowhere")


@fault(CheckpointError, "one: is a local folder", "revision 'main' has no meaning")
def local_folder_with_a_revision(case: Case) -> None:
    case.recipe["models"][0] = {"path": str(case.one), "revision": "main"}


@fault(CheckpointError, "one: is quantised", "quantization_config", "unquantised")
def quantised_model(case: Case) -> None:
    case.edit_json(case.one / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@fault(RecipeError, "base_model", "is an adapter", "the full model it was trained on")
def adapter_as_base(case: Case) -> None:
    make_adapter(case.base)


@fault(CheckpointError, "one: is an adapter that names no base", "base_model")
def adapter_without_a_base(case: Case) -> None:
    make_adapter(case.one)
    case.recipe |= {"method": "linear", "base_model": None, "parameters": {}}


def make_adapter(folder: Path, base: str | None = None) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    state = random_state({f"{prefix}.lora_A.weight": (2, 16), f"{prefix}.lora_B.weight": (16, 2)})
    save_weights(folder, state)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0],
              "task_type": "CAUSAL_LM",
              "base_model_name_or_path": base}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


# -- values -----------------------------------------------------------------------------------------------------------


def spoil(value: float, name: str = UP) -> Callable[[dict], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[-1] = value

    return change


@fault(CheckpointError, f"one: tensor {UP} holds at least 1 NaN or infinite", "--allow-nonfinite")
def nan_in_a_model(case: Case) -> None:
    case.rewrite(case.one, spoil(float("nan")))


@fault(CheckpointError, f"two: tensor {UP} holds at least 1 NaN or infinite", "--allow-nonfinite")
def infinity_in_a_model(case: Case) -> None:
    case.rewrite(case.two, spoil(float("-inf")))


@fault(CheckpointError, f"base: tensor {UP} holds at least 1 NaN or infinite", "--allow-nonfinite")
def nan_in_the_base(case: Case) -> None:
    case.rewrite(case.base, spoil(float("nan")))


@fault(CheckpointError, "one: tensor model.norm.weight holds at least 1 NaN")
def nan_in_a_vector(case: Case) -> None:
    case.rewrite(case.one, spoil(float("nan"), "model.norm.weight"))


@fault(CheckpointError, f"one: tensor {UP} holds at least 1 NaN or infinite")
def nan_that_weight_zero_would_hide(case: Case) -> None:
    case.rewrite(case.one, spoil(float("nan")))
    case.recipe["models"][0] = {"path": str(case.one), "weight": 0}


@fault(CheckpointError, f"one: tensor {UP} holds at least 1 NaN or infinite")
def nan_that_trimming_would_hide(case: Case) -> None:
    case.rewrite(case.one, spoil(float("nan")))
    case.recipe |= {"method": "ties", "parameters": {"density": 0.01}}


@fault(CheckpointError, f"one: tensor {UP} holds at least 1 NaN or infinite")
def infinity_that_dropping_would_hide(case: Case) -> None:
    case.rewrite(case.one, spoil(float("inf")))
    case.recipe |= {"method": "dare_linear", "parameters": {"density": 0}}


@fault(OutputError, UP, "not finite in F16", "smaller weights or a wider out_dtype", "--allow-nonfinite")
def overflow_of_float16(case: Case) -> None:
    case.rewrite(case.one, spoil(1e6))
    case.recipe["out_dtype"] = "float16"


@fault(OutputError, UP, "not finite in BF16", "wider out_dtype")
def overflow_of_bfloat16_by_rounding(case: Case) -> None:
    for model in (case.base, case.one, case.two):
        case.rewrite(model, spoil(3.4e38))
    case.recipe["out_dtype"] = "bfloat16"


@fault(OutputError, UP, "not finite in F32")
def overflow_of_float32_after_float64(case: Case) -> None:
    case.rewrite(case.one, spoil(3e38))
    case.recipe |= {"dtype": "float64", "parameters": {"lambda": 3.0}}


@fault(OutputError, UP, "not finite in F32", "smaller weights")
def overflow_of_the_sum(case: Case) -> None:
    case.rewrite(case.one, spoil(3e38))
    case.rewrite(case.two, spoil(3e38))


# -- models that do not fit -------------------------------------------------------------------------------------------


@fault(CheckpointError, "do not fit together", f"tensor {UP} is missing in", "one")
def tensor_missing_in_a_model(case: Case) -> None:
    case.rewrite(case.one, lambda state: {name: value for name, value in state.items() if name != UP})


@fault(CheckpointError, "two", "input_layernorm.weight is missing in", "and 18 more")
def many_tensors_missing(case: Case) -> None:
    case.rewrite(case.two, lambda state: {"model.embed_tokens.weight": state["model.embed_tokens.weight"],
                                          "lm_head.weight": state["lm_head.weight"]})  # fmt: skip


@fault(CheckpointError, "one", "has 1 tensor(s) that the reference model lacks", UP, "optional_tensors")
def tensor_missing_in_the_base(case: Case) -> None:
    case.rewrite(case.base, lambda state: {name: value for name, value in state.items() if name != UP})


@fault(
    CheckpointError, "two", "has 1 tensor(s) that the reference model lacks", "value_head.weight", "optional_tensors"
)
def unexpected_tensor(case: Case) -> None:
    case.rewrite(case.two, lambda state: state | {"value_head.weight": torch.ones(2)})


@fault(CheckpointError, f"tensor {UP}", "[24, 15]", "[24, 16]", "one", "base")
def shape_mismatch(case: Case) -> None:
    case.rewrite(case.one, lambda state: state | {UP: torch.ones(24, 15)})


@fault(CheckpointError, "[40, 16]", "[32, 16]", "vocabulary axis", "tokenizer: base", "tokenizer: union")
def vocabulary_mismatch(case: Case) -> None:
    case.rewrite(case.one, lambda state: state | {
        "model.embed_tokens.weight": torch.ones(40, 16), "lm_head.weight": torch.ones(40, 16),
    })  # fmt: skip


@fault(CheckpointError, f"tensor {UP} is F32", "I64", "one")
def integers_in_place_of_floats(case: Case) -> None:
    case.rewrite(case.one, lambda state: state | {UP: torch.ones(24, 16, dtype=torch.int64)})


@fault(CheckpointError, "one: its tokenizer is incompatible", "tokenizer: base or tokenizer: union")
def incompatible_tokenizers(case: Case) -> None:
    save_tokenizer(case.one, [*reversed(WORDS)])


@fault(CheckpointError, "one", "no tokenizer files", "can't be aligned")
def alignment_without_a_tokenizer(case: Case) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (case.one / name).unlink()
    case.recipe["tokenizer"] = "base"


def tie(case: Case, model: Path, *, declared: bool = True, stored: str = "absent") -> None:
    """Sets tie_word_embeddings, and the head: absent, equal to the embedding, or as it is."""

    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if stored == "absent":
            del state["lm_head.weight"]
        elif stored == "equal":
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        return state

    case.edit_json(model / "config.json", tie_word_embeddings=declared)
    case.rewrite(model, change)


@fault(CheckpointError, "lm_head.weight", "one: tied", "two: untied", "tie_word_embeddings: true", "or false")
def some_heads_tied_and_some_not(case: Case) -> None:
    tie(case, case.one)


@fault(CheckpointError, "lm_head.weight", "one: contradictory", "tie_word_embeddings: true")
def tied_by_its_config_but_not_in_its_file(case: Case) -> None:
    tie(case, case.one, stored="as it is")


@fault(CheckpointError, "tie_word_embeddings: false", "no model stores a head")
def untying_without_a_head(case: Case) -> None:
    for model in (case.base, case.one, case.two):
        tie(case, model)
    case.recipe["tie_word_embeddings"] = False


# -- the recipe -------------------------------------------------------------------------------------------------------


def recipe_row(name: str, *fragments: str, error: type[FuseError] = RecipeError, **changes: Any) -> None:
    ROWS.append(Row(name, lambda case: case.recipe.update(changes), fragments, error))


recipe_row("unknown_method", "no merge method is called 'tiez'", "Did you mean 'ties'?", method="tiez")
recipe_row("unknown_key", "unknown key 'modles'", "Did you mean 'models'?", modles=[])
recipe_row("unknown_parameter", "task_arithmetic has no parameter 'lamda'", "Did you mean 'lambda'?",
           parameters={"lamda": 1})  # fmt: skip
recipe_row("parameter_out_of_range", "density is 1.5", "expected float [0, 1]", method="ties",
           parameters={"density": 1.5})  # fmt: skip
recipe_row("parameter_is_a_word", "density is 'much'", "expected float", method="ties", parameters={"density": "much"})
recipe_row("parameter_too_large_for_the_arithmetic", "lambda is 1e+40", "float32", parameters={"lambda": 1e40})
recipe_row("parameter_is_nan", "density is nan", method="ties", parameters={"density": float("nan")})
recipe_row(
    "unknown_choice", "scope is 'layer'", "expected model | tensor", method="ties", parameters={"scope": "layer"}
)
recipe_row("missing_base", "base_model: task_arithmetic merges differences from a base", base_model=None)
recipe_row("no_models", "give either models (whole models) or slices", models=[])
recipe_row("weights_that_sum_to_zero", "weights sum to 0", "normalize: false", method="linear",
           parameters={"weight": 0})  # fmt: skip
recipe_row("density_by_tensor_over_the_whole_model", "density differs between tensors", "scope: tensor",
           method="ties", parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]})  # fmt: skip
recipe_row("filter_without_a_value", "is not a filter", "{filter: pattern, value: number}",
           parameters={"lambda": [{"filter": "mlp"}]})  # fmt: skip
recipe_row("wrong_out_dtype", "out_dtype", "'float8'", out_dtype="float8")
recipe_row("wrong_shard_size", "max_shard_size: 'big' is not a size", "500MB", max_shard_size="big")
recipe_row("negative_seed", "seed", "greater than or equal to 0", seed=-1)
recipe_row("unknown_tokenizer_source", "tokenizer", "nobody", "base", "union", tokenizer="nobody", error=FuseError)


@fault(RecipeError, "slerp takes exactly 2 model(s)", "the recipe gives 1")
def too_few_models(case: Case) -> None:
    case.recipe |= {"method": "slerp", "base_model": None, "models": [str(case.one)], "parameters": {"t": 0.5}}


@fault(RecipeError, "slerp takes exactly 2 model(s)", "the recipe gives 3")
def too_many_models(case: Case) -> None:
    models = [str(case.one), str(case.two), str(case.base)]
    case.recipe |= {"method": "slerp", "base_model": None, "models": models, "parameters": {"t": 0.5}}


@fault(RecipeError, "models.0: lambda is the same for all models", "the recipe's parameters")
def common_parameter_at_one_model(case: Case) -> None:
    case.recipe["models"][0] = {"path": str(case.one), "parameters": {"lambda": 1}}


@fault(RecipeError, "models.0", "unknown key 'wieght'", "Did you mean 'weight'?")
def unknown_key_at_one_model(case: Case) -> None:
    case.recipe["models"][0] = {"path": str(case.one), "wieght": 1}


@fault(RecipeError, "slices.0.sources.0: layers [1, 4)", "has 3 layers", "0 <= first < last <= 3")
def slices_out_of_range(case: Case) -> None:
    case.recipe = {"method": "passthrough", "slices": [{"sources": [{"model": str(case.one), "layers": [1, 4]}]}]}


@fault(RecipeError, "slices.0: its sources have [1, 2] layers", "equally many")
def slices_of_unequal_height(case: Case) -> None:
    sources = [{"model": str(case.one), "layers": [0, 1]}, {"model": str(case.two), "layers": [0, 2]}]
    case.recipe = {"method": "linear", "slices": [{"sources": sources}]}


@fault(RecipeError, "broken.yaml: cannot be read (not UTF-8 text)", "YAML")
def recipe_is_not_utf8(case: Case) -> None:
    case.recipe = case.folder / "broken.yaml"
    case.recipe.write_bytes("method: ties # \u00e9".encode("latin-1"))


@fault(RecipeError, "nowhere.yaml: cannot be read (No such file or directory)", "recipe in YAML")
def recipe_not_found(case: Case) -> None:
    case.recipe = case.folder / "nowhere.yaml"


@fault(RecipeError, "broken.yaml line 3: not valid YAML")
def recipe_is_not_yaml(case: Case) -> None:
    case.recipe = case.folder / "broken.yaml"
    case.recipe.write_text("method: ties\nmodels: [a, {\n")


@fault(RecipeError, "broken.yaml line 3: the key 'method' appears twice")
def recipe_says_a_key_twice(case: Case) -> None:
    case.recipe = case.folder / "broken.yaml"
    case.recipe.write_text("method: ties\nmodels: [a]\nmethod: linear\n")


@fault(RecipeError, "broken.yaml: expected a mapping", "'method' and 'models'")
def recipe_is_a_list(case: Case) -> None:
    case.recipe = case.folder / "broken.yaml"
    case.recipe.write_text("- ties\n")


# -- the output -------------------------------------------------------------------------------------------------------


@fault(OutputError, "merged: exists", "--overwrite", own_output=True)
def output_exists(case: Case) -> None:
    case.make_old_output()


@fault(OutputError, "merged: exists and is not a folder", own_output=True)
def output_is_a_file(case: Case) -> None:
    case.output.write_text("precious")
    case.options["overwrite"] = True


@fault(OutputError, "merged: exists and is not a folder", own_output=True)
def output_is_a_link(case: Case) -> None:
    (case.output.parent / "elsewhere").mkdir()
    case.output.symlink_to("elsewhere")
    case.options["overwrite"] = True


@fault(
    OutputError, "merged: does not look like a model folder", "config.json, main.py", "not replaced", own_output=True
)
def output_is_somebodys_project(case: Case) -> None:
    case.output.mkdir()
    (case.output / "main.py").write_text("precious")
    (case.output / "config.json").write_text("{}")
    case.options["overwrite"] = True


@fault(OutputError, "merged.partial: exists", "no run of hf_fuse left it", own_output=True)
def something_else_has_the_partial_folders_name(case: Case) -> None:
    folder = case.output.with_name("merged.partial")
    folder.mkdir()
    (folder / "precious.txt").write_text("precious")


@fault(OutputError, "overlaps with the input", "models/one", own_output=True)
def output_is_an_input(case: Case) -> None:
    case.options |= {"output": case.one, "overwrite": True}


@fault(OutputError, "overlaps with the input", "models/base", own_output=True)
def output_is_inside_an_input(case: Case) -> None:
    case.options["output"] = case.base / "merged"


@fault(OutputError, "overlaps with the input", own_output=True)
def output_holds_the_inputs(case: Case) -> None:
    (case.folder / "models" / "model.safetensors").write_bytes(b"")
    case.options |= {"output": case.folder / "models", "overwrite": True}


@fault(OutputError, "overlaps with the input", "models/one", own_output=True)
def output_is_an_adapter_among_the_inputs(case: Case) -> None:
    make_adapter(case.one)
    case.options |= {"output": case.one, "overwrite": True}


@fault(OutputError, "overlaps with the input", own_output=True)
def an_input_is_called_like_the_partial_folder(case: Case) -> None:
    case.one.rename(case.output.with_name("merged.partial"))
    case.output.with_name(".merged.lock").write_text("1")  # as a killed run leaves it
    case.recipe["models"][0] = str(case.output.with_name("merged.partial"))


@fault(OutputError, "cannot be written", "Choose another output", own_output=True)
def output_below_a_file(case: Case) -> None:
    (case.output.parent / "file").write_text("precious")
    case.options["output"] = case.output.parent / "file" / "merged"


@fault(OutputError, "the disk has 0.00 GB free", "the output needs 0.06 GB", "choose another output")
def disk_too_small(case: Case) -> None:
    usage = shutil.disk_usage(case.folder)._replace(free=1000)
    case.patch.setattr(shutil, "disk_usage", lambda path: usage)


def _full(case: Case, owner: Any, name: str, code: int, calls_before: int = 0) -> None:
    genuine, left = getattr(owner, name), [calls_before]

    def fail(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return genuine(*arguments, **named)
        raise OSError(code, os.strerror(code))

    case.patch.setattr(owner, name, fail)


@fault(OutputError, "model.safetensors: cannot be written (No space left on device)", "old output, if any, is intact")
def disk_full_while_tensors_are_written(case: Case) -> None:
    _full(case, os, "pwrite", errno.ENOSPC, calls_before=6)  # the first is the lock's


@fault(OutputError, "model.safetensors: cannot be written", "quota", "old output, if any, is intact")
def quota_exceeded_while_tensors_are_written(case: Case) -> None:
    _full(case, os, "pwrite", errno.EDQUOT, calls_before=6)


@fault(OutputError, "merged", "cannot be written", "No space left on device")
def disk_full_when_the_config_is_written(case: Case) -> None:
    _full(case, Path, "write_text", errno.ENOSPC)


@fault(OutputError, "merged", "cannot be written", "Input/output error")
def disk_fails_at_the_end(case: Case) -> None:
    _full(case, os, "fsync", errno.EIO, calls_before=1)


# -- others at work, and the rest -------------------------------------------------------------------------------------


def _after_plan(case: Case, action: Callable[[], None]) -> None:
    create = writer.PartialFolder.create

    def acting(self: writer.PartialFolder, layout: writer.Layout) -> None:
        create(self, layout)
        action()

    case.patch.setattr(writer.PartialFolder, "create", acting)


@fault(CheckpointError, f"one/{SECOND}: became shorter while it was read", "tensor", inputs_change=True)
def input_shrinks_during_the_merge(case: Case) -> None:
    _after_plan(case, lambda: os.truncate(case.one / SECOND, 1000))


@fault(CheckpointError, f"one/{SECOND}: cannot be read (No such file or directory)", inputs_change=True)
def input_vanishes_during_the_merge(case: Case) -> None:
    _after_plan(case, lambda: (case.one / SECOND).unlink(missing_ok=True))


@fault(CheckpointError, "cannot be read (Input/output error)")
def input_on_a_failing_disk(case: Case) -> None:
    _full(case, os, "preadv", errno.EIO, calls_before=5)


@fault(HubError, "ada/merged: no Hub token found", "hf auth login")
def push_without_a_token(case: Case) -> None:
    import huggingface_hub

    case.patch.setattr(huggingface_hub, "get_token", lambda: None)
    case.options["push"] = "ada/merged"


@fault(FuseError, "device: 'gpu' is not a device", "cpu, cuda or cuda:N")
def unknown_device(case: Case) -> None:
    case.options["device"] = "gpu"


# -- running the rows -------------------------------------------------------------------------------------------------


@pytest.fixture
def case(tiny_family: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return make_case(tiny_family("plain"), tmp_path, monkeypatch)


def make_case(family: Family, folder: Path, patch: pytest.MonkeyPatch) -> Case:
    made = Case(folder, patch)
    for source, target in zip(family.all, (made.base, made.one, made.two)):
        shutil.copytree(source, target)
    made.output.parent.mkdir()
    made.recipe = {
        "method": "task_arithmetic", "base_model": str(made.base), "models": [str(made.one), str(made.two)],
    }  # fmt: skip
    return made


def prepared(row: Row, case: Case, old_output: bool) -> None:
    if old_output and not row.own_output:
        case.make_old_output()
        case.options["overwrite"] = True
    case.options.setdefault("output", case.output)
    row.breaks(case)


def state_of(row: Row, case: Case) -> dict[str, Any]:
    parts = [case.output.parent] if row.inputs_change else [case.output.parent, case.folder / "models"]
    return {str(part): digests(part) for part in parts}


def arguments(case: Case) -> list[str]:
    """The command line that does what the case does."""
    recipe = case.recipe
    if isinstance(recipe, dict):
        recipe = case.folder / "recipe.yaml"
        with recipe.open("w") as file:  # rows may have broken Path.write_text
            yaml.safe_dump(case.recipe, file)
    flags = []
    for name, value in case.options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return ["merge", str(recipe), *flags]


def check_message(row: Row, text: str) -> None:
    for fragment in row.fragments:
        assert fragment in text
    assert text.isprintable(), "one line"


def names(row: Row) -> str:
    return row.name


@pytest.mark.parametrize("old_output", [False, True], ids=["new", "over_old"])
@pytest.mark.parametrize("row", ROWS, ids=names)
def test_fault_from_python(row: Row, old_output: bool, case: Case) -> None:
    prepared(row, case, old_output)
    before = state_of(row, case)
    with pytest.raises(row.error) as raised:
        hf_fuse.merge(case.recipe, **case.options)
    check_message(row, str(raised.value))
    assert state_of(row, case) == before


@pytest.mark.parametrize("row", ROWS, ids=names)
def test_fault_on_the_command_line(row: Row, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(row, case, old_output=True)
    before = state_of(row, case)
    with pytest.raises(SystemExit) as ended:
        cli.run_command(arguments(case))
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    *others, last = printed.err.splitlines()
    assert last.startswith("error: ")
    check_message(row, last)
    assert all(line.startswith("note: ") for line in others)
    assert state_of(row, case) == before


IN_A_PROCESS = ("truncated_shard", "nan_in_a_model", "unknown_parameter", "output_exists")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in IN_A_PROCESS], ids=names)
def test_fault_in_a_process_of_its_own(row: Row, case: Case) -> None:
    prepared(row, case, old_output=True)
    command = [sys.executable, "-m", "hf_fuse", *arguments(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    check_message(row, done.stderr.rstrip("\n"))


def test_debug_shows_the_traceback(case: Case) -> None:
    os.truncate(case.one / FIRST, 10)
    case.options = {"output": case.output}
    command = [sys.executable, "-m", "hf_fuse", *arguments(case), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "in read_header" in done.stderr
    assert FIRST in done.stderr


# -- what is not an error, but must be said or done right ------------------------------------------------------------


def test_a_recipe_without_faults_runs(case: Case) -> None:
    assert hf_fuse.merge(case.recipe, case.output) == case.output
    base, one, two, merged = (load_weights(folder) for folder in (case.base, case.one, case.two, case.output))
    assert list(merged) == sorted(base)
    for name in base:
        torch.testing.assert_close(merged[name], base[name] + (one[name] - base[name]) + (two[name] - base[name]))
    assert [path.name for path in case.output.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_allow_nonfinite(case: Case, value: float) -> None:
    case.rewrite(case.one, spoil(value))
    hf_fuse.merge(case.recipe, case.output, allow_nonfinite=True)
    merged = load_weights(case.output)
    assert not merged[UP].view(-1)[-1].isfinite()
    assert merged[UP].view(-1)[:-1].isfinite().all()


def test_optional_tensors(case: Case) -> None:
    """Listed tensors may be missing anywhere: averaged over those who have them; extra ones are left out."""
    one, two = load_weights(case.one), load_weights(case.two)
    case.rewrite(case.one, lambda state: {name: value for name, value in state.items() if name != UP})
    case.rewrite(case.two, lambda state: state | {"value_head.weight": torch.ones(2)})
    case.recipe = {"method": "linear", "models": [str(case.one), str(case.two), str(case.base)]}
    case.recipe["optional_tensors"] = ["value_head.*", "*.1.mlp.up_proj.*"]
    hf_fuse.merge(case.recipe, case.output)
    assert UP not in load_weights(case.output)
    case.recipe["models"].reverse()
    hf_fuse.merge(case.recipe, case.output, overwrite=True)
    merged, base = load_weights(case.output), load_weights(case.base)
    torch.testing.assert_close(merged[UP], (base[UP] + two[UP]) / 2)
    norm = "model.norm.weight"
    torch.testing.assert_close(merged[norm], (base[norm] + one[norm] + two[norm]) / 3)
    assert "value_head.weight" not in merged


def test_mixed_dtypes_are_shown(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.rewrite(case.one, lambda state: {name: value.bfloat16() for name, value in state.items()})
    case.rewrite(case.two, lambda state: state | {UP: state[UP].half()})
    plan = hf_fuse.plan(case.recipe)
    count = len(load_weights(case.base))
    assert [parent["dtypes"] for parent in plan.to_dict()["parents"]] == [
        {"F32": count}, {"BF16": count}, {"F32": count - 1, "F16": 1},
    ]  # fmt: skip
    case.options = {"output": case.output}
    cli.run_command(["plan", *arguments(case)[1:]])
    assert "BF16" in capsys.readouterr().out
    hf_fuse.merge(case.recipe, case.output)
    assert {value.dtype for value in load_weights(case.output).values()} == {torch.float32}


def test_code_of_a_model_is_noted_and_left_behind(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.edit_json(case.base / "config.json", auto_map={"AutoModel": "modeling.Own"})
    (case.base / "modeling.py").write_text("raise SystemExit('executed')")
    case.options = {"output": case.output}
    cli.run_command(arguments(case))
    assert "auto_map" in capsys.readouterr().err
    assert not list(case.output.rglob("*.py"))
    assert "auto_map" not in json.loads((case.output / "config.json").read_text())


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_the_umask(case: Case, mask: int, expected: int) -> None:
    for path in case.base.iterdir():
        path.chmod(0o600)
    old = os.umask(mask)
    try:
        hf_fuse.merge(case.recipe, case.output)
    finally:
        os.umask(old)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in case.output.iterdir()} == {
        path.name: oct(expected) for path in case.output.iterdir()
    }
    assert case.output.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_second_run_names_the_first(case: Case) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom hf_fuse.checkpoint.writer import exclusive_output\n"
        "with exclusive_output(Path(sys.argv[1])) as partial:\n"
        "    partial.folder.mkdir()\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(case.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match=rf"another run \(process {first.pid}\) is writing it"):
            hf_fuse.merge(case.recipe, case.output)
        assert {path.name for path in case.output.parent.iterdir()} == {"merged.partial", ".merged.lock"}
        first.kill()
    hf_fuse.merge(case.recipe, case.output)
    assert {path.name for path in case.output.parent.iterdir()} == {"merged"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_folder_without_write_permission(case: Case) -> None:
    case.output.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            hf_fuse.merge(case.recipe, case.output)
    finally:
        case.output.parent.chmod(0o700)


def test_file_size_limit_of_the_system(case: Case) -> None:
    """A real refusal by the kernel while the weights are written."""
    code = (
        "import resource, signal, sys\nfrom hf_fuse.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "main()\n"
    )
    case.options = {"output": case.output}
    done = subprocess.run([sys.executable, "-c", code, *arguments(case)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "cannot be written (File too large)" in done.stderr
    assert list(case.output.parent.iterdir()) == []


def test_more_shards_than_files_may_be_open(case: Case) -> None:
    """Large models come in hundreds of shards, and 1024 open files are a usual limit."""
    for model in (case.base, case.one, case.two):
        case.rewrite(model, lambda state: None, shards=25)
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (60, 200))\nfrom hf_fuse.cli import main\nmain()\n"
    )
    case.options = {"output": case.output, "workers": 8}
    done = subprocess.run([sys.executable, "-c", code, *arguments(case)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_weights(case.output)) == len(load_weights(case.base))


# -- tied heads -------------------------------------------------------------------------------------------------------


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, nothing missing or left over."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, found = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    return model


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
@pytest.mark.parametrize("stored", ["absent", "equal"])
@pytest.mark.parametrize("declared", [True, None], ids=["declared", "unsaid"])
def test_all_tied(case: Case, method: str, stored: str, declared: bool | None) -> None:
    """Merged once and stored as the parents store it, whatever the method draws."""
    if declared is None and stored == "absent":
        pytest.skip("a Llama that neither stores a head nor says that it is tied has none")
    for model in (case.base, case.one, case.two):
        tie(case, model, stored=stored)
        if declared is None:
            config = json.loads((model / "config.json").read_text())
            del config["tie_word_embeddings"]
            (model / "config.json").write_text(json.dumps(config))
    case.recipe["method"] = method
    if method == "linear":
        case.recipe["base_model"] = None
    hf_fuse.merge(case.recipe, case.output)
    merged = load_weights(case.output)
    assert ("lm_head.weight" in merged) == (stored == "equal")
    if stored == "equal":
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    if declared:
        model = loaded(case.output)
        assert torch.equal(model.lm_head.weight, merged["model.embed_tokens.weight"])
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("reference_is_tied", [True, False])
@pytest.mark.parametrize("choice", [True, False])
def test_some_tied_and_some_not_after_a_choice(case: Case, choice: bool, reference_is_tied: bool) -> None:
    states = [load_weights(model) for model in (case.base, case.one, case.two)]
    heads = [state["lm_head.weight"] for state in states]
    embeddings = [state["model.embed_tokens.weight"] for state in states]
    tied = 0 if reference_is_tied else 1
    tie(case, (case.base, case.one)[tied])
    heads[tied] = embeddings[tied]
    case.recipe |= {"method": "linear", "base_model": None, "tie_word_embeddings": choice}
    case.recipe["models"] = [str(model) for model in (case.base, case.one, case.two)]
    hf_fuse.merge(case.recipe, case.output)
    merged = load_weights(case.output)
    model = loaded(case.output)
    assert model.config.tie_word_embeddings is choice
    torch.testing.assert_close(model.model.embed_tokens.weight.data, sum(embeddings) / 3)
    if choice:
        assert "lm_head.weight" not in merged
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        torch.testing.assert_close(model.lm_head.weight.data, sum(heads) / 3)
        assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("choice", [True, False])
def test_contradictory_head_after_a_choice(case: Case, choice: bool) -> None:
    for model in (case.base, case.one, case.two):
        tie(case, model, stored="as it is")
    with pytest.raises(CheckpointError, match="contradictory"):
        hf_fuse.merge(case.recipe, case.output)
    hf_fuse.merge(case.recipe | {"tie_word_embeddings": choice}, case.output)
    model = loaded(case.output)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is choice
    if not choice:
        assert torch.equal(model.lm_head.weight, load_weights(case.output)["lm_head.weight"])


def test_vocabularies_can_be_aligned(case: Case) -> None:
    """What the error offers works: rows of the same word are averaged, whatever their numbers."""
    reverse = [*reversed(WORDS)]
    save_tokenizer(case.one, reverse)
    case.recipe |= {"method": "linear", "base_model": str(case.base), "tokenizer": "base"}
    hf_fuse.merge(case.recipe, case.output)
    one, two, merged = (
        load_weights(folder)["model.embed_tokens.weight"] for folder in (case.one, case.two, case.output)
    )
    first = VOCABULARY - len(WORDS) - (VOCABULARY - 4 - len(WORDS))
    here, there = first + WORDS.index("cat"), first + reverse.index("cat")
    torch.testing.assert_close(merged[here], (one[there] + two[here]) / 2)


def test_rows_have_distinct_names() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 90
    assert LLAMA["vocab_size"] == VOCABULARY
