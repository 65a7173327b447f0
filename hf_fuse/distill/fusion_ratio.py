"""What TGeo-KD makes its ratio of: features of a prediction, a controller, and the derivative that it learns from.

N predictions, V tokens or classes (C of a classifier), O outcomes (the V, or K of them and the rest), F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam

from hf_fuse.distill.methods._distributions import log_distributions
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError

LOWEST, HIGHEST = 0.05, 0.95
WIDTHS = (32, 16)
SCALARS = 8


def wide(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def gaps(student_NV: Tensor, teacher_NV: Tensor | TopK, labels_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``T^2 KL(teacher || student)`` and the cross-entropy of each prediction, ``(N,)`` both.

    Raises:
        FuseError: a top-K was taken at another temperature.
    """
    student_NO, teacher_NO = _outcomes(student_NV, teacher_NV, temperature)
    kl_N = (teacher_NO.exp() * (teacher_NO - student_NO)).sum(-1)
    return temperature**2 * kl_N, F.cross_entropy(wide(student_NV), labels_N, reduction="none")


@torch.no_grad()
def scalar_features(student_NV: Tensor, teacher_NV: Tensor | TopK, labels_N: Tensor) -> Tensor:
    """The triangle of student S, teacher T and label G in numbers that don't grow with the vocabulary, ``(N, 8)``.

    Squared distances S-T, S-G, T-G, Jensen-Shannon divergence of S and T in units of log 2, probabilities of the label,
    entropies in units of log V. With a top-K, at its temperature, and as far as its K tokens and their rest can tell.

    Raises:
        FuseError: a top-K without the labels' probabilities.
    """
    temperature, labels_N1 = getattr(teacher_NV, "temperature", 1.0), labels_N.unsqueeze(-1)
    s_NO, t_NO = (log_probs_NO.exp() for log_probs_NO in _outcomes(student_NV, teacher_NV, temperature))
    if not isinstance(teacher_NV, TopK):
        teacher_at_label_N = t_NO.gather(-1, labels_N1).squeeze(-1)
    elif teacher_NV.label_log_prob_N is not None:
        teacher_at_label_N = teacher_NV.label_log_prob_N.float().exp()
    else:
        raise FuseError("tgeo: the teacher's top-K lacks the labels' probabilities. Make it with the labels.")
    at_label = [(wide(student_NV) / temperature).softmax(-1).gather(-1, labels_N1).squeeze(-1), teacher_at_label_N]
    to_label = [probs_NO.square().sum(-1) + 1 - 2 * label_N for probs_NO, label_N in zip((s_NO, t_NO), at_label)]
    entropies = [torch.special.entr(probs_NO).sum(-1) for probs_NO in (s_NO, t_NO)]
    divergence_N = torch.special.entr((s_NO + t_NO) / 2).sum(-1) - sum(entropies) / 2
    most = math.log(max(student_NV.shape[-1], 2))
    between = [(s_NO - t_NO).square().sum(-1), *to_label, divergence_N / math.log(2)]
    return torch.stack([*between, *at_label, *(entropy_N / most for entropy_N in entropies)], -1)


