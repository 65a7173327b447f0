"""A training recipe: which model, with which adapter, on which data. Unknown keys are errors with the nearest name.

The keys of ``adapter`` are those of the method's PEFT config, the keys of ``train`` those of
:class:`hf_fuse.FuseConfig` (TrainingArguments and a few more), or :class:`hf_fuse.DistillConfig` where there is
something to distil, all under their own names.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import ModelRef, PushEntry, _split_reference, explain, read_mapping
from hf_fuse.registry import names, nearest

if typing.TYPE_CHECKING:
    from peft import PeftConfig

Config = TypeVar("Config")
Format = Literal["chat", "completion", "text", "classification"]

# Keys of TrainingArguments that the recipe says elsewhere.
ELSEWHERE = {
    "output_dir": "say output at the top of the recipe, or pass --output",
    "push_to_hub": "say push: org/name at the top of the recipe, or pass --push",
    "hub_model_id": "say push: org/name at the top of the recipe, or pass --push",
    "hub_token": "run `hf auth login`, or set HF_TOKEN; recipes are kept and published",
    "resume_from_checkpoint": "pass --resume",
    "remove_unused_columns": "the columns that a model needs are chosen from data",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class TrainedModel(ModelRef):
    """The model to start from: a folder or Hub id. ``base+adapter`` goes on training an adapter.

    ``dtype`` of the weights: by default as stored if an adapter is trained, float32 if the whole model is.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None


class AdapterEntry(BaseModel):
    """``method`` is PEFT's name (lora, mixlora, ...); every other key is one of its config."""

    model_config = ConfigDict(extra="allow")
    method: str


