"""The recipe: what to merge, how, into what. One YAML file, or the same keys as a dictionary.

mergekit's YAML is recognised by its ``merge_method`` key and translated (:mod:`hf_fuse.recipe_mergekit`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hf_fuse.errors import RecipeError
from hf_fuse.registry import get, names, nearest

# Keys of ours that may stand in a mergekit file, which has no word for them.
OURS = ("output", "output_kind", "rank", "push", "seed", "max_shard_size")
OUT_DTYPES = ("float64", "float32", "float16", "bfloat16")

# A parameter's value: one number, flag or word; a list, interpolated over depth (numbers) or stepped (the rest);
# or a list of {filter, value}, of which the first whose filter matches the tensor's name counts. A weight may also be
# {learned: FOLDER}, the coefficients that hf-fuse learn has found.
Value = Any


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _split_reference(value: Any) -> Any:
    """``"org/name@revision"`` and ``"base+adapter"`` are short for the mappings that the classes below describe."""
    if not isinstance(value, str):
        return value
    model, _, adapter = value.partition("+")
    if Path(value).expanduser().is_dir():
        model, adapter = value, ""
    entry: dict[str, Any] = dict(zip(("path", "revision"), _at(model)))
    if adapter:
        entry |= dict(zip(("adapter", "adapter_revision"), _at(adapter)))
    return {key: part for key, part in entry.items() if part}


def _at(reference: str) -> tuple[str, str]:
    if Path(reference).expanduser().is_dir():
        return reference, ""
    path, _, revision = reference.partition("@")
    return path, revision


class ModelRef(_Strict):
    """A full model or a LoRA adapter: a local folder or a Hub id, optionally at a revision, optionally with an adapter
    applied on top."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @property
    def key(self) -> str:
        """Stable name of the reference: ``path@revision+adapter@revision``."""
        text = self.path + (f"@{self.revision}" if self.revision else "")
        if self.adapter:
            text += f"+{self.adapter}" + (f"@{self.adapter_revision}" if self.adapter_revision else "")
        return text


Reference = Annotated[ModelRef, BeforeValidator(_split_reference)]


class ModelEntry(ModelRef):
    """One model to merge, with what differs for it alone."""

    weight: Value = None
    parameters: dict[str, Value] = Field(default_factory=dict)
    statistics: str | None = None  # folder or file that hf-fuse learn has made, for methods that use one


class SliceSource(_Strict):
    """Layers ``layers[0]`` up to but not including ``layers[1]`` of one model."""

    model: Reference
    layers: tuple[int, int]
    weight: Value = None
    parameters: dict[str, Value] = Field(default_factory=dict)
    statistics: str | None = None


