"""Vision transformers as ensembles of paths: how much each layer's terms count in what the head reads.

A pre-norm transformer ends in ``x_0 + sum_l a_l + sum_l f_l``: the embedding and the attention and feed-forward terms
of each layer, ``2 L + 1`` paths. :class:`EnsembleScale` gives each path a factor per channel in that sum alone: the
layers above still read the whole residual stream. Formulas follow a summary of the paper (no code was at hand, so the
start at one is our reading); its self-distillation is left out.

Shapes: P paths, B images, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.errors import CheckpointError, FuseError

NAME = "ensemble_scale"
# Names of the norm between attention and feed-forward part of a layer, and of the norm after the last layer.
MIDDLE_NORMS = ("layernorm_after", "norm2", "layer_norm2")
FINAL_NORMS = ("layernorm", "norm", "post_layernorm")


class EnsembleScale(nn.Module):
    """Factors ``scale_PD`` of the paths: embedding, attention and feed-forward of layer 0, of layer 1, ...

    ``kept_P`` is 0 for paths that are pruned: they count for nothing, whatever their factors.
    """

    def __init__(self, paths: int, width: int):
        super().__init__()
        self.scale_PD = nn.Parameter(torch.ones(paths, width))
        self.register_buffer("kept_P", torch.ones(paths))
        self._stream: Tensor | None = None
        self._change: Tensor | None = None

    def prune(self, paths: Iterable[int]) -> None:
        """Takes these paths (0 is the embedding, ``1 + 2 l`` and ``2 + 2 l`` are layer ``l``'s) out of the head's sum.

        Raises:
            FuseError: no such path, or none would be left.
        """
        chosen = sorted(set(paths))
        count = len(self.kept_P)
        if not all(isinstance(path, int) and 0 <= path < count for path in chosen):
            raise FuseError(f"paths to prune are {chosen}, expected numbers from 0 to {count - 1}.")
        left = self.kept_P.clone()
        left[chosen] = 0
        if not left.any():
            raise FuseError("paths to prune are all there are. Leave at least one to the head.")
        self.kept_P.copy_(left)

    def begin(self, stream_BTD: Tensor) -> None:
        self._stream, self._change = torch.zeros_like(stream_BTD), torch.zeros_like(stream_BTD)
        self.add(0, stream_BTD)

    def add(self, path: int, stream_BTD: Tensor) -> None:
        """Counts what came into the residual stream since the last call as this path."""
        # The change to the plain sum, not the sum itself: factors of one leave every bit as it was.
        factor_D = self.kept_P[path] * self.scale_PD[path] - 1
        self._change = self._change + factor_D.to(stream_BTD.dtype) * (stream_BTD - self._stream)
        self._stream = stream_BTD

    def total(self, stream_BTD: Tensor) -> Tensor:
        """The weighted sum of the paths; what is added up here is let go."""
        total = stream_BTD + self._change
        self._stream = self._change = None
        return total


def add_path_ensemble(model: nn.Module, *, pruned: Iterable[int] = ()) -> EnsembleScale:
    """Puts an :class:`EnsembleScale` before the last norm of a ViT-like model, in place, and returns it.

    Its factors are parameters of the model: they train with it, and ``model.save_pretrained`` stores them beside its
    weights; :func:`load_path_ensemble` loads such a folder. Other loaders ignore them, and have all paths count fully.

    Args:
        model: a pre-norm vision transformer of transformers (ViT, DeiT, DINOv2...), with any head.
        pruned: paths to take out of the head's sum, see :meth:`EnsembleScale.prune`.

    Raises:
        FuseError: the model is built in another way, or has an ensemble already.
    """
    owner, layers, final = _parts(model)
    if hasattr(owner, NAME):
        raise FuseError(f"{type(model).__name__}: has a path ensemble already.")
    middles = [next((getattr(layer, name) for name in MIDDLE_NORMS if hasattr(layer, name)), None) for layer in layers]
    if None in middles:
        raise FuseError(
            f"{type(model).__name__}: its layers ({type(layers[0]).__name__}) are not known to be pre-norm."
        )
    reference = next(layers.parameters())
    made = EnsembleScale(2 * len(layers) + 1, final.weight.shape[0]).to(reference.device, reference.dtype)
    made.prune(pruned)
    setattr(owner, NAME, made)
    for index, (layer, middle) in enumerate(zip(layers, middles)):
        if index == 0:
            layer.register_forward_pre_hook(lambda _, args, kwargs: made.begin(_given(args, kwargs)), with_kwargs=True)
        middle.register_forward_pre_hook(lambda _, args, path=2 * index + 1: made.add(path, args[0]))
        layer.register_forward_hook(
            lambda _, __, out, path=2 * index + 2: made.add(path, out[0] if isinstance(out, tuple) else out)
        )
    final.register_forward_pre_hook(lambda _, args: (made.total(args[0]),))
    return made


def load_path_ensemble(folder: str | Path, loader: Any = None, **options: Any) -> nn.Module:
    """Loads what ``save_pretrained`` (or a Trainer) wrote of a model with a path ensemble.

    Args:
        folder: a folder or Hub id.
        loader: class with ``from_pretrained``; default ``AutoModelForImageClassification``.
        options: for ``from_pretrained``.

    Raises:
        CheckpointError: no such model, or one without a path ensemble.
    """
    import transformers
    from safetensors import safe_open

    from hf_fuse.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    stored = {name: info for name, info in checkpoint.tensors.items() if name.split(".")[-2:-1] == [NAME]}
    if len(stored) != 2:
        raise CheckpointError(f"{folder}: holds no path ensemble. Load it with transformers' own from_pretrained.")
    safe = {"use_safetensors": True, "trust_remote_code": False}
    loader = loader or transformers.AutoModelForImageClassification
    model = loader.from_pretrained(checkpoint.folder, **safe | options)
    made = add_path_ensemble(model)
    tensors = {}
    for name, info in stored.items():
        with safe_open(info.file, "pt") as file:
            tensors[name.rpartition(".")[2]] = file.get_tensor(name)
    try:
        made.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its path ensemble does not fit the model: {error}") from None
    return model


def _parts(model: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """The module with the last norm, the layers and that norm."""
    height = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == height:
            while name:
                name = name.rpartition(".")[0]
                owner = model.get_submodule(name)
                for norm in FINAL_NORMS:
                    if hasattr(owner, norm):
                        return owner, module, getattr(owner, norm)
    raise FuseError(f"{type(model).__name__}: no stack of layers with a norm after it was found. Expected a ViT.")


def _given(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
