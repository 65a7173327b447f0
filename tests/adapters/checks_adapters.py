"""What PEFT expects of a tuner, as checks that run over every adapter of the package (``test_every_adapter.py``).

A new adapter is one line in ``ADAPTERS``.
"""

from __future__ import annotations

import atexit
import copy
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_adapters import llama, train

import hf_fuse
from hf_fuse.adapters.routed_layer import routed_layers
from hf_fuse.errors import FuseError

EVERYWHERE = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(NamedTuple):
    """How to make a small one, and what is to be expected of it."""

    config: Callable[..., PeftConfig]
    mergeable: bool = False
    starts_as_base: bool = True


def _routed(name: str, starts_as_base: bool = True, **settings) -> Adapter:
    def config(**more) -> PeftConfig:
        usual = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "num_experts": 3, "target_modules": EVERYWHERE}
        return getattr(hf_fuse, name)(**usual | settings | more)

    return Adapter(config, starts_as_base=starts_as_base)


def _atlas(**settings) -> PeftConfig:
    return hf_fuse.AtlasConfig(**{"task_vectors": _task_vectors()} | settings)


@cache
def _task_vectors() -> list[str]:
    """Folders of two LoRAs, trained as it were. They stay until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="hf_fuse_task_vectors_"))
    atexit.register(shutil.rmtree, folder)
    for seed in (1, 2):
        train(llama(), seed, r=seed + 1, target_modules=EVERYWHERE).save_pretrained(folder / str(seed))
    return [str(folder / "1"), str(folder / "2")]


def _nola(**settings) -> PeftConfig:
    return hf_fuse.NolaConfig(**{"num_basis": 6, "r": 2, "target_modules": EVERYWHERE} | settings)


def _mixda(**settings) -> PeftConfig:
    usual = {"num_domains": 2, "gate": "token", "gate_layers": 1, "gate_dropout": 0.0, "target_modules": EVERYWHERE}
    return hf_fuse.MixDaConfig(**usual | settings)


def _pst(**settings) -> PeftConfig:
    return hf_fuse.PstConfig(**{"sparsity": 0.3, "r": 2, "score_r": 2, "target_modules": EVERYWHERE} | settings)


ADAPTERS = {
    "mixlora": _routed("MixLoraConfig", router_aux_loss_coef=0.1),
    "mixlora_dora": _routed("MixLoraConfig", use_dora=True, router_aux_loss_coef=0.1),
    # An expert's output is multiplied with its probability.
    "mixlora_switch": _routed("MixLoraConfig", False, routing_strategy="mixlora-switch", jitter_noise=0.0),
    "dynmole": _routed("DynMoleConfig"),
    "mola": _routed("MolaConfig", num_experts=[2, 4], router_aux_loss_coef=0.1),
    "loramoe": _routed("LoraMoeConfig", blc_weight=0.1),
    "hydralora": _routed("HydraLoraConfig"),
    "nola": Adapter(_nola, mergeable=True),
    "atlas": Adapter(_atlas, mergeable=True),
    "mixda": Adapter(_mixda, starts_as_base=False),
    "mixda_ungated": Adapter(partial(_mixda, gate="none")),
    "pst": Adapter(_pst, mergeable=True, starts_as_base=False),
}


def batch(rows: int = 2, length: int = 7, seed: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


def move(model, seed: int = 0, adapter: str = "default"):
    """Gives every parameter of an adapter another value, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter), alpha=0.3)
    return model


def trained(adapter: Adapter, **more):
    return move(get_peft_model(llama(), adapter.config(task_type="CAUSAL_LM", **more)))


def take_factors(mixed, plain) -> None:
    """Gives a MixLoRA of one expert the factors of PEFT's LoRA on the same modules."""
    loras = dict(plain.get_base_model().named_modules())
    with torch.no_grad():
        for layer in routed_layers(mixed):
            experts = layer.experts["default"]
            for name in getattr(experts, "targets", {"": ""}).values():
                lora = loras[f"{layer.key}.{name}".rstrip(".")]
                suffix = f"_{name}" if name else ""
                getattr(experts, f"A{suffix}").copy_(lora.lora_A["default"].weight)
                getattr(experts, f"B{suffix}").copy_(lora.lora_B["default"].weight)


def check_fresh_adapter_is_the_base(adapter: Adapter, tmp_path: Path):
    base = logits(llama())
    model = get_peft_model(llama(), adapter.config())
    if adapter.starts_as_base:
        torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-6)
    assert (logits(move(model)) - base).abs().max() > 1e-3


def check_config_survives_json(adapter: Adapter, tmp_path: Path):
    config = adapter.config(task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() == config.to_dict()
    assert copy.deepcopy(config) == config


def check_only_the_adapter_is_trainable(adapter: Adapter, tmp_path: Path):
    model = get_peft_model(llama(), adapter.config())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name in dict(model.named_parameters()) if ".default." in f"{name}."} != set()


def check_training_step(adapter: Adapter, tmp_path: Path):
    model = trained(adapter).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        # An expert that nobody chose has zeros: None would stall distributed training.
        assert (parameter.grad is not None) == parameter.requires_grad, name
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name


