"""Compression of one model: recipe -> what to change -> one stock checkpoint, with figures from before and after.

The package is also the function: ``hf_fuse.compress(recipe, output="out")`` runs
:func:`hf_fuse.compress.engine.compress`.
"""

import sys
import types


class _CallablePackage(types.ModuleType):
    """``hf_fuse.compress`` names both the folder and the verb; importing a submodule must not hide the verb."""

    def __call__(self, *args, **kwargs):
        from hf_fuse.compress.engine import compress

        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
