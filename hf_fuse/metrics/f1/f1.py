"""F1 score of a classifier, as an ``evaluate`` module that loads from this folder without a network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """F1 = 2 TP / (2 TP + FP + FN): the harmonic mean of precision and recall. For more than two classes the
per-class scores are averaged. A class with neither predictions nor references scores 0."""
_INPUTS = """
Args:
    predictions: predicted class ids, one per example.
    references: true class ids, in the same order.
    labels: the classes to average over, in this order; default: every class seen in predictions or references.
    pos_label: the class that counts as positive when average is "binary".
    average: "binary" (one class), "macro" (plain mean), "micro" (counts pooled), "weighted" (by number of references)
        or None (one score per class).
    sample_weight: one non-negative weight per example; all count the same when omitted.
Returns:
    {"f1": float, or a list of floats when average is None}
"""


class F1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        labels: list[int] | None = None,
        pos_label: int = 1,
        average: str | None = "binary",
        sample_weight: list[float] | None = None,
    ) -> dict[str, float | list[float]]:
        if average not in ("binary", "macro", "micro", "weighted", None):
            raise ValueError(f"average={average!r}: expected 'binary', 'macro', 'micro', 'weighted' or None.")
        predicted, true = np.asarray(predictions), np.asarray(references)
        weight = np.ones(true.size) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        seen = np.union1d(predicted, true)
        if average == "binary":
            if seen.size > 2:
                raise ValueError(
                    f"average='binary' needs at most two classes, but {seen.size} occur. "
                    "Pass average='macro', 'micro' or 'weighted'."
                )
            labels = [pos_label]
        classes = seen if labels is None else np.asarray(labels)
        every = np.union1d(seen, classes)

        def counted(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
            counts = np.bincount(np.searchsorted(every, ids), weights, minlength=every.size)
            return counts[np.searchsorted(every, classes)]

        right = predicted == true
        hits = counted(true[right], weight[right])
        support = counted(true, weight)
        # TP + FP and TP + FN added up: the denominator of F1.
        total = counted(predicted, weight) + support
        if average == "micro":
            return {"f1": _ratio(2 * hits.sum(), total.sum())}
        scores = [_ratio(2 * hit, both) for hit, both in zip(hits, total)]
        if average is None:
            return {"f1": scores}
        if average == "weighted":
            return {"f1": _ratio(float(np.dot(scores, support)), support.sum())}
        return {"f1": float(np.mean(scores))}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
