"""Which tensor of a base each tensor of a LoRA adapter means, and whether the two belong together.

The rules for names, ranks, scales and targets are those of PEFT's LoRA, applied to names and shapes alone: no model is
built. An adapter that fits only in part is an error, because half an adapter merges into a model that nobody trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from hf_fuse.checkpoint.reader import REDOWNLOAD, Checkpoint, FilePool, TensorInfo
from hf_fuse.errors import CheckpointError

CONFIG = "adapter_config.json"
MERGE_FIRST = "Merge it into its base with PEFT's merge_and_unload(), save that model and use it instead."
SHOWN = 5  # names spelt out in a message

# Wrappers whose order and presence changed between releases of transformers, so they may differ on both sides.
WRAPPERS = {"model", "language_model", "text_model"}
# Stored whole beside the factors after the vocabulary was resized, or where the embedding itself is adapted.
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"}
# Their Conv1D stores [in, out]. For a square weight the shape cannot tell, the architecture can.
TRANSPOSED_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@dataclass(frozen=True)
class LowRank:
    """One factored change, ``scale * up @ down`` (its transpose if ``transposed``) in the shape of the base's tensor.

    ``up`` is ``[out, r, 1...]`` and ``down`` is ``[r, in, kernel...]``; a bias has ``up`` ``[out]`` and no ``down``.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    up: TensorInfo
    down: TensorInfo | None
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.up.shape[1] if self.down else 1


