"""Heads of hf_fuse/heads on the features of a frozen encoder, against a linear probe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from study import small_data
from study.small_data import Rows, Source, few
from study.trials import Effort, Found, Question, Row

PROBE = "linear probe"
FEW, MANY = 4, 30  # rows of each class

QUESTIONS: dict[str, Question] = {}
for data in ("digits", "text"):
    QUESTIONS |= {
        f"{data}, heads, {FEW} rows per class": Question("accuracy", PROBE),
        f"{data}, heads, {MANY} rows per class": Question("accuracy", PROBE),
        f"{data}, heads, classes one after the other": Question(
            "accuracy", "linear probe (SGD)", references=("linear probe, all at once",)
        ),
        f"{data}, heads, new classes": Question(
            f"harmonic mean of accuracies on classes of {FEW} rows and on others of {MANY}", PROBE
        ),
        f"{data}, heads, strange inputs": Question("area: confidence tells test rows from strange ones", PROBE),
        f"{data}, heads, several probes": Question("mean log-probability of the class", "mean of the probes"),
    }


def heads_of_seed(seed: int, effort: Effort) -> Found:
    """Question -> method -> row."""
    found: Found = {}
    for source in (small_data.digits(seed, effort.base_steps), small_data.text(seed)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of fits that stop early
            rows = _of_source(source, effort)
        found |= {f"{source.name}, heads, {question}": by_head for question, by_head in rows.items()}
        print(f"seed {seed}, {source.name}: heads done", file=sys.stderr)
    return found


def candidates(effort: Effort) -> dict[str, dict[str, Callable[[], Any]]]:
    """Head -> setting -> how to make it."""
    from sklearn.linear_model import LogisticRegression

    from hf_fuse.heads.analytic import Analytic
    from hf_fuse.heads.bonsai import Bonsai
    from hf_fuse.heads.gb_nn import GbNn
    from hf_fuse.heads.naive_bayes import NaiveBayes
    from hf_fuse.heads.nearest_mean import NearestMean
    from hf_fuse.heads.simplex import Simplex
    from hf_fuse.heads.teen import Teen

    short = effort.steps == 1
    return {
        PROBE: {f"C {c:g}": lambda c=c: LogisticRegression(C=c, max_iter=300) for c in (1.0, 0.03)},
        "NearestMean": {metric: lambda metric=metric: NearestMean(metric) for metric in ("euclidean", "cosine")},
        "Teen": {f"calibration {c}": lambda c=c: Teen(c) for c in (0.5, 0.2)},
        "Analytic": {
            "features": lambda: Analytic(ridge=1.0), "expansion 200": lambda: Analytic(ridge=1.0, expansion=200),
        },
        "NaiveBayes": {f"floor {floor:g}": lambda floor=floor: NaiveBayes(floor) for floor in (1e-6, 0.1)},
        "Simplex": {f"scale {s}": lambda s=s: Simplex(64, s, epochs=2 if short else 20) for s in (8.0, 16.0)},
        "GbNn": {f"{n} stages": lambda n=n: GbNn(n, steps=10) for n in (3, 8)},
        "Bonsai": {
            f"{n} rounds": lambda n=n: Bonsai(
                n, 64, 2 if short else 30, 2 if short else 100, 2 if short else 100, epochs=1 if short else 10
            )
            for n in (2, 3)
        },
    }  # fmt: skip


def _of_source(source: Source, effort: Effort) -> dict[str, dict[str, Row]]:
    encoder = source.model().eval()
    parts = {name: _features(encoder, rows) for name, rows in source.parts.items()}
    by_size = {count: _features(encoder, few(source.parts["train"], count)) for count in (FEW, MANY)}
    found = {}
    heads = candidates(effort)
    for count, train in by_size.items():
        found[f"{count} rows per class"] = {
            name: _best(settings, lambda head, train=train: head.fit(*train), _accuracy, parts, effort)
            for name, settings in heads.items()
            if name != "Teen"
        }
    tokens = {
        name: _features(encoder, few(rows, MANY) if name == "train" else rows, tokens=True)
        for name, rows in source.parts.items()
    }
    found[f"{MANY} rows per class"]["MomentProbing"] = _best(
        _probes(effort), lambda head: head.fit(*tokens["train"]), _accuracy, tokens, effort
    )
    found["classes one after the other"] = _class_by_class(by_size[MANY], parts, heads, effort)
    found["new classes"] = _new_classes(source, encoder, parts, heads, effort)
    found["strange inputs"] = _strange(source, encoder, by_size[MANY], parts, effort)
    found["several probes"] = _several(by_size[MANY], parts)
    return found


def _probes(effort: Effort) -> dict[str, Callable[[], Any]]:
    from hf_fuse.heads.moment_probing import MomentProbing

    epochs = 1 if effort.steps == 1 else 15
    return {f"projection {p}": lambda p=p: MomentProbing(p, 4, epochs=epochs) for p in (64, 128)}


def _class_by_class(train: Any, parts: dict[str, Any], heads: dict[str, Any], effort: Effort) -> dict[str, Row]:
    """Two classes at a time, none of them seen again."""
    from sklearn.linear_model import SGDClassifier

    X, y = train
    every = np.unique(y)
    steps = [(X[np.isin(y, pair)], y[np.isin(y, pair)]) for pair in np.array_split(every, len(every) // 2)]

    def taught(head: Any) -> Any:
        for some in steps:
            head.partial_fit(*some)
        return head

    def descended(head: Any) -> Any:
        for some in steps:
            for _ in range(20):
                head.partial_fit(*some, classes=every)
        return head

    sgd = {f"alpha {a:g}": lambda a=a: SGDClassifier("log_loss", alpha=a, random_state=0) for a in (1e-4, 1e-2)}
    found = {
        "linear probe, all at once": _best(heads[PROBE], lambda head: head.fit(X, y), _accuracy, parts, effort),
        "linear probe (SGD)": _best(sgd, descended, _accuracy, parts, effort),
    }
    for name in ("NearestMean", "Analytic", "NaiveBayes"):
        found[name] = _best(heads[name], taught, _accuracy, parts, effort)
    return found


def _new_classes(
    source: Source, encoder: Any, parts: dict[str, Any], heads: dict[str, Any], effort: Effort
) -> dict[str, Row]:
    """The last third of the classes are new and have few rows; test rows are of all classes."""
    from sklearn.linear_model import LogisticRegression

    first_new = source.classes - source.classes // 3
    base = _features(encoder, few([r for r in source.parts["train"] if r["labels"] < first_new], MANY))
    new = _features(encoder, few([r for r in source.parts["train"] if r["labels"] >= first_new], FEW))
    both = tuple(np.concatenate(pair) for pair in zip(base, new))

    def harmonic(head: Any, X: np.ndarray, y: np.ndarray) -> float:
        old_right, new_right = (_accuracy(head, X[some], y[some]) for some in (y < first_new, y >= first_new))
        return 2 * old_right * new_right / max(old_right + new_right, 1e-9)

    def fit(head: Any) -> Any:
        return head.fit(*both)

    weighted = {
        name: lambda name=name: LogisticRegression(max_iter=300, class_weight=name if name == "balanced" else None)
        for name in ("balanced", "plain")
    }
    found = {PROBE: _best(weighted, fit, harmonic, parts, effort)}
    found |= {name: _best(heads[name], fit, harmonic, parts, effort) for name in ("NearestMean", "NaiveBayes")}
    found["Teen"] = _best(heads["Teen"], lambda head: head.fit(*base).partial_fit(*new), harmonic, parts, effort)
    return found


def _strange(source: Source, encoder: Any, train: Any, parts: dict[str, Any], effort: Effort) -> dict[str, Row]:
    """Strange rows: features of the other kind of data (turned images, docstrings)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from hf_fuse.heads.sdm import Sdm

    strange = {name: _features(encoder, rows)[0] for name, rows in source.other.items()}

    def area(head: Any, X: np.ndarray, others: np.ndarray) -> float:
        confidence = np.concatenate([head.predict_proba(rows).max(1) for rows in (X, others)])
        return float(roc_auc_score(np.arange(len(confidence)) < len(X), confidence))

    both = {name: (parts[name][0], strange[name]) for name in ("validation", "test")}
    heads = {
        PROBE: {f"C {c:g}": lambda c=c: LogisticRegression(C=c, max_iter=300) for c in (1.0, 0.03)},
        "Sdm": {f"C {c:g}": lambda c=c: Sdm(c) for c in (1.0, 0.03)},
    }
    return {name: _best(settings, lambda h: h.fit(*train), area, both, effort) for name, settings in heads.items()}