def _outcomes(student_NV: Tensor, teacher_NV: Tensor | TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities ``(N, O)`` of both."""
    if isinstance(teacher_NV, TopK):
        return log_distributions(student_NV, teacher_NV, temperature)
    student_NV, teacher_NV = (wide(logits_NV) / temperature for logits_NV in (student_NV, teacher_NV))
    return student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)


@torch.no_grad()
def vector_features(student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor, class_means_NC: Tensor) -> Tensor:
    """Those of the reference, ``(N, 9 C)``: the vertices S, T, G and M, and five squared differences between them.

    Args:
        student_NC: logits.
        teacher_NC: logits.
        labels_N: classes.
        class_means_NC: M, the teacher's mean probabilities for samples of the same class.
    """
    s, t = wide(student_NC).softmax(-1), wide(teacher_NC).softmax(-1)
    g = F.one_hot(labels_N, s.shape[-1]).to(s)
    m = class_means_NC.to(s)
    return torch.cat([s, t, g, m, *((a - b).square() for a, b in ((m, s), (g, s), (t, s), (t, g), (m, g)))], -1)


@torch.no_grad()
def slopes(
    trained: list[nn.Parameter],
    before: list[Tensor],
    direction: list[Tensor],
    values: Callable[[], Tensor],
    *,
    distance: float = 0.01,
) -> Tensor:
    """``<direction, gradient of each value at before>`` by central differences, ``(N,)``; what trains stays as it is.

    Args:
        trained: the parameters that the values depend on.
        before: where to differentiate.
        direction: one tensor per parameter.
        values: computes them, with the parameters as they are.
        distance: how far to go in all. 0.01 as in DARTS.
    """
    length = torch.stack([part.square().sum() for part in direction]).sum().sqrt()
    if not length > 0:
        return torch.zeros_like(values())
    after, ends = copies(trained), []
    for sign in (1, -1):
        for parameter, was, part in zip(trained, before, direction, strict=True):
            parameter.copy_(was + sign * distance / length * part)
        ends.append(values())
    for parameter, now in zip(trained, after):
        parameter.copy_(now)
    return (ends[0] - ends[1]) * length / (2 * distance)


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


class Controller(nn.Module):
    """A small network F -> 32 -> 16 -> 1 whose output lies in (0.05, 0.95), and AdamW for it.

    Its weights and Adam's moments are buffers: they are saved with the rest of a loss's state, and the student's
    optimizer does not get them. The last layer starts at 0, so that every ratio starts at 0.5.

    Args:
        features: F.
        learning_rate: of AdamW.
        weight_decay: likewise.
    """

    weights: Tensor

    def __init__(self, features: int, *, learning_rate: float = 0.01, weight_decay: float = 0.05) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        layers = [nn.Linear(inner, outer) for inner, outer in zip((features, *WIDTHS), (*WIDTHS, 1))]
        self.shapes = [tuple(parameter.shape) for layer in layers for parameter in layer.parameters()]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
        weights = torch.cat([parameter.detach().flatten() for layer in layers for parameter in layer.parameters()])
        self.register_buffer("weights", weights)
        self.register_buffer("first_moment", torch.zeros_like(weights))
        self.register_buffer("second_moment", torch.zeros_like(weights))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, features_NF: Tensor, weights: Tensor | None = None) -> Tensor:
        """Ratios ``(N,)``; ``weights`` in the place of its own, to differentiate by them."""
        weights = self.weights if weights is None else weights
        parts = weights.split([math.prod(shape) for shape in self.shapes])
        parts = [part.view(shape) for part, shape in zip(parts, self.shapes)]
        values = features_NF.to(weights.dtype)
        for number in range(0, len(parts), 2):
            values = F.linear(values, parts[number], parts[number + 1])
            if number + 2 < len(parts):
                values = F.leaky_relu(values)
        return LOWEST + (HIGHEST - LOWEST) * values.squeeze(-1).sigmoid()

    def gradient(self, features_NF: Tensor, by_ratio_N: Tensor) -> Tensor:
        """Of the validation loss by the weights, given that by each ratio."""
        weights = self.weights.detach().clone().requires_grad_()
        with torch.enable_grad():
            ratios_N = self(features_NF, weights)
        return torch.autograd.grad(ratios_N, weights, by_ratio_N.to(ratios_N.dtype))[0]

    def step(self, gradient: Tensor) -> None:
        """One step of AdamW: decay that is added to the gradient, as in the reference, would outweigh one so small."""
        adam(
            [self.weights], [gradient], [self.first_moment], [self.second_moment], [], [self.steps], foreach=False,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=self.learning_rate, weight_decay=self.weight_decay, eps=1e-15,
            maximize=False, decoupled_weight_decay=True,
        )  # fmt: skip
