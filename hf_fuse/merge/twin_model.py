"""Twin-Merging as one model: the merged weights, a low-rank branch per task, and a router that mixes them per input.

Made from a store (:mod:`hf_fuse.merge.twin_store`), it computes ``theta_s + sum_k w_k(x) v_k`` for each sample of a
batch without building those weights: branches run beside the merged layers, each sample with its own ``w``. The router
reads the merged model's last hidden states once, before the first token is generated; then ``w`` stays
(https://arxiv.org/abs/2406.15479, whose code builds the weights anew for every input).

Shapes: B samples, T tokens, D width, K tasks, R rank of all branches together (``K r``), M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fuse.checkpoint.reader import open_checkpoint, read_header
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.merge.twin_restore import SHARED, read_store

# What the router's pass over the merged model needs of a batch.
READ = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "pixel_values")


class TwinConfig(PreTrainedConfig):
    """Settings of a :class:`TwinModel`.

    Args:
        base: ``config.json`` of the merged model.
        architecture: its class in transformers.
        tasks: names of the tasks, in the order of the weights.
        branches: parameter of the merged model -> rank of each task's difference; 0: kept whole.
        generation: the merged model's generation settings.
    """

    model_type = "hf_fuse_twin"

    def __init__(
        self,
        base: dict | None = None,
        architecture: str = "",
        tasks: list[str] | None = None,
        branches: dict[str, int] | None = None,
        generation: dict | None = None,
        **rest: Any,
    ):
        self.base, self.architecture = base or {}, architecture
        self.tasks, self.branches, self.generation = tasks or [], branches or {}, generation or {}
        super().__init__(**rest)


class TwinRouter(nn.Sequential):
    """``[B, D] -> [B, K]`` logits: the classifier of the authors' code."""

    def __init__(self, width: int, tasks: int):
        wide = 2 * width
        super().__init__(
            nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(0.5),
            nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(0.5),
            nn.Linear(wide, tasks),
        )  # fmt: skip


