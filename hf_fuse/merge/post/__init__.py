"""Steps on a merged difference from the base, whatever method made it: one file, one function of the same name.

A recipe lists them under ``post`` with their parameters, which follow depth and names like a method's own::

    post:
      subspace_boosting: {beta: 0.2}

The first argument is the merged difference of one whole tensor in the working precision; the result takes its place.
``applies(shape, **options)`` in the file says for which tensors the step is worth holding one in one piece.
"""
