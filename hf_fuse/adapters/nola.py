"""NOLA: a LoRA whose factors are sums of random matrices, of which only the coefficients are trained and stored.

``A = A_0 + sum_n alpha_n A_n`` and ``B = sum_n beta_n B_n`` with entries of ``A_n, B_n`` uniform in
``[-1, 1] / sqrt(N)`` (arXiv 2310.02556). The number of trained parameters, 2 N per layer, no longer depends on the rank
or the layer's size. The matrices follow from an integer seed and the layer's name; they are made in pieces when needed
and never kept, so they cost time instead of memory: merge the adapter before generating text with it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.low_rank import LowRankLayer, LowRankModel
from hf_fuse.adapters.targeted_config import TargetedConfig

# Elements of the random matrices that exist at a time: few enough for a processor's cache, enough for a GPU.
CHUNK = {"cpu": 1 << 16}
GPU_CHUNK = 1 << 24


@dataclass
class NolaConfig(TargetedConfig):
    """Settings of NOLA (arXiv 2310.02556).

    Args:
        num_basis: random matrices per factor; a layer trains ``2 * num_basis`` numbers.
        r: rank of the change. It costs no parameters.
        lora_alpha: the change is scaled by ``lora_alpha / r`` (reference: 8 for GPT-2, 4 with r 16 for LLaMA-2).
        lora_dropout: probability, on the input of the change.
        seed: of the random matrices. Part of the adapter: with another seed the stored coefficients mean nothing.
        target_modules: names of Linear layers as for LoRA; default: PEFT's choice for the architecture.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for LoRA.

    The reference trains with learning rate 5e-3 (GPT-2) and 1e-3 (LLaMA-2).
    """

    num_basis: int = field(default=512, metadata={"help": "Random matrices per factor."})
    r: int = field(default=8, metadata={"help": "Rank of the change."})
    lora_alpha: float = field(default=8, metadata={"help": "The change is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the change's input."})
    seed: int = field(default=0, metadata={"help": "Of the random matrices."})

    target_parameters = None
    bias = "none"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["NOLA"]
        for name in ("num_basis", "r"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected a probability below 1.")
        if type(self.seed) is not int:
            raise ValueError(f"seed is {self.seed!r}, expected an integer.")


class NolaLayer(LowRankLayer):
    """A linear layer with NOLA coefficients ``nola_alpha`` and ``nola_beta``, ``[N]`` each."""

    adapter_layer_names = ("nola_alpha", "nola_beta")
    other_param_names = ("dropout", "settings", "keys")

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__(base_layer, name)
        self.nola_alpha, self.nola_beta = nn.ParameterDict(), nn.ParameterDict()
        self.settings: dict[str, NolaConfig] = {}
        self.keys: dict[str, list[list[int]]] = {}

    def update_layer(self, adapter_name: str, config: NolaConfig) -> None:
        self.settings[adapter_name], self.dropout[adapter_name] = config, config.lora_dropout
        name = self.name.removeprefix("_orig_mod.")  # of a compiled model
        self.keys[adapter_name] = [stream_keys(config.seed, f"{name}:{part}") for part in ("A_0", "A", "B")]
        # The frozen A_0 alone lets gradients reach beta; alpha follows from the second step on.
        self.nola_alpha[adapter_name] = nn.Parameter(torch.zeros(config.num_basis))
        self.nola_beta[adapter_name] = nn.Parameter(torch.zeros(config.num_basis))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        config, alpha_N, beta_N = (held[adapter_name] for held in (self.settings, self.nola_alpha, self.nola_beta))
        anchor, down, up = self.keys[adapter_name]
        size = config.r * self.in_features
        A_0 = uniform_matrices(anchor, 0, 1, size, alpha_N.device) * self.in_features**-0.5  # Kaiming, a = sqrt(5)
        down_ri = (A_0[0] + random_sum(alpha_N, down, size)).view(config.r, self.in_features)
        up_or = random_sum(beta_N, up, config.r * self.out_features).view(self.out_features, config.r)
        return down_ri.to(alpha_N.dtype), (up_or * (config.lora_alpha / config.r)).to(beta_N.dtype)


class NolaModel(LowRankModel):
    """Adds NOLA to a model; made by ``get_peft_model(model, NolaConfig(...))``."""

    prefix = "nola_"
    tuner_layer_cls = NolaLayer


# One operator to the compiler, which would otherwise unroll hundreds of pieces.
@torch.library.custom_op(
    "hf_fuse::random_sum", mutates_args=(), schema="(Tensor coefficients, int[] keys, int size) -> Tensor"
)
def random_sum(coefficients_N: Tensor, keys: list[int], size: int) -> Tensor:
    """``sum_n coefficients_n matrix_n / sqrt(N)``, fp32 ``[size]``; see :func:`uniform_matrices`.

    Backward makes the matrices again instead of saving them.
    """
    count, device = len(coefficients_N), coefficients_N.device
    scaled_N = coefficients_N.float() * count**-0.5
    total = torch.zeros(size, device=device)
    with torch.autocast(device.type, enabled=False):
        for first, matrices in _chunks(keys, count, size, device):
            total.addmv_(matrices.T, scaled_N[first : first + len(matrices)])
    return total


@torch.library.custom_op(
    "hf_fuse::random_products", mutates_args=(), schema="(Tensor gradient, int[] keys, int count) -> Tensor"
)
def _random_products(gradient: Tensor, keys: list[int], count: int) -> Tensor:
    """``<gradient, matrix_n> / sqrt(N)`` for every n."""
    with torch.autocast(gradient.device.type, enabled=False):
        products = [m @ gradient for _, m in _chunks(keys, count, len(gradient), gradient.device)]
    return torch.cat(products) * count**-0.5


@random_sum.register_fake
def _(coefficients_N, keys, size):
    return coefficients_N.new_empty(size, dtype=torch.float32)


@_random_products.register_fake
def _(gradient, keys, count):
    return gradient.new_empty(count)


def _remember(ctx, inputs, output) -> None:
    coefficients_N, ctx.keys, _ = inputs
    ctx.count, ctx.dtype = len(coefficients_N), coefficients_N.dtype


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _random_products(gradient, ctx.keys, ctx.count).to(ctx.dtype), None, None


random_sum.register_autograd(_backward, setup_context=_remember)


def _chunks(keys: list[int], count: int, size: int, device: torch.device):
    """``(first, matrices [rows, size])`` for all ``count`` matrices, a few at a time."""
    rows = max(1, CHUNK.get(device.type, GPU_CHUNK) // size)
    for first in range(0, count, rows):
        yield first, uniform_matrices(keys, first, min(rows, count - first), size, device)


def stream_keys(seed: int, name: str) -> list[int]:
    """Two 32-bit keys for the random numbers called ``name``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return [int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4)]


def uniform_matrices(keys: list[int], first: int, count: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Matrices ``first`` to ``first + count`` of a stream, flattened: fp32 ``[count, size]``, uniform in [-1, 1].

    A hash of the element's place, in integers: every device and release of torch gives the same bits (the generators
    of torch promise neither), any piece can be made alone, and a GPU needs nothing from the host.
    """
    rows = torch.arange(first, first + count, dtype=torch.int32, device=device).add_(keys[0])
    columns = torch.arange(size, dtype=torch.int32, device=device).add_(keys[1])
    mixed = _mix(_mix(rows).unsqueeze(1) ^ _mix(columns))
    return mixed.float().mul_(2.0**-31)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit moves about half of the output bits.

    Multiply and xor-shift with the constants of C. Wellons' lowbias32; int32 wraps, and its shifts are made logical.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


register("nola", NolaConfig, NolaModel)
