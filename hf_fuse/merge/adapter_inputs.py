"""The adapters that are merged into one: opened, bound to their base, and under one set of names.

The base is opened only if the recipe names one. Weighted sums of factors do without: then a table of the shapes that
the adapters themselves imply stands in for it, so that a model of many gigabytes need not be downloaded to add up
adapters of a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_fuse.checkpoint.adapter import FINGERPRINT, Adapter, base_fingerprint, is_adapter, open_adapter
from hf_fuse.checkpoint.adapter_binding import listed, same_tensor
from hf_fuse.checkpoint.adapter_writer import target_list
from hf_fuse.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint, resolve
from hf_fuse.checkpoint.tokenizer import read_tokenizer, tokenizer_files
from hf_fuse.checkpoint.tokenizer_comparison import compare_all
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.plan import Parent, refuse_overlap, same_tokenizer_files
from hf_fuse.recipe import ModelRef, Recipe

# Settings that the merged adapter has if all inputs agree on them.
INHERITED = ("task_type", "auto_mapping", "revision")


@dataclass
class Whole:
    """A tensor that adapters store whole: one entry per adapter, and the base's."""

    name: str
    infos: list[TensorInfo]
    base: TensorInfo | None
    equal: bool  # the same numbers in all adapters
    trained: bool  # in modules_to_save or a bias, not a copy that PEFT stores beside an adapted embedding


@dataclass
class Inputs:
    """Adapters by the keys of their references."""

    parents: dict[str, Parent]
    base: Checkpoint
    base_ref: ModelRef | None
    modules: dict[str, str]  # adapted tensor of the base -> its module's name in the output
    owners: dict[str, str]  # tensor stored whole -> its name in the output
    recorded: str | None  # fingerprint of the base that the adapters recorded
    fan_in_fan_out: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether the base was opened, and not only described by its adapters."""
        return self.base_ref is not None

    @property
    def base_parent(self) -> Parent:
        return Parent(self.base_ref, "base", self.base, None)

    @property
    def configs(self) -> list[dict]:
        return [parent.adapter.adapter.config for parent in self.parents.values()]


def open_inputs(recipe: Recipe, *, base_may_be_listed: bool, allow_pickle: bool, verify: bool) -> Inputs:
    """Opens and binds the adapters of a recipe.

    Raises:
        RecipeError: their bases differ, or the base is said to be an adapter.
        CheckpointError: a model that is no adapter, or one that does not fit the base or the others.
    """
    base_ref = _base_of(recipe)
    refs = {ref.key: ref for ref in recipe.models}
    if recipe.base_model and base_may_be_listed:
        refs.pop(recipe.base_model.key, None)  # no change of itself
    opened: dict[str, tuple[Adapter, Parent]] = {}
    for key, ref in refs.items():
        path, revision = (ref.adapter, ref.adapter_revision) if ref.adapter else (ref.path, ref.revision)
        folder, repo_id, commit = resolve(path, revision, allow_pickle=allow_pickle)
        if not is_adapter(folder):
            raise CheckpointError(
                f"{path}: is not an adapter (no adapter_config.json), and output_kind: adapter merges LoRA adapters. "
                "Remove it, or make a model of all with output_kind: model."
            )
        adapter = open_adapter(folder, path, allow_pickle=allow_pickle)
        opened[key] = adapter, Parent(ref, "model", None, None, None, folder, repo_id, commit)
    if not opened:
        raise RecipeError("models: none is an adapter. Give at least one besides the base.")
    adapters = [adapter for adapter, _ in opened.values()]
    recorded = {adapter.config.get(FINGERPRINT) for adapter in adapters} - {None}
    if len(recorded) > 1:
        raise CheckpointError(
            f"adapters {listed(a.ref for a in adapters)}: {FINGERPRINT} in their configs says that they were trained "
            "on different bases. Merge adapters of one base only."
        )
    if base_ref is None:
        base = described_base(adapters)
    else:
        base = open_checkpoint(base_ref.path, base_ref.revision, allow_pickle=allow_pickle)
    # PEFT corrects this setting by the kind of module when it loads, so adapters of one base may disagree in it.
    turned = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
    for adapter, parent in opened.values():
        config = adapter.config | {"fan_in_fan_out": turned and base_ref is not None}
        if base_ref is None:
            config.pop(FINGERPRINT, None)  # the description has no bytes to compare with
        parent.checkpoint, parent.adapter = base, replace(adapter, config=config).bind(base)
    parents = {key: parent for key, (_, parent) in opened.items()}
    refuse_overlap(recipe, parents)
    if verify:
        _verify(parents)
    inputs = Inputs(parents, base, base_ref, *_names(parents), min(recorded, default=None), bool(turned))
    _compare(inputs)
    return inputs


def _base_of(recipe: Recipe) -> ModelRef | None:
    """The base that the recipe names, alone or before the ``+`` of its models."""
    named = [recipe.base_model] if recipe.base_model else []
    if named and named[0].adapter:
        raise RecipeError(f"base_model: {named[0].key} is a model with an adapter. Expected the model alone.")
    named += [ModelRef(path=ref.path, revision=ref.revision) for ref in recipe.models if ref.adapter]
    if len({ref.key for ref in named}) > 1:
        raise RecipeError(
            f"models: the adapters stand on different bases ({listed(sorted({ref.key for ref in named}))}). Merge "
            "adapters of one base only."
        )
    return named[0] if named else None


def described_base(adapters: list[Adapter]) -> Checkpoint:
    """The tensors of a base as far as its adapters imply them, in PEFT's own orientation; there are no bytes."""
    tensors: dict[str, TensorInfo] = {}
    nowhere = adapters[0].folder

    def add(name: str, shape: tuple[int, ...]) -> None:
        tensors.setdefault(name, TensorInfo(name, "F32", shape, nowhere, 0))

    for adapter in adapters:
        for module, part in adapter.factors.items():
            if "embedding_A" in part:
                add(f"{module}.weight", (part["embedding_A"].shape[-1], part["embedding_B"].shape[0]))
            else:
                add(f"{module}.weight", (part["B"].shape[0], *part["A"].shape[1:]))
            if "bias" in part:
                add(f"{module}.bias", part["bias"].shape)
        for name, info in adapter.full.items():
            add(name, info.shape)
    base = Checkpoint(f"of {adapters[0].ref}", nowhere, tensors)
    base.config = {}
    return base