class DataSource(_Strict):
    """Rows of one dataset: a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt), a folder, or a Hub id.

    ``columns`` maps the names that training expects to those of the dataset: ``{prompt: question}``.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    columns: dict[str, str] = Field(default_factory=dict)


class SourceEntry(_Strict):
    """A teacher that reads the rows with a tokenizer, or a chat template, of its own: a model, or a cache of one that
    ``hf-fuse teach`` has made of the same data. The options are those of
    :class:`~hf_fuse.distill.aligned_teacher.AlignedTeacher`."""

    path: str
    revision: str | None = None
    tokenizer: str | None = None  # folder or Hub id, where it doesn't lie beside the model
    chat_template: str | None = None
    k: int = Field(default=16, ge=1)  # tokens kept of each prediction; a cache has its own
    vocabulary: Literal["exact", "min_ed", "statistical"] = "min_ed"
    align: Literal["boundaries", "dtw", "dtw_suffix"] = "boundaries"
    collisions: Literal["sum", "first"] = "sum"


def _sources(value: Any) -> Any:
    entries = value if isinstance(value, list) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


Sources = Annotated[list[DataSource], BeforeValidator(_sources), Field(min_length=1)]


class DataEntry(_Strict):
    """What to learn from, and what to measure on."""

    train: Sources
    eval: Sources | None = None
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)  # of the training rows, instead of eval
    replay: Sources | None = None  # what the model isn't to forget, for the objective of this name
    format: Format | None = None  # none: told from the columns
    max_length: int | None = Field(default=None, ge=2)  # in tokens; none: 1024, or the model's context if shorter
    packing: bool = False  # several texts in one row of max_length; they don't see each other
    train_on: Literal["assistant", "all"] = "assistant"  # of a chat; of a completion the prompt is never trained on
    chat_template: str | None = None  # a named format or Jinja text, instead of the tokenizer's

    @model_validator(mode="after")
    def _one_eval(self) -> DataEntry:
        if self.eval and self.eval_fraction:
            raise ValueError("give eval (a dataset) or eval_fraction (of the training rows), not both")
        return self


class TrainingRecipe(_Strict):
    """A whole training run. See the README for an example."""

    model: Annotated[TrainedModel, BeforeValidator(_split_reference)]
    adapter: Annotated[AdapterEntry | None, BeforeValidator(lambda v: {"method": v} if isinstance(v, str) else v)] = (
        None
    )
    data: Annotated[DataEntry, BeforeValidator(lambda v: {"train": v} if isinstance(v, (str, list)) else v)]
    # To learn from: caches that hf-fuse teach has made, models, or base (the model without its adapter).
    teacher: Annotated[list[str] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = None
    # To learn from as well: teachers with other tokenizers.
    sources: Annotated[list[SourceEntry] | None, BeforeValidator(lambda v: v if v is None else _sources(v))] = None
    train: dict[str, Any] = Field(default_factory=dict)
    output: str | None = None
    push: Annotated[PushEntry | None, BeforeValidator(lambda v: {"repo": v} if isinstance(v, str) else v)] = None
    num_processes: int | None = Field(default=None, ge=1)
    accelerate_config: str | None = None  # a file made by `accelerate config`, for FSDP, DeepSpeed or several machines
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_adapter(self) -> TrainingRecipe:
        if self.adapter and self.model.adapter:
            raise ValueError("model has an adapter to go on with, and adapter asks for a new one. Keep one of them")
        return self

    @property
    def trains_adapter(self) -> bool:
        return bool(self.adapter or self.model.adapter)

    @property
    def distils(self) -> bool:
        """Whether a DistillTrainer is needed: there is a teacher, or an objective that only that trainer knows."""
        objectives = self.train.get("objectives")
        known = {*names("distill"), *names("attached")}
        return bool(self.teacher or self.sources) or (isinstance(objectives, dict) and not known.isdisjoint(objectives))


def load_training_recipe(
    source: str | Path | dict | TrainingRecipe, overrides: dict[str, Any] | None = None
) -> TrainingRecipe:
    """Reads a training recipe from a YAML file, a dictionary or a TrainingRecipe; ``overrides`` are dotted keys
    (``{"train.learning_rate": 1e-4}``) and win. Relative paths are those of the working directory.

    Raises:
        RecipeError: no such file, not YAML, unknown key (with the nearest name), wrong type; one message each. The keys
            of ``adapter`` and ``train`` are checked by :func:`adapter_config` and :func:`training_config`.
    """
    data, name = read_mapping(source, overrides, "'model' and 'data'")
    for key in set(data) - set(TrainingRecipe.model_fields):
        if key in ("models", "method", "merge_method", "slices"):
            raise RecipeError(f"{name}: has the key {key!r} of a recipe for merging. Run it with hf-fuse merge.")
        for section, known in (("data", DataEntry.model_fields), ("train", _training_keys())):
            if key in known:
                raise RecipeError(f"{name}: the key {key!r} belongs into {section}. Write {section}.{key}.")
    try:
        return TrainingRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, TrainingRecipe)}") from None


def adapter_config(entry: AdapterEntry, task_type: str | None) -> PeftConfig:
    """The PEFT config of an adapter. ``task_type`` (PEFT's name, or None) counts where the recipe names none.

    Raises:
        RecipeError: unknown method or key (with the nearest name), or values that the config refuses.
    """
    import peft

    import hf_fuse  # noqa: F401 - registers the adapters of ours

    types = peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    known = {str(getattr(kind, "value", kind)).lower(): config for kind, config in types}
    name = entry.method.lower().replace("-", "_")
    if name not in known:
        raise RecipeError(f"adapter: no method is called {entry.method!r}. {nearest(name, known)}")
    options = dict(entry.model_extra or {})
    if task_type and "task_type" in _keys(known[name]):
        options.setdefault("task_type", task_type)
    return _built(known[name], options, "adapter", hidden=("peft_type", "auto_mapping", "inference_mode"))


def training_config(
    options: dict[str, Any], output_dir: str | Path, *, distilled: bool = False, **defaults: Any
) -> Any:
    """The FuseConfig of the section ``train``; ``defaults`` count where the section is silent.

    Args:
        distilled: a DistillConfig instead.

    Raises:
        RecipeError: unknown key (with the nearest name), a wrong type, or values that the config refuses.
    """
    from hf_fuse.distill.config import DistillConfig
    from hf_fuse.trainer import FuseConfig

    for key, advice in ELSEWHERE.items():
        if key in options:
            raise RecipeError(f"train: {key} can't be set here: {advice}.")
    if "token" in (options.get("teacher_model_init_kwargs") or ()):  # a mapping, or its text
        raise RecipeError(f"train: teacher_model_init_kwargs.token can't be set here: {ELSEWHERE['hub_token']}.")
    managed = {"output_dir": str(output_dir), "remove_unused_columns": False}
    return _built(DistillConfig if distilled else FuseConfig, {**defaults, **options, **managed}, "train")


def _training_keys() -> list[str]:
    from hf_fuse.trainer import FuseConfig

    return _keys(FuseConfig)


def _keys(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


def _built(config: type[Config], options: dict[str, Any], section: str, hidden: tuple[str, ...] = ()) -> Config:
    known = [key for key in _keys(config) if key not in hidden]
    hints = typing.get_type_hints(config)
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"{section}: unknown key {key!r}. {nearest(key, known)}")
        options[key] = _typed(hints[key], value, f"{section}.{key}")
    try:
        return config(**options)
    except (TypeError, ValueError, AssertionError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"{section}: {' '.join(str(error).split())}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation wants it. Annotations that pydantic can't read are left to the config."""
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise RecipeError(f"{where} is {value!r}, expected {wanted}.") from None
    except PydanticUserError:
        return value
