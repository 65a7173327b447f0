"""A base, the models made from it, and examples of what they were made for: what coefficients are learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.checkpoint.adapter import is_adapter
from hf_fuse.checkpoint.reader import Checkpoint, FilePool, open_checkpoint, resolve
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.evaluation_models import Candidate, candidates, check_device, loaded
from hf_fuse.merge.columns import Columns
from hf_fuse.merge.contraction import Contraction
from hf_fuse.merge.heads import head_tensors
from hf_fuse.merge.learn_data import WRITERS, encoded_examples, read_examples
from hf_fuse.merge.learn_recipe import LearnRecipe
from hf_fuse.merge.live import regions
from hf_fuse.merge.plan import Parent, Plan
from hf_fuse.merge.plan import plan as planned
from hf_fuse.merge.sources import Buffers, read_numbers
from hf_fuse.merge.stream import Merger
from hf_fuse.merge.units import MERGE, Unit
from hf_fuse.merge.workers import Workers, World
from hf_fuse.training_data import TrainingData


@dataclass
class Task:
    """Examples of something to do.

    Attributes:
        name: the model's, or that of the data.
        model: which of the models was made for it; None if it is that of none.
        labelled: whether the labels mean anything.
    """

    name: str
    model: int | None
    data: TrainingData
    labelled: bool

    def batch(self, numbers: Iterable[int], device: torch.device) -> dict[str, Tensor]:
        made = self.data.collator([self.data.train[int(number)] for number in numbers])
        return {name: values.to(device) for name, values in made.items()}

    def batches(self, size: int, device: torch.device, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        """All examples once, or the first ``most``, in their order."""
        count = min(len(self.data.train), most or len(self.data.train))
        for start in range(0, count, size):
            yield self.batch(range(start, min(start + size, count)), device)

    def drawn(self, size: int, device: torch.device, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches without end: all examples in a new order each time, all batches of one size."""
        random = torch.Generator().manual_seed(seed)
        count = len(self.data.train)
        size = min(size, count)
        while True:
            order = torch.randperm(count, generator=random)
            for start in range(0, count - size + 1, size):
                yield self.batch(order[start : start + size].tolist(), device)


@dataclass
class Family:
    """Base and models as a merge sees them, and their tasks.

    Attributes:
        kind: ``causal``, ``seq2seq``, ``text`` or ``image``: what the models predict from.
        plan: of the merge that the coefficients are for.
        merger: the stream of its task vectors, measured where its method measures.
        tasks: one per model with data of its own; or the target alone.
        control: examples of what is to stay as it is, if the recipe has some.
        heads: stored names of the tensors that every model keeps its own of.
    """

    recipe: LearnRecipe
    kind: str
    plan: Plan
    merger: Merger
    tasks: list[Task]
    candidate: Candidate  # that the live model is loaded from
    control: Task | None = None
    heads: list[str] = field(default_factory=list)

    @property
    def units(self) -> list[Unit]:
        """What is merged, in the order of the base's files."""
        return [unit for unit in self.plan.units if unit.action == MERGE]

    @property
    def models(self) -> list[Parent]:
        """The models in the recipe's order; the base is none of them."""
        return [self.plan.parents[model.key] for model in self.recipe.models]

    @cached_property
    def model(self) -> Any:
        """The live model, in evaluation mode. Its weights change."""
        recipe = self.recipe
        return loaded(self.candidate, self.kind, device=recipe.device, dtype=recipe.dtype).eval()

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def contraction(self, layout: dict[str, Columns], count: int, **options: Any) -> Contraction:
        """The live model's contraction with columns for the units in ``layout``; see there for ``options``."""
        return Contraction(self.model, self.merger, self.plan.units, layout, count, **options)

    def put_head(self, number: int | None) -> None:
        """Gives the live model the head of one of the models, or of the base, if they keep their own.

        Raises:
            CheckpointError: the base has none.
        """
        if not self.heads:
            return
        parent = self.plan.parents[self.recipe.base_model.key] if number is None else self.models[number]
        infos = {**parent.checkpoint.tensors, **(parent.adapter.replaced if parent.adapter else {})}
        buffers = Buffers(torch.device("cpu"), torch.float32, FilePool())
        for stored, name in self._live_heads.items():
            if stored not in infos:
                raise CheckpointError(f"{parent.ref.key}: has no tensor {stored}, which a head for its data needs.")
            info = infos[stored]
            values = torch.empty(info.numel)
            read_numbers(info, 0, values, buffers)
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            old = getattr(module, leaf)
            new = values.view(info.shape).to(old.device, old.dtype)
            # Another number of classes needs another parameter.
            setattr(module, leaf, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
        buffers.pool.close()

    @cached_property
    def _live_heads(self) -> dict[str, str]:
        """Names in the live model of the tensors of heads, by their stored names."""
        found = regions(self.model, {unit.name: unit.shape for unit in self.plan.units})
        names = {id(tensor): name for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]}
        return {stored: names[id(found[stored].parameter)] for stored in self.heads if stored in found}