def _several(train: Any, parts: dict[str, Any]) -> dict[str, Row]:
    """Probes on parts of the features, some of which know little; the market learns from validation rows."""
    from sklearn.linear_model import LogisticRegression

    from hf_fuse.heads.prediction_market import PredictionMarket

    X, y = train
    pieces = [slice(None), slice(0, 4), slice(4, 8), slice(8, 12)]
    probes = [LogisticRegression(max_iter=300).fit(X[:, piece], y) for piece in pieces]

    def told(rows: np.ndarray) -> np.ndarray:
        return np.stack([probe.predict_proba(rows[:, piece]) for probe, piece in zip(probes, pieces)], axis=1)

    market = PredictionMarket().fit(told(parts["validation"][0]), parts["validation"][1])
    bets, labels = told(parts["test"][0]), parts["test"][1]
    combined = {"mean of the probes": bets.mean(1), "PredictionMarket": market.predict_proba(bets)}
    return {
        name: Row(float(np.log(chances[np.arange(len(labels)), labels]).mean())) for name, chances in combined.items()
    }


def _accuracy(head: Any, X: np.ndarray, y: np.ndarray) -> float:
    return float((head.predict(X) == y).mean())


def _best(
    settings: dict[str, Callable[[], Any]],
    fit: Callable[[Any], Any],
    figure: Callable[..., float],
    parts: dict[str, Any],
    effort: Effort,
) -> Row:
    """The setting that is best on validation features, and its figure on those of the test."""
    reached, row = -float("inf"), Row(0.0)
    for label, make in list(settings.items())[: effort.settings]:
        head = fit(make())
        score = figure(head, *parts["validation"])
        if score > reached:
            reached, row = score, Row(figure(head, *parts["test"]), label)
    return row


@torch.no_grad()
def _features(encoder: Any, rows: Rows, *, tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier takes, or all of the last hidden states (padding NaN); and labels."""
    from hf_fuse.heads.features import EncoderFeatures

    features = EncoderFeatures(encoder, processor=_as_they_are, tokens=tokens, batch_size=512)
    return features.transform(rows), np.array([row["labels"] for row in rows])


def _as_they_are(rows: Rows, return_tensors: str) -> dict[str, Any]:
    """The rows are what the model takes already."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
