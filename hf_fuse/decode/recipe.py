"""A recipe for fusion while decoding: which models in which roles, by which method, and how to generate."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import ModelRef, Reference, explain, read_mapping

References = Annotated[
    list[Reference] | None, BeforeValidator(lambda v: v if isinstance(v, list) or v is None else [v])
]
# What transformers takes as it comes, and stumbles over when the models are loaded: settings, their type, and it said.
TYPES = [
    (("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), Annotated[int, Field(ge=1)],
     "an integer >= 1"),
    (("top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size"), Annotated[int, Field(ge=0)], "an integer >= 0"),
    (("temperature", "repetition_penalty", "max_time"), Annotated[float, Field(gt=0)], "a number > 0"),
    (("top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"), Annotated[float, Field(ge=0, le=1)],
     "a number from 0 to 1"),
    (("length_penalty", "guidance_scale"), float, "a number"),
    (("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), bool, "true or false"),
    (("eos_token_id", "suppress_tokens", "begin_suppress_tokens"), int | list[int], "a token id or a list of them"),
    (("stop_strings",), str | list[str], "a text or a list of them"),
]  # fmt: skip
ROLES = ("model", "models", "experts", "base_model", "auxiliary_model", "reward_model")


class DecodeRecipe(BaseModel):
    """Models are folders or Hub ids, of whole models or adapters. Which of them a method needs, its function says."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    method: str
    model: Reference | None = None
    models: References = None
    experts: References = None
    base_model: Reference | None = None
    auxiliary_model: Reference | None = None
    reward_model: Reference | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    generation: dict[str, Any] = Field(default_factory=dict)  # of transformers' GenerationConfig
    chat: bool = False  # each prompt through the chat template of the first model's tokenizer
    batch_size: int = Field(default=8, ge=1)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0)

    @property
    def found_method(self) -> registry.Method:
        return registry.get("decode", self.method)

    @property
    def roles(self) -> dict[str, bool]:
        return model_keys(self.found_method)

    def references(self, role: str) -> list[ModelRef]:
        said = getattr(self, role)
        return said if isinstance(said, list) else [said] if said else []

    @property
    def options(self) -> dict[str, Any]:
        return self.found_method.settings(self.parameters)


def model_keys(method: registry.Method) -> dict[str, bool]:
    """Keys under which a recipe names the method's models -> whether it can do without."""
    parameters = inspect.signature(method.function).parameters.values()
    return {p.name: p.default is not p.empty for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def load_decode_recipe(
    source: str | Path | dict | DecodeRecipe, overrides: dict[str, Any] | None = None
) -> DecodeRecipe:
    """Reads a recipe from a YAML file, a dictionary or a DecodeRecipe; ``overrides`` are dotted keys
    (``{"parameters.alpha": 0.5}``) and win. Relative paths are those of the working directory.

    Raises:
        RecipeError: no such file, not YAML, unknown key or method (with the nearest name), a model that is missing or
            of no use, a parameter that is missing or out of range; one message each.
    """
    data, name = read_mapping(source, overrides, "'method' and its models")
    if data.get("method") in {*registry.names("merge"), *registry.names("compress")}:
        raise RecipeError(
            f"{name}: {data['method']} works on weights, not while decoding. Run it with another command."
        )
    try:
        recipe = DecodeRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_misplaced(error, data.get('method')) or explain(error, DecodeRecipe)}") from None
    roles = recipe.roles
    for role in ROLES:
        if recipe.references(role) and role not in roles:
            raise RecipeError(f"{name}: {recipe.method} has no use for {role}. It takes {', '.join(roles)}.")
        if role in roles and not roles[role] and not recipe.references(role):
            raise RecipeError(f"{name}: {recipe.method} needs {role}: a folder or a Hub id.")
    _ = recipe.options
    _check_generation(recipe.generation, name)
    return recipe


def _misplaced(error: ValidationError, method: Any) -> str | None:
    """What to say of a key that stands beside its method instead of one level deeper."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden" or len(problem["loc"]) != 1 or method not in registry.names("decode"):
        return None
    key = problem["loc"][0]
    if key in registry.get("decode", method).options:
        return (
            f"{key!r} is a parameter of {method}. It belongs under parameters; as a dotted key it is parameters.{key}."
        )
    if key in _generation_settings():
        return (
            f"{key!r} is a setting of generate(). It belongs under generation; as a dotted key it is generation.{key}."
        )
    return None


def _generation_settings() -> dict[str, Any]:
    from transformers import GenerationConfig

    return {name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")}


def _check_generation(said: dict[str, Any], name: str) -> None:
    from transformers import GenerationConfig

    known = _generation_settings()
    for key, value in said.items():
        if key not in known:
            raise RecipeError(f"{name}: generation: no setting is called {key!r}. {registry.nearest(key, known)}")
        for keys, kind, expected in TYPES:
            if key in keys and value is not None:
                try:
                    said[key] = TypeAdapter(kind).validate_python(value)
                except ValidationError:
                    raise RecipeError(f"{name}: generation: {key} is {value!r}, expected {expected}.") from None
    try:
        GenerationConfig(**said)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{name}: generation: {str(error).splitlines()[0]}") from None
