"""Step Law (https://arxiv.org/abs/2503.04715): learning rate and batch size for pre-training, from two numbers.

``learning rate = 1.79 N^-0.713 D^0.307`` and ``batch = 0.58 D^0.571`` tokens, for N parameters outside the embeddings
and D tokens, AdamW, dense decoders. It says nothing about fine-tuning or adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Sizes of the models that the law was fitted on, roughly.
FITTED = (60e6, 1e9)


@dataclass(frozen=True)
class StepLaw:
    """What the law says.

    Attributes:
        learning_rate: peak learning rate of AdamW.
        batch_tokens: tokens per optimizer step.
        warning: why not to trust it here; None within the sizes it was fitted on.
    """

    learning_rate: float
    batch_tokens: float
    warning: str | None


def step_law(parameters: float, tokens: float) -> StepLaw:
    """Learning rate and batch size to pre-train a dense decoder.

    Args:
        parameters: without embeddings (see :func:`parameters_outside_embeddings`).
        tokens: of the whole training.

    Raises:
        FuseError: a number below 1, or none that is finite.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not 1 <= value < math.inf:
            raise FuseError(f"{name} is {value}; expected a count, as 1e9.")
    low, high = FITTED
    warning = None
    if not low <= parameters <= high:
        warning = (
            f"the law was fitted on dense models of {low:.0e} to {high:.0e} parameters; this one has {parameters:.1e}"
        )
    return StepLaw(1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571, warning)


def parameters_outside_embeddings(config: PretrainedConfig) -> int:
    """Number of parameters of a causal language model, without embeddings and output layer; allocates no weights.

    Raises:
        FuseError: the config is not that of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise FuseError(f"{config.model_type}: is not a causal language model: {str(error).split('.')[0]}.") from None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    left_out = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)
