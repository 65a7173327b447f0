"""Time and saved activations of mixtures of LoRA experts, next to plain LoRA of the same rank.

    python recipes/benchmarks/routed_adapters.py
    python recipes/benchmarks/routed_adapters.py --device cuda --dtype bfloat16 --tokens 16384 --hidden 4096

One feed-forward layer and one Linear, forward and backward. All variants take turns in every round, so that whatever
else the machine does befalls them alike; ratios are to plain LoRA in the same run. On the CPU time is that of the
process on one thread (``--threads``), on a GPU that of the wall clock between synchronisations.
Saved activations are the bytes held between forward and backward: parameters and the output do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_fuse.adapters.routed_ffn import routed_ffn
from hf_fuse.adapters.routed_linear import routed_linear
from hf_fuse.adapters.routing import Routes, dense, route, router_logits, top_k


@dataclass
class Shapes:
    """One feed-forward layer and its experts."""

    tokens: int = 2048
    hidden: int = 1024
    width: int = 2816
    experts: int = 8
    top_k: int = 2
    rank: int = 8
    dropout: float = 0.0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass
class Result:
    """Of one variant: seconds of each round, bytes that autograd saved."""

    seconds: list[float]
    saved_bytes: int


class Layer:
    """A gated feed-forward layer of random weights, with LoRA factors of several kinds."""

    def __init__(self, shapes: Shapes) -> None:
        torch.manual_seed(0)
        self.shapes = shapes
        made = {"device": shapes.device, "dtype": getattr(torch, shapes.dtype)}
        sizes = {
            "gate": (shapes.hidden, shapes.width),
            "up": (shapes.hidden, shapes.width),
            "down": (shapes.width, shapes.hidden),
        }
        self.base = {name: nn.Linear(*size, bias=False, **made).requires_grad_(False) for name, size in sizes.items()}

        def factors(*experts: int, rank: int = shapes.rank) -> dict[str, tuple[Tensor, Tensor]]:
            return {
                name: (
                    (0.02 * torch.randn(*experts, rank, inputs, **made)).requires_grad_(),
                    (0.02 * torch.randn(*experts, outputs, rank, **made)).requires_grad_(),
                )
                for name, (inputs, outputs) in sizes.items()
            }

        self.plain = factors()
        self.wide = factors(rank=shapes.top_k * shapes.rank)
        self.experts = factors(shapes.experts)
        self.router = (0.02 * torch.randn(shapes.experts, shapes.hidden, **made)).requires_grad_()
        self.x = torch.randn(shapes.tokens, shapes.hidden, **made).requires_grad_()

    def parameters(self) -> list[Tensor]:
        pairs = [*self.plain.values(), *self.wide.values(), *self.experts.values()]
        return [*(m.weight for m in self.base.values()), self.router, *(factor for pair in pairs for factor in pair)]

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.shapes.dropout) if self.shapes.dropout else x

    def lora(self, name: str, factors: dict, x: Tensor) -> Tensor:
        A, B = factors[name]
        return self.base[name](x) + F.linear(F.linear(self.dropped(x), A), B) * 2.0

    def frozen_ffn(self) -> Tensor:
        return self.base["down"](F.silu(self.base["gate"](self.x)) * self.base["up"](self.x))

    def lora_ffn(self, factors: dict, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return self.lora("down", factors, F.silu(self.lora("gate", factors, x)) * self.lora("up", factors, x))

    def routes(self) -> Routes:
        return route(router_logits(self.x, self.router), "mixlora", top_k=self.shapes.top_k)

    def expert(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (A[index], B[index]) for name, (A, B) in self.experts.items()}

    def expert_by_expert(self) -> Tensor:
        """Each expert a whole layer on its tokens, nothing shared."""
        weights = self.routes().weights_TE
        y = torch.zeros_like(self.x, dtype=weights.dtype)
        for index in range(self.shapes.experts):
            tokens = weights[:, index].nonzero()[:, 0]
            out = self.lora_ffn(self.expert(index), self.x[tokens])
            y = y.index_add(0, tokens, out * weights[tokens, index, None])
        return y.to(self.x.dtype)

    def gate_and_up_shared(self) -> Tensor:
        """MixLoRA's own scheme: the frozen products in once for all tokens, the one out for every expert."""
        weights = self.routes().weights_TE
        gate, up = self.base["gate"](self.x), self.base["up"](self.x)
        y = torch.zeros_like(self.x, dtype=weights.dtype)
        for index in range(self.shapes.experts):
            tokens = weights[:, index].nonzero()[:, 0]
            x, factors = self.x[tokens], self.expert(index)

            def change(name: str, x: Tensor, factors: dict = factors) -> Tensor:
                A, B = factors[name]
                return F.linear(F.linear(self.dropped(x), A), B) * 2.0

            h = F.silu(gate[tokens] + change("gate", x)) * (up[tokens] + change("up", x))
            out = self.base["down"](h) + change("down", h)
            y = y.index_add(0, tokens, out * weights[tokens, index, None])
        return y.to(self.x.dtype)

    def routed_ffn(self, kernel: str | None) -> Tensor:
        return routed_ffn(
            self.x,
            self.routes(),
            **self.base,
            activation=F.silu,
            factors=self.experts,
            scaling=2.0,
            dropout=self.shapes.dropout,
            kernel=kernel,
        )

    def routed_linear(self, strategy: Callable[[Tensor], Routes], shared_A: bool = False) -> Tensor:
        A, B = self.experts["gate"]
        weights = strategy(router_logits(self.x, self.router)).weights_TE
        out = self.base["gate"](self.x)
        return routed_linear(out, self.x, weights, A[0] if shared_A else A, B, 2.0, dropout=self.shapes.dropout)

    def linear_expert_by_expert(self) -> Tensor:
        weights = dense(router_logits(self.x, self.router)).weights_TE
        y = self.base["gate"](self.x)
        for index, (A, B) in enumerate(zip(*self.experts["gate"])):
            change = F.linear(F.linear(self.dropped(self.x), A), B) * 2.0
            y = y + (weights[:, index, None] * change).to(y.dtype)
        return y


