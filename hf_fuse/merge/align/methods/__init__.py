"""Ways to align one model to another: one file, one function each.

A method is ``name(pair, *, options) -> Alignment``. The :class:`~hf_fuse.merge.align.pair.Pair` is the two checkpoints
with what is known of their symmetries, and the live models with data if the recipe has any. A file declares with
``needs_data(options)`` whether data must be given, with ``FUSES`` whether it writes a merged model, with
``SAME_WIDTHS`` and ``NEEDS_REFERENCE`` what it takes, may ``check`` the pair before anything runs, and names its
``PAPER``.
"""
