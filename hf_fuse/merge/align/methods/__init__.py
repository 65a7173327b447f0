"""Ways to align one model to another: one file, one function each.

A method is ``name(pair, *, options) -> Alignment``. The :class:`~hf_fuse.merge.align.pair.Pair` is the two checkpoints
with what is known of their symmetries, and the live models with data if the recipe has any. A file declares with
``NEEDS_DATA`` whether data must be given (None: as its option ``metric`` says), and names its ``PAPER``.
"""
