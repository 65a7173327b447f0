"""``hf-fuse train``: a recipe -> a trained adapter or model in a folder, by :class:`hf_fuse.trainer.FuseTrainer`.

The module is also the function: ``hf_fuse.train(recipe, output="out")`` runs :func:`train`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.writer import exclusive_output, leftovers, remove_tree
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.recipe import PushEntry
from hf_fuse.training_launch import launch, launched, quiet, ranks, said_by_lead, speaks
from hf_fuse.training_output import (
    RESULTS,
    check_same_run,
    draw_losses,
    has_checkpoint,
    newest_checkpoint,
    starting_point,
    write_card,
    write_recipe,
)
from hf_fuse.training_recipe import TrainingRecipe, load_training_recipe
from hf_fuse.training_setup import Setup, prepare

NOT_KEPT = "training_args.bin"  # a pickle; fuse_recipe.yaml says the same


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        output: the folder.
        figures: ``train_loss``, and after an evaluation ``eval_loss`` and what else was measured.
        steps: optimizer steps in all.
        trainable: number of parameters that were trained.
        notes: what the user should know about the data.
        address: where it was pushed to.
    """

    output: Path
    figures: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    trainable: int | None = None
    notes: tuple[str, ...] = ()
    address: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "trainable_parameters": self.trainable, **self.figures}


