# quick
"""MixLoRA on a small model in plain Python: what ``hf-fuse train recipes/mixlora.yaml`` does, step by step.

    python recipes/mixlora_finetune.py           # seconds: the base hardly speaks
    python recipes/mixlora_finetune.py --full    # a minute or two: a base that has read the standard library

The task: from the head of a function to the first line of its docstring. Base and data are made here, in
``mixlora-example``; with a model and rows of your own, only the part below ``fine_tune`` is needed.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from peft import PeftModel, get_peft_model

from hf_fuse import FuseConfig, FuseTrainer, MixLoraConfig

EXAMPLE = Path("mixlora-example")
CONTEXT = 128


def make_example(folder: Path, *, base_steps: int, rows: int) -> None:
    """``base``: a byte-level Llama that has read code and docstrings. ``train.jsonl``, ``eval.jsonl``: the task."""
    from hf_fuse.data.stdlib_text import stdlib_domains
    from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

    size, tokenizer = ModelSize(context=CONTEXT), byte_tokenizer(CONTEXT)
    base = new_model(size, tokenizer, seed=0)
    domains = stdlib_domains(source_characters=300_000)[:2]
    train(base, [token_stream(tokenizer, d.train, 200_000) for d in domains], Schedule(base_steps, 4e-3), seed=0)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    pairs = functions(Path(sysconfig.get_path("stdlib")), rows)
    for name, part in (("train", pairs[: -rows // 10]), ("eval", pairs[-rows // 10 :])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n", encoding="utf-8")


def functions(library: Path, most: int) -> list[dict[str, str]]:
    """Heads of documented functions and the first lines of their docstrings, short enough for the model."""
    found: list[dict[str, str]] = []
    for path in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                pair = {"prompt": f"def {node.name}({ast.unparse(node.args)}):\n", "completion": text.split("\n")[0]}
                if pair["completion"] and sum(len(part.encode()) for part in pair.values()) < CONTEXT - 2:
                    found.append(pair)
        if len(found) >= most:
            break
    return found[:most]


def fine_tune(folder: Path, output: Path) -> dict[str, float]:
    """Trains the adapter and returns the figures of the evaluation."""
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = MixLoraConfig(
        task_type="CAUSAL_LM",
        num_experts=4,
        top_k=2,
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        router_aux_loss_coef=0.01,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"][1:] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    data = load_dataset("json", data_files={name: str(folder / f"{name}.jsonl") for name in ("train", "eval")})
    data = data.map(encode, remove_columns=["prompt", "completion"])
    arguments = FuseConfig(
        output_dir=str(output),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        seed=0,
        objectives={"router_z": 0.001},
        eval_strategy="epoch",
        prediction_loss_only=True,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = FuseTrainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # the adapter; the expert-usage chart lies beside it
    return trainer.evaluate()


def complete(folder: Path, adapter: Path, prompt: str) -> str:
    """What the fine-tuned model says, loaded as anybody would load it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, adapter).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    said = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
    return tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="train the base for longer, and on more rows")
    parser.add_argument("--output", type=Path, default=Path("mixlora-python"), help="folder for the adapter")
    given = parser.parse_args()
    if given.full or not (EXAMPLE / "eval.jsonl").exists():
        make_example(EXAMPLE, base_steps=800 if given.full else 40, rows=1500 if given.full else 200)
    figures = fine_tune(EXAMPLE, given.output)
    prompt = "def copy_file(source, target):\n"
    print(f"eval loss: {figures['eval_loss']:.4f}\nadapter: {given.output}")
    print(f"{prompt}    {complete(EXAMPLE, given.output, prompt)!r}")


if __name__ == "__main__":
    main()
