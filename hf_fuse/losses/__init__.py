"""Losses: one file, one function of the same name.

A loss is a pure function of named tensors that returns a scalar, computed in fp32. Its parameters say what it needs:

- ``router_logits``: a tuple with the gate's logits of each routed layer, ``(N, E)`` or ``(B, S, E)``; the softmax of
  them is what the router weighs experts by;
- ``router_weights``: a tuple with the weights that each token gave each expert, of the same shapes, 0 where an
  expert was not chosen;
- ``attention_mask``: ``(B, S)`` in the order in which the N tokens were flattened; 0 marks padding, which then takes
  no part. None counts every token.

A mask that leaves no token gives 0, tied to the graph, and never NaN.
"""
