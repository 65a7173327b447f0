"""How mergekit's files name models, and whose tokenizer and token embeddings they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fuse.errors import RecipeError
from hf_fuse.recipe_mergekit_parameters import check_keys, expect


def reference(value: Any, where: str) -> dict[str, str]:
    """``path@revision+lora@revision`` or ``{model: {path, revision}, lora: {path, revision}}``."""
    if isinstance(value, dict):
        check_keys(value, ("model", "lora", "override_architecture"), where)
        if value.get("override_architecture") is not None:
            raise RecipeError(f"{where}: override_architecture is not supported; the tensors' names decide. Remove it.")
        model, lora = value.get("model"), value.get("lora")
    elif isinstance(value, str) and not Path(value).expanduser().is_dir():
        model, *rest = value.split("+")
        if len(rest) > 1:
            raise RecipeError(f"{where}: {value!r} has more than one '+'. Expected model or model+lora.")
        lora = rest[0] if rest else None
    else:
        model, lora = value, None
    result = _path(model, where, "path", "revision")
    return result | (_path(lora, f"{where} (lora)", "adapter", "adapter_revision") if lora is not None else {})


def _path(value: Any, where: str, path_key: str, revision_key: str) -> dict[str, str]:
    if isinstance(value, dict):
        check_keys(value, ("path", "revision"), where)
        path, revision = value.get("path"), value.get("revision")
    elif isinstance(value, str) and value.count("@") and not Path(value).expanduser().is_dir():
        path, _, revision = value.partition("@")
    else:
        path, revision = value, None
    if not isinstance(path, str) or not path or "@" in str(revision or "") or revision == "":
        raise RecipeError(f"{where}: {value!r} is not a model. Expected a path or Hub id, or one of them @revision.")
    return {path_key: path} | ({revision_key: str(revision)} if revision is not None else {})


def key_of(ref: dict[str, str]) -> str:
    """A reference as recipes name it (``ModelRef.key``)."""
    from hf_fuse.recipe import ModelRef

    return ModelRef(**ref).key


def tokenizer(data: dict, recipe: dict, name: str) -> dict[str, Any]:
    """``tokenizer`` or ``tokenizer_source`` of a file.

    Args:
        data: the file.
        recipe: what it has been translated to so far, the models in particular.
    """
    if data.get("tokenizer") is None:
        if data.get("tokenizer_source") is None:
            return {}
        where = f"{name}: tokenizer_source"
        return {"tokenizer": {"source": _tokenizer_source(data["tokenizer_source"], recipe, where)}}
    if data.get("tokenizer_source") is not None:
        raise RecipeError(f"{name}: give either tokenizer or tokenizer_source.")
    where, entry = f"{name}: tokenizer", data["tokenizer"]
    expect(entry, dict, where)
    check_keys(entry, ("source", "tokens", "pad_to_multiple_of"), where)
    result: dict[str, Any] = {"source": _tokenizer_source(entry.get("source") or "union", recipe, f"{where}.source")}
    if entry.get("tokens") is not None:
        expect(entry["tokens"], dict, f"{where}.tokens")
        result["tokens"] = {
            str(token): _token(value, f"{where}.tokens.{token}") for token, value in entry["tokens"].items()
        }
    if entry.get("pad_to_multiple_of") is not None:
        result["pad_to_multiple_of"] = entry["pad_to_multiple_of"]
    return {"tokenizer": result}


def _tokenizer_source(value: Any, recipe: dict, where: str) -> str:
    """``base``, ``union`` or the key of the model with that tokenizer; an adapter brings none of its own."""
    from hf_fuse.recipe import Recipe

    if value in ("base", "union"):
        return value
    wanted = reference(value, where)
    models = Recipe.model_validate(recipe).references
    for adapters in (True, False):
        for ref in models:
            adapter = {"adapter": ref.adapter, "adapter_revision": ref.adapter_revision} if adapters else {}
            own = {"path": ref.path, "revision": ref.revision} | adapter
            if {key: part for key, part in own.items() if part is not None} == wanted:
                return ref.key
    keys = ", ".join(ref.key for ref in models)
    raise RecipeError(
        f"{where}: {key_of(wanted)} is none of the models; the tokenizer of a model that is not merged is not "
        f"supported. Expected base, union or one of {keys}."
    )


def _token(value: Any, where: str) -> dict[str, Any]:
    """``source``: a model, ``{kind: model_token, model, token | token_id}`` or ``{kind: zero}``; ``force``."""
    expect(value, dict, where)
    check_keys(value, ("source", "force"), where)
    source, result = value.get("source"), {}
    if isinstance(source, dict) and "kind" in source:
        here = f"{where}.source"
        if source["kind"] == "zero":
            check_keys(source, ("kind",), here)
        elif source["kind"] == "model_token":
            check_keys(source, ("kind", "model", "token", "token_id"), here)
            if (source.get("token") is None) == (source.get("token_id") is None):
                raise RecipeError(f"{here}: give either token or token_id.")
            source = {key: part for key, part in source.items() if part is not None}
            source["model"] = key_of(reference(source.get("model"), f"{here}.model"))
        else:
            raise RecipeError(f"{here}.kind: {source['kind']!r} is unknown. Known: model_token, zero.")
        result["source"] = source
    elif source is not None:
        result["source"] = key_of(reference(source, f"{where}.source"))
    force = value.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{where}.force: {force!r} is not a flag.")
    return result | ({"force": True} if force else {})