class TwinModel(PreTrainedModel):
    """A merged model with a branch per task.

    ::

        model = TwinModel.from_store("store")
        train_router(model, {"math": batches, "code": other_batches})
        model.save_pretrained("twin")
        TwinModel.from_pretrained("twin")(input_ids=ids).logits

    It is called like the merged model, ``model.model``. ``task_weights`` (a mapping of tasks to numbers, or ``[B, K]``)
    takes the place of the router.
    """

    config_class = TwinConfig
    _keep_in_fp32_modules_strict = {"router"}

    def __init__(self, config: TwinConfig):
        super().__init__(config)
        kind = getattr(transformers, config.architecture, None)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            raise CheckpointError(f"{config.architecture!r} is no model of transformers.")
        self.model = kind(AutoConfig.for_model(**config.base))
        if config.generation and self.model.can_generate():
            self.model.generation_config = GenerationConfig.from_dict(config.generation)
        self.router = TwinRouter(self.model.config.get_text_config().hidden_size, len(config.tasks))
        count, shapes = len(config.tasks), {name: value.shape for name, value in self.model.named_parameters()}
        self.branches = nn.ParameterDict()
        for name, rank in config.branches.items():
            if name not in shapes:
                raise CheckpointError(f"branches: {config.architecture} has no parameter {name}.")
            for side, shape in _shapes(shapes[name], rank, count).items():
                self.branches[_key(name, side)] = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self._weights: Tensor | None = None  # of the pass that is running
        self._prefill: Tensor | None = None  # of the last prompt
        self._hook_modules()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: whatever is not in a checkpoint keeps the values of its own class."""

    @classmethod
    def from_store(cls, store: str | Path, *, dtype: torch.dtype | str = "auto") -> TwinModel:
        """Makes the model from a store of ``hf-fuse store twin``; its router is not trained yet.

        Raises:
            CheckpointError: no such store, a damaged one, or one of an architecture whose layers don't mix that way.
        """
        from safetensors.torch import load_file

        folder = Path(store).expanduser().absolute()
        facts = read_store(folder)
        base = AutoConfig.from_pretrained(folder / SHARED, trust_remote_code=False, local_files_only=True)
        kind = getattr(transformers, (base.architectures or [""])[0], None)
        if kind is None:
            raise CheckpointError(f"{folder / SHARED}: its config names no architecture of transformers.")
        merged = kind.from_pretrained(
            folder / SHARED, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        names = _live_names(folder / SHARED, kind, base)
        for entry in facts["tasks"].values():
            if entry["expert"]:
                read_header(folder / entry["expert"])  # says what is wrong with a damaged file
        experts = {
            task: _renamed(load_file(folder / entry["expert"]), names, folder) if entry["expert"] else {}
            for task, entry in facts["tasks"].items()
        }
        generation = merged.generation_config.to_diff_dict() if merged.can_generate() else {}
        config = TwinConfig(
            base.to_dict(),
            kind.__name__,
            list(experts),
            _ranks(experts),
            generation,
            dtype=merged.dtype,
        )
        model = cls(config)
        model.model.load_state_dict(merged.state_dict())
        model.to(merged.dtype).router.float()
        with torch.no_grad():
            for place, task in enumerate(experts):
                model._fill(place, experts[task])
        model._verify(folder)
        return model.eval()

    def _fill(self, place: int, expert: Mapping[str, Tensor]) -> None:
        for name, rank in self.config.branches.items():
            span = slice(place * rank, (place + 1) * rank)
            if rank and f"{name}.left" in expert:
                self.branches[_key(name, "left")][:, span] = expert[f"{name}.left"].to(self.dtype)
                self.branches[_key(name, "right")][span] = expert[f"{name}.right"].to(self.dtype)
            elif name in expert:
                self.branches[_key(name, "whole")][place] = expert[name].to(self.dtype)

    # -- mixing ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task_weights: Any = None, **inputs: Any) -> Any:
        if args:
            inputs[self.model.main_input_name], *rest = args
            if rest:
                raise TypeError("TwinModel takes one positional argument. Pass the others by name.")
        cache = inputs.get("past_key_values")
        decoding = cache is not None and cache.get_seq_length() > 0
        if task_weights is None and decoding:
            if self._prefill is None or len(self._prefill) != len(_first(inputs)):
                raise FuseError("The cache is of another prompt than the last one. Give task_weights for it.")
            weights_BK = self._prefill
        else:
            weights_BK = self._prefill = self._given(task_weights, inputs)
        with self._mixing(weights_BK):
            return self.model(**inputs)

    @torch.no_grad()
    def generate(self, *args: Any, task_weights: Any = None, **inputs: Any) -> Any:
        """As of the merged model; the weights are those of the prompt, for all tokens that follow."""
        if args:
            (inputs[self.model.main_input_name],) = args
        weights_BK = self._given(task_weights, inputs)
        settings = inputs.get("generation_config") or self.model.generation_config
        copies = max(inputs.get(key) or getattr(settings, key, 1) or 1 for key in ("num_beams", "num_return_sequences"))
        with self._mixing(weights_BK.repeat_interleave(copies, 0)):
            return self.model.generate(**inputs)

    @classmethod
    def can_generate(cls) -> bool:
        return False  # in the way that transformers means: the merged model does it

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Any]) -> Tensor:
        """``[B, D]``: the merged model's last hidden states, averaged over the tokens that are no padding."""
        read = {name: inputs[name] for name in READ if inputs.get(name) is not None}
        inner = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model.base_model
        with self._mixing(None):
            hidden_BTD = inner(**read).last_hidden_state.float()
        mask_BT = read.get("attention_mask")
        if mask_BT is None or mask_BT.shape != hidden_BTD.shape[:2]:
            return hidden_BTD.mean(1)
        mask_BT1 = mask_BT[..., None].float()
        return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)

    def task_weights(self, inputs: Mapping[str, Any]) -> Tensor:
        """``[B, K]``: what the router gives each task for these inputs."""
        return self.router(self.features(inputs)).softmax(-1)

    def _given(self, task_weights: Any, inputs: Mapping[str, Any]) -> Tensor:
        count = len(_first(inputs))
        if task_weights is None:
            return self.task_weights(inputs)
        if isinstance(task_weights, Mapping):
            if unknown := sorted(set(task_weights) - set(self.config.tasks)):
                known = ", ".join(self.config.tasks)
                raise RecipeError(f"task_weights: there is no task {unknown[0]!r}. Its tasks: {known}.")
            task_weights = [[float(task_weights.get(task, 0)) for task in self.config.tasks]] * count
        weights_BK = torch.as_tensor(task_weights, dtype=torch.float32, device=self.device)
        if weights_BK.shape != (count, len(self.config.tasks)):
            raise RecipeError(
                f"task_weights: is {list(weights_BK.shape)}, expected a number for each of {count} samples and "
                f"{len(self.config.tasks)} tasks."
            )
        return weights_BK

    @contextmanager
    def _mixing(self, weights_BK: Tensor | None) -> Iterator[None]:
        before, self._weights = self._weights, weights_BK
        try:
            yield
        finally:
            self._weights = before

    def _hook_modules(self) -> None:
        # While a model is being loaded, tied tensors are not yet one: their names tell.
        tied = self.model.all_tied_weights_keys
        for path, module in self.model.named_modules():
            names = {key: f"{path}.{key}" for key, _ in module.named_parameters(recurse=False)}
            own = {key: tied.get(name, name) for key, name in names.items()}
            own = {key: name for key, name in own.items() if name in self.config.branches}
            if own:
                module.register_forward_hook(
                    lambda module, args, kwargs, out, own=own: self._with_branches(module, own, args, kwargs, out),
                    with_kwargs=True,
                )

    def _with_branches(self, module: nn.Module, own: dict[str, str], args: tuple, kwargs: dict, out: Tensor) -> Any:
        weights_BK = self._weights
        if weights_BK is None:
            return None
        if not isinstance(out, Tensor) or out.shape[0] not in (1, len(weights_BK)):
            raise FuseError(
                f"TwinModel: what a {type(module).__name__} puts out is not one row per sample, so samples can't be "
                "mixed apart there. Extract one model per mix from the store instead."
            )
        weights_BK = weights_BK.to(out.dtype)
        whole = dict(own)
        if "weight" in own and self.config.branches[own["weight"]] and isinstance(module, _MATRICES):
            out = out + self._low_rank(module, whole.pop("weight"), args[0], weights_BK)
        if "bias" in whole and isinstance(module, (nn.Linear, Conv1D)):
            bias_BM = weights_BK @ self._dense(whole.pop("bias")).to(out.dtype)
            out = out + _per_sample(bias_BM, out.dim())
        if whole:
            out = out + self._affine(module, whole, args, kwargs, weights_BK)
        return out

    def _low_rank(self, module: nn.Module, name: str, x: Tensor, weights_BK: Tensor) -> Tensor:
        left_MR, right_RN = self.branches[_key(name, "left")], self.branches[_key(name, "right")]
        share_BR = weights_BK.repeat_interleave(left_MR.shape[1] // weights_BK.shape[1], dim=1)
        if isinstance(module, nn.Embedding):
            return (left_MR[x] * _per_sample(share_BR, x.dim() + 1)) @ right_RN
        if isinstance(module, Conv1D):  # stored [inputs, outputs]
            left_MR, right_RN = right_RN.T, left_MR.T
        return ((x @ right_RN.T) * _per_sample(share_BR, x.dim())) @ left_MR.T

    def _affine(self, module: nn.Module, own: dict[str, str], args: tuple, kwargs: dict, weights_BK: Tensor) -> Tensor:
        """The branches of a module whose output is affine in its parameters: norms, convolutions, tables, heads."""
        dense = {key: self._dense(name) for key, name in own.items()}

        def output(values: dict[str, Tensor]) -> Tensor:
            return functional_call(module, values, args, kwargs)

        with self._mixing(None):
            zero = output({key: torch.zeros_like(value[0]) for key, value in dense.items()})
            parts = [output({key: value[k] for key, value in dense.items()}) - zero for k in range(weights_BK.shape[1])]
        return sum(_per_sample(weights_BK[:, k], part.dim()) * part for k, part in enumerate(parts))

    def _dense(self, name: str) -> Tensor:
        """The differences of all tasks, ``[K, ...]``."""
        if not self.config.branches[name]:
            return self.branches[_key(name, "whole")]
        left_MR, right_RN = self.branches[_key(name, "left")], self.branches[_key(name, "right")]
        count = len(self.config.tasks)
        return torch.stack([one @ other for one, other in zip(left_MR.chunk(count, 1), right_RN.chunk(count, 0))])

    @torch.no_grad()
    def _verify(self, folder: Path) -> None:
        """Compares two samples with different weights to models whose weights were built for them."""
        random = torch.Generator().manual_seed(0)
        weights_BK = torch.rand(2, len(self.config.tasks), generator=random)
        inputs, self.training = self._probe(random), False
        self.model.eval()
        names, found = list(self.config.branches), _output(self(**inputs, task_weights=weights_BK))
        parameters = dict(self.model.named_parameters())
        for row, weights_K in enumerate(weights_BK):
            mixed = {
                name: parameters[name]
                + torch.einsum("k,k...->...", weights_K.to(self.dtype), self._dense(name).to(self.dtype))
                for name in names
            }
            sample = {name: value[row : row + 1] for name, value in inputs.items()}
            expected = _output(functional_call(self.model, mixed, kwargs=sample, tie_weights=True))
            difference = (found[row : row + 1] - expected).abs().max().item()
            tolerance = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
            if not difference <= tolerance * max(expected.abs().max().item(), 1.0):
                raise CheckpointError(
                    f"{folder}: branches of {self.config.architecture} do not add up to its mixed weights (outputs "
                    f"differ by {difference:.2g}). Extract one model per mix from the store instead."
                )

    def _probe(self, random: torch.Generator) -> dict[str, Tensor]:
        config = self.model.config
        if self.model.main_input_name == "pixel_values":
            size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
            return {"pixel_values": torch.randn(2, config.num_channels, *size, generator=random).to(self.dtype)}
        ids_BT = torch.randint(config.get_text_config().vocab_size, (2, 6), generator=random)
        # An end in the middle would decide where classifiers look.
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        return inputs | ({"decoder_input_ids": ids_BT} if config.is_encoder_decoder else {})


_MATRICES = (nn.Linear, nn.Embedding, Conv1D)


def _shapes(shape: torch.Size, rank: int, tasks: int) -> dict[str, tuple[int, ...]]:
    if not rank:
        return {"whole": (tasks, *shape)}
    return {"left": (shape[0], tasks * rank), "right": (tasks * rank, shape[1])}


def _key(name: str, side: str) -> str:
    return f"{name}.{side}".replace(".", "/")  # dots are not allowed in names of parameters


@torch.no_grad()
def _live_names(folder: Path, kind: type[PreTrainedModel], config: Any) -> dict[str, str]:
    """Stored name -> parameter of the live model, for tensors that are loaded as they are, under whatever name.

    transformers renames some and makes one of several others while it loads them, by tables of its own. So it is given
    tensors that are filled with their numbers: a parameter that holds one number is that tensor.
    """
    stored = open_checkpoint(str(folder)).tensors
    marks = {name: torch.full(info.shape, float(number)) for number, (name, info) in enumerate(stored.items())}
    loaded = kind.from_pretrained(None, config=config, state_dict=marks, dtype=torch.float32)
    names, found = list(stored), {}
    for parameter, value in loaded.named_parameters():
        number = float(value.flatten()[0]) if value.numel() else -1.0
        name = names[int(number)] if number.is_integer() and 0 <= number < len(names) else None
        if name and bool((value == number).all()) and stored[name].shape == tuple(value.shape):
            found[name] = parameter
    return found


def _renamed(expert: Mapping[str, Tensor], names: Mapping[str, str], folder: Path) -> dict[str, Tensor]:
    """A task's differences under the live model's names."""
    found = {}
    for name, value in expert.items():
        stem, _, side = name.rpartition(".")
        if name in names:
            found[names[name]] = value
        elif stem in names:
            found[f"{names[stem]}.{side}"] = value
        else:
            raise CheckpointError(
                f"{folder}: {name} is stored in another form than the live model has it, so it can't become a branch. "
                "Extract one model per mix from the store instead."
            )
    return found


def _ranks(experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """Parameter of the merged model -> rank of its branches, 0 for whole ones."""
    found: dict[str, int] = {}
    for expert in experts.values():
        for name, value in expert.items():
            stem, _, side = name.rpartition(".")
            if side == "left":
                found[stem] = value.shape[1]
            elif side != "right":
                found[name] = 0
    return found


def _first(inputs: Mapping[str, Any]) -> Tensor:
    for name in READ:
        if inputs.get(name) is not None:
            return inputs[name]
    raise FuseError(f"TwinModel needs one of {', '.join(READ)} to choose weights.")


def _per_sample(values: Tensor, dimensions: int) -> Tensor:
    """``[B]`` or ``[B, X]`` with ones in between, so that it multiplies what has ``dimensions``."""
    if values.dim() == 1:
        return values.view(-1, *[1] * (dimensions - 1))
    return values.view(len(values), *[1] * (dimensions - 2), -1)


def _output(outputs: Any) -> Tensor:
    found = getattr(outputs, "logits", None)
    return (outputs.last_hidden_state if found is None else found).float()
