"""Mixtures of experts as PEFT adapters. Importing this package registers every one of them with PEFT."""

from importlib import import_module

import peft  # noqa: F401  (first of all: while it is being imported, it may import this package)

from hf_fuse.adapters._peft import METHODS

for _method in METHODS:
    import_module(f"hf_fuse.adapters.{_method}")
