"""From a training recipe to everything but the weights: whatever can be wrong with it is found here."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint, resolve
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.training_data import Rows, TrainingData, encode, encode_images, read_rows, set_classes
from hf_fuse.training_recipe import TrainingRecipe, adapter_config, training_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_fuse.trainer import FuseConfig

# Format of the data -> (loader, PEFT's name of the task, what the model has to be).
KINDS = {
    "text": ("AutoModelForCausalLM", "CAUSAL_LM", "causal language model"),
    "classification": ("AutoModelForSequenceClassification", "SEQ_CLS", "text classifier"),
    "images": ("AutoModelForImageClassification", None, "image classifier"),
}


@dataclass
class Setup:
    """A checked recipe and what it names.

    Attributes:
        recipe: with Hub models pinned to their commits.
        base: the model's checkpoint; its weights have not been read.
        config: the model's, with the classes of the data.
        processor: tokenizer, image processor, or None.
        data: encoded.
        arguments: for the Trainer.
        adapter: config of the adapter to put on the model, or None.
        adapter_folder: of the adapter to go on with, or None.
        kind: key of ``KINDS``.
        new_head: the base has no head for these classes; it is trained with the adapter, or comes with an old one.
        trainable: (trainable parameters, all of them), or None where they can't be known without the weights.
    """

    recipe: TrainingRecipe
    base: Checkpoint
    config: PreTrainedConfig
    processor: Any
    data: TrainingData
    arguments: FuseConfig
    adapter: PeftConfig | None
    adapter_folder: Path | None
    kind: str
    new_head: bool
    trainable: tuple[int, int] | None = None

    @property
    def dtype(self) -> str:
        return self.recipe.model.dtype or ("auto" if self.recipe.trains_adapter else "float32")

    def summary(self) -> str:
        """One line: what is trained, on how much."""
        what = "adapter" if self.recipe.trains_adapter else "model"
        if self.trainable:
            what = f"{self.trainable[0]:,} of {self.trainable[1]:,} parameters"
        facts = ", ".join(f"{value:,} {name}" for name, value in self.data.facts.items())
        return f"{what} of {self.base.repo_id or self.base.folder.name}, on {facts}"

    def load_model(self) -> PreTrainedModel:
        """The base with its weights, the adapter on it, ready to train.

        Raises:
            CheckpointError: weights and config disagree, the base lacks weights that training would start from at
                random, or the adapter is that of another base.
        """
        from transformers.utils import logging

        loader, _, what = KINDS[self.kind]
        verbosity = logging.get_verbosity()
        if self.new_head:
            logging.set_verbosity_error()  # that its weights are missing is no news
        try:
            model, info = _loader(loader).from_pretrained(
                self.base.folder, config=self.config, dtype=self.dtype, use_safetensors=True, trust_remote_code=False,
                local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=self.new_head,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(f"{self.base.ref}: cannot be loaded as a {what}: {_first_line(error)}.") from error
        finally:
            logging.set_verbosity(verbosity)
        if info["missing_keys"] and not self.new_head:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(f"{self.base.ref}: lacks {len(missing)} weight(s) of a {what}, first {missing[0]!r}.")
        # What an adapter says of its base must hold on other machines.
        model.name_or_path = model.config._name_or_path = self.base.repo_id or str(self.base.folder)
        return self.with_adapter(model)

    def with_adapter(self, model: PreTrainedModel) -> Any:
        """``model`` with the recipe's adapter, old or new, or as it is."""
        import peft

        if self.adapter_folder:
            try:
                return peft.PeftModel.from_pretrained(
                    model, self.adapter_folder, is_trainable=True, use_safetensors=True
                )
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{self.recipe.model.adapter}: is no adapter for {self.base.ref}: {_first_line(error)[:300]}. Name "
                    "the base that it was trained on."
                ) from error
        if self.adapter is None:
            return model
        config = copy.deepcopy(self.adapter)  # PEFT completes it for this model
        config.revision = self.base.commit
        if self.new_head and self.kind == "images" and not getattr(config, "modules_to_save", None):
            config.modules_to_save = _heads(model)
        return peft.get_peft_model(model, config)


