"""The demo's small models: a byte-level tokenizer, a Llama of a few hundred thousand parameters, and their training."""

from __future__ import annotations

import logging as stdlib_logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class ModelSize:
    """Shape of the demo's Llama.

    Attributes:
        hidden: width of the residual stream.
        feed_forward: width inside the feed-forward layers.
        layers: number of decoder layers.
        heads: attention heads.
        context: positions; also the length of the training sequences, in bytes.
    """

    hidden: int = 64
    feed_forward: int = 192
    layers: int = 4
    heads: int = 4
    context: int = 128


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW, a linear warm-up over a tenth of the steps, then half a cosine down to zero."""

    steps: int
    learning_rate: float
    batch: int = 8


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens are the 256 bytes and one mark, which precedes each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # ByteLevel writes every byte as one printable character; without merges each of them stays a token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    mark = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, mark)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama for ``tokenizer``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        # The usual 0.02 is meant for models ten times as wide; with it, half the demo's steps go into growing weights.
        initializer_range=0.6 / size.hidden**0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    streams: Sequence[Tensor],
    schedule: Schedule,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Trains ``model`` in place with ``transformers.Trainer`` on the CPU.

    Args:
        model: a causal language model.
        streams: token ids of each domain ``[N]``; every domain gives the same number of sequences, whatever its size.
        schedule: number of steps and how large they are.
        seed: which sequences are cut from the documents, and in what order they come.
        on_step: called after each optimizer step.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            on_step()

    length = model.config.max_position_embeddings
    sequences = _sequences(streams, schedule.steps * schedule.batch, length, seed)
    # The Trainer insists on a folder of its own; nothing in it is kept.
    with tempfile.TemporaryDirectory(prefix="hf-fuse-demo-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, schedule.steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=sequences, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        uses_cache, model.config.use_cache = model.config.use_cache, False  # of no use in training
        trainer.train()
        model.config.use_cache = uses_cache
    model.eval()


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], most: int) -> Tensor:
    """The token ids of ``documents``, one after the other, ``[N]``; stops after the document that exceeds ``most``."""
    import torch

    ids: list[int] = []
    for document in documents:
        if len(ids) >= most:
            break
        ids += tokenizer(document, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _sequences(streams: Sequence[Tensor], count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """``count`` training examples of ``length`` tokens, cut at random places, taken from the streams in turn."""
    draw = random.Random(seed)
    examples = []
    for index in range(count):
        stream = streams[index % len(streams)]
        start = draw.randrange(max(1, len(stream) - length + 1))
        ids_L = stream[start : start + length]
        examples.append({"input_ids": ids_L, "labels": ids_L})
    return examples


def seconds_per_step(size: ModelSize, tokenizer: PreTrainedTokenizerFast, stream: Tensor) -> float:
    """Time of one training step on this machine, measured on a model that is thrown away."""
    moments: list[float] = []
    model = new_model(size, tokenizer, 0)
    train(model, [stream], Schedule(9, 1e-3), seed=0, on_step=lambda: moments.append(time.perf_counter()))
    # The first steps are slower: memory is claimed, kernels are chosen.
    return (moments[-1] - moments[3]) / (len(moments) - 4)


@contextmanager
def quiet_and_reproducible() -> Iterator[None]:
    """Within it: no warnings, logs or bars of the libraries, and one thread; then all is as before.

    On matrices this small a second thread saves a tenth of the time on an idle machine and multiplies it on a busy one;
    and sums whose order depends on the number of cores would give each machine its own figures.
    """
    import torch
    from transformers.utils import logging

    verbosity, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    own = stdlib_logging.getLogger("hf_fuse")
    own_level = own.level
    variable = "HF_HUB_DISABLE_PROGRESS_BARS"
    before = os.environ.get(variable)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        own.setLevel(stdlib_logging.ERROR)  # a note per merge that its parents state no licence
        os.environ[variable] = "1"  # honoured by the merge engine's bar
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.set_verbosity(verbosity)
            own.setLevel(own_level)
            if bars:
                logging.enable_progress_bar()
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
