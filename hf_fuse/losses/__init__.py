"""Losses: one file, one function of the same name; the second paragraph of a file says when to prefer it.

A loss is a pure function of named tensors that returns a scalar, computed in fp32: a mean. :class:`hf_fuse.FuseTrainer`
weighs the means of micro-batches by how much of the whole batch they hold: predictions if the loss takes ``labels``,
else tokens if it takes ``attention_mask``, else samples, or what the module's ``MEAN_OVER`` says: one of these,
``replay``, or a column whose entries count unless they are NaN or -100. Keyword-only
parameters are options; the others say what it needs, and a shape suffix (``logits_NC``) is not part of the name:

- ``logits``, ``labels``: ``(N, C)`` and ``(N,)``, the predictions that have a label (for causal language models, the
  next token): padding and shifting are done;
- ``second_logits``: ``(N, C)``, of a second forward pass;
- ``hidden_states``, ``attentions``: tuples of ``(B, S, D)`` and ``(B, heads, S, S)``; ``attention``: of one layer,
  another one each step;
- ``features``: ``(N, D)``, one vector per sample: what the classifier takes, and of models without one the mean of the
  last hidden state over the attention mask; ``second_features``: of a second forward pass;
- ``head``, ``head_bias``: ``(C, D)`` and ``(C,)``, the classifier's own;
- ``logits_at``, ``features_at``: functions from a move of the inputs' points (:mod:`hf_fuse.input_points`) to what
  another forward pass gives;
- ``old_features``, ``old_head``, ``old_bias``, ``old_class_means``: of the frozen ``old_model``;
- ``sample_logits``, ``sample_labels``: ``(B, C)`` and ``(B,)``, of all samples, with -100 for those without a label;
- ``image_embeds``, ``text_embeds``: ``(N, D)``, of models with two towers; ``ids_restore``: of ViTMAE, its masks;
- ``replay_logits``, ``replay_labels``: predictions for a batch of ``replay_dataset``, as the first two;
- ``partner_labels``, ``shares``: of the samples that are mixed in, and what each keeps of itself (``mixup_alpha``);
- ``sample_ids``: ``(N,)``, which sample of the training set each one is, from 0 on: a column of the data, or its index;
- ``class_counts``: ``(C,)``, of the labels in the training set; ``progress``: share of the training that is done;
  ``step`` and ``epoch``: how many are done;
- ``router_logits``: a tuple with the gate's logits of each routed layer, ``(N, E)`` or ``(B, S, E)``; the softmax of
  them is what the router weighs experts by;
- ``router_weights``: a tuple with the weights that each token gave each expert, of the same shapes, 0 where an
  expert was not chosen;
- ``attention_mask``: ``(B, S)`` in the order in which the N tokens were flattened; 0 marks padding, which then takes
  no part. None counts every token;
- any other name is a column of the batch (``task_types``), or what the model takes (``pixel_values``).

A parameter with a default may stay without a tensor. A loss that carries state (a queue, an average) is a class, an
``nn.Module`` of the file's name: its options are those of ``__init__``, its needs those of ``forward``, and its buffers
are saved in checkpoints. Its method ``prepare(model, train_dataset)``, if it has one, is called once, before training:
there it makes layers of its own, which are trained with the model and are no part of it when it is saved, and tables
with a row per sample (:class:`~hf_fuse.losses._sample_table.SampleTable`). Such losses are not evaluated.

Losses that compare the samples of a batch see those of a micro-batch on all processes
(:func:`~hf_fuse.losses._processes.gathered`); they say ``IN_BATCH = True``, since splitting a batch into more
micro-batches changes them. Other packages add losses through the entry point group
``hf_fuse.losses``.

A mask that leaves no token gives 0, tied to the graph, and never NaN.
"""