@dataclass
class Binding:
    """The work of ``Adapter.bind``. ``factors`` is ``{module: {"A", "B", "bias", "embedding_A", "embedding_B"}}``,
    ``full`` the tensors stored whole; both carry the names of the model that the adapter was trained on."""

    ref: str
    config: dict
    factors: dict[str, dict[str, TensorInfo]]
    full: dict[str, TensorInfo]
    base: Checkpoint
    prefixes: list[tuple[str, str]] = field(default_factory=list)

    def run(self, strict: bool) -> tuple[dict[str, LowRank], dict[str, TensorInfo]]:
        """``(low_rank, replaced)``, both by the base's tensor names."""
        replaced = self.full_tensors()
        targets, absent = {}, []
        for module in self.factors:
            found = self.find(f"{module}.weight")
            if found:
                targets[module] = replaced.get(found, self.base.tensors[found])
            else:
                absent.append(module)
                if len(absent) == SHOWN:  # a whole other model: five names say enough
                    break
        if absent:
            tied = self.base_setting("tie_word_embeddings") and absent[0].rpartition(".")[2] in EMBEDDINGS
            raise self.error(
                f"the base has no weights for the adapted module(s) {listed(absent)}",
                "It ties its output to its embeddings, and a change of one end alone has no merged form."
                if tied
                else "Name the base it was trained on.",
            )
        low_rank: dict[str, LowRank] = {}
        blocks = {self.orientation(m, info) for m, info in targets.items() if _in_block(m)} - {None}
        for module, info in targets.items():
            for change in self.changes(module, info, blocks):
                if change.name in low_rank:
                    raise self.error(f"two of its modules mean {change.name!r} of the base, one of them {module!r}")
                low_rank[change.name] = change
        if strict:
            self.check_coverage({info.name.removesuffix(".weight"): module for module, info in targets.items()})
        return low_rank, replaced

    def error(self, what: str, fix: str = "Name the base it was trained on.") -> CheckpointError:
        trained = self.config.get("base_model_name_or_path")
        trained = f"trained on {trained}" if trained else "its config names no base"
        return CheckpointError(f"adapter {self.ref} ({trained}) on base {self.base.ref}: {what}. {fix}")

    def base_setting(self, name: str) -> object:
        """A value of the base's config, of its text model's config where that has one."""
        text = self.base.config.get("text_config")
        return (text if isinstance(text, dict) else {}).get(name) or self.base.config.get(name)

    def find(self, name: str) -> str | None:
        """The base's name of the adapter's tensor ``name``: the same, or the same but for a prefix or a renaming."""
        found = self.search(self.base.tensors, name)
        if found is None and (running := self.search(self.running_names, name)):
            found = self.running_names[running]
        return found

    @cached_property
    def running_names(self) -> dict[str, str]:
        """``{name in the running model: name in the file}``, asked for when a name is not simply in the file."""
        return running_names(self.base)

    def search(self, names: Collection[str], name: str) -> str | None:
        if name in names:
            return name
        for ours, theirs in self.prefixes:
            if name.startswith(ours) and theirs + name[len(ours) :] in names:
                return theirs + name[len(ours) :]
        parts = name.split(".")
        for cut in range(len(parts) - 1):
            rest = ".".join(parts[cut:])
            ours = name[: -len(rest)]
            hits = [n for n in names if (n == rest or n.endswith(f".{rest}")) and _same_model(ours, n[: -len(rest)])]
            if len(hits) > 1:
                raise self.error(f"{name!r} could mean {listed(hits)} of the base")
            if hits:
                self.prefixes.append((ours, hits[0][: -len(rest)]))
                return hits[0]
        return None

    def full_tensors(self) -> dict[str, TensorInfo]:
        """Tensors stored whole, by the base's names: retrained modules, biases, embeddings."""
        replaced, unexplained = {}, []
        for name, info in self.full.items():
            found = self.find(name) or name
            known = self.base.tensors.get(found)
            if not self.explained(name, info, known):
                unexplained.append(info.name)
            # The first axis may differ: resized vocabularies and other label counts. The plan compares those.
            elif known and (len(known.shape) != len(info.shape) or known.shape[1:] != info.shape[1:]):
                raise self.shape_error(f"{info.name!r} is", info.shape, known)
            elif found in replaced:
                raise self.error(f"two of its tensors mean {found!r} of the base, one of them {info.name!r}")
            replaced[found] = replace(info, name=found)
        if unexplained:
            raise self.error(
                f"{len(unexplained)} unknown tensor(s), explained neither by modules_to_save nor by a resized "
                f"vocabulary: {listed(unexplained)}",
                f"Add their modules to modules_to_save in its {CONFIG} if they were trained, else remove them.",
            )
        # A resized model with tied ends is saved with both ends; the base stores one.
        for name in [n for n in replaced if n not in self.base.tensors]:
            if any(same_tensor(twin, replaced[name]) for n, twin in replaced.items() if n in self.base.tensors):
                del replaced[name]
        return replaced

    def explained(self, name: str, info: TensorInfo, known: TensorInfo | None) -> bool:
        """Whether PEFT would have stored this tensor whole."""
        path, _, leaf = name.rpartition(".")
        if ".base_layer." in info.name:
            return True
        if leaf == "bias" and self.config.get("bias") not in (None, "none"):
            return True
        vocabulary = self.base_setting("vocab_size")
        if len(info.shape) == 2 and (
            path.rpartition(".")[2] in EMBEDDINGS or (known and vocabulary and known.shape[0] == vocabulary)
        ):
            return True
        # PEFT saves whatever ends with a listed name, and everything inside it.
        parts = path.split(".")
        inside = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
        return any(module.endswith(str(end)) for module in inside for end in self.config.get("modules_to_save") or [])

    def orientation(self, module: str, info: TensorInfo) -> bool | None:
        """Whether the base stores the module's weight as ``[in, out]``; None if it is square and may do either."""
        part = self.factors[module]
        may = self.config.get("fan_in_fan_out") or self.base.config.get("model_type") in TRANSPOSED_TYPES
        if not may or "A" not in part or not (len(info.shape) == len(part["A"].shape) == len(part["B"].shape) == 2):
            return False
        straight = part["B"].shape[0], part["A"].shape[1]
        return None if info.shape == straight == straight[::-1] else info.shape == straight[::-1]

    def changes(self, module: str, info: TensorInfo, blocks: set[bool]) -> Iterator[LowRank]:
        """The change of the module's weight, and of its bias if the adapter has one (``lora_bias``).

        ``blocks`` are the orientations of the modules inside numbered blocks that are not square.
        """
        part = self.factors[module]
        embedding = "embedding_A" in part
        up, down = (part["embedding_B"], part["embedding_A"]) if embedding else (part["B"], part["A"])
        pair = f"lora_B {list(up.shape)} and lora_A {list(down.shape)} of {module!r}"
        if not info.is_float:
            raise self.error(f"{info.name!r} is stored quantised, as {info.dtype}", "Name the unquantised base.")
        transposed = True if embedding else self.orientation(module, info)
        if transposed is None:
            if len(blocks) > 1:
                raise self.error(
                    f"{module!r} is square, and its neighbours are stored in both orientations", MERGE_FIRST
                )
            # Outside the blocks such models have plain linear layers (heads).
            transposed = _in_block(module) and blocks != {False}
        ranks = up.shape[1:2], down.shape[:1]
        if ranks[0] != ranks[1] or len(down.shape) < 2 or up.numel != up.shape[0] * up.shape[1]:
            raise self.error(f"{pair} do not multiply", REDOWNLOAD)
        product = (up.shape[0], *down.shape[1:])
        if info.shape != (product[::-1] if transposed else product):
            raise self.shape_error(f"{pair} give", product, info)
        rank = self.setting("rank_pattern", module, self.config.get("r", 8))
        if rank != up.shape[1]:
            raise self.error(f"{pair} have rank {up.shape[1]}, but its {CONFIG} says {rank!r}", REDOWNLOAD)
        alpha = self.setting("alpha_pattern", module, self.config.get("lora_alpha", 8))
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise self.error(f"lora_alpha of {module!r} is {alpha!r}, expected a number", REDOWNLOAD)
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        yield LowRank(info.name, info.shape, scale, up, down, transposed)
        if "bias" in part:
            name = info.name.removesuffix("weight") + "bias"
            bias = self.base.tensors.get(name)
            if bias is None or bias.shape != part["bias"].shape:
                raise self.error(f"the base has no {name!r} of the shape of lora_B.bias of {module!r}", MERGE_FIRST)
            yield LowRank(name, bias.shape, scale, part["bias"], None)

    def shape_error(self, what: str, shape: Iterable[int], info: TensorInfo) -> CheckpointError:
        return self.error(f"{what} {list(shape)}, but {info.name!r} of the base is {list(info.shape)}")

    def setting(self, table: str, module: str, default: object) -> object:
        """PEFT's rule: the first key that matches the module's name to its end, starting at a dot, as an expression."""
        values = self.config.get(table) or {}
        for key, value in values.items():
            if self.matches(rf"(.*\.)?({key})$", module):
                return value
        return values.get(module, default)

    def matches(self, expression: str, name: str) -> bool:
        try:
            return re.match(expression, name) is not None
        except re.error as error:
            raise self.error(f"{expression!r} in its {CONFIG} is not an expression ({error})", REDOWNLOAD) from None

    def check_coverage(self, adapted: dict[str, str]) -> None:
        """Every layer that ``target_modules`` names must be there; ``adapted`` is {module in the base: in the adapter}.

        Files may hold layers that the model does not build as modules (fused experts, auxiliary heads), so kinds of
        modules that the adapter never touches count only if they stand plainly in a block.
        """
        kinds = {_kind(module) for module in adapted}
        missing, ends = [], set()
        for name, info in self.base.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or module in adapted or not 2 <= len(info.shape) <= 5:
                continue
            end = self.target(module)
            if end and _kind(module) in kinds:
                missing.append(module)
            elif end and _kind(module).count("#") < 2:
                ends.add(end)
        if missing:
            raise self.error(
                f"the adapter has no tensors for {len(missing)} module(s) of the base that its target_modules name, as "
                f"if the base were deeper or the adapter incomplete: {listed(missing)}"
            )
        idle = sorted(e for e in ends if not any(m == e or m.endswith(f".{e}") for m in adapted.values()))
        if idle and isinstance(self.config.get("target_modules"), list):
            raise self.error(f"its target_modules name {listed(idle)}, for which it has no tensors", REDOWNLOAD)

    def target(self, module: str) -> str | None:
        """The entry of ``target_modules`` that names this module of the base; None if it was not to be adapted."""
        names = [module]
        if "running_names" in self.__dict__:
            names += [n.removesuffix(".weight") for n, file in self.running_names.items() if file == f"{module}.weight"]
        names += [ours + n[len(theirs) :] for ours, theirs in self.prefixes for n in names if n.startswith(theirs)]
        return next((end for name in reversed(names) if (end := self.target_as_trained(name))), None)

    def target_as_trained(self, module: str) -> str | None:
        def ends_with(end: object) -> bool:
            return module == end or module.endswith(f".{end}")

        excluded = self.config.get("exclude_modules") or []
        if self.matches(rf"(?:{excluded})\Z", module) if isinstance(excluded, str) else any(map(ends_with, excluded)):
            return None
        saved = self.config.get("modules_to_save") or []
        if any(self.matches(rf"(^|.*\.){end}($|\..*)", module) for end in saved):
            return None
        targets = self.config.get("target_modules")
        if isinstance(targets, str) and targets != "all-linear":
            return targets if self.matches(rf"(?:{targets})\Z", module) else None
        if not isinstance(targets, list):  # not spelt out: whatever the adapter has in one layer it needs in all
            targets = sorted({name.rpartition(".")[2] for name in self.factors})
        end = next((str(end) for end in targets if ends_with(end)), None)
        layers = self.config.get("layers_to_transform")
        if end is None or module in targets or layers in (None, []):
            return end
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            before = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if self.matches(rf"{before}{pattern}\.\d+\.", module):
                number = int(re.match(rf"{before}{pattern}\.(\d+)\.", module)[1])
                return end if number in (layers if isinstance(layers, list) else [layers]) else None
        return None


