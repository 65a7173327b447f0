"""The models under evaluation: found and checked from their files first, loaded one at a time later."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.checkpoint.reader import open_checkpoint, read_json, resolve
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.evaluation_data import unique_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Kind of evaluation -> transformers' loader, its table of architectures, and what to call it.
_KINDS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal language model"),
    "seq2seq": (
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "sequence-to-sequence model",
    ),
    "text": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "text classifier",
    ),
    "image": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image classifier"),
}


@dataclass
class Candidate:
    """A model to evaluate, whose weights are not read yet (unless it came live).

    Attributes:
        name: as in the report; unique.
        config: the model's transformers config.
        processor: its tokenizer, or its image processor (None where it has none).
        live: the model itself, if it was given as one.
        source: folder to load from; for an adapter that of its base model.
        adapter: folder of a LoRA adapter to put on the base.
        folder: the local folder that the user named; None for Hub ids and live models.
    """

    name: str
    config: object
    processor: object
    live: PreTrainedModel | None = None
    source: Path | None = None
    adapter: Path | None = None
    folder: Path | None = None


def check_device(device: str) -> None:
    """FuseError if torch cannot use ``device`` here."""
    import torch

    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise FuseError(f"device {device!r}: cannot be used here: {reason}.") from None


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A floating-point torch dtype from its name; "auto" stays."""
    import torch

    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise FuseError(f"dtype {str(dtype)!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def candidates(models: Sequence, kind: str, tokenizer=None) -> list[Candidate]:
    """Finds every model (downloading Hub ids) and reads its config and tokenizer, but no weights.

    Args:
        models: folders, Hub ids or live models.
        kind: "causal", "text" or "image": what they are evaluated as.
        tokenizer: one for all of them (live, folder or Hub id) instead of their own.

    Raises:
        CheckpointError: a folder is missing, damaged, or holds a model of another kind.
        FuseError: a tokenizer is missing, or a model is given twice.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _processor(resolve(str(tokenizer))[0], kind, f"tokenizer {tokenizer}")
    found = []
    for model in models:
        if isinstance(model, (str, Path)):
            found.append(_from_files(str(model), kind, tokenizer))
        else:
            found.append(_from_live(model, kind, tokenizer))
    _name_apart(found)
    return found


def loaded(candidate: Candidate, kind: str, *, device: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """The candidate's model, ready to run. Never runs code of the repository, never reads pickles."""
    if candidate.live is not None:
        return candidate.live
    import transformers
    from transformers.utils import logging

    loader = getattr(transformers, _KINDS[kind][0])
    # Two progress displays at once garble the terminal; weights load in seconds next to what follows.
    showed_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = loader.from_pretrained(
            candidate.source,
            config=candidate.config,
            dtype=dtype,
            device_map="auto" if device == "auto" else None,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            # transformers fills them at random, and a random head would be evaluated without a word.
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{candidate.source}: lacks {len(missing)} weight(s) of a {_KINDS[kind][2]}, first {missing[0]!r}. "
                f"Expected a checkpoint saved as {type(model).__name__}."
            )
        if candidate.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, candidate.adapter, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{candidate.name}: cannot be loaded as a {_KINDS[kind][2]}: {reason}.") from error
    finally:
        if showed_bars:
            logging.enable_progress_bar()
    return model if device == "auto" else model.to(device)


def _from_files(ref: str, kind: str, tokenizer) -> Candidate:
    path, repo_id, _ = resolve(ref)
    source, adapter = path, None
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        if kind != "causal":
            raise CheckpointError(
                f"{ref}: is an adapter, but a {_KINDS[kind][2]} has to be a whole model. Merge it into its base first."
            )
        if not (path / "adapter_model.safetensors").exists():
            raise CheckpointError(f"{path}: holds adapter_config.json but no adapter_model.safetensors. Save it again.")
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{path / 'adapter_config.json'}: names no base_model_name_or_path. Add it.")
        source, adapter = open_checkpoint(base).folder, path
    else:
        # Reads the headers of all shards: a damaged or incomplete checkpoint is found before hours of work on others.
        open_checkpoint(str(path))
    config = _config(source, kind, ref)
    if tokenizer is None:
        has_own = adapter is not None and (adapter / "tokenizer_config.json").exists()
        tokenizer = _processor(adapter if has_own else source, kind, ref)
    name = repo_id or path.name
    return Candidate(name, config, tokenizer, None, source, adapter, path if repo_id is None else None)


def _from_live(model: PreTrainedModel, kind: str, tokenizer) -> Candidate:
    origin = str(getattr(model, "name_or_path", "") or "")
    name = Path(origin).name if Path(origin).is_absolute() else origin or type(model).__name__
    if tokenizer is None and kind == "image":
        tokenizer = _processor(Path(origin), kind, name) if origin and Path(origin).is_dir() else None
    elif tokenizer is None:
        if not origin:
            raise FuseError(f"{name}: is a live model that does not say where it came from. Pass its tokenizer.")
        tokenizer = _processor(Path(origin) if Path(origin).is_dir() else origin, kind, name)
    return Candidate(name, model.config, tokenizer, live=model)


def _config(folder: Path, kind: str, ref: str):
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    if not (folder / "config.json").exists():
        raise CheckpointError(f"{ref}: has no config.json. Expected a folder saved by save_pretrained.")
    if "auto_map" in (raw := read_json(folder / "config.json")) and "model_type" not in raw:
        raise CheckpointError(f"{ref}: needs code from its repository, which is never run.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{ref}: its config.json is not understood by transformers: {reason}.") from error
    _, table, title = _KINDS[kind]
    known = getattr(modeling_auto, table)
    architectures = list(config.architectures or [])
    fits = config.model_type in known and (not architectures or any(name in known.values() for name in architectures))
    if not fits:
        what = architectures[0] if architectures else f"of type {config.model_type!r}"
        raise CheckpointError(f"{ref}: is {what}, not a {title}. {_advice(kind)}")
    return config


def _advice(kind: str) -> str:
    if kind == "causal":
        return "Perplexity and lm-eval tasks need one; for classifiers, name the dataset's label column."
    return "Choose a model with a classification head, or leave out the label column to measure perplexity."


def _processor(source: Path | str, kind: str, ref: str):
    """The tokenizer or image processor saved in ``source``; None for an image model that has no processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if kind == "image":
        if not any((source / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
            return None
        loader, what = AutoImageProcessor, "image processor"
    else:
        loader, what = AutoTokenizer, "tokenizer"
    try:
        return loader.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # missing files, missing packages and damaged files all raise differently
        reason = re.sub(r"\s+", " ", str(error)).strip().split(". ")[0].rstrip(".")
        raise FuseError(f"{ref}: its {what} cannot be loaded: {reason}. Pass one with tokenizer.") from error


def _name_apart(found: list[Candidate]) -> None:
    """Makes names unique: folders by as many parents as it takes, live models by a number."""
    folders = [candidate.folder for candidate in found if candidate.folder is not None]
    twice = next((folder for index, folder in enumerate(folders) if folder in folders[:index]), None)
    if twice:
        raise FuseError(f"{twice}: is given twice as a model. Remove one.")
    names = iter(unique_names(folders))
    for candidate in found:
        if candidate.folder is not None:
            candidate.name = next(names)
    seen: dict[str, int] = {}
    for candidate in sorted(found, key=lambda candidate: candidate.live is not None):
        seen[candidate.name] = seen.get(candidate.name, 0) + 1
        if seen[candidate.name] > 1:
            candidate.name += f" #{seen[candidate.name]}"
