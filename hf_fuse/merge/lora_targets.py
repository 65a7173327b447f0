"""Which modules of a model a LoRA adapter can change, where their weights lie in its files, and which of them it is to
change."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_fuse.checkpoint.adapter_binding import EMBEDDINGS, TRANSPOSED_TYPES, listed, running_names
from hf_fuse.checkpoint.reader import Checkpoint, TensorInfo
from hf_fuse.checkpoint.tied import embedding_name, head_name, stored_twice, vocabulary_tensors
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.merge.extraction import FACTORS, LEFT_OUT, WHOLE

LINEAR, CONV, EMBEDDING = "linear", "convolution", "embedding"
# Ending of the architecture's name -> PEFT's name of the task.
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS", "MTModel": "SEQ_2_SEQ_LM",
}  # fmt: skip
# Endings of the modules that PEFT expects to find whole in any adapter for the task.
HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip

OTHER_BASE = "Name the model it was fine-tuned from."
KEEP_WHOLE = "If it is a new head, keep it whole: --save-full with an expression."
RESIZED = (
    "If its vocabulary was resized, resize the base's as well (resize_token_embeddings) and save that as the base."
)


@dataclass(frozen=True)
class Target:
    """A module that PEFT can adapt. ``transposed``: its weight is stored ``[in, out]``."""

    module: str
    kind: str
    transposed: bool
    head: bool = False  # turns hidden states into the output; "all linear layers" leaves it out


@dataclass(frozen=True)
class Modules:
    """``targets`` by the names of their weights in the files; ``names`` of all modules as they run; for every tensor in
    the files its name as it runs; ``prefix`` of what a model without a head calls by shorter names."""

    targets: dict[str, Target]
    names: set[str]
    running: dict[str, str]
    prefix: str = ""
    model_class: dict[str, str] | None = None  # PEFT's auto_mapping


@dataclass(frozen=True)
class Job:
    """One tensor of the fine-tuned model, and what becomes of its change."""

    name: str
    running: str  # its name in the running model
    tuned: TensorInfo
    base: TensorInfo | None  # None: a new head
    way: str
    target: Target | None = None
    head: str | None = None  # the module of a new task that it belongs to

    @property
    def module(self) -> str:
        """The module that is saved if this tensor is stored whole."""
        return self.head or self.running.rpartition(".")[0]

    @property
    def matrix(self) -> tuple[int, int]:
        rows = self.tuned.shape[0] if self.tuned.shape else 1
        return rows, self.tuned.numel // max(rows, 1)


def find_modules(checkpoint: Checkpoint) -> Modules:
    """Builds the model without memory for its weights and looks at its modules; where transformers does not know the
    architecture, names and shapes have to tell."""
    model = _skeleton(checkpoint)
    return _from_names(checkpoint) if model is None else _from_model(checkpoint, model)


def task_type(checkpoint: Checkpoint) -> str | None:
    """PEFT's name for what the architecture does."""
    name = checkpoint.architecture or ""
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


def _skeleton(checkpoint: Checkpoint) -> Any:
    try:
        import torch
        import transformers

        config = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(checkpoint.config)
        with torch.device("meta"):
            return getattr(transformers, checkpoint.config["architectures"][0])(config)
    except Exception:  # whatever a config from elsewhere may hold
        return None


def _from_model(checkpoint: Checkpoint, model: Any) -> Modules:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = {name for name, _ in model.named_modules() if name}
    renamed, prefix = running_names(checkpoint), f"{getattr(model, 'base_model_prefix', '')}."
    file_of = {}
    for name in [*model.state_dict()]:
        for file in (renamed.get(name, name), name.removeprefix(prefix), prefix + name):
            if file in checkpoint.tensors:
                file_of[name] = file
                break
    ends = [end for end in (_head(model, "get_output_embeddings"), _classifier(model)) if end is not None]
    targets = {}
    for name, module in model.named_modules():
        file = file_of.get(f"{name}.weight")
        if file is None or file in targets:  # a head that is tied to the embedding has no weight of its own
            continue
        head = any(module is end for end in ends)
        if isinstance(module, (nn.Linear, Conv1D)):
            targets[file] = Target(name, LINEAR, isinstance(module, Conv1D), head)
        elif isinstance(module, nn.Embedding):
            targets[file] = Target(name, EMBEDDING, True)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            targets[file] = Target(name, CONV, False)
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return Modules(targets, names, {file: name for name, file in file_of.items()}, prefix, origin)


