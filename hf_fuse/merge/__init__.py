"""Weight-space merging: recipe -> plan -> stream -> one folder.

The package is also the function: ``hf_fuse.merge(recipe, output="out")`` runs :func:`hf_fuse.merge.engine.merge`.
"""

import sys
import types


class _CallablePackage(types.ModuleType):
    """``hf_fuse.merge`` names both the folder and the verb; importing a submodule must not hide the verb."""

    def __call__(self, *args, **kwargs):
        from hf_fuse.merge.engine import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
