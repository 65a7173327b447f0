"""From a recipe for learning to a folder: what a merge needs to know, as files that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hf_fuse.checkpoint.reader import DTYPE_CODES, Checkpoint, open_checkpoint
from hf_fuse.checkpoint.writer import check_output, exclusive_output, lay_out
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.evaluation_models import Candidate, candidates, check_device, loaded
from hf_fuse.merge.finish import RECIPE_FILE, versions
from hf_fuse.merge.learn_data import encoded_examples, read_examples
from hf_fuse.merge.learn_recipe import LearnRecipe, load_learn_recipe
from hf_fuse.merge.workers import World
from hf_fuse.recipe import dump_recipe, output_folder
from hf_fuse.training_data import TrainingData


@dataclass
class Subject:
    """The model to learn about and the examples to learn from.

    Attributes:
        kind: ``causal``, ``seq2seq``, ``text`` or ``image``: what the model predicts from.
        data: encoded; ``train`` holds the chosen examples.
        labelled: whether the labels of the data mean anything.
    """

    checkpoint: Checkpoint
    candidate: Candidate
    kind: str
    data: TrainingData
    recipe: LearnRecipe
    labelled: bool

    @cached_property
    def model(self) -> Any:
        """The live model, in evaluation mode."""
        return loaded(self.candidate, self.kind, device=self.recipe.device, dtype=self.recipe.dtype).eval()

    def batch(self, numbers: Iterable[int]) -> dict[str, Tensor]:
        """Some of the examples, on the model's device."""
        made = self.data.collator([self.data.train[number] for number in numbers])
        return {name: values.to(self.model.device) for name, values in made.items()}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All examples in batches, under a progress bar that counts examples."""
        count = len(self.data.train)
        with tqdm(total=count, desc=self.recipe.estimator, unit="example", disable=None) as bar:
            for start in range(0, count, size):
                numbers = range(start, min(start + size, count))
                yield self.batch(numbers)
                bar.update(len(numbers))

    def stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers by parameter name -> by the names, and in the shapes, that the checkpoint stores the weights in.

        Raises:
            CheckpointError: the checkpoint has other names.
        """
        from transformers.core_model_loading import revert_weight_conversion

        found = revert_weight_conversion(self.model, dict(values))
        if lost := [name for name in found if name not in self.checkpoint.tensors]:
            raise CheckpointError(
                f"{self.candidate.name}: its files hold no tensor {lost[0]}, so they are of an older layout. Load the "
                "model with transformers, save it again with save_pretrained, and use that."
            )
        return found


@dataclass(frozen=True)
class Learned:
    """What an estimator has found.

    Attributes:
        tensors: by the checkpoint's names.
        shared: name -> the name under which its numbers are.
        inputs_first: matrices stored ``[in, out]``.
        facts: for the summary: name -> number.
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, str] = field(default_factory=dict)
    inputs_first: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def learn(
    recipe: str | Path | dict | LearnRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Estimates from data what a merge method needs to know of a model, or of several, into a new folder.

    Of one model that is statistics, and the folder is what ``statistics`` beside a model in a recipe for merging names.
    Of several it is the coefficients of a merge: the folder is a value of ``weight``, ``{learned: FOLDER}``, and holds
    that recipe (``merge.yaml``) and a chart.

    Args:
        recipe: YAML file, dictionary or LearnRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"examples": 1024}``.
        overwrite: replace an existing output, in one step, when the new one is complete.

    Raises:
        FuseError: with one message that says what, where and what to do. No output is left then, an old one is intact.
    """
    recipe = load_learn_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    if World().size > 1:
        raise RecipeError("learn: runs in one process. Start it without a launcher.")
    check_output(folder, overwrite)
    if recipe.method.argument == "family":
        from hf_fuse.merge.family import open_family
        from hf_fuse.merge.learned_output import write_coefficients

        family = open_family(recipe)
        with exclusive_output(folder, overwrite=overwrite) as partial:
            partial.folder.mkdir()
            write_coefficients(family, recipe.method.function(family, **recipe.options), partial.folder, folder)
            partial.publish()
        return folder
    subject = open_subject(recipe)
    with exclusive_output(folder, overwrite=overwrite) as partial:
        found = recipe.method.function(subject, **recipe.options)
        bad = next((name for name, values in found.tensors.items() if not values.isfinite().all()), None)
        if bad:
            raise FuseError(
                f"{subject.candidate.name}: the {recipe.estimator} of tensor {bad} is not finite. Check the model, or "
                "compute in dtype: float32."
            )
        rows = [(name, DTYPE_CODES["float32"], tuple(values.shape)) for name, values in found.tensors.items()]
        metadata = {
            "statistics": recipe.estimator,
            "shared": json.dumps(found.shared, sort_keys=True),
            "inputs_first": json.dumps(sorted(found.inputs_first)),
        }
        layout = lay_out(rows, 1 << 62, recipe.estimator, metadata)
        partial.create(layout)
        for name, values in found.tensors.items():
            partial.write(
                layout.places[name], 0, memoryview(values.float().cpu().contiguous().view(-1).numpy()).cast("B")
            )
        partial.sync()
        (partial.folder / RECIPE_FILE).write_text(_record(subject, found), encoding="utf-8")
        partial.publish()
    return folder


def open_subject(recipe: LearnRecipe) -> Subject:
    """Finds the model and reads and encodes the data, but no weights.

    Raises:
        CheckpointError: no such model, damaged, or of another kind than the data.
        FuseError: everything that can be wrong with the data, or an unknown device.
    """
    check_device(recipe.device)
    entry = recipe.data_entry(recipe.data)
    checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision)
    rows, kind, labelled = read_examples(entry, checkpoint)
    candidate = candidates([str(checkpoint.folder)], kind)[0]
    return Subject(checkpoint, candidate, kind, encoded_examples(rows, recipe, entry, candidate), recipe, labelled)


def _record(subject: Subject, found: Learned) -> str:
    """The recipe as it was run."""
    recipe = subject.recipe
    pinned = {"revision": subject.checkpoint.commit} if subject.checkpoint.commit else {}
    update = {"model": recipe.model.model_copy(update=pinned), "output": None}
    provenance = {"versions": versions(), "learned": dict(found.facts)}
    return dump_recipe(recipe.model_copy(update=update | {"provenance": provenance}))
