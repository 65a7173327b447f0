"""Ways to make one model smaller: one file, one function each.

A method is ``name(subject, *, options) -> Edit``. The :class:`~hf_fuse.compress.subject.Subject` is the model with its
calibration text, the :class:`~hf_fuse.compress.edit.Edit` says what the output has that the input had not. A file
declares with ``NEEDS_TEXT`` whether calibration text must be given, and names its ``PAPER``.
"""
