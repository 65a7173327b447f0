"""Distillation that needs more than two sets of logits: heads, peers, views, histories, earlier selves, a controller.

One file, one class of the same name, a ``torch.nn.Module`` whose keyword-only arguments are its options, as a loss with
state is (:mod:`hf_fuse.losses`): ``forward`` says by its parameters what it needs and returns a **mean**, ``prepare``
makes the layers it trains beside the student, and its ``state_dict`` is in each checkpoint, but not in the saved model.
The :class:`hf_fuse.DistillTrainer` gives further tensors, and calls ``attach(trainer)`` once if there is such a method:

- ``teacher_logits``: ``(N, C)``, of the one teacher, for the same predictions as ``logits``; from a cache a
  :class:`~hf_fuse.distill.top_k.TopK`, for classes that say ``takes_top_k = True``;
- ``head_inputs``: ``(N, D)``, what the student's output layer or classifier took for these predictions;
- ``inputs``: the batch without what the model doesn't take; ``model``: as wrapped for training. For further passes.

A method ``before_step()`` is called when the gradients of a whole batch are there, before they are clipped.

Evaluation leaves these terms out. Other packages add some through the entry point group ``hf_fuse.attached``.
"""