def open_family(recipe: LearnRecipe) -> Family:
    """Plans the merge, and reads and encodes all data; no weights but what the merge has to measure first.

    Raises:
        CheckpointError: models that do not fit together, or are of another kind than the data.
        FuseError: everything that can be wrong with the data, or an unknown device.
    """
    check_device(recipe.device)
    if recipe.device == "auto":
        raise RecipeError("device: auto may spread the model over several devices. Say cpu, cuda or cuda:N.")
    keys = [model.key for model in recipe.models]
    if recipe.base_model.key in keys or len(set(keys)) < len(keys):
        raise RecipeError("models: the base, or a model for the second time, is among them. Remove it.")
    shown = _whole_models(recipe)[0]
    sources = [(model.key, number, model.data) for number, model in enumerate(recipe.models) if model.data]
    if recipe.data:
        sources = [("data", None, recipe.data)]
    if recipe.control:
        sources.append(("control", None, recipe.control))
    read = [(name, number, recipe.data_entry(data)) for name, number, data in sources]
    read = [(name, number, entry, *read_examples(entry, shown)) for name, number, entry in read]
    kinds = {kind: name for name, _, _, _, kind, _ in read}
    if len(kinds) > 1:
        said = "; ".join(f"{name}: {kind}" for kind, name in kinds.items())
        raise RecipeError(f"data: the models' examples are of different kinds ({said}). Expected one.")
    kind = next(iter(kinds))
    plan = planned(_merging(recipe, kind))
    own = _candidates(plan, recipe, kind)
    origin = own[None if plan.recipe.heads is None or plan.recipe.heads.key == recipe.base_model.key else 0]
    tasks = []
    for name, number, entry, rows, _, labelled in read:
        data = encoded_examples(rows, recipe, entry, own[number])
        tasks.append(Task(name, number, data, labelled))
    control = tasks.pop() if recipe.control else None
    merger = _measured(plan, recipe)
    heads = sorted(head_tensors(plan.parents[plan.recipe.heads.key].checkpoint)) if plan.recipe.heads else []
    return Family(recipe, kind, plan, merger, tasks, origin, control, heads)


def _whole_models(recipe: LearnRecipe) -> list[Checkpoint]:
    """The models that are no adapters, and the base.

    Raises:
        CheckpointError: they are of different architectures.
    """
    refs = [m for m in recipe.models if not m.adapter and not is_adapter(resolve(m.path, m.revision)[0])]
    found = [open_checkpoint(ref.path, ref.revision) for ref in [*refs, recipe.base_model]]
    kinds = {checkpoint.config.get("model_type"): checkpoint.ref for checkpoint in found}
    if len(kinds) > 1:
        said = "; ".join(f"{ref}: {kind}" for kind, ref in kinds.items())
        raise CheckpointError(f"models: are of different architectures ({said}). Merge models made from one base.")
    return found


def _merging(recipe: LearnRecipe, kind: str) -> dict[str, Any]:
    """The merge whose weights are learned; every number of it that is not learned."""
    merging = getattr(recipe.method.module, "merging", None)
    method, parameters = merging(**recipe.options) if merging else ("task_arithmetic", {})
    models = [model.model_dump(exclude={"data"}, exclude_none=True) for model in recipe.models]
    said = {"method": method, "base_model": recipe.base_model.model_dump(exclude_none=True), "models": models}
    if kind not in WRITERS and recipe.heads == "own":
        said["heads"] = models[0] if recipe.models[0].data else said["base_model"]
    return said | {"parameters": parameters, "seed": recipe.seed}


def _candidates(plan: Plan, recipe: LearnRecipe, kind: str) -> dict[int | None, Candidate]:
    """Config and tokenizer or image processor of every model with data, by number, and those of the base (None) where
    they are needed; adapters have those of the base."""
    wanted = {number: model.key for number, model in enumerate(recipe.models) if model.data}
    if kind in WRITERS or recipe.data or recipe.control or recipe.heads == "merged":
        wanted |= {None: recipe.base_model.key}
    return {number: candidates([str(plan.parents[key].checkpoint.folder)], kind)[0] for number, key in wanted.items()}


def _measured(plan: Plan, recipe: LearnRecipe) -> Merger:
    sources = {key: parent.source for key, parent in plan.parents.items()}
    merger = Merger(plan.method, sources, plan.units, torch.float32, recipe.seed)
    if units := [unit for unit in plan.units if merger.scope(unit) == "model"]:
        threads = torch.get_num_threads()
        workers = Workers(torch.device("cpu"), torch.float32)
        try:
            merger.measure_model(units, World(), workers)
        finally:
            workers.close()
            torch.set_num_threads(threads)
    return merger
