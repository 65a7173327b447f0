"""Teachers: frozen models that are asked for their predictions, and the check that these mean what the student's mean.

B samples, S positions, D hidden (the teacher's), V vocabulary, N predictions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_fuse.checkpoint.tokenizer_comparison import PROBES
from hf_fuse.errors import FuseError

BASE = "base"


class Teacher:
    """A model in evaluation mode whose parameters carry no gradient. It lies whole on each process's device.

    Args:
        model: is frozen, and moved to ``device`` unless it is quantised or dispatched over several.
        device: of the student.
        name: for messages.

    Raises:
        FuseError: DeepSpeed has split the model's parameters over the processes.
    """

    def __init__(self, model: nn.Module, device: torch.device, name: str) -> None:
        self.model, self.name = model, name
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise FuseError(
                f"{name}: DeepSpeed ZeRO-3 has split its parameters over the processes. Load it before the "
                "DistillConfig is made, so that it stays whole, or use another ZeRO stage."
            )
        self._freeze(device)
        output_layer = self.base.get_output_embeddings() if hasattr(self.base, "get_output_embeddings") else None
        # The student's, if it is the same layer, is replaced for the time of its forward pass.
        self._head = None if output_layer is None else output_layer.forward

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """For a batch of the student's, ``(B, S, V)`` or ``(B, V)``."""
        with torch.no_grad(), self._as_teacher():
            outputs = self.model(**self._of_model(inputs))
        if getattr(outputs, "logits", None) is None:
            raise FuseError(f"{self.name}: is a {type(self.base).__name__}, which returns no logits.")
        return outputs.logits

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """What the output layer gets, ``(B, S, D)``."""
        seen: list[Tensor] = []

        def kept(hidden_BSD: Tensor) -> Tensor:
            seen.append(hidden_BSD)
            return hidden_BSD

        with replaced_head(self.base, kept):
            returned = self.logits(inputs)
        if returned is not seen[0]:
            check_unchanged(seen[0], returned, self.base)
        return seen[0]

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits ``(N, V)``."""
        with torch.no_grad():
            return self._head(hidden_ND)

    def _freeze(self, device: torch.device) -> None:
        self.model.eval().requires_grad_(False)
        if not getattr(self.base, "is_quantized", False) and not getattr(self.base, "hf_device_map", None):
            self.model.to(device)

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[None]:
        yield

    def _of_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        known = inspect.signature(self.base.forward).parameters
        unwanted = set() if self.base.config.is_encoder_decoder else {"labels"}
        given = {name: value for name, value in inputs.items() if name in known and isinstance(value, Tensor)}
        given = {name: value for name, value in given.items() if name not in unwanted}
        return given | ({"use_cache": False} if "use_cache" in known else {})


class BaseTeacher(Teacher):
    """The student's own base model, its adapters switched off: a teacher that takes no memory.

    Args:
        model: the student, a PEFT model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        if not hasattr(model, "disable_adapter"):
            raise FuseError(
                f"teacher is 'base', but the student is a {type(model).__name__} without an adapter. Give a "
                "peft_config, or a model as the teacher."
            )
        super().__init__(model, device, BASE)

    def _freeze(self, device: torch.device) -> None:
        pass

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[None]:
        # PEFT unfreezes the whole adapter when it switches it on again.
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, was in trained:
                parameter.requires_grad_(was)


