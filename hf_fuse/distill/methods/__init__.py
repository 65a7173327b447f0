"""Distillation methods: one file, one function of the same name.

A method is a pure function of the student's and the teacher's logits for N predictions. It returns the **sum** over
the N, computed in fp32; whoever calls it divides by the right count (:class:`hf_fuse.DistillTrainer`: by the
predictions of the whole batch). Parameters before the keyword-only options, of which a method takes those it needs:

- ``student_NV``: logits, of the predictions that have a label; padding and shifting are done;
- ``teacher_NV``: the teacher's logits for the same predictions, without gradient, or a
  :class:`~hf_fuse.distill.top_k.TopK` of them where the method says so;
- ``sources``, instead of ``teacher_NV``: all teachers at once, each a :class:`~hf_fuse.distill.sources.Source`, which
  may have other tokens;
- ``sequences_N``: of which row of the batch each prediction is; such a method can't be computed in chunks;
- ``labels_N``: class or token ids;
- ``progress``: share of the training that is done, 0 to 1.

The temperature divides both logits. ``scale_by_t2`` multiplies the loss by its square, so that the size of gradients
hardly depends on it (Hinton et al. 2015); TRL's distillation trainers don't do that. Other packages add methods
through the entry point group ``hf_fuse.distill``.

A teacher with other tokens comes to ``teacher_NV`` as a top-K over the student's, for the predictions that it has a
place for. With ``ANY_VOCABULARY = True`` in its module a method gets the teacher's own tokens instead.
"""