def _head(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except Exception:  # models without such a part raise what they like
        return None


def _classifier(model: Any) -> Any:
    return next((part for name in ("classifier", "score") if (part := getattr(model, name, None)) is not None), None)


def _from_names(checkpoint: Checkpoint) -> Modules:
    targets, head = {}, head_name(checkpoint)
    turned = checkpoint.config.get("model_type") in TRANSPOSED_TYPES
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(info.shape) != 2 or not info.is_float:
            continue
        if module.rpartition(".")[2] in EMBEDDINGS and name != head:
            targets[name] = Target(module, EMBEDDING, True)
        else:
            targets[name] = Target(module, LINEAR, turned and name != head, name == head)
    parts = [name.split(".") for name in checkpoint.tensors]
    names = {".".join(part[:stop]) for part in parts for stop in range(1, len(part))}
    return Modules(targets, names, {name: name for name in checkpoint.tensors})


def of_way(jobs: Iterable[Job], way: str) -> list[Job]:
    """The jobs whose tensors become factors, are stored whole, or are left out."""
    return [job for job in jobs if job.way == way]


def choose(
    tuned: Checkpoint, origin: Checkpoint, modules: Modules, targets: str | None, save_full: str | None
) -> list[Job]:
    """What becomes of each floating tensor of the fine-tuned model.

    Raises:
        CheckpointError: tensors that only one of the models has, or of different shapes.
        FuseError: an expression that is none, or that matches nothing.
    """
    theirs = _by_names_of(tuned, modules, origin)
    head = head_name(tuned)
    if head and head not in theirs and (embedding := embedding_name(origin)):
        theirs[head] = origin.tensors[embedding]  # the base ties its head to its embedding
    twice = stored_twice(tuned)
    names = [name for name, info in tuned.tensors.items() if info.is_float and name != twice]
    running = {name: modules.running.get(name, name) for name in names}
    heads = {name: _head_of(running[name], HEADS.get(task_type(tuned) or "", ())) for name in names}
    whole = {name for name in names if save_full and _search("save_full", save_full, name)}
    if save_full and not whole:
        raise FuseError(f"save_full: {save_full!r} is found in no tensor's name of {tuned.ref}.")
    whole |= {name for name, module in heads.items() if module}
    wanted = {
        name: target
        for name, target in modules.targets.items()
        if name in names and name not in whole and _wanted(target, targets)
    }
    if targets and not wanted:
        kinds = sorted({target.module.rpartition(".")[2] for target in modules.targets.values()})
        raise FuseError(f"targets: {targets!r} is found in no module's name. The model has {', '.join(kinds)}.")
    # PEFT stores modules, not tensors: the rest of a module goes with what was asked for, biases of adapted ones aside.
    adapted = {target.module for target in wanted.values()}
    saved = {running[name].rpartition(".")[0] for name in whole} - adapted
    whole |= {name for name in names if running[name].rpartition(".")[0] in saved}
    lost = sorted(n for n in set(theirs) - set(tuned.tensors) if theirs[n].is_float and _has_place(n, modules))
    new = sorted(name for name in names if name not in theirs and name not in whole)
    if lost or new:
        ref, missing, fix = (tuned.ref, lost, OTHER_BASE) if lost else (origin.ref, new, KEEP_WHOLE)
        raise CheckpointError(f"{ref}: lacks tensors that the other model has: {listed(missing)}. {fix}")
    jobs, vocabulary = [], vocabulary_tensors(tuned)
    for name in names:
        info, base = tuned.tensors[name], theirs.get(name)
        if base and base.shape != info.shape:
            if name not in whole or name in vocabulary:
                fix = RESIZED if name in vocabulary else KEEP_WHOLE
                raise CheckpointError(
                    f"{tuned.ref}: tensor {name} is {list(info.shape)}, {list(base.shape)} in {origin.ref}. {fix}"
                )
            base = None
        way = WHOLE if name in whole else FACTORS if name in wanted else LEFT_OUT
        jobs.append(Job(name, running[name], info, base, way, wanted.get(name), heads[name]))
    return jobs


def _by_names_of(tuned: Checkpoint, modules: Modules, origin: Checkpoint) -> dict[str, TensorInfo]:
    """The base's tensors, called as in the fine-tune's files: models without a head, and older releases of
    transformers, have other names for the same. Without a head that is the embedding."""
    twice = stored_twice(origin)
    found = {name: info for name, info in origin.tensors.items() if name != twice}
    if set(found) <= set(tuned.tensors):
        return found
    theirs = find_modules(origin)
    ours = {modules.running.get(name, name).removeprefix(modules.prefix): name for name in tuned.tensors}
    bare = {name: theirs.running.get(name, name).removeprefix(theirs.prefix) for name in found}
    return {ours.get(bare[name], bare[name]): info for name, info in found.items()}


def _has_place(name: str, modules: Modules) -> bool:
    """Whether the fine-tune's architecture has such a module, or a list of layers that this would be one of. A base
    made for another task has a head of its own, or a whole tower, which is no loss."""
    owner = re.split(r"\.\d+\.", name)[0] if re.search(r"\.\d+\.", name) else name.rpartition(".")[0]
    return owner in modules.names or modules.prefix + owner in modules.names


def _head_of(name: str, ends: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor whose name ends as one of ``ends``."""
    parts = name.split(".")
    around = (".".join(parts[:stop]) for stop in range(1, len(parts)))
    return next((module for module in around if ends and module.endswith(ends)), None)


def _wanted(target: Target, expression: str | None) -> bool:
    if expression is None:
        return target.kind == LINEAR and not target.head
    return _search("targets", expression, target.module)


def _search(option: str, expression: str, name: str) -> bool:
    try:
        return re.search(expression, name) is not None
    except re.error as error:
        raise FuseError(f"{option}: {expression!r} is not an expression ({error}).") from None
