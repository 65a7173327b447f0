"""Which modules an adapter is put on: fields that PEFT reads of the configurations of all adapters here."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig


@dataclass
class TargetedConfig(PeftConfig):
    """A configuration with targets. As for LoRA, lists of names become sets."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the Linear modules to adapt, a regular expression of them, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regular expression, that are not adapted."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved, such as a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the only layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, if layers_to_transform does not find it."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