class Slice(_Strict):
    """The next layers of the output: from one source, or merged from several of equal length."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: dict[str, Value] = Field(default_factory=dict)


class TokenSource(_Strict):
    """Where the embedding row of one token comes from."""

    source: Any = None
    force: bool = False


class TokenizerEntry(_Strict):
    """``source``: ``base``, ``union`` or one of the models; ``tokens`` override single rows."""

    source: str = "union"
    tokens: dict[str, TokenSource] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class PushEntry(_Strict):
    """Where to push the result."""

    repo: str
    private: bool | None = None
    revision: str | None = None


def _steps(value: Any) -> Any:
    """``post: subspace_boosting`` is short for ``post: {subspace_boosting: {}}``."""
    if isinstance(value, str):
        return {value: {}}
    return {name: said or {} for name, said in value.items()} if isinstance(value, dict) else value


class Recipe(_Strict):
    """A whole merge. See the README for one example of each kind."""

    method: str
    models: Annotated[list[Annotated[ModelEntry, BeforeValidator(_split_reference)]], Field(default_factory=list)]
    base_model: Reference | None = None
    parameters: dict[str, Value] = Field(default_factory=dict)
    # Steps on the merged difference from the base: {name: its parameters}, in this order.
    post: Annotated[dict[str, dict[str, Value]], BeforeValidator(_steps)] = Field(default_factory=dict)
    slices: list[Slice] | None = None
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    tokenizer: Annotated[
        TokenizerEntry | None, BeforeValidator(lambda v: {"source": v} if isinstance(v, str) else v)
    ] = None
    chat_template: str | None = None
    tie_word_embeddings: bool | None = None
    optional_tensors: list[str] = Field(default_factory=list)
    heads: Reference | None = None  # the model whose head a merge of classifiers has; heads are not merged then
    seed: int = Field(default=0, ge=0)
    max_shard_size: str | int = "5GB"
    output: str | None = None
    output_kind: Literal["model", "adapter"] = "model"  # adapter: LoRA adapters of one base become one
    rank: int | None = Field(default=None, ge=1)  # of that adapter; none: the sum of their ranks, nothing lost
    push: Annotated[PushEntry | None, BeforeValidator(lambda v: {"repo": v} if isinstance(v, str) else v)] = None
    dialect: Literal["hf_fuse", "mergekit"] = "hf_fuse"
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _models_or_slices(self) -> Recipe:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give either models (whole models) or slices (layer ranges), and at least one of them")
        return self

    @model_validator(mode="after")
    def _head_of_a_model(self) -> Recipe:
        if self.heads is not None and (self.slices or self.heads.key not in {ref.key for ref in self.references}):
            raise ValueError(f"heads is {self.heads.key!r}, expected one of models (without slices)")
        return self

    @model_validator(mode="after")
    def _only_what_an_adapter_has(self) -> Recipe:
        if self.output_kind == "model" and self.rank is not None:
            raise ValueError("rank is that of an adapter: say output_kind: adapter too, or remove it")
        unfit = ("slices", "tokenizer", "chat_template", "tie_word_embeddings", "heads")
        if self.output_kind == "adapter" and (said := [key for key in unfit if getattr(self, key) is not None]):
            raise ValueError(f"{said[0]} has no meaning with output_kind: adapter. Remove it")
        return self

    @property
    def references(self) -> list[ModelRef]:
        """All distinct models in order of appearance, the base first."""
        found: dict[str, ModelRef] = {}
        for ref in [
            *([self.base_model] if self.base_model else []),
            *self.models,
            *(s.base_model for s in self.slices or () if s.base_model),
            *(source.model for s in self.slices or () for source in s.sources),
        ]:
            found.setdefault(ref.key, ref)
        return list(found.values())

    @property
    def statistics(self) -> dict[str, str]:
        """Folder or file of each model's statistics, by the model's key.

        Raises:
            RecipeError: a model that is named several times has different ones.
        """
        said = [(model.key, model.statistics) for model in self.models]
        said += [(source.model.key, source.statistics) for s in self.slices or () for source in s.sources]
        found: dict[str, str] = {}
        for key, ref in said:
            if ref is not None and found.setdefault(key, ref) != ref:
                raise RecipeError(f"{key}: has two kinds of statistics, {found[key]} and {ref}. Remove one.")
        return found

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)


def parse_size(value: str | int) -> int:
    """``"5GB"`` -> 5_000_000_000 (powers of ten, as in transformers; ``"GiB"`` for powers of two)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise RecipeError(f"max_shard_size: {value!r} is not a size, expected for example 5GB or 500MB.")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as a word; here it is a number, as in YAML 1.2 and JSON. Duplicate keys are refused."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice. Remove one.")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str, name: str = "recipe") -> Any:
    """Parses YAML with plain data types only.

    Raises:
        RecipeError: not YAML; the line is named.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        if "another document" in str(problem):
            raise RecipeError(f"{name}{line}: a second document begins. Expected one recipe per file.") from None
        raise RecipeError(f"{name}{line}: not valid YAML ({problem}).") from None
    except RecipeError as error:
        raise RecipeError(f"{name} {error}") from None


def read_mapping(
    source: str | Path | dict | BaseModel, overrides: dict[str, Any] | None, expected: str
) -> tuple[dict[str, Any], str]:
    """A recipe of any kind with its overrides, not yet validated, and its name for messages.

    Raises:
        RecipeError: the file can't be read, is not a mapping (``expected`` says of what), or an override has no place.
    """
    name = "recipe"
    if isinstance(source, BaseModel):
        data: Any = source.model_dump(exclude_unset=True)
    elif isinstance(source, dict):
        data = copy.deepcopy(source)
    else:
        path = Path(source).expanduser()
        name = str(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise RecipeError(f"{source}: cannot be read ({reason}). Expected a recipe in YAML.") from None
        data = read_yaml(text, name)
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: expected a mapping with at least {expected}.")
    for key, value in (overrides or {}).items():
        _override(data, key, value, name)
    return data, name


def load_recipe(source: str | Path | dict | Recipe, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe from a YAML file, a dictionary or a Recipe; ``overrides`` are dotted keys
    (``{"parameters.density": 0.3, "models.0.weight": 2}``) and win.

    Relative paths are those of the working directory, as on the command line.

    Raises:
        RecipeError: no such file, not YAML, unknown key (with the nearest name), wrong type; one message each.
    """
    data, name = read_mapping(source, overrides, "'method' and 'models'")
    if "merge_method" in data:
        from hf_fuse.recipe_mergekit import translate

        # What mergekit has no word for may be said with ours, on the command line or in the file.
        ours = {key: data.pop(key) for key in OURS if key in data}
        data = translate(data, name) | ours
    elif "estimator" in data and "method" not in data:
        raise RecipeError(f"{name}: has an estimator, as a recipe for learning. Run it with hf-fuse learn.")
    elif "experts" in data and "method" not in data:
        raise RecipeError(
            f"{name}: has experts and no method, as mergekit-moe's files do. Expected a merge: method and models."
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_misplaced(error, data.get('method')) or explain(error, Recipe)}") from None