def running_names(base: Checkpoint) -> dict[str, str]:
    """``{name in the running model: name in the file}`` of the tensors that transformers renames on loading.

    Tensors that it also rearranges (fused experts) are left out. The model is built without memory for its weights.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        config = transformers.CONFIG_MAPPING[base.config["model_type"]].from_dict(base.config)
        with torch.device("meta"):
            model = getattr(transformers, base.config["architectures"][0])(config)
        steps = get_model_conversion_mapping(model)
        moved = [step for step in steps if not isinstance(step, WeightConverter)]
        changed = [step for step in steps if isinstance(step, WeightConverter)]
        names = {name: rename_source_key(name, moved, changed) for name in base.tensors}
    except Exception:  # no such class, or a release without these functions: then files and modules agree in names
        return {}
    return {new: name for name, (new, rearranged) in names.items() if not rearranged and new != name}


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _kind(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def _in_block(module: str) -> bool:
    return re.search(r"(^|\.)\d+\.", module) is not None


def _same_model(ours: str, theirs: str) -> bool:
    """Whether two prefixes can stand before the same tensor: one is empty, or both are mere wrappers."""
    return not ours or not theirs or {*ours.split("."), *theirs.split(".")} - {""} <= WRAPPERS


def same_tensor(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are equal in type, shape and every byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pool, width = FilePool(), one.nbytes // max(one.numel, 1)
    try:
        for first in range(0, one.numel, 1 << 20):
            pieces = [bytearray(min(1 << 20, one.numel - first) * width) for _ in range(2)]
            for info, piece in zip((one, other), pieces):
                pool.read(info, first, memoryview(piece))
            if pieces[0] != pieces[1]:
                return False
        return True
    finally:
        pool.close()
