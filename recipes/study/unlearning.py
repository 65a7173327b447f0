"""Forgetting samples of a digit classifier: how far the result is from a model trained without them."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from study import small_data
from study.small_data import Rows, Source
from study.suites import fit
from study.trials import Effort, Found, Question, Row
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from hf_fuse.unlearn import s3t
from hf_fuse.unlearn.datamodel_matching import datamodel_matching
from hf_fuse.unlearn.l1_sparse import L1Sparse
from hf_fuse.unlearn.laf import laf
from hf_fuse.unlearn.metrics import UnlearningReport, unlearning_report

UNTOUCHED, ANEW, ANEW_TOO = "untouched", "trained anew", "trained anew, other order"
GONE = 60  # of 300 rows

QUESTIONS = {
    "digits, forgetting": Question(
        "KL from the retrained model's predictions", UNTOUCHED, lower_is_better=True, references=(ANEW_TOO,)
    ),
    "digits, forgetting, membership": Question(
        "share of forgotten rows that an attacker calls known, away from that of the retrained model", UNTOUCHED,
        lower_is_better=True, references=(ANEW_TOO,),
    ),
    "digits, forgetting, test": Question("accuracy on test rows", UNTOUCHED, references=(ANEW, ANEW_TOO)),
    "digits, exact deletion": Question(
        "accuracy on test rows after one row is deleted", ANEW, references=("base of s3t",)
    ),
}  # fmt: skip


def unlearning_of_seed(seed: int, effort: Effort) -> Found:
    """Question -> method -> row. Half of the forgotten rows choose the setting, the other half is measured."""
    source = small_data.digits(seed, effort.base_steps)
    rows, test = source.parts["train"][:300], source.parts["test"]
    gone, kept = rows[:GONE], rows[GONE:]
    steps = 4 * effort.steps
    known, anew, other = (
        _fitted(source, some, steps, seed + order) for some, order in ((rows, 0), (kept, 0), (kept, 1))
    )

    def report(model: Any, forgotten: Rows) -> UnlearningReport:
        return unlearning_report(model.eval(), forgotten, kept, test, retrained=anew)

    chosen, shown = gone[: GONE // 2], gone[GONE // 2 :]
    ideal = report(anew, shown)
    found: Found = {question: {} for question in QUESTIONS}
    for method, settings in _methods(known, kept, gone, seed, effort).items():
        models = {label: forget() for label, forget in list(settings.items())[: effort.settings]}
        label = min(models, key=lambda label: report(models[label], chosen).kl_to_retrained)
        _note(found, method, label, report(models[label], shown), ideal)
    _note(found, ANEW_TOO, "", report(other, shown), ideal)
    found["digits, forgetting, test"][ANEW] = Row(ideal.test_accuracy)
    found["digits, exact deletion"] = _deleted(source, kept, test, anew, seed, effort)
    print(f"seed {seed}: unlearning done", file=sys.stderr, flush=True)
    return found


def _note(found: Found, method: str, label: str, one: UnlearningReport, ideal: UnlearningReport) -> None:
    found["digits, forgetting"][method] = Row(one.kl_to_retrained, label)
    found["digits, forgetting, membership"][method] = Row(abs(one.membership - ideal.membership), label)
    found["digits, forgetting, test"][method] = Row(one.test_accuracy, label)


def _methods(known: Any, kept: Rows, gone: Rows, seed: int, effort: Effort) -> dict[str, dict[str, Callable[[], Any]]]:
    forget_N = torch.arange(len(gone) + len(kept)) < len(gone)
    epochs = 1 if effort.steps == 1 else 4

    def matched(rate: float) -> Any:
        return datamodel_matching(
            copy.deepcopy(known), gone + kept, forget_N, epochs=epochs, learning_rate=rate, seed=seed
        )

    def moved(rate: float) -> Any:
        return laf(
            copy.deepcopy(known), kept, gone, epochs=epochs, extraction_rate=rate, alignment_rate=2 * rate, seed=seed
        )

    return {
        UNTOUCHED: {"": lambda: known},
        "training on": {f"rate {r:g}": lambda r=r: _trained_on(known, kept, r, 0, seed, effort) for r in (1e-3, 3e-3)},
        "l1_sparse": {
            f"alpha {a:g}": lambda a=a: _trained_on(known, kept, 3e-3, a, seed, effort) for a in (0.02, 0.2)
        },
        "laf": {f"rate {r:g}": lambda r=r: moved(r) for r in (3e-5, 3e-4)},
        "datamodel_matching": {f"rate {r:g}": lambda r=r: matched(r) for r in (3e-4, 1e-3)},
    }  # fmt: skip


def _trained_on(known: Any, kept: Rows, rate: float, alpha: float, seed: int, effort: Effort) -> Any:
    model = copy.deepcopy(known)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2 * effort.steps, learning_rate=rate, per_device_train_batch_size=32, seed=seed,
            use_cpu=True, dataloader_pin_memory=False, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=kept, callbacks=[L1Sparse(alpha)] if alpha else [])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def _fitted(source: Source, rows: Rows, steps: int, seed: int) -> Any:
    model = source.model()
    batch = default_data_collator(rows)
    fit(model, batch["pixel_values"], batch["labels"], steps, source.rate, seed, batch=32)
    return model.eval()


def _deleted(source: Source, kept: Rows, test: Rows, anew: Any, seed: int, effort: Effort) -> dict[str, Row]:
    """S3T with as many slices as there are layers; its last layer is that of the base, learned from other images."""
    batch = default_data_collator(test)
    labels_N = batch.pop("labels")
    found = {ANEW: Row((anew(**batch).logits.argmax(1) == labels_N).float().mean().item())}
    # A classifier whose last layer knows something: of the first half of the rows, all of which may stay.
    half = len(kept) // 2
    base = _fitted(source, kept[:half], effort.steps, seed)
    for sequences in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            tuned = s3t.fine_tune(
                copy.deepcopy(base), kept[half:], Path(folder, "s3t"), data_collator=default_data_collator, slices=2,
                sequences=sequences, epochs=max(1, effort.steps // 10), seed=seed,
            )  # fmt: skip
            tuned.delete([seed])
            chances_NC = tuned.predict_proba(batch)
        label = f"s3t, {sequences} sequence{'s' if sequences > 1 else ''}"
        found[label] = Row((chances_NC.argmax(1) == labels_N).float().mean().item())
    found["base of s3t"] = Row((base(**batch).logits.argmax(1) == labels_N).float().mean().item())
    return found