def _misplaced(error: ValidationError, method: Any) -> str | None:
    """What to say of a parameter that stands beside its method instead of under ``parameters``."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden" or len(problem["loc"]) != 1 or method not in names("merge"):
        return None
    key = problem["loc"][0]
    if key not in get("merge", method).options:
        return None
    return f"{key!r} is a parameter of {method}. It belongs under parameters; as a dotted key it is parameters.{key}."


def _override(data: Any, dotted: str, value: Any, name: str) -> None:
    keys = dotted.split(".")
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(data, list):
            if not key.isdigit() or int(key) >= len(data):
                raise RecipeError(f"{name}: --{dotted}: {key!r} is not the index of one of {len(data)} entries.")
            key = int(key)
            if isinstance(data[key], str) and not last:
                data[key] = _split_reference(data[key])
        elif not isinstance(data, dict):
            raise RecipeError(f"{name}: --{dotted}: {'.'.join(keys[:position])} has no keys to set.")
        if last:
            data[key] = value
        else:
            data = data[key] if isinstance(key, int) else data.setdefault(key, {})


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation in one line: where, what, and the nearest key for a misspelt one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "nullable")))
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        fields = _fields(model, parents)
        prefix = ".".join(map(str, parents))
        return f"unknown key {key!r}{f' in {prefix}' if prefix else ''}. {nearest(str(key), fields)}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})." if where else f"{message}."


def _fields(model: type[BaseModel], location: list) -> list[str]:
    """Field names of the model that a location of pydantic's points into."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def dump_recipe(recipe: BaseModel) -> str:
    """The recipe as YAML, keys in the order of the class, only what was set."""
    data = recipe.model_dump(exclude_unset=True, exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def output_folder(said: str | Path | None) -> Path:
    """The folder to make, as an absolute path.

    Raises:
        RecipeError: neither the caller nor the recipe says one.
    """
    if said is None:
        raise RecipeError("output: no folder is given. Pass --output DIR, or say output in the recipe.")
    return Path(said).expanduser().absolute()