def check_save_and_load(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert not any("default" in key or "base_layer" in key for key in saved)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for options in ({"adapter_name": "other"}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(llama(), tmp_path, **options)
        assert torch.equal(logits(again), expected), options
        assert any(p.requires_grad for p in again.parameters()) == options.get("is_trainable", False)
        assert not any(p.is_meta for p in again.parameters())


def check_state_dict_can_be_set(adapter: Adapter, tmp_path: Path):
    model, other = trained(adapter), get_peft_model(llama(), adapter.config())
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def check_several_adapters(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    model.add_adapter("second", adapter.config(target_modules=["q_proj", "down_proj"]))
    move(model, seed=1, adapter="second")
    first = logits(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in f"{n}.")
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    assert all(p.requires_grad == (".second." in f"{n}.") for n, p in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    model.save_pretrained(tmp_path)
    for name, expected in (("default", first), ("second", second)):
        folder = tmp_path if name == "default" else tmp_path / name
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), expected), name
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)

    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name in model.state_dict())


def check_deleting_the_active_adapter(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    model.add_adapter("second", adapter.config())
    move(model, seed=1, adapter="second")
    model.set_adapter("second")
    second = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def check_disabling(adapter: Adapter, tmp_path: Path):
    base, model = logits(llama()), trained(adapter)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        inputs = batch()
        model.train()
        assert getattr(model(**inputs, labels=inputs["input_ids"]), "aux_loss", None) is None
    assert torch.equal(logits(model), adapted)
    assert any(parameter.requires_grad for parameter in model.parameters())


def check_merging(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    adapted = logits(model)
    if adapter.mergeable:
        torch.testing.assert_close(logits(model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)
        return
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="can't be merged"):
            merge()
    assert torch.equal(logits(model), adapted)


def check_unloading(adapter: Adapter, tmp_path: Path):
    base = llama()
    bare = trained(adapter).unload()
    assert torch.equal(logits(bare), logits(base))
    assert bare.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, BaseTunerLayer) for module in bare.modules())
    assert not bare._forward_hooks and not bare._forward_pre_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(bare, adapter.config())


def check_gradient_checkpointing(adapter: Adapter, tmp_path: Path):
    def gradients(**kwargs):
        model = trained(adapter)
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        model.train()
        inputs = batch()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        return output.loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    loss, plain = gradients()
    checkpointed_loss, checkpointed = gradients(use_reentrant=False)
    assert torch.equal(loss, checkpointed_loss)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def check_reentrant_checkpointing_is_refused(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    inputs = batch()
    model.train()
    if getattr(model(**inputs, labels=inputs["input_ids"]), "aux_loss", None) is None:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(FuseError, match="use_reentrant"):
        model(**inputs, labels=inputs["input_ids"])


def check_half_precision(adapter: Adapter, tmp_path: Path):
    for dtype in (torch.bfloat16, torch.float16):
        model = move(get_peft_model(llama().to(dtype), adapter.config()))
        assert {p.dtype for n, p in model.named_parameters() if ".default." in f"{n}."} == {torch.float32}
        out = logits(model)
        assert out.dtype == dtype and out.isfinite().all()
        model = get_peft_model(llama().to(dtype), adapter.config(), autocast_adapter_dtype=False)
        assert {p.dtype for n, p in model.named_parameters() if ".default." in f"{n}."} == {dtype}
        assert logits(move(model)).isfinite().all()


def check_autocast(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model).float()
        model.train()
        inputs = batch()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
    # The median: rounding sends single tokens to other experts.
    assert (found - expected).abs().median() < 0.05 * expected.abs().median()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert {routed.dtype for routed in getattr(output, "router_logits", ())} <= {torch.float32}


def check_copying(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    move(clone, seed=5)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(clone), logits(model))
    for copied in (clone, again):
        inputs = batch()
        loss = copied.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def check_transformers_integration(adapter: Adapter, tmp_path: Path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter.config())
    move(model).save_pretrained(tmp_path / "adapter")
    expected = logits(model)

    by_name = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_name), expected)
    loaded = llama()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(base))

    added = llama()
    added.add_adapter(adapter.config(), "mine")
    inputs = batch()
    output = move(added, adapter="mine").train()(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    added.save_pretrained(tmp_path / "mine")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "mine")), logits(added))


def check_injection(adapter: Adapter, tmp_path: Path):
    model = move(inject_adapter_in_model(adapter.config(), llama()))
    assert torch.equal(logits(model), logits(trained(adapter)))


def check_modules_to_save(adapter: Adapter, tmp_path: Path):
    model = trained(adapter, modules_to_save=["lm_head"])
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def check_chosen_layers(adapter: Adapter, tmp_path: Path):
    for targets in ({}, {"target_modules": None}):  # as given, and the adapter's own
        model = get_peft_model(llama(), adapter.config(layers_to_transform=[1], **targets))
        names = [name for name in model.state_dict() if ".default." in f"{name}."]
        assert names and all(".layers.1." in name for name in names)


def check_wrong_targets(adapter: Adapter, tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?i)target modules .*not found"):
        get_peft_model(llama(), adapter.config(target_modules=["no_such_module"]))
    model = get_peft_model(llama(), adapter.config(exclude_modules=["v_proj", "up_proj"]))
    keys = [name for name in model.state_dict() if ".default." in f"{name}."]
    assert keys and not any("v_proj" in key or "up_proj" in key for key in keys)


def check_generation(adapter: Adapter, tmp_path: Path):
    model = trained(adapter).eval()
    inputs = batch(rows=1, length=3)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        ids = inputs["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids)


def check_status(adapter: Adapter, tmp_path: Path):
    model = trained(adapter)
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    assert status.requires_grad == {"default": True} and status.trainable_params > 0
    assert len(status.devices["default"]) == 1


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