@contextlib.contextmanager
def replaced_head(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model computes ``forward`` in the place of its output layer, so that wrappers around it notice nothing."""
    layer = model.get_output_embeddings()
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def check_unchanged(given: Tensor, returned: Tensor, model: nn.Module) -> None:
    """Refuses models that work on what their output layer returns.

    Raises:
        FuseError: they would scale the losses that are computed in its place.
    """
    if given.shape != returned.shape or not torch.equal(given.detach().float(), returned.detach().float()):
        raise FuseError(
            f"chunk_size: {type(model).__name__} changes its logits after the output layer (scaling, soft-capping), "
            "which can't be done in chunks. Set chunk_size to 0."
        )


def load_teacher(name: str, options: dict[str, Any]) -> nn.Module:
    """Loads the model that a checkpoint's configuration names, in its own precision.

    Raises:
        FuseError: there is none, its class isn't one of transformers, or it lacks weights.
    """
    options = {"dtype": "auto", "use_safetensors": True} | options | {"trust_remote_code": False}
    where = {key: options[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in options}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        kind = (config.architectures or ["no architecture"])[0]
        if not hasattr(transformers, kind):
            raise FuseError(f"teacher {name}: its configuration names {kind}, which transformers doesn't have.")
        loader = getattr(transformers, kind)
        model, info = loader.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise FuseError(f"teacher {name}: can't be loaded: {reason}.") from error
    if missing := sorted(info["missing_keys"]):
        raise FuseError(f"teacher {name}: lacks {len(missing)} weight(s) of a {kind}, first {missing[0]!r}.")
    return model


def tokenizer_of(model: nn.Module, processing_class: Any = None) -> PreTrainedTokenizerBase | None:
    """The given tokenizer or the processor's; else that of the folder the model came from; None if there is none."""
    found = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(found, PreTrainedTokenizerBase):
        return found
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    with contextlib.suppress(OSError, ValueError, KeyError):
        # It was loaded from there, so it is at hand.
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False) if source else None
    return None


def check_teacher(
    teacher: Teacher,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuses a teacher whose predictions aren't about the same tokens or classes.

    Vocabularies of different size are fine if the tokenizers are equal: rows beyond them are padding, and cut off.

    Raises:
        FuseError: tokenizers, vocabularies or classes differ, or can't be compared.
    """
    of_tokens = student.get_output_embeddings() is not None
    configs = student.config, teacher.base.config
    check_predictions(f"teacher {teacher.name}", *configs, tokenizer, teacher_tokenizer, of_tokens=of_tokens)


def check_predictions(
    named: str,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    *,
    of_tokens: bool,
) -> None:
    """As :func:`check_teacher`, from the configs of both."""
    if tokenizer is not None and teacher_tokenizer is not None and not _equal(tokenizer, teacher_tokenizer):
        raise FuseError(
            f"{named}: has another tokenizer than the student ({len(teacher_tokenizer)} and {len(tokenizer)} tokens). "
            "It would read the student's token ids as other text. Use a teacher of the same family."
        )
    if not of_tokens:
        _check_classes(named, student, teacher)
        return
    sizes = [config.get_text_config().vocab_size for config in (student, teacher)]
    if sizes[0] == sizes[1]:
        return
    if tokenizer is None or teacher_tokenizer is None:
        raise FuseError(
            f"{named}: its vocabulary has {sizes[1]} entries, the student's {sizes[0]}. That may be padding, if the "
            "tokenizers are equal, but they aren't both known. Give processing_class and teacher_tokenizer."
        )
    if len(tokenizer) > min(sizes):
        raise FuseError(
            f"{named}: the tokenizer has {len(tokenizer)} tokens, but vocabularies have {sizes[1]} (teacher) and "
            f"{sizes[0]} (student) entries. Resize the smaller model's embeddings."
        )


def _equal(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab() and all(
        one(text)["input_ids"] == other(text)["input_ids"] for text in PROBES
    )


def _check_classes(named: str, student: Any, teacher: Any) -> None:
    if student.num_labels != teacher.num_labels:
        raise FuseError(f"{named}: predicts {teacher.num_labels} classes, the student {student.num_labels}.")
    for number, name in student.id2label.items():
        other = teacher.id2label.get(number, name)
        unnamed = name == f"LABEL_{number}" or other == f"LABEL_{number}"
        if not unnamed and str(name).lower() != str(other).lower():
            raise FuseError(
                f"{named}: its class {number} is {other!r}, the student's {name!r}. Give the student the teacher's "
                "id2label and label2id, and number the labels of the data likewise."
            )
