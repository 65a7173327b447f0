"""Weight-space merge methods: one file, one function of the same name.

The first argument tells what the engine hands over, in the working precision (fp32 or fp64):

- ``models_KN``: the weights of K models, a block of N elements each; the result is the merged weights;
- ``deltas_KN``: their differences from the base; the result is the merged difference, to which the
  engine adds the base;
- ``vectors_KN``: differences if the recipe has a base, else weights.

A method is elementwise unless its module says ``UNIT`` (or a function ``unit(**options)`` there does). With
``"tensor"`` it gets ``[K, *shape]``. With ``"rows"`` it gets whole rows, ``[K, R, C]``: a row is all that lies behind
an index of the first axis, and a vector is one row. It may ask for ``base`` (the base's weights, shaped like one
model's block) and for ``place`` (a :class:`~hf_fuse.merge.methods._passes.Place`). A module with ``measure(...)`` needs
numbers from a whole tensor or model first: a generator of :class:`~hf_fuse.merge.methods._passes.Pass` whose return
value reaches the method as ``state``. A module with ``rescale(...)`` learns the lengths of all task vectors and of the
merged one when everything is computed, and returns the factor that the whole is multiplied with. ``MODELS = (low,
high)`` bounds K; ``SCALARS = "mean"`` has 0-d tensors averaged instead; ``DEFAULTS`` holds, in the form of a recipe's
parameters, defaults that depend on the tensor's name. ``check(**options)`` refuses, before any work, options that do
not go together.
"""
