"""From a recipe to a plan: what will be read, computed and written, found out from headers alone.

Everything that can be wrong with the input is found here, before any work.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse import registry
from hf_fuse.checkpoint.reader import Checkpoint, open_checkpoint, resolve
from hf_fuse.checkpoint.tied import Tying, embedding_name, resolve_tying, tied_view, vocabulary_tensors
from hf_fuse.checkpoint.writer import Layout, check_output, lay_out, leftovers
from hf_fuse.errors import CheckpointError, OutputError, RecipeError
from hf_fuse.merge.carry import config_differences
from hf_fuse.merge.coefficients import with_learned
from hf_fuse.merge.heads import leave_out_heads
from hf_fuse.merge.statistics import Statistics, open_statistics
from hf_fuse.merge.units import Unit, build_units, unexpected
from hf_fuse.recipe import ModelRef, Recipe, load_recipe
from hf_fuse.registry import Method

if TYPE_CHECKING:
    from hf_fuse.checkpoint.vocabulary import Alignment

SPARE_BYTES = 64_000_000  # room for tokenizer, config and card when the free disk space is checked


@dataclass
class Parent:
    """One input model: where it was found, and its tensors as the merge sees them."""

    ref: ModelRef
    role: str  # "base" or "model"
    checkpoint: Checkpoint
    source: Any  # one of hf_fuse.merge.sources
    adapter: Any = None
    adapter_folder: Path | None = None
    adapter_repo: str | None = None
    adapter_commit: str | None = None
    tokenizer: str = "none"  # how its tokenizer relates to the reference's
    statistics: Statistics | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """An adapter may bring its own tokenizer, with the tokens that its training added."""
        if self.adapter_folder is not None and (self.adapter_folder / "tokenizer.json").exists():
            return self.adapter_folder
        return self.checkpoint.folder

    def describe(self) -> dict[str, Any]:
        entry = {
            "role": self.role,
            "ref": self.ref.key,
            "repo_id": self.checkpoint.repo_id,
            "commit": self.checkpoint.commit,
            "architecture": self.checkpoint.architecture,
            "dtypes": dict(Counter(info.dtype for info in self.checkpoint.tensors.values())),
            "tensors": len(self.checkpoint.tensors),
            "bytes": self.checkpoint.nbytes,
            "tokenizer": self.tokenizer,
        }
        if self.adapter is not None:
            entry["adapter"] = {
                "ref": self.ref.adapter or self.ref.path,
                "repo_id": self.adapter_repo,
                "commit": self.adapter_commit,
                "targets": len(self.adapter.low_rank),
            }
        if self.statistics is not None:
            entry["statistics"] = self.statistics.ref
        return entry


@dataclass
class Plan:
    """A merge, ready to run."""

    recipe: Recipe
    method: Method
    parents: dict[str, Parent]
    units: list[Unit]
    layout: Layout
    tying: Tying
    alignment: Alignment | None = None
    warnings: list[str] = field(default_factory=list)
    # Found out by merging: the parameters with which a later merge goes on from this one.
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Parent:
        """The parent whose config, tokenizer and tensor names the output has: the base, else the first model."""
        return next(iter(self.parents.values()))

    @property
    def statistics(self) -> dict[str, Statistics]:
        return _statistics(self.parents)

    @property
    def passes(self) -> int:
        """How often each input byte is read at most: once to merge, and what the method measures first."""
        return getattr(self.method.module, "PASSES", 2 if hasattr(self.method.module, "measure") else 1)

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs for one pass."""
        weights = sum(
            self.parents[part.key].source.tensors[part.name].nbytes
            for unit in self.units
            for part in [*unit.inputs, *([unit.base] if unit.base else [])]
        )
        return weights + sum(
            self.statistics[part.key].tensors[part.name].nbytes for unit in self.units for part in unit.statistics
        )

    @property
    def bytes_kept_aside(self) -> int:
        """Bytes of intermediate results on the output's disk while the merge runs."""
        if not hasattr(self.method.module, "rescale"):
            return 0
        return sum(unit.numel for unit in self.units) * (8 if self.recipe.dtype == "float64" else 4)

    @property
    def peak_memory(self) -> int:
        """Estimate of the peak of anonymous memory in bytes, interpreter and libraries included."""
        from hf_fuse.merge.sources import BLOCK
        from hf_fuse.merge.workers import default_workers, needs_whole_tensor, row_length

        width = 8 if self.recipe.dtype == "float64" else 4
        models = max((len(unit.inputs) for unit in self.units), default=1)
        whole = max((math.prod(u.matrix) for u in self.units if needs_whole_tensor(self.method, u)), default=0)
        whole = max(whole, max((u.numel for u in self.units if u.post), default=0))
        # Block of K models, base, result, about as much again for the method's intermediate values, raw bytes.
        if self.statistics:  # as many numbers again; a Gram may be larger than its matrix
            models *= 2
            beside = (self.statistics[part.key].tensors[part.name].numel for u in self.units for part in u.statistics)
            whole = max(whole, max(beside) if whole else 0)
        block = max([BLOCK, *(row_length(self.method, u) or 0 for u in self.units)])
        blocks = default_workers() * block * (2 * models + 4) * width
        return 300_000_000 + blocks + whole * (2 * models + 4) * width

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``hf-fuse plan --json`` prints."""
        output = Path(self.recipe.output).expanduser() if self.recipe.output else None
        return {
            "method": self.method.name,
            "summary": self.method.summary,
            "paper": self.method.paper,
            "parents": [parent.describe() for parent in self.parents.values()],
            "tensors": dict(Counter(unit.action for unit in self.units)),
            "parameters": sum(unit.numel for unit in self.units),
            "files": self.layout.sizes,
            "out_dtypes": dict(Counter(unit.dtype for unit in self.units)),
            "tied": self.tying.tied,
            "tokenizer": None if self.recipe.tokenizer is None else self.recipe.tokenizer.source,
            "vocabulary": None if self.alignment is None else len(self.alignment.vocab),
            "passes": self.passes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.layout.nbytes,
            "peak_memory": self.peak_memory,
            "free_disk": _free(output) if output else None,
            "output": self.recipe.output,
            "push": self.recipe.push.repo if self.recipe.push else None,
            "warnings": self.warnings,
        }


def plan(
    recipe: str | Path | dict | Recipe,
    *,
    overrides: dict[str, Any] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    continue_from: str | Path | None = None,
) -> Plan:
    """Reads a recipe and the headers of its models, and checks that they fit.

    Args:
        recipe: a YAML file, the same as a dictionary, or a :class:`~hf_fuse.recipe.Recipe`.
        overrides: dotted keys that win over the recipe.
        output: folder of the result, instead of the recipe's.
        overwrite: an existing output is going to be replaced.
        allow_pickle: accept ``.bin`` inputs, loaded with torch's restricted unpickler.
        verify: compare the content of Hub inputs with the hashes the Hub has (reads all bytes).
        continue_from: output of an earlier merge by a sequential method (opcm), to which the models are added.

    Raises:
        FuseError: the first thing that is wrong, with where and what to do.
    """
    recipe = load_recipe(recipe, overrides)
    if output is not None:
        recipe = recipe.model_copy(update={"output": str(output)})
        recipe.model_fields_set.add("output")
    if continue_from is not None:
        from hf_fuse.merge.continuation import continued

        recipe = continued(recipe, continue_from)
    method = registry.get("merge", recipe.method)
    if recipe.output_kind == "adapter":
        from hf_fuse.merge.adapter_plan import plan_adapter

        return plan_adapter(recipe, method, overwrite=overwrite, allow_pickle=allow_pickle, verify=verify)
    parents = _open_parents(recipe, allow_pickle)
    for key, ref in recipe.statistics.items():
        parents[key].statistics = open_statistics(ref, getattr(method.module, "STATISTICS", None))
    refuse_overlap(recipe, parents)
    if verify:
        _verify(parents)
    warnings = []
    checkpoints = [parent.checkpoint for parent in parents.values()]
    warnings += config_differences(checkpoints[0], checkpoints[1:])
    for parent in parents.values():
        if parent.checkpoint.config.get("quantization_config"):
            raise CheckpointError(
                f"{parent.ref.key}: is quantised (quantization_config in its config.json); quantised numbers can't be "
                "merged. Use the unquantised model."
            )
        if parent.checkpoint.config.get("auto_map"):
            warnings.append(
                f"{parent.ref.key}: its config points to code of its own (auto_map), which is not carried over"
            )
    alignment = _align(recipe, parents, warnings)
    moved = [key for key in parents if alignment is not None and not alignment.identity(key)]
    if moved and getattr(method.module, "STATISTICS", None) == "fisher":
        raise RecipeError(
            f"tokenizer: moves the rows of {moved[0]}'s embeddings, which its statistics can't follow. Remove it, or "
            "align the vocabularies in a merge of its own before the statistics are made."
        )
    tying = resolve_tying(checkpoints, recipe.tie_word_embeddings)
    for parent in parents.values():
        parent.source.tensors = tied_view(parent.source.tensors, tying)
        if tying.head is not None and hasattr(parent.source, "names"):  # a lent embedding is realigned like its owner
            parent.source.names.update({tying.head, tying.embedding})
    heads = leave_out_heads(parents, recipe.heads.key) if recipe.heads else set()
    tables = {key: parent.source.tensors for key, parent in parents.items()}
    base = parents.get(recipe.base_model.key) if recipe.base_model else None
    models = {key: parent for key, parent in parents.items() if parent is not base}
    stated = with_learned(recipe, method, base, models)
    units = build_units(stated, method, tables, tying, _statistics(parents), heads)
    unexpected(units, tables, recipe, tying)
    layout = lay_out(
        ((name, unit.dtype, unit.shape) for unit in units for name in (unit.name, *unit.aliases)),
        recipe.max_shard_bytes,
    )
    made = Plan(recipe, method, parents, units, layout, tying, alignment, warnings)
    check_room(recipe.output, layout.nbytes + made.bytes_kept_aside, overwrite)
    return made


def check_room(output: str | None, nbytes: int, overwrite: bool) -> None:
    """Whether the output may be made, and whether ``nbytes`` of weights and the small files fit on its disk."""
    if not output:
        return
    folder = Path(output).expanduser()
    check_output(folder.absolute(), overwrite)
    needed, free = nbytes + SPARE_BYTES, _free(folder)
    if free < needed:
        raise OutputError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free, the output needs {needed / 1e9:.2f} GB. Free some "
            "space or choose another output."
        )


def _free(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _statistics(parents: dict[str, Parent]) -> dict[str, Statistics]:
    return {key: parent.statistics for key, parent in parents.items() if parent.statistics is not None}


def _open_parents(recipe: Recipe, allow_pickle: bool) -> dict[str, Parent]:
    opened: dict[str, Checkpoint] = {}
    parents = {}
    base_key = recipe.base_model.key if recipe.base_model else None
    for ref in recipe.references:
        parents[ref.key] = _open_parent(ref, "base" if ref.key == base_key else "model", recipe, opened, allow_pickle)
    return parents


def _open_parent(ref: ModelRef, role: str, recipe: Recipe, opened: dict[str, Checkpoint], allow_pickle: bool) -> Parent:
    from hf_fuse.checkpoint.adapter import is_adapter, open_adapter
    from hf_fuse.merge.sources import AdapterSource, FileSource

    def full(path: str, revision: str | None) -> Checkpoint:
        key = f"{path}@{revision}"
        if key not in opened:
            opened[key] = open_checkpoint(path, revision, allow_pickle=allow_pickle)
        return opened[key]

    adapter_path, adapter_revision = ref.adapter, ref.adapter_revision
    if adapter_path is None:
        folder, repo_id, commit = resolve(ref.path, ref.revision, allow_pickle=allow_pickle)
        if not is_adapter(folder):
            checkpoint = full(ref.path, ref.revision)
            return Parent(ref, role, checkpoint, FileSource(checkpoint))
        if role == "base":
            raise RecipeError(f"base_model: {ref.key} is an adapter. Expected the full model it was trained on.")
        adapter = open_adapter(folder, ref.key, allow_pickle=allow_pickle)
        if recipe.base_model is not None:
            checkpoint = full(recipe.base_model.path, recipe.base_model.revision)
        elif adapter.base_ref:
            checkpoint = full(adapter.base_ref, None)
        else:
            raise CheckpointError(f"{ref.key}: is an adapter that names no base. Say base_model in the recipe.")
    else:
        checkpoint = full(ref.path, ref.revision)
        folder, repo_id, commit = resolve(adapter_path, adapter_revision, allow_pickle=allow_pickle)
        adapter = open_adapter(folder, adapter_path, allow_pickle=allow_pickle)
    bound = adapter.bind(checkpoint)
    return Parent(ref, role, checkpoint, AdapterSource(checkpoint, bound), bound, folder, repo_id, commit)


def refuse_overlap(recipe: Recipe, parents: dict[str, Parent]) -> None:
    """An output inside an input, or the other way round, would be destroyed or read while it is written."""
    if not recipe.output:
        return
    output = Path(recipe.output).expanduser().resolve()
    for parent in parents.values():
        statistics = parent.statistics and Path(parent.statistics.ref).expanduser().resolve()
        for folder in filter(None, (parent.checkpoint.folder, parent.adapter_folder, statistics)):
            inside = folder in output.parents
            if inside or any(place in (folder, *folder.parents) for place in (output, *leftovers(output))):
                raise OutputError(
                    f"{recipe.output}: overlaps with the input {parent.ref.key}. Choose an output of its own."
                )


def _verify(parents: dict[str, Parent]) -> None:
    from hf_fuse.hub import verify_files

    for parent in parents.values():
        checkpoint = parent.checkpoint
        if checkpoint.repo_id and checkpoint.commit:
            verify_files(checkpoint.repo_id, checkpoint.commit, checkpoint.folder)


def _align(recipe: Recipe, parents: dict[str, Parent], warnings: list[str]) -> Alignment | None:
    """Compares tokenizers; with ``tokenizer:`` in the recipe shows every source in the output vocabulary."""
    from hf_fuse.checkpoint.tokenizer import read_tokenizer
    from hf_fuse.checkpoint.tokenizer_comparison import compare_all
    from hf_fuse.checkpoint.vocabulary import align
    from hf_fuse.merge.sources import RealignedSource

    folders = {key: parent.tokenizer_folder for key, parent in parents.items()}
    entry = recipe.tokenizer
    first, *others = parents
    if entry is None:
        same = same_tokenizer_files([folders[key] for key in parents])
        if same is not None:
            for parent in parents.values():
                parent.tokenizer = same
            return None
    tokenizers = {key: read_tokenizer(folders[key]) for key in parents}
    comparisons = compare_all(tokenizers, first)
    for key, comparison in comparisons.items():
        parents[key].tokenizer = comparison.kind
        if comparison.kind != "identical":
            warnings.append(f"tokenizer of {key} is {comparison.kind}: {'; '.join(comparison.reasons[:3])}")
    if entry is None:
        wrong = [key for key, comparison in comparisons.items() if comparison.kind == "incompatible"]
        if wrong:
            raise CheckpointError(
                f"{wrong[0]}: its tokenizer is incompatible with that of {first} "
                f"({'; '.join(comparisons[wrong[0]].reasons[:3])}). Say tokenizer: base or tokenizer: union in the "
                "recipe."
            )
        return None
    lacking = [key for key, tokenizer in tokenizers.items() if tokenizer is None]
    if lacking:
        raise CheckpointError(f"{lacking[0]}: has no tokenizer files, so its embeddings can't be aligned by token.")
    sizes = {}
    for key, parent in parents.items():
        name = embedding_name(parent.checkpoint)
        if name is None:
            raise CheckpointError(f"{key}: no token embedding found, so tokenizer: {entry.source} can't be applied.")
        sizes[key] = parent.source.tensors[name].shape[0]
    alignment = align(
        entry.source,
        tokenizers,
        base_key=recipe.base_model.key if recipe.base_model else None,
        vocab_sizes=sizes,
        token_sources={token: source.model_dump() for token, source in entry.tokens.items()} or None,
        pad_to_multiple_of=entry.pad_to_multiple_of,
    )
    warnings += alignment.notes
    plain = {key: parent.source for key, parent in parents.items()}
    for key, parent in parents.items():
        if not alignment.identity(key):
            parent.source = RealignedSource(plain, key, vocabulary_tensors(parent.checkpoint), alignment)
    return alignment


def same_tokenizer_files(folders: list[Path]) -> str | None:
    """``identical`` if all folders hold the same tokenizer files byte for byte, ``none`` if none has any, else None."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")  # fmt: skip
    contents = [
        {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()} for folder in folders
    ]
    if any(content != contents[0] for content in contents[1:]):
        return None
    return "identical" if contents[0] else "none"
