"""The only file that touches PEFT's tables: a new ``PeftType`` member, and the classes that belong to it."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

# Modules of this folder that end with a call of `register`; importing the package imports them all.
METHODS = ("mixlora", "dynmole", "mola", "loramoe", "hydralora", "nola", "atlas", "mixda", "pst")


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Makes ``get_peft_model`` and ``PeftModel.from_pretrained`` know a method. Twice does no harm.

    Args:
        name: lower case; ``name.upper()`` is the ``peft_type`` of ``adapter_config.json`` and ``name + "_"`` must be
            ``model_cls.prefix``. A name that PEFT knows by itself is left to PEFT.
    """
    peft_type = name.upper()
    if peft_type in PeftType.__members__:
        return
    # What the class statement of an enum does for each member: PEFT has no way for others to add one.
    member = str.__new__(PeftType, peft_type)
    member._name_ = member._value_ = peft_type
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, peft_type, member)
    PeftType._member_names_.append(peft_type)
    PeftType._member_map_[peft_type] = member
    PeftType._value2member_map_[peft_type] = member
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