def variants(layer: Layer) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Group -> name -> forward pass. The first of a group is what ratios are to."""
    ffn = {
        "plain LoRA": partial(layer.lora_ffn, layer.plain),
        f"plain LoRA, rank x {layer.shapes.top_k}": partial(layer.lora_ffn, layer.wide),
        "frozen layer": layer.frozen_ffn,
        "expert by expert, nothing shared": layer.expert_by_expert,
        "expert by expert, gate and up shared": layer.gate_and_up_shared,
        "routed_ffn": partial(layer.routed_ffn, None),
        "routed_ffn, loop": partial(layer.routed_ffn, "loop"),
        "routed_ffn, slots": partial(layer.routed_ffn, "slots"),
    }
    if layer.shapes.dtype == "bfloat16":
        ffn["routed_ffn, groups"] = partial(layer.routed_ffn, "groups")
    some = partial(top_k, top_k=layer.shapes.top_k)
    linear = {
        "plain LoRA": partial(layer.lora, "gate", layer.plain, layer.x),
        "expert by expert": layer.linear_expert_by_expert,
        "routed_linear, all experts": partial(layer.routed_linear, dense),
        f"routed_linear, {layer.shapes.top_k} experts": partial(layer.routed_linear, some),
        "routed_linear, shared A": partial(layer.routed_linear, dense, shared_A=True),
    }
    return {"feed-forward layer": ffn, "one Linear": linear}


class Allocated(TorchDispatchMode):
    """Remembers every storage that is made, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.storages.append(reference)
                self.sizes[reference.cdata] = tensor.untyped_storage().nbytes()
        return out


def saved_bytes(forward: Callable[[], Tensor], x: Tensor, parameters: list[Tensor]) -> int:
    """What lies in memory between forward and backward because of the latter: neither the output nor parameters."""
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage()._cdata)
        return tensor

    with Allocated() as allocated, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    outside = {y.untyped_storage()._cdata, *(tensor.untyped_storage()._cdata for tensor in parameters)}
    alive = {s.cdata for s in allocated.storages if not s.expired()} - outside
    size = sum(allocated.sizes[cdata] for cdata in alive)
    # The input was there before: it counts where the backward pass needs it.
    return size + x.untyped_storage().nbytes() * (x.untyped_storage()._cdata in saved)


def seconds(forward: Callable[[], Tensor], gradient: Tensor) -> float:
    clock = time.perf_counter if gradient.is_cuda else time.process_time
    if gradient.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    forward().backward(gradient)
    if gradient.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(shapes: Shapes, rounds: int, only: str | None = None) -> dict[str, dict[str, Result]]:
    layer = Layer(shapes)
    groups = variants(layer)
    if only:
        groups = {only: groups[only]}
    results = {
        group: {
            name: Result([], saved_bytes(forward, layer.x, layer.parameters())) for name, forward in members.items()
        }
        for group, members in groups.items()
    }
    gradients = {group: torch.randn_like(next(iter(members.values()))()) for group, members in groups.items()}
    for turn in range(rounds + 1):  # the first warms caches and allocators up
        for group, members in groups.items():
            for name, forward in members.items():
                took = seconds(forward, gradients[group])
                if turn:
                    results[group][name].seconds.append(took)
                layer.x.grad = None
    return results


def print_table(results: dict[str, dict[str, Result]]) -> None:
    for group, members in results.items():
        first = next(iter(members.values()))
        print(f"\n{group:<38}{'least ms':>10}{'ratio':>8}{'median':>8}{'saved MB':>10}{'ratio':>8}")
        for name, result in members.items():
            print(
                f"  {name:<36}{1e3 * min(result.seconds):>10.1f}{min(result.seconds) / min(first.seconds):>8.2f}"
                f"{statistics.median(result.seconds) / statistics.median(first.seconds):>8.2f}"
                f"{result.saved_bytes / 1e6:>10.1f}{result.saved_bytes / first.saved_bytes:>8.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Shapes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("feed-forward layer", "one Linear"))
    parser.add_argument("--json", help="write the raw figures to this file")
    arguments = vars(parser.parse_args())
    rounds, threads, only, path = (arguments.pop(name) for name in ("rounds", "threads", "only", "json"))
    torch.set_num_threads(threads)
    shapes = Shapes(**arguments)
    print(f"torch {torch.__version__}, {threads} thread(s), {rounds} rounds, {shapes}")
    results = measure(shapes, rounds, only)
    print_table(results)
    if path:
        with open(path, "w") as file:  # noqa: PTH123
            figures = {group: {n: asdict(r) for n, r in members.items()} for group, members in results.items()}
            json.dump({"shapes": asdict(shapes), "results": figures}, file)


if __name__ == "__main__":
    main()
