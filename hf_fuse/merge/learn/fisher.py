"""Diagonal Fisher information of a model: how much each weight matters to its predictions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.merge.learn._predictions import predictions
from hf_fuse.merge.learn_data import WRITERS
from hf_fuse.merge.learning import Learned, Subject
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2111.09832"


def fisher(
    subject: Subject,
    *,
    labels: Literal["sampled", "exact", "given"] = "sampled",
    samples: Annotated[int, Between(1)] = 1,
) -> Learned:
    """``F = mean over examples of E[(d log p(y | x) / d theta)^2]``, y from the model's own predictions.

    One gradient per example and draw, squared before it is averaged. Of a language model the labels of all positions
    that are trained on are drawn, each given the text before it, and the gradient is that of the whole sequence: its
    expected square is the sum of those of the positions. Weights that are tied have one gradient and one F.

    Args:
        subject: model and data; batches are of one example, so there is no padding.
        labels: ``sampled`` draws them; ``exact`` sums over all classes of a classifier, a gradient each; ``given``
            takes those of the data, which makes it the empirical Fisher.
        samples: draws per example.
    """
    model = subject.model
    if labels == "exact" and subject.kind in WRITERS:
        raise RecipeError("parameters: labels: exact needs a classifier; a language model has too many. Use sampled.")
    if labels == "given" and not subject.labelled:
        raise RecipeError("parameters: labels: given, but the data have no column label. Use sampled.")
    if labels != "sampled" and samples != 1:
        raise RecipeError(f"parameters: samples is {samples}, but labels: {labels} draws none. Remove it.")
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
    weight = [0.0]  # of the gradient that is on its way

    def add_square(parameter: Tensor, total: Tensor) -> None:
        total.addcmul_(parameter.grad.float(), parameter.grad.float(), value=weight[0])
        parameter.grad = None

    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_()
        handles.append(
            parameter.register_post_accumulate_grad_hook(lambda p, total=squares[name]: add_square(p, total))
        )
    random = torch.Generator().manual_seed(subject.recipe.seed)
    count = len(subject.data.train)
    for batch in subject.batches(1):
        logits_NC, given_N = predictions(model, batch)
        log_probs_NC = logits_NC.log_softmax(-1)
        draws = _draws(log_probs_NC, given_N, labels, samples, random)
        for number, (share, drawn_N) in enumerate(draws, 1):
            weight[0] = share / count
            chosen_N = log_probs_NC.gather(1, drawn_N[:, None].to(log_probs_NC.device))
            chosen_N.sum().backward(retain_graph=number < len(draws))
    for handle in handles:
        handle.remove()
    tensors = subject.stored(squares)
    shared = _tied(model, subject)
    for name, info in subject.checkpoint.tensors.items():
        if info.is_float and name not in tensors and name not in shared:
            tensors[name] = torch.zeros(info.shape)  # buffers, and what this model does not use
    return Learned(tensors, shared, facts={"examples": count})


def _draws(
    log_probs_NC: Tensor, given_N: Tensor, labels: str, samples: int, random: torch.Generator
) -> list[tuple[float, Tensor]]:
    """(weight, labels ``[N]``) of each gradient of one example."""
    if labels == "given":
        return [(1.0, given_N)]
    probs_NC = log_probs_NC.detach().exp().cpu()
    if labels == "exact":
        return [(share, torch.tensor([number])) for number, share in enumerate(probs_NC[0].tolist())]
    return [(1 / samples, torch.multinomial(probs_NC, 1, generator=random)[:, 0]) for _ in range(samples)]


def _tied(model: Any, subject: Subject) -> dict[str, str]:
    """Stored names of weights that are another weight: ``{name: the other's}``."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {
        name: first[id(parameter)]
        for name, parameter in every
        if first[id(parameter)] != name and name in subject.checkpoint.tensors
    }
