"""Run by torchrun in two processes: gradients of an adapter must be those of one process, whatever wraps the model."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from checks_adapters import ADAPTERS, batch, trained
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def losses_and_gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.aux_loss_folded and output.aux_loss.requires_grad
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name.removeprefix("module.")] = full.clone()
    return gradients


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def sharded(model) -> FSDPModule:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, unused parameters looked for": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "ddp, static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "ddp, checkpointing": lambda m: DistributedDataParallel(checkpointed(m)),
    "fsdp": sharded,
    "fsdp, checkpointing": lambda m: sharded(checkpointed(m)),
}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    names = sys.argv[1:]
    for name in names:
        model = trained(ADAPTERS[name]).train()
        rows = [batch(seed=seed) for seed in range(dist.get_world_size())]
        parts = [losses_and_gradients(copy.deepcopy(model), inputs) for inputs in rows]
        expected = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
        for kind, wrap in WRAPPERS.items():
            found = losses_and_gradients(wrap(copy.deepcopy(model)), rows[rank])
            assert found.keys() == expected.keys(), kind
            for key, gradient in expected.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6, msg=f"{name}, {kind}: {key}")
    if rank == 0:
        print(f"{dist.get_world_size()} processes, {len(names) * len(WRAPPERS)} comparisons")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