def _verify(parents: Mapping[str, Parent]) -> None:
    from hf_fuse.hub import verify_files

    found = {}
    for parent in parents.values():
        found[parent.adapter_repo, parent.adapter_commit] = parent.adapter_folder
        found[parent.checkpoint.repo_id, parent.checkpoint.commit] = parent.checkpoint.folder
    for (repo_id, commit), folder in found.items():
        if repo_id and commit:
            verify_files(repo_id, commit, folder)


def _names(parents: Mapping[str, Parent]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the output, by those of the base: of adapted modules, and of tensors stored whole.

    Those of the first adapter count. What only others have is renamed where they put another prefix before the same
    names, as releases of transformers do.
    """
    tables: list[tuple[dict[str, str], dict[str, str]]] = []
    for parent in parents.values():
        adapter, bound = parent.adapter.adapter, parent.adapter
        module_of = {info.name: module for module, part in adapter.factors.items() for info in part.values()}
        name_of = {info.start: name for name, info in adapter.full.items()}
        changed = {name: module_of[change.up.name] for name, change in bound.low_rank.items()}
        tables.append((changed, {name: name_of[info.start] for name, info in bound.replaced.items()}))
    styles = [_style(changed) for changed, _ in tables]
    modules: dict[str, str] = {}
    owners: dict[str, str] = {}
    for (changed, whole), style in zip(tables, styles):
        for found, names in ((modules, changed), (owners, whole)):
            for name, ours in names.items():
                if style and styles[0] and style != styles[0] and name.startswith(styles[0][1]):
                    ours = styles[0][0] + name[len(styles[0][1]) :]
                    ours = ours.removesuffix("." + name.rpartition(".")[2]) if found is modules else ours
                found.setdefault(name, ours)
    return modules, owners


def _style(modules: Mapping[str, str]) -> tuple[str, str] | None:
    """``(prefix in the adapter, prefix in the base)`` if all names differ in that alone."""
    found = set()
    for name, module in modules.items():
        ours, theirs = module.split("."), name.split(".")[:-1]
        while ours and theirs and ours[-1] == theirs[-1]:
            ours.pop(), theirs.pop()
        found.add(("".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)))
    return found.pop() if len(found) == 1 else None


def _compare(inputs: Inputs) -> None:
    """Notes where the adapters disagree in what no merge can decide; refuses vocabularies that can't be one."""
    names = {key: parent.adapter.adapter.base_ref for key, parent in inputs.parents.items()}
    if len(set(names.values())) > 1:
        said = ", ".join(f"{key}: {name or 'none'}" for key, name in names.items())
        inputs.warnings.append(f"the adapters name different bases ({said}); merge adapters of one base only")
    tasks = {config.get("task_type") for config in inputs.configs}
    if len(tasks) > 1:
        inputs.warnings.append(
            f"the adapters are for different tasks ({', '.join(sorted(map(str, tasks)))}), so none is named"
        )
    folders = {key: parent.adapter_folder for key, parent in inputs.parents.items()}
    folders = {key: folder for key, folder in folders.items() if tokenizer_files(folder)}
    for key in folders:
        inputs.parents[key].tokenizer = "its own"
    if len(folders) > 1 and same_tokenizer_files(list(folders.values())) is None:
        first, *_ = folders
        for key, found in compare_all({key: read_tokenizer(folder) for key, folder in folders.items()}, first).items():
            reasons = "; ".join(found.reasons[:3])
            if found.kind == "incompatible":
                raise CheckpointError(
                    f"{key}: its tokenizer is incompatible with that of {first} ({reasons}). Adapters trained with "
                    "different vocabularies can't become one."
                )
            if found.kind != "identical":
                inputs.warnings.append(f"tokenizer of {key} is {found.kind}: {reasons}")


def fingerprint(inputs: Inputs) -> str | None:
    """Of the base, if it is at hand; else what the adapters recorded."""
    return base_fingerprint(inputs.base) if inputs.known else inputs.recorded


def base_name(inputs: Inputs) -> str | None:
    """What the merged adapter calls its base: a Hub id if anybody knows one."""
    said = [config.get("base_model_name_or_path") for config in inputs.configs]
    said = [name for name in said if name]
    if inputs.known and inputs.base.repo_id:
        return inputs.base.repo_id
    if inputs.known and len(set(said)) != 1:
        return inputs.base.ref
    return said[0] if said else None


def inherited(inputs: Inputs) -> dict[str, Any]:
    found = {}
    for key in INHERITED:
        values = [config.get(key) for config in inputs.configs]
        if all(value == values[0] for value in values):
            found[key] = values[0]
    return found


def targets(inputs: Inputs) -> list[str]:
    """``target_modules`` of the merged adapter: the union of the inputs' lists where those say exactly what is there,
    else the modules by name."""
    modules = sorted(set(inputs.modules.values()))
    lists = [config.get("target_modules") for config in inputs.configs]
    limited = any(config.get(key) for config in inputs.configs for key in ("layers_to_transform", "exclude_modules"))
    if all(isinstance(entries, list) for entries in lists) and not limited:
        entries = sorted({str(entry) for found in lists for entry in found})
        used = [e for e in entries if any(module == e or module.endswith(f".{e}") for module in modules)]
        if all(any(module == e or module.endswith(f".{e}") for e in used) for module in modules):
            return used
    same = all(n.split(".")[-2:-1] == m.split(".")[-1:] for n, m in inputs.modules.items())
    if inputs.known and same:
        others = (n.removesuffix(".weight") for n in inputs.base.tensors if n not in inputs.modules)
        return target_list(modules, others)
    return modules


def whole_tensors(inputs: Inputs) -> list[Whole]:
    """What the adapters store whole, complete for each of them.

    An adapter that lacks a tensor which another one stores has the base's. Copies of the base's embeddings, which PEFT
    stores where the embedding is adapted, are left out.

    Raises:
        CheckpointError: an adapter lacks one and the base is not at hand or lacks it too, or shapes differ.
    """
    bound = {key: parent.adapter for key, parent in inputs.parents.items()}
    ends = {str(end) for config in inputs.configs for end in config.get("modules_to_save") or []}
    found = []
    for name, ours in inputs.owners.items():
        infos = {key: adapter.replaced.get(name) for key, adapter in bound.items()}
        base = inputs.base.tensors.get(name) if inputs.known else None
        trained = is_saved(ours, ends) or ours.endswith(".bias")
        stored = [info for info in infos.values() if info]
        if base and not trained and all(same_tensor(info, base) for info in stored):
            continue
        if base and any(info.shape != base.shape for info in stored):
            inputs.warnings.append(f"{ours} has another size than the base's; it is averaged")
            base = None
        lacking = [key for key, info in infos.items() if info is None]
        if lacking and base is None:
            have = next(key for key, info in infos.items() if info)
            fix = (
                f"{inputs.base.ref} has none of this size, so all adapters must have it"
                if inputs.known
                else "Name their base as base_model in the recipe: its tensor stands in"
            )
            raise CheckpointError(f"{lacking[0]}: lacks the tensor {ours!r} that {have} stores whole. {fix}.")
        if lacking:
            inputs.warnings.append(f"{ours} is stored whole, but not by {', '.join(lacking)}: the base's stands in")
        for key, info in infos.items():
            if info and info.shape != stored[0].shape:
                raise CheckpointError(
                    f"{key}: tensor {ours!r} is {list(info.shape)}, {list(stored[0].shape)} in another adapter. "
                    "Vocabularies and label counts must agree to become one adapter."
                )
        every = [info or base for info in infos.values()]
        equal = all(same_tensor(info, every[0]) for info in every[1:])
        found.append(Whole(name, every, base, equal, trained))
    return found


def is_saved(name: str, ends: Iterable[str]) -> bool:
    """PEFT's rule for ``modules_to_save``: a listed ending of the tensor's module, or of one around it."""
    ends, parts = tuple(ends), name.split(".")
    return bool(ends) and any(".".join(parts[:stop]).endswith(ends) for stop in range(1, len(parts)))
