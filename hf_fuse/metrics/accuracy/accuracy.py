"""Share of predictions that are right, as an ``evaluate`` module that loads from this folder without a network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Accuracy: the share of predictions equal to their reference (or, unnormalised, their number)."
_INPUTS = """
Args:
    predictions: predicted class ids, one per example.
    references: true class ids, in the same order.
    normalize: False returns the number of right predictions instead of their share.
    sample_weight: one non-negative weight per example; all count the same when omitted.
Returns:
    {"accuracy": float}
"""


class Accuracy(evaluate.Metric):
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
        normalize: bool = True,
        sample_weight: list[float] | None = None,
    ) -> dict[str, float]:
        right = np.asarray(predictions) == np.asarray(references)
        weight = np.ones(right.size) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        score = float((right * weight).sum())
        return {"accuracy": score / float(weight.sum()) if normalize else score}
