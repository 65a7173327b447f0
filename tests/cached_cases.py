"""Students of cached teachers and of a second head, in different layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_cases import KL, another
from training_cases import bert, classes_data, language_data, llama, padded, three_steps

from hf_fuse import DistillConfig, DistillTrainer
from hf_fuse.distill.cache import CachedRow, CacheFacts, CacheWriter, text_key
from hf_fuse.distill.top_k import TopK

K = 6
DUAL = {"weight": 0.7, "align_gradients": True}
# teacher: None for the cache.
CASES: dict[str, dict[str, Any]] = {
    "cached": {"objectives": KL | {"forward_kl": 0.5, "pld": 0.2}},
    "cached_chunks": {"objectives": KL | {"forward_kl": 0.5}, "chunk_size": 5},
    "dual_cached": {"objectives": {"dual_head": {"weight": 0.7, "head": "low_rank", "size": 4}}},
    "dual_language": {"teacher": another(llama), "objectives": {"dual_head": DUAL | {"mean_over_classes": True}}},
    "dual_classes": {
        "model": bert, "teacher": another(bert), "objectives": {"dual_head": DUAL | {"head": "nonlinear", "size": 5}},
    },
}  # fmt: skip


def write_cache(folder: Path, rows: list[dict[str, Any]], teacher: Any, **facts: Any) -> Path:
    """What ``teacher`` says about rows of token ids and labels."""
    folder.mkdir(parents=True)
    vocabulary = teacher.config.vocab_size
    facts = {"teacher": "teacher", "tokenizer": "tokenizer", "vocabulary": vocabulary, "k": K} | facts
    writer = CacheWriter(folder, CacheFacts(**facts))
    for number, row in enumerate(rows):
        ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        positions = (labels[1:] != -100).nonzero().flatten() + 1
        with torch.no_grad():
            logits = teacher.eval()(ids[None]).logits[0, positions - 1]
        top = TopK.of(logits, writer.facts.k, ids[positions], temperature=writer.facts.temperature)
        writer.add(CachedRow(ids, positions, top, -top.label_log_prob_N.mean().item(), text_key({"text": str(number)})))
    writer.finish()
    return folder


def make_trainer(
    case: str, output: Path, batch: int, accumulation: int, cache: Any = None, **changes: Any
) -> DistillTrainer:
    """Three steps of SGD on one of ``CASES``, in the given layout."""
    settings = CASES[case] | changes
    teacher = settings.pop("teacher", None)
    model = settings.pop("model", llama)()
    is_language = model.get_output_embeddings() is not None
    data = settings.pop("data", None) or (language_data() if is_language else classes_data())
    own = {key: settings.pop(key) for key in ("processing_class", "eval_dataset") if key in settings}
    own["peft_config"] = settings.pop("peft_config", lambda: None)()
    return DistillTrainer(
        model,
        DistillConfig(**three_steps(output, batch, accumulation) | settings),
        teacher=str(cache) if teacher is None else teacher(),
        train_dataset=data,
        **{"eval_dataset": data[:13], "data_collator": padded if is_language else None} | own,
    )
