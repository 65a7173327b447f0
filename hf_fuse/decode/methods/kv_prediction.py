"""A small model reads the prompt and linear maps predict the large model's cache from its own: a sooner first token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_fuse.checkpoint.reader import read_json
from hf_fuse.checkpoint.writer import exclusive_output
from hf_fuse.decode.keys_and_values import (
    Projected,
    attention_layers,
    check_cache,
    made_cache,
    recorded,
    replaced,
)
from hf_fuse.decode.vocabularies import named, shared_vocabulary
from hf_fuse.distill.teachers import tokenizer_of
from hf_fuse.errors import CheckpointError, FuseError

PAPER = "https://arxiv.org/abs/2410.08391"
MAPS, DESCRIPTION, AUXILIARY = "kv_maps.safetensors", "kv_prediction.json", "auxiliary"


def kv_prediction(model: nn.Module, auxiliary_model: nn.Module | None = None, *, maps: str) -> KvPrediction:
    """A model and what was learned to predict its cache.

    Args:
        model: the large one.
        auxiliary_model: the small one; by default the one saved with the maps.
        maps: folder that :meth:`KvPrediction.save_pretrained` has made.

    Raises:
        CheckpointError: no such folder, or it was made from other models.
        FuseError: models whose cache can't be predicted, or different tokenizers.
    """
    folder = Path(maps).expanduser()
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(f"maps: {maps} has no {DESCRIPTION}. Expected a folder made by KvPrediction.")
    made_from = read_json(folder / DESCRIPTION)
    if not isinstance(made_from.get("layer_map"), list):
        raise CheckpointError(f"maps: {folder / DESCRIPTION} is damaged. Save the KvPrediction again.")
    if auxiliary_model is None:
        auxiliary_model = AutoModelForCausalLM.from_pretrained(
            folder / AUXILIARY, dtype=model.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).to(model.device)
    for role, given in {"model": model, "auxiliary_model": auxiliary_model}.items():
        if fingerprint(given) != made_from.get(role):
            raise CheckpointError(f"maps: {maps} was learned with another {role} than {named(given)}. Use the same.")
    try:
        predictor = KvPrediction(model, auxiliary_model, made_from["layer_map"])
        predictor.load_maps(load_file(folder / MAPS, device=str(model.device)))
    except (OSError, RuntimeError, SafetensorError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"maps: {folder / MAPS} is damaged ({reason}). Save the KvPrediction again.") from None
    return predictor.eval()


def default_layer_map(layers: int, auxiliary_layers: int) -> list[int]:
    """Auxiliary layer for each layer, rising evenly; where they don't divide, earlier ones serve one layer more."""
    if layers < auxiliary_layers:
        return [layer * auxiliary_layers // layers for layer in range(layers)]
    each, more = divmod(layers, auxiliary_layers)
    return [source for source in range(auxiliary_layers) for _ in range(each + (source < more))]


class KvPrediction(nn.Module):
    """A frozen model, an auxiliary one, and a linear map per layer of the model for its keys and one for its values.

    The auxiliary model reads the prompt but its last token, which the model reads itself before it goes on alone. Keys
    are predicted before norm and rotary embedding, on concatenated heads.

    Train it with ``transformers.Trainer`` on rows of ``input_ids`` and ``labels``: :meth:`forward` returns the loss.

    Args:
        model: is frozen.
        auxiliary_model: is trained along with the maps; freeze it yourself if it is to stay as it is.
        layer_map: auxiliary layer for each layer of the model; :func:`default_layer_map` by default.

    Raises:
        FuseError: an architecture whose cache can't be predicted, different tokenizers, or a map to no layer.
    """

    def __init__(self, model: nn.Module, auxiliary_model: nn.Module, layer_map: Sequence[int] | None = None) -> None:
        super().__init__()
        shared_vocabulary([model, auxiliary_model])
        check_cache(model)
        layers, sources = attention_layers(model), attention_layers(auxiliary_model)
        self.layer_map = list(layer_map or default_layer_map(len(layers), len(sources)))
        if len(self.layer_map) != len(layers) or not all(0 <= source < len(sources) for source in self.layer_map):
            raise FuseError(
                f"layer_map is {self.layer_map}, expected {len(layers)} numbers of layers from 0 to {len(sources) - 1}."
            )
        self.model, self.auxiliary_model = model.requires_grad_(False), auxiliary_model
        paired = [(sources[source], layer) for source, layer in zip(self.layer_map, layers)]
        self.key_maps = nn.ModuleList(_linear_map(source.k_proj, layer.k_proj) for source, layer in paired)
        self.value_maps = nn.ModuleList(_linear_map(source.v_proj, layer.v_proj) for source, layer in paired)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and its three parts: cross-entropy of the model behind the predicted cache, of the auxiliary model,
        and the sum over layers of the mean absolute errors of keys and values. (The authors' code adds 1e-4 times a
        z-loss.)

        A row's prompt ends where its labels begin. A row without a prompt is cut in the middle.

        Args:
            input_ids: ``(B, S)``.
            labels: ``(B, S)``, -100 where there is nothing to learn.
            attention_mask: ``(B, S)``, for padding on either side.
        """
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        place_BS = mask_BS.cumsum(-1) - 1
        labelled_BS = (labels != -100) & mask_BS.bool()
        prompt_B1 = place_BS.masked_fill(~labelled_BS, input_ids.shape[1]).amin(-1, keepdim=True)
        prompt_B1 = torch.where(prompt_B1 <= 1, mask_BS.sum(-1, keepdim=True) // 2, prompt_B1)
        continued_BS = labels.masked_fill(place_BS < prompt_B1, -100)
        given = {"input_ids": input_ids, "attention_mask": mask_BS, "position_ids": place_BS.clamp(min=0)}

        auxiliary_logits, *predictions = self._predicted(given)
        with torch.no_grad(), recorded(attention_layers(self.model)) as targets:
            self.model(**given, use_cache=False, logits_to_keep=1)
        cached_BS = mask_BS.bool() & (place_BS < prompt_B1 - 1)
        with replaced(attention_layers(self.model), *predictions, cached_BS):
            logits = self.model(**given, use_cache=False).logits
        errors = sum(
            (predicted_BSX - target_BSX).abs()[mask_BS.bool()].mean()
            for kind, wanted in zip(predictions, targets)
            for predicted_BSX, target_BSX in zip(kind, wanted)
        )
        parts = {
            "language_model_loss": _next_token_loss(logits, continued_BS),
            "auxiliary_loss": _next_token_loss(auxiliary_logits, labels),
            "cache_loss": errors,
        }
        return {"loss": sum(parts.values()), **parts}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As ``generate()`` of transformers, which does everything behind the prompt.

        Args:
            input_ids: ``(B, S)``, padded on the left.
            attention_mask: ``(B, S)``.
            kwargs: of the model's ``generate()``.
        """
        settings = kwargs.get("generation_config") or self.model.generation_config
        said = {name: kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences")}
        for name in ("past_key_values", "assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name, getattr(settings, name, None)) is not None:
                raise FuseError(f"{name}: not possible with a predicted cache. Leave it out.")
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.shape[1] > 1:
            cache = self.predicted_cache(input_ids[:, :-1], mask_BS[:, :-1])
            copies = max(number or 1 for number in said.values())
            if copies > 1:
                cache.batch_repeat_interleave(copies)
            kwargs["past_key_values"] = cache
        return self.model.generate(input_ids, attention_mask=mask_BS, **kwargs)

    def predicted_cache(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The model's cache of a prompt ``(B, S)``, without having run the model."""
        positions_BS = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions_BS}
        _, keys, values = self._predicted(given, logits_to_keep=1)
        return made_cache(self.model, keys, values, positions_BS)

    def _predicted(self, given: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Projected, Projected]:
        """Logits of the auxiliary model, and the predictions."""
        with recorded(attention_layers(self.auxiliary_model)) as (keys, values):
            logits = self.auxiliary_model(**given, use_cache=False, **kwargs).logits
        return logits, self._mapped(self.key_maps, keys), self._mapped(self.value_maps, values)

    def _mapped(self, maps: nn.ModuleList, projected: Projected) -> Projected:
        dtype = self.model.dtype
        return [
            linear(projected[source].to(linear.weight.dtype)).to(dtype) for linear, source in zip(maps, self.layer_map)
        ]

    def load_maps(self, tensors: dict[str, Tensor]) -> None:
        for name in ("key_maps", "value_maps"):
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(name)}
            getattr(self, name).load_state_dict(own)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the maps and the auxiliary model, and what they were learned from, in one step.

        Raises:
            OutputError: the folder exists, or can't be written.
        """
        folder = Path(folder).expanduser().absolute()
        maps = {name: value.contiguous() for name, value in self.state_dict().items() if "_maps." in name}
        description = {
            "layer_map": self.layer_map,
            "model": fingerprint(self.model),
            "auxiliary_model": fingerprint(self.auxiliary_model),
        }
        with exclusive_output(folder, overwrite=overwrite) as partial:
            partial.folder.mkdir()
            save_file(maps, partial.folder / MAPS)
            (partial.folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            self.auxiliary_model.save_pretrained(partial.folder / AUXILIARY)
            if tokenizer := tokenizer_of(self.auxiliary_model):
                tokenizer.save_pretrained(partial.folder / AUXILIARY)
            partial.publish()
        return folder


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by a few numbers of each parameter, rounded so that fp32 and bf16 copies are one."""
    digest = hashlib.sha256()
    for name, values in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.detach().flatten()[:8].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _linear_map(source: nn.Module, target: nn.Module) -> nn.Linear:
    """Starts as the identity, as far as the sizes allow."""
    weight = target.weight
    linear = nn.Linear(source.out_features, target.out_features, device=weight.device)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _next_token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels_BS[:, 1:].flatten())
