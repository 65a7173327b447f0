"""Fusion while decoding: several live models, one stream of tokens.

Each method is a function of live models: ``proxy_tuning(large, small_expert, small_base, alpha=1.0).generate(...)``.
"""

from __future__ import annotations

from hf_fuse import registry

METHODS = registry.names("decode")
__all__ = [*METHODS, "FusedModels"]


def __getattr__(name: str):
    if name in METHODS:
        return registry.get("decode", name).function
    if name == "FusedModels":
        from hf_fuse.decode.fused_models import FusedModels

        return FusedModels
    raise AttributeError(f"module 'hf_fuse.decode' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
