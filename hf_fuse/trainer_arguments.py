"""What a FuseTrainer is made from, checked and completed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_fuse.errors import FuseError
from hf_fuse.trainer_config import FuseConfig

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


def check_arguments(model: Any, args: Any) -> None:
    """Refuses what no training can start from.

    Raises:
        FuseError: no FuseConfig, a name instead of a model, or an old transformers.
    """
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise FuseError('FuseTrainer needs transformers 5.19 or later. Run: pip install -U "transformers>=5.19"')
    if not isinstance(args, FuseConfig):
        raise FuseError(f"args is a {type(args).__name__}, expected a FuseConfig: TrainingArguments with objectives.")
    if isinstance(model, str):
        raise FuseError(
            f"model is the name {model!r}, expected a model. Load it first, with the head that the task needs: "
            "AutoModelForCausalLM.from_pretrained(...), AutoModelForSequenceClassification.from_pretrained(...)."
        )
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible, but this is a single process: it uses one of them. To use all, start it with "
            "accelerate launch --num_processes %d.",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1


def with_adapter(model: Any, peft_config: PeftConfig) -> nn.Module:
    """``model`` with a new adapter.

    Raises:
        FuseError: it has one.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise FuseError("The model has an adapter already. Give either a PeftModel or a peft_config, not both.")
    return get_peft_model(model, peft_config)


def name_causal_loss(model: Any) -> None:
    """Sets ``loss_type`` of causal language models whose class name doesn't tell it (``GPT2LMHeadModel``).

    They fall back to this loss anyway, but by ``loss_type`` the Trainer decides whether labels are to be shifted.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    # XLM and XLNet are listed too, but compute a loss of their own that doesn't shift.
    listed = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    own_loss = getattr(config, "model_type", None) in ("xlm", "xlnet")
    if listed and not own_loss and base.loss_type is None and not config.is_encoder_decoder:
        base.loss_type = "ForCausalLM"