def train(
    recipe: str | Path | dict | TrainingRecipe,
    overrides: dict[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    push: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
) -> TrainingResult:
    """Trains as a recipe says. The output appears in one step when all is done; checkpoints until then lie in
    ``<output>.partial``.

    With ``num_processes`` in the recipe this process only launches the others (with accelerate) and waits for them.

    Args:
        recipe: a YAML file, a dictionary or a TrainingRecipe.
        overrides: dotted keys that win: ``{"train.learning_rate": 1e-4}``.
        output: folder to make, instead of the recipe's.
        overwrite: replace an existing output when the new one is complete; drop an unfinished run.
        resume: go on from the newest checkpoint of an unfinished run, or else of the output.
        push: Hub id to push the result to, instead of the recipe's.
        private: visibility of a new repository.
        dry_run: check everything, read and encode the data, and train nothing.

    Raises:
        RecipeError, CheckpointError, OutputError, HubError, FuseError: found before anything is trained.
        FuseError: the loss is no longer finite, or a launched process failed.
    """
    recipe = load_training_recipe(recipe, overrides)
    recipe = _placed(recipe, output, push, private)
    folder = Path(recipe.output).expanduser().absolute()
    rank, size = ranks()
    if launched() and recipe.num_processes not in (None, size):
        raise RecipeError(
            f"num_processes is {recipe.num_processes}, but {size} process(es) were started. Leave num_processes out of "
            "the recipe, or start as many."
        )
    with quiet(rank), said_by_lead(rank):
        checkpoint = starting_point(folder, overwrite=overwrite, resume=resume)
        target = _push_target(recipe) if rank == 0 else None
        setup = prepare(recipe, leftovers(folder)[0])
        if checkpoint:
            check_same_run(checkpoint, setup.recipe)
    notes = tuple(setup.data.notes)
    if speaks():
        print(f"training {setup.summary()}", *(f"note: {note}" for note in notes), sep="\n", file=sys.stderr)
    if dry_run:
        return TrainingResult(folder, trainable=setup.trainable and setup.trainable[0], notes=notes)
    if not launched() and (recipe.accelerate_config or (recipe.num_processes or 1) > 1):
        launch(recipe, use_cpu=setup.arguments.use_cpu, overwrite=overwrite, resume=resume)
        result = _read_result(folder)
    else:
        with quiet(rank):
            result = _run(setup, folder, checkpoint, lead=rank == 0, overwrite=overwrite or resume)
    if target is not None:
        from hf_fuse.hub import push as upload

        address = upload(folder, target.repo_id, target=target, commit_message="Push a model trained with hf_fuse")
        result = replace(result, address=address)
    return replace(result, notes=notes)


def _placed(
    recipe: TrainingRecipe, output: str | Path | None, push: str | None, private: bool | None
) -> TrainingRecipe:
    """The recipe with what the command line says of where the result goes."""
    update: dict[str, Any] = {"output": str(output)} if output else {}
    if push or (private is not None and recipe.push):
        update["push"] = PushEntry(repo=push) if push else recipe.push
        if private is not None:
            update["push"] = update["push"].model_copy(update={"private": private})
    recipe = recipe.model_copy(update=update)
    if not recipe.output:
        raise RecipeError("output: say which folder to make, in the recipe or with --output.")
    return recipe


def _push_target(recipe: TrainingRecipe) -> Any:
    if recipe.push is None:
        return None
    from hf_fuse.hub import check_push

    return check_push(recipe.push.repo, private=recipe.push.private, revision=recipe.push.revision)


def _run(setup: Setup, folder: Path, checkpoint: Path | None, *, lead: bool, overwrite: bool) -> TrainingResult:
    """Trains in this process, alone or as one of several; ``lead`` writes."""
    import transformers

    from hf_fuse.trainer import FuseTrainer

    kind, more = FuseTrainer, {}
    if setup.recipe.distils:
        from hf_fuse.distill.open_sources import open_sources
        from hf_fuse.distill.trainer import DistillTrainer

        kind, more = DistillTrainer, {"teacher": [*(setup.recipe.teacher or []), *open_sources(setup)]}
    with contextlib.ExitStack() as stack:
        partial = leftovers(folder)[0]
        if lead:
            unfinished = stack.enter_context(exclusive_output(folder, overwrite=overwrite, keep=has_checkpoint))
            if checkpoint is None:
                remove_tree(partial)
            partial.mkdir(exist_ok=True)
            write_recipe(setup, partial)
        transformers.set_seed(setup.arguments.seed)  # adapters and new heads start at random
        model = setup.load_model()
        # Of no use here, and with a cache transformers would take the texts of a packed row for one.
        uses_cache, model.config.use_cache = getattr(model.config, "use_cache", None), False
        trainer = kind(
            model=model, args=setup.arguments, train_dataset=setup.data.train, eval_dataset=setup.data.eval,
            replay_dataset=setup.data.replay, data_collator=setup.data.collator, processing_class=setup.processor,
            callbacks=[_progress()],
            compute_metrics=class_scores if setup.data.format == "classification" else None, **more,
        )  # fmt: skip
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        _check_count(setup.recipe, trainer.accelerator.num_processes)
        try:
            done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            if lead and (left := newest_checkpoint(partial)):
                print(f"note: {left} is kept; --resume goes on from it.", file=sys.stderr)
            raise
        figures = {"train_loss": done.training_loss} | _evaluation(trainer, setup)
        _check_finite(model, figures)
        model.config.use_cache = uses_cache
        trainer.save_model(str(partial))
        trainer.save_state()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result = TrainingResult(folder, figures, trainer.state.global_step, trainable)
        trainer.accelerator.wait_for_everyone()
        if lead:
            (partial / NOT_KEPT).unlink(missing_ok=True)
            draw_losses(trainer.state.log_history, partial)
            (partial / RESULTS).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
            write_card(setup, partial, figures)
            unfinished.publish()
        return result


def class_scores(prediction: Any) -> dict[str, float]:
    """Accuracy and macro-averaged F1 of ``(logits [N, C], labels [N])``."""
    import evaluate

    from hf_fuse.evaluation import METRICS

    predicted_N, labels_N = prediction.predictions.argmax(-1), prediction.label_ids
    accuracy, f1 = (evaluate.load(str(METRICS / name), keep_in_memory=True) for name in ("accuracy", "f1"))
    return {
        "accuracy": accuracy.compute(predictions=predicted_N, references=labels_N)["accuracy"],
        "macro_f1": f1.compute(predictions=predicted_N, references=labels_N, average="macro")["f1"],
    }


def _evaluation(trainer: Any, setup: Setup) -> dict[str, float]:
    """Figures on the evaluation data, from the log if the last step ended with them."""
    if setup.data.eval is None:
        return {}
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    same_weights = not setup.arguments.load_best_model_at_end
    if last.get("step") != trainer.state.global_step or not same_weights:
        last = trainer.evaluate()
    figures = {
        key: value
        for key, value in last.items()
        if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_time"))
    }
    if setup.kind == "text" and not setup.arguments.label_smoothing_factor:  # else the loss is no cross-entropy
        figures["eval_perplexity"] = math.exp(min(figures["eval_loss"], 700))
    return figures


def _check_finite(model: Any, figures: dict[str, float]) -> None:
    # Weights that are merely huge are finite; what they compute is not.
    broken = [name for name in ("train_loss", "eval_loss") if not math.isfinite(figures.get(name, 0))]
    for name, parameter in model.named_parameters():
        values = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a shard of it, under FSDP
        if parameter.requires_grad and not values.isfinite().all():
            broken.append(name)
    if broken:
        raise FuseError(
            f"{broken[0]}: is no longer finite after training, so nothing is saved. Lower train.learning_rate, or "
            "train in a wider dtype. The old output, if any, is intact."
        )


def _check_count(recipe: TrainingRecipe, count: int) -> None:
    if recipe.num_processes not in (None, count):
        raise FuseError(f"num_processes is {recipe.num_processes}, but accelerate made {count} of them work together.")


def _read_result(folder: Path) -> TrainingResult:
    """What the launched processes wrote down."""
    found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    steps, trainable = found.pop("steps"), found.pop("trainable_parameters")
    return TrainingResult(folder, found, steps, trainable)


def _progress() -> Any:
    """Bars on a terminal, and everywhere a line on standard error for each entry of the log."""
    import transformers
    from tqdm import tqdm

    class Progress(transformers.ProgressCallback if sys.stderr.isatty() else transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            # Routers have a dozen numbers each; they are in the log and in the chart.
            shown = [
                f"{key} {value:.4g}"
                for key, value in (logs or {}).items()
                if isinstance(value, (int, float)) and not key.startswith("router/") and key != "total_flos"
            ]
            tqdm.write(f"step {state.global_step}/{state.max_steps}: {', '.join(shown)}", file=sys.stderr)

    return Progress()


class _CallableModule(types.ModuleType):
    """``hf_fuse.train`` names both the file and the verb, as ``hf_fuse.merge`` does."""

    def __call__(self, *args: Any, **kwargs: Any) -> TrainingResult:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