def prepare(recipe: TrainingRecipe, output_dir: Path) -> Setup:
    """Checks a recipe against models and data, which are read and encoded, and reads no weights.

    Raises:
        RecipeError: a key of ``adapter`` or ``train``, or an adapter that does not fit the model.
        CheckpointError: no such model, damaged files, or a model of another kind than the data asks for.
        FuseError: everything that can be wrong with the data.
    """
    import torch

    if recipe.adapter:
        adapter_config(recipe.adapter, None)
    defaults: dict[str, Any] = {"disable_tqdm": True, "use_cpu": not torch.accelerator.is_available()}
    if recipe.data.eval or recipe.data.eval_fraction:
        defaults["eval_strategy"] = "epoch"
    arguments = training_config(recipe.train, output_dir, distilled=recipe.distils, **defaults)
    _check_replay(recipe, arguments)
    rows = read_rows(recipe.data)
    kind = "images" if rows.has_images else "classification" if rows.format == "classification" else "text"
    if recipe.data.packing and arguments.use_cache:
        raise RecipeError("train: use_cache can't be used with packing: packed texts would see each other.")
    if arguments.eval_strategy != "no" and not rows.eval:
        raise RecipeError("train: eval_strategy needs data to evaluate on. Give data.eval or data.eval_fraction.")
    if rows.eval and kind == "text" and "prediction_loss_only" not in recipe.train:
        arguments.prediction_loss_only = True  # else the logits of the whole evaluation set are gathered

    base = open_checkpoint(recipe.model.path, recipe.model.revision)
    adapter_folder, adapter_commit = None, None
    if recipe.model.adapter:
        adapter_folder, _, adapter_commit = resolve(recipe.model.adapter, recipe.model.adapter_revision)
        if not (adapter_folder / "adapter_config.json").exists():
            raise CheckpointError(f"{recipe.model.adapter}: is no adapter (it has no adapter_config.json).")
    commits = {"revision": base.commit, "adapter_revision": adapter_commit}
    pinned = recipe.model.model_copy(update={key: commit for key, commit in commits.items() if commit})
    setup = Setup(
        recipe.model_copy(update={"model": pinned}), base, _config(base, recipe, kind), None, None, arguments, None,
        adapter_folder, kind, False,
    )  # fmt: skip
    if recipe.adapter:
        setup.adapter = adapter_config(recipe.adapter, KINDS[kind][1])
    if rows.format == "classification":
        setup.new_head = set_classes(setup.config, rows)
    _encode(setup, rows)
    _try_adapter(setup)
    if recipe.distils:
        from hf_fuse.distill.recipe_checks import check_teachers

        check_teachers(setup)
    return setup


def _check_replay(recipe: TrainingRecipe, arguments: FuseConfig) -> None:
    wanted = any("replay_logits" in objective.required for objective in arguments.read_objectives()[1])
    if wanted and not recipe.data.replay:
        raise RecipeError("train.objectives: replay needs data.replay, the texts that are not to be forgotten.")
    if recipe.data.replay and not wanted:
        raise RecipeError("data.replay needs an objective that uses it. Add train.objectives.replay: 0.1.")


def _encode(setup: Setup, rows: Rows) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = setup.base.folder
    if setup.kind == "images":
        import torch

        if any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
            setup.processor = _loaded(AutoImageProcessor, folder, setup.base.ref, "image processor")
        stored = setup.config.dtype or torch.float32
        dtype = stored if setup.dtype == "auto" else getattr(torch, setup.dtype)
        setup.data = encode_images(rows, setup.processor, setup.config, dtype)
        return
    source = next((f for f in (setup.adapter_folder, folder) if f and (f / "tokenizer_config.json").exists()), folder)
    setup.processor = _loaded(AutoTokenizer, source, setup.base.ref, "tokenizer")
    setup.data = encode(rows, setup.recipe.data, setup.processor, setup.config)
    if rows.format == "classification" and setup.config.get_text_config().pad_token_id is None:
        # Decoders classify at the last token that is no padding, so they must know which that is.
        setup.config.get_text_config().pad_token_id = setup.data.collator.keywords["pad_id"]


def _config(base: Checkpoint, recipe: TrainingRecipe, kind: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    loader, _, what = KINDS[kind]
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{base.ref}: config.json cannot be used: {_first_line(error)}.") from error
    fits = type(config) in _loader(loader)._model_mapping
    if not fits or (kind == "text" and (base.architecture or "").endswith("ForMaskedLM")):
        raise CheckpointError(
            f"{base.ref}: is a {base.architecture or config.model_type}, but the data trains a {what}. Choose another "
            "model, or other data."
        )
    if recipe.model.attn_implementation:
        config._attn_implementation = recipe.model.attn_implementation
    return config


def _try_adapter(setup: Setup) -> None:
    """Puts the adapter on a copy of the model that has shapes and no weights, looks whether that can serve the
    objectives, and counts what would be trained."""
    import torch

    from hf_fuse.loss_inputs import check_needs

    with torch.device("meta"):
        model = _loader(KINDS[setup.kind][0]).from_config(copy.deepcopy(setup.config))
        if setup.recipe.data.packing and "position_ids" not in inspect.signature(model.forward).parameters:
            raise RecipeError(
                f"data: a {setup.config.model_type} takes no positions: packed texts would see each other."
            )
        try:
            model = model if setup.adapter_folder else setup.with_adapter(model)
        except (FuseError, ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"adapter: {' '.join(str(error).split())}") from error
        except (RuntimeError, NotImplementedError):
            return  # an adapter that starts from the weights themselves can't be tried without them
    if not setup.adapter_folder:
        base = model.get_base_model() if setup.adapter else model
        extra = frozenset()
        if setup.recipe.distils:
            from hf_fuse.distill.trainer import DistillTrainer

            extra = DistillTrainer.extra_tensors
        for objective in setup.arguments.read_objectives()[1]:
            check_needs(objective, base, setup.data.train, extra)
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        setup.trainable = sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def _heads(model: PreTrainedModel) -> list[str]:
    """The modules beside the backbone: what a new set of classes has to learn from the start."""
    beside = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    return [name for name, module in beside if next(module.parameters(), None) is not None]


def _loader(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _loaded(loader: Any, folder: Path, ref: str, what: str) -> Any:
    try:
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # missing files, missing packages and damaged files all raise differently
        raise CheckpointError(f"{ref}: its {what} cannot be loaded: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().split(". ")[0].rstrip(".")
