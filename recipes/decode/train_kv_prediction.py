"""Learns to predict a model's cache of a prompt from a smaller model's.

``python recipes/decode/train_kv_prediction.py LARGE SMALL train.txt --output kv-maps``. Rows are pieces of the text, of
which the first half is the prompt. The authors train for 70,000 steps from a rate of 1.2e-3.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_fuse.decode.methods.kv_prediction import KvPrediction
from hf_fuse.evaluation_data import read_text_files
from hf_fuse.training_encoding import pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub id of the large model")
    parser.add_argument("auxiliary_model", help="folder or Hub id of the small one, with the same tokenizer")
    parser.add_argument("text", help="a text file")
    parser.add_argument("--output", default="kv-maps", help="folder to make")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    options = parser.parse_args()

    model, auxiliary = (AutoModelForCausalLM.from_pretrained(name) for name in (options.model, options.auxiliary_model))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    (texts,) = read_text_files([options.text])
    rows = [row for text in texts for row in pieces(tokenizer, text, options.length)]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in rows if len(ids) == options.length]
    predictor = KvPrediction(model, auxiliary)
    arguments = TrainingArguments(
        f"{options.output}-trainer", max_steps=options.steps, learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size, lr_scheduler_type="cosine", warmup_steps=options.steps // 14,
        weight_decay=0.1, adam_beta2=0.95, save_strategy="no", report_to=[],
    )  # fmt: skip
    Trainer(predictor, arguments, train_dataset=rows).train()
    print(f"maps: {predictor.save_pretrained(options.output)}")


if __name__ == "__main__":
    main()
