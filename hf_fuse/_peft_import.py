"""Registers the adapters with PEFT without importing PEFT, which takes seconds.

``import hf_fuse`` calls :func:`register_with_peft`. If PEFT is there already the adapters are registered at once;
otherwise the moment somebody imports PEFT (``transformers`` does so too when it meets an adapter).
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterPeft:
    """A finder that finds what the others find, and has the adapters imported after ``peft``."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "peft":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # A loader may serve several modules; asking for a spec (is_peft_available) is not yet an import.
            if module.__name__ == "peft" and self in sys.meta_path:
                sys.meta_path.remove(self)
                import_module("hf_fuse.adapters")

        spec.loader.exec_module = execute_and_register
        return spec


def register_with_peft() -> None:
    """Now, or as soon as ``peft`` is imported."""
    if "peft" in sys.modules:
        import_module("hf_fuse.adapters")
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
