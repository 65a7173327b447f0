"""Heads on features: figures of the specifications, exact updates in portions, saving, and digits as a real task."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.heads.analytic import Analytic
from hf_fuse.heads.concatenated import Concatenated
from hf_fuse.heads.cosmo import Cosmo, gated
from hf_fuse.heads.gb_nn import GbNn
from hf_fuse.heads.head import Head, softmax
from hf_fuse.heads.label_sets import LabelSetOperations
from hf_fuse.heads.linear import linear_layer
from hf_fuse.heads.loki import Loki, expected_distances, tree_distances
from hf_fuse.heads.moment_probing import MomentProbe, MomentProbing
from hf_fuse.heads.naive_bayes import NaiveBayes
from hf_fuse.heads.nearest_mean import NearestMean
from hf_fuse.heads.prediction_market import PredictionMarket
from hf_fuse.heads.saved import FILE
from hf_fuse.heads.sdm import Sdm, sdm, sdm_loss
from hf_fuse.heads.simplex import Simplex, SimplexClassifier, simplex
from hf_fuse.heads.teen import Teen

# Each on the digits' pixels; accuracy it has to reach (chance is 0.1).
HEADS = [
    (NearestMean(), 0.82),
    (NearestMean("cosine"), 0.82),
    (NaiveBayes(), 0.78),
    (Analytic(expansion=128), 0.87),
    (Teen(), 0.82),
    (Simplex(corners=16, epochs=20), 0.84),
    (GbNn(stages=6, units=8), 0.86),
    (Sdm(), 0.86),
]
EXACT = [NearestMean(), NearestMean("cosine"), NaiveBayes(), Analytic(), Analytic(ridge=1.0, expansion=40), Teen()]


def name(head):
    return type(head).__name__


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X, y = X[:900] / 16, y[:900]
    return X[:600], y[:600], X[600:], y[600:]


@pytest.mark.parametrize(("head", "accuracy"), HEADS, ids=[name(head) for head, _ in HEADS])
def test_learns_digits_and_is_saved_whole(head, accuracy, digits, tmp_path):
    X, y, test_X, test_y = digits
    head = clone(head).fit(X, np.array([f"d{digit}" for digit in y]))
    assert head.score(test_X, np.array([f"d{digit}" for digit in test_y])) >= accuracy
    probabilities = head.predict_proba(test_X)
    assert probabilities.shape == (300, 10) and (probabilities >= 0).all()
    assert probabilities.sum(1) == pytest.approx(np.ones(300))
    assert (probabilities.argmax(1) == head.decision_function(test_X).argmax(1)).mean() > 0.99
    assert head.save_pretrained(tmp_path).name == FILE
    for kind in (Head, type(head)):
        same = kind.from_pretrained(tmp_path)
        assert same.get_params() == head.get_params()
        assert same.decision_function(test_X) == pytest.approx(head.decision_function(test_X), abs=1e-12)
        assert same.predict(test_X[:2]).tolist() == head.predict(test_X[:2]).tolist()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert np.array_equal(head.decision_function(torch.tensor(test_X)), head.decision_function(test_X))


@pytest.mark.parametrize("head", EXACT, ids=name)
def test_portions_in_any_order_are_the_same_as_all_at_once(head, digits):
    X, y, test_X, _ = digits
    whole = clone(head).fit(X, y)
    parts, start = clone(head), 0
    if isinstance(head, Teen):  # its first portion says what the base classes are
        parts.partial_fit(X[:100], y[:100])
        start = 100
    order = start + np.argsort(-y[start:], kind="stable")  # classes come one after another, the highest first
    for rows in np.array_split(order, 9):
        parts.partial_fit(X[rows], y[rows])
    assert parts.classes_.tolist() == whole.classes_.tolist()
    assert np.abs(parts.decision_function(test_X) - whole.decision_function(test_X)).max() < 1e-8
    again = parts.fit(X[:50], y[:50])
    assert (
        np.abs(again.decision_function(test_X) - clone(head).fit(X[:50], y[:50]).decision_function(test_X)).max() == 0
    )


@pytest.mark.parametrize("head", [NearestMean(scale=3.0), NaiveBayes()], ids=name)
def test_a_linear_head_becomes_a_layer_with_its_probabilities(head, digits):
    X, y, test_X, _ = digits
    layer = linear_layer(clone(head).fit(X, y), torch.float64)
    logits = layer(torch.tensor(test_X)).detach().numpy()
    assert softmax(logits) == pytest.approx(head.fit(X, y).predict_proba(test_X), abs=1e-9)


def test_layers_of_other_linear_heads(digits):
    X, y, test_X, _ = digits
    analytic = Analytic().fit(X, y)
    logits = linear_layer(analytic, torch.float64)(torch.tensor(test_X)).detach().numpy()
    assert (analytic.classes_[logits.argmax(1)] == analytic.predict(test_X)).all()
    two = y < 2
    model = LogisticRegression().fit(X[two], y[two])
    logits = linear_layer(model, torch.float64)(torch.tensor(test_X)).detach().numpy()
    assert softmax(logits) == pytest.approx(model.predict_proba(test_X), abs=1e-9)
    for head in (Teen(), NearestMean("cosine"), Analytic(expansion=20)):
        with pytest.raises(FuseError, match="not linear"):
            linear_layer(head.fit(X, y))


def test_heads_are_estimators_of_scikit_learn(digits, tmp_path):
    X, y, *_ = digits
    assert cross_val_score(NaiveBayes(), X, y, cv=3).mean() > 0.8
    assert repr(NearestMean("cosine")) == "NearestMean(metric='cosine')"
    # Two classes, whose scores are one number for scikit-learn's measures; parameters that are numbers of numpy.
    two = np.array(["even", "odd"], dtype=object)[y % 2]
    search = GridSearchCV(make_pipeline(StandardScaler(), Analytic()), {"analytic__ridge": np.logspace(-1, 1, 2)},
                          scoring="roc_auc", cv=2).fit(X, two)  # fmt: skip
    assert search.best_score_ > 0.8 and search.decision_function(X).shape == (600,)
    found = search.best_estimator_[-1]
    found.save_pretrained(tmp_path)
    same = Head.from_pretrained(tmp_path)
    assert same.get_params() == found.get_params() and same.n_features_in_ == 64
    same.partial_fit(X, two)  # names of another type of array
    probabilities = found.predict_proba(X)
    assert (found.classes_[probabilities.argmax(1)] == found.predict(X)).all()
    assert probabilities.min() >= 0 and probabilities.sum(1) == pytest.approx(np.ones(600))
    with pytest.raises(NotFittedError):
        NearestMean().predict(X)
    with pytest.raises(ValueError, match="X has 63 features, but Analytic is expecting 64"):
        same.predict(X[:, 1:])


def test_classes_may_be_anything_that_is_a_class(digits):
    X, y, test_X, _ = digits
    for classes in (y % 2 == 1, y * 100 - 7, y.reshape(-1, 1), torch.tensor(y), [f"{n}" for n in y]):
        head = NearestMean().fit(torch.tensor(X, dtype=torch.bfloat16), classes)
        expected = np.unique(np.asarray(classes))
        assert head.classes_.tolist() == expected.tolist() and set(head.predict(test_X)) <= set(expected.tolist())
    assert NaiveBayes().fit(X[:3], ["a"] * 3).predict(test_X[:2]).tolist() == ["a", "a"]
    for bad in ([0.5, 1.5], ["a", None], [np.nan, 1.0], None):
        with pytest.raises(ValueError, match="^y"):
            NearestMean().fit(X[:2], bad)


@pytest.mark.parametrize("head", [GbNn(stages=1, units=2), Concatenated(), NaiveBayes(), Sdm()], ids=name)
def test_a_call_that_fails_changes_nothing(head, digits):
    X, y, test_X, _ = digits
    head = clone(head).fit(X[y < 3], y[y < 3])
    before = head.predict_proba(test_X)
    calls = [(X[:3, 1:], y[:3], "X has 63 features"), (X[:3], ["a", "b", "c"], "are strings and others numbers")]
    if name(head) in ("GbNn", "Concatenated"):
        calls.append((X, y, "can't learn new classes"))
    for samples, classes, message in calls:
        with pytest.raises(FuseError, match=message):
            head.partial_fit(samples, classes)
    assert np.array_equal(head.predict_proba(test_X), before)
    with pytest.raises(ValueError):
        Sdm().fit(X[:2], [0, 0]).predict(X)


def test_classes_of_a_simplex_keep_their_corners(digits, tmp_path):
    X, y, test_X, test_y = digits
    head = Simplex(corners=16, epochs=15).fit(X[y < 3], y[y < 3] * 2)  # 0, 2, 4
    corners = head.network_.corners
    head.partial_fit(X[y < 5], np.array([0, 2, 4, 1, 7])[y[y < 5]])
    assert head.classes_.tolist() == [0, 1, 2, 4, 7]
    assert torch.equal(head.network_.corners[[0, 2, 3]], corners)
    assert torch.equal(head.network_.corners[[1, 4]], simplex(16)[3:5])
    known = test_y < 5
    assert head.score(test_X[known], np.array([0, 2, 4, 1, 7])[test_y[known]]) > 0.8
    head.save_pretrained(tmp_path)
    assert np.array_equal(Head.from_pretrained(tmp_path).scores(test_X), head.scores(test_X))
    with pytest.raises(FuseError, match="corners is 4, too few for 5 classes"):
        Simplex(corners=4, epochs=1).fit(X[:9], y[:9] % 4).partial_fit(X[:5], range(5))


def test_analytic_is_the_ridge_solution():
    draw = np.random.default_rng(0)
    X, y = draw.standard_normal((30, 5)), draw.integers(0, 3, 30)
    head = Analytic(ridge=0.1)
    for start in range(0, 30, 7):
        head.partial_fit(X[start : start + 7], y[start : start + 7])
    direct = np.linalg.solve(X.T @ X + 0.1 * np.eye(5), X.T @ np.eye(3)[y])
    assert np.abs(head.weights_.T - direct).max() < 2e-11


def test_teen_moves_new_prototypes():
    head = Teen().fit([[1.0, 0.0], [0.0, 1.0]], [0, 1]).partial_fit([[0.8, 0.6]], [2])
    assert softmax(16 * np.array([0.8, 0.6])) == pytest.approx([0.961, 0.039], abs=1e-3)
    assert head.prototypes_[2] == pytest.approx([0.900, 0.320], abs=1e-3)
    assert head.prototypes_[:2] == pytest.approx(np.eye(2))
    plain = Teen(calibration=0).fit([[1.0, 0.0], [0.0, 1.0]], [0, 1]).partial_fit([[0.8, 0.6]], [2])
    cosine = NearestMean("cosine", scale=16).fit([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], [0, 1, 2])
    X = np.random.default_rng(0).standard_normal((20, 2))
    assert plain.decision_function(X) == pytest.approx(cosine.decision_function(X))


def test_naive_bayes_by_hand():
    head = NaiveBayes(variance_floor=0.0).fit([[-1.0], [1.0], [1.0], [3.0]], [0, 0, 1, 1])
    assert head.variances_ == pytest.approx([1.0])
    scores = head.scores([[0.8]])[0] - 0.5 * 0.8**2  # what is the same for both classes
    assert scores == pytest.approx([-1.013, -1.413], abs=1e-3)
    assert head.predict_proba([[0.8]])[0, 0] == pytest.approx(0.599, abs=1e-3)
    single = NaiveBayes().fit([[0.0, 1.0], [1.0, 1.0]], [0, 1])
    assert np.isfinite(single.decision_function([[0.3, 0.4]])).all(), "classes of one sample have no variance"


def test_loki_predicts_labels_never_seen(digits, tmp_path):
    line = np.abs(np.arange(3)[:, None] - np.arange(3)[None])
    assert expected_distances([[0.5, 0, 0.5]], line).argmin() == 1
    X, y, test_X, test_y = digits
    known = y != 5
    near = np.abs(np.arange(10)[:, None] - np.arange(10)[None])
    zero_one = Loki(NearestMean(), list(range(10)), 1 - np.eye(10)).fit(X[known], y[known])
    assert (zero_one.predict(test_X) == zero_one.estimator_.predict(test_X)).all()
    assert not hasattr(zero_one.estimator, "classes_"), "scikit-learn's rule: parameters stay as they are"
    loki = Loki(NearestMean(scale=0.2).fit(X[known], y[known]), list(range(10)), near)
    assert 5 in loki.predict(test_X), "without fit: the classifier is"
    loki.save_pretrained(tmp_path)
    assert np.array_equal(Loki.from_pretrained(tmp_path).predict(test_X), loki.predict(test_X))
    assert Head.from_pretrained(tmp_path).classes_.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    with pytest.raises(CheckpointError, match="no file of Loki"):
        Loki.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FuseError, match="knows 9"):
        Loki(NearestMean(), list(range(9)), near[:9, :9]).fit(X, y).predict(test_X)
    tree = {"cat": "animal", "dog": "animal", "car": "thing", "animal": "root", "thing": "root"}
    assert tree_distances(tree, ["cat", "dog", "car", "root"])[0].tolist() == [0, 2, 4, 2]
    with pytest.raises(FuseError, match="joins 'cat' and 'tree'"):
        tree_distances(tree, ["cat", "tree"])


def test_corners_of_a_simplex():
    for corners in (2, 4, 5, 33):
        found = simplex(corners).double()
        cosines = found @ found.T
        assert found.shape == (corners, corners - 1)
        assert torch.allclose(cosines, torch.full_like(cosines, -1 / (corners - 1)).fill_diagonal_(1), atol=1e-6)
    assert (simplex(4)[0] @ simplex(4)[1]).item() == pytest.approx(-0.3333, abs=1e-4)
    head = SimplexClassifier(8, 3, corners=5, from_end=True)
    assert torch.equal(head.corners, simplex(5).flip(0)[:3])
    assert [name for name, _ in head.named_parameters()] == ["projection.weight"], "the corners are fixed"
    with pytest.raises(FuseError, match="too few for 3 classes"):
        SimplexClassifier(8, 3, corners=2)


def test_moments_see_what_means_do_not(tmp_path):
    """Two classes of token sets with equal means: in one, two channels rise together; in the other, one rises as the
    other falls."""
    draw = np.random.default_rng(0)
    X, y = draw.standard_normal((240, 6, 8)).astype(np.float32), draw.integers(0, 2, 240)
    X[:, :, 1] = np.where(y[:, None] == 1, X[:, :, 0], -X[:, :, 0])
    X[:, 0] = 0.0
    X[5, 4:] = np.nan
    head = MomentProbing(projection=32, parts=2, epochs=30, learning_rate=1e-2).fit(X[:160], y[:160])
    assert head.score(X[160:], y[160:]) > 0.9
    assert NearestMean().fit(X[:160, 1:4].mean(1), y[:160]).score(X[160:, 1:4].mean(1), y[160:]) < 0.7
    longer = np.concatenate([X[160:], np.full((80, 3, 8), np.nan, np.float32)], axis=1)
    assert head.decision_function(longer) == pytest.approx(head.decision_function(X[160:]), abs=1e-5), "padding"
    head.save_pretrained(tmp_path)
    assert np.array_equal(Head.from_pretrained(tmp_path).predict(X), head.predict(X))
    assert MomentProbe(768, 10).moments.in_features == 2883, "the paper's size: three maps of 31 x 31"
    rows = MomentProbe(8, 2, projection=32, parts=2, centre="scalar")
    covariances = rows.covariances(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    assert torch.allclose(covariances.norm(dim=-1), torch.ones(2, 1, 16), atol=1e-5)
    with pytest.raises(FuseError, match="the first token of a sample is padding"):
        head.predict(np.full((1, 2, 8), np.nan))


def test_gate_of_cosmo():
    # The specification's four columns: two seen and two unseen classes, each expert silent on the other's.
    seen, unseen = np.array([[0.3, 0.6]]), np.array([[0.7, 0.1]])
    published = gated(seen, unseen, [0.2], normalize=False)
    assert published.round(2).tolist() == [[0.32, 0.56, 0.22, 0.10]] and published.sum() == pytest.approx(1.2)
    assert gated(seen, unseen, [0.2]).sum() == pytest.approx(1.0)


def test_cosmo_learns_whom_to_ask(digits, tmp_path):
    X, y, test_X, test_y = digits
    seen, unseen = NearestMean(scale=2).fit(X[y < 6], y[y < 6]), NearestMean(scale=2).fit(X[y >= 6], y[y >= 6])
    gate = Cosmo().fit(seen.predict_proba(X), unseen.predict_proba(X), y < 6)
    found = gate.predict_proba(seen.predict_proba(test_X), unseen.predict_proba(test_X)).argmax(1)
    alone = np.where(test_y < 6, seen.predict(test_X), -1)
    assert (found == test_y).mean() > max((alone == test_y).mean(), 0.7)
    gate.save_pretrained(tmp_path)
    same = Cosmo.from_pretrained(tmp_path)
    pair = seen.predict_proba(test_X), unseen.predict_proba(test_X)
    assert same.temperatures == [0.5, 1.0, 2.0] and np.array_equal(same.predict_proba(*pair), gate.predict_proba(*pair))
    with pytest.raises(FuseError, match="the same samples, and 6 and 4 classes"):
        same.predict_proba(*pair[::-1])
    with pytest.raises(CheckpointError, match="holds a Cosmo, expected a Head"):
        Head.from_pretrained(tmp_path)
    with pytest.raises(FuseError, match="all samples are of one kind"):
        Cosmo().fit(seen.predict_proba(X), unseen.predict_proba(X), np.ones(len(X)))


def test_sdm_by_hand():
    z = np.array([[2.0, 1.0, 0.0]])
    for similarity, distance, expected in [
        (10, 1.0, [0.917, 0.076, 0.006]),
        (10, 0.1, [0.419, 0.327, 0.255]),
        (10, 0.0, [1 / 3] * 3),
        (np.e - 2, 1.0, softmax(z)[0]),
    ]:
        assert np.exp(sdm(z, [similarity], [distance]))[0] == pytest.approx(expected, abs=1.5e-3)
    assert sdm_loss(z, [0], [np.e - 2], [1.0]) == pytest.approx(-np.log(softmax(z)[0, 0]))
    assert np.isfinite(sdm(1e4 * z, [1000], [1.0])).all()


def test_sdm_is_unsure_far_from_what_it_knows(digits):
    X, y, test_X, _ = digits
    head = Sdm().fit(X[:400], y[:400]).partial_fit(X[400:], y[400:])
    assert head.bank_.shape == (600, 64)
    near, far = head.predict_proba(test_X).max(1).mean(), head.predict_proba(test_X + 5).max(1)
    assert far == pytest.approx(0.1) and near > 0.3
    similarity, distance = head.similarity_and_distance(X[:20])
    assert (distance == 1).all() and (similarity >= 0).all(), "known samples are at distance 0"


def test_prediction_market_by_hand():
    X = [[[0.9, 0.1], [0.4, 0.6]]]
    market = PredictionMarket(stake=0.1).partial_fit(X, [0], classes=[0, 1])
    assert market.budgets_ == pytest.approx([0.519, 0.481], abs=1e-3)
    market.budgets_ = np.array([0.5, 0.5])
    assert market.predict_proba(X)[0] == pytest.approx([0.65, 0.35])
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 200)
    right, guess = np.eye(2)[y] * 0.6 + 0.2, np.full((200, 2), 0.5)
    market = PredictionMarket().fit(np.stack([guess, right], axis=1), y)
    assert market.budgets_[1] > 0.95 and market.budgets_.sum() == pytest.approx(1.0)
    with pytest.raises(FuseError, match="2 classes, but X has 3 columns"):
        PredictionMarket().fit(np.full((2, 1, 3), 1 / 3), [0, 1])


def test_stages_of_gb_nn(digits):
    start = GbNn(stages=0).fit(np.eye(4), [1, 0, 1, 1])
    assert start.start_[1] - start.start_[0] == pytest.approx(1.0986, abs=1e-4)
    residual = np.array([1, 0, 1, 1]) - start.predict_proba(np.eye(4))[:, 1]
    assert residual == pytest.approx([0.25, -0.75, 0.25, 0.25])
    X, y, test_X, _ = digits
    head = GbNn(stages=5, units=4).fit(X[:200], y[:200])
    losses = []
    for stages in range(6):
        probabilities = softmax(head.scores(X[:200], stages=stages))
        losses.append(-np.log(probabilities[np.arange(200), y[:200]]).mean())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    network = head.network().double()
    logits = network(torch.tensor(test_X)).detach().numpy()
    assert logits == pytest.approx(head.decision_function(test_X), abs=1e-5)
    assert network[0].out_features == 20
    more = GbNn(stages=2, units=4).fit(X[:200], y[:200]).partial_fit(X[:200], y[:200])
    assert len(more.inner_) == 4


def test_label_sets_of_digit_pairs(digits, tmp_path):
    """A sample holds one or two digits; intersections, unions and differences of such samples are recognised."""
    X, y, *_ = digits
    X, y = X[y < 4], y[y < 4]
    pairs = np.random.default_rng(0).integers(0, len(X), (600, 2))
    both = X[pairs[:, 0]] + X[pairs[:, 1]]
    labels = np.maximum(np.eye(4)[y[pairs[:, 0]]], np.eye(4)[y[pairs[:, 1]]])
    operations = LabelSetOperations(hidden=64, epochs=8, batch_size=32).fit(both[:500], labels[:500])
    a, b, of_a, of_b = both[500:550], both[550:], labels[500:550], labels[550:]
    wanted = {"intersection": of_a * of_b, "union": np.maximum(of_a, of_b), "difference": of_a * (1 - of_b)}
    for operation, expected in wanted.items():
        found = operations.predict_proba(operations.combine(operation, a, b)) > 0.5
        unchanged = operations.predict_proba(a) > 0.5
        assert (found == expected).mean() > max((unchanged == expected).mean(), 0.75), operation
    operations.save_pretrained(tmp_path)
    same = LabelSetOperations.from_pretrained(tmp_path)
    assert np.array_equal(same.combine("union", a, b), operations.combine("union", a, b))
    with pytest.raises(FuseError, match="expected intersection, union, difference"):
        operations.combine("xor", a, b)
    with pytest.raises(FuseError, match="a row of 0 and 1"):
        LabelSetOperations().fit(both[:3], 2 * labels[:3])


def test_bad_input_is_one_error(tmp_path):
    head = NearestMean()
    for X, y, message in [
        ([1.0, 2.0], [0, 1], "Expected 2D array"),
        ([[np.nan]], [0], "contains NaN"),
        ([[1.0]], [0, 1], "one class for each of 1 samples"),
        ([[1.0], [2.0]], [0], "one class for each of 2 samples"),
    ]:
        with pytest.raises(FuseError, match=message):
            head.fit(X, y)
    head.fit([[1.0], [2.0]], ["a", "b"])
    with pytest.raises(FuseError, match="some classes are strings"):
        head.partial_fit([[1.0]], [3])
    with pytest.raises(ValueError, match="is not fitted yet"):
        NearestMean().predict([[1.0]])
    with pytest.raises(CheckpointError, match="holds no head.safetensors"):
        Head.from_pretrained(tmp_path)


def test_a_file_cannot_choose_what_is_imported(tmp_path):
    NearestMean().fit([[1.0], [2.0]], [0, 1]).save_pretrained(tmp_path)
    arrays = load_file(tmp_path / FILE)
    for kind in ("os.system", "Head", "Loki", "head.features"):
        said = {"head": kind, "parameters": {}, "learned": {}}
        save_file(arrays, tmp_path / FILE, metadata={"head": json.dumps(said)})
        with pytest.raises(CheckpointError, match="expected a Head"):
            Head.from_pretrained(tmp_path)
    for said in ([], {"head": []}, {"head": "NearestMean", "parameters": {}, "learned": {}}):
        save_file(arrays, tmp_path / FILE, metadata={"head": json.dumps(said)})
        with pytest.raises(CheckpointError, match="Save it again"):
            Head.from_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        Head.from_pretrained(tmp_path)
    NaiveBayes().fit([[1.0], [2.0]], [0, 1]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a NaiveBayes, expected a NearestMean"):
        NearestMean.from_pretrained(tmp_path)
