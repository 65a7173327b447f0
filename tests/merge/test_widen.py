import pytest
import torch

from hf_fuse import merge_state_dicts


def widen(base, *models, name="w", dtype="float32", **parameters):
    base, *models = [{name: torch.as_tensor(v, dtype=getattr(torch, dtype))} for v in (base, *models)]
    return merge_state_dicts(models, "widen", base=base, parameters=parameters, dtype=dtype)[name]


def test_worked_matrix():
    merged = widen([[1, 0], [0, 1]], [[2, 0], [0, 1]], [[1, 1], [0, 1]])
    torch.testing.assert_close(merged, torch.tensor([[1.75, 1], [0, 1]]))


def test_worked_vector():
    merged = widen([1, 1, 1], [1.5, 1, 1], [1, 1.2, 1.101])  # with 1.1 the last one is at its mean, up to rounding
    assert merged.tolist() == pytest.approx([1.5, 1.2, 1.101])
    # Scores [[1, .450166, .475021], [.377541, 1, 1]]: seen where the other model's change is not zero too.
    merged = widen([0, 0, 0], [0.5, 0.01, 0.0], [0, 0.2, 0.1])
    assert merged[1].item() == pytest.approx(0.01 * (1 / (1 + torch.tensor(0.19).exp()).item()) + 0.2)


def test_identical_models_are_not_returned():
    merged = widen([[1, 0], [0, 1]], [[2, 0], [0, 1]], [[2, 0], [0, 1]])
    torch.testing.assert_close(merged, torch.tensor([[2.5, 0], [0, 1]]))


def test_negative_threshold_is_task_arithmetic():
    base, *models = torch.randn(4, 30, 20, generator=torch.Generator().manual_seed(0))
    merged = widen(base, *models, threshold=-1)
    torch.testing.assert_close(merged, base + sum(m - base for m in models))
    half = widen(base, *models, threshold=-1, significant=0.5)
    torch.testing.assert_close(half, base + 0.5 * sum(m - base for m in models))


def reference(base, models, threshold=1.0, significant=1.0):
    """The published procedure for a matrix's columns, all at once in fp64."""
    base, models = base.double(), [m.double() for m in models]
    scores = []
    for kind in ("length", "direction"):
        ranks = []
        for model in models:
            if kind == "length":
                change = (model.norm(dim=0) - base.norm(dim=0)).abs()
            else:
                change = 1 - torch.nn.functional.cosine_similarity(model, base, dim=0)
            order = change.argsort(stable=True)
            ranks.append(torch.empty_like(change).scatter_(0, order, torch.arange(len(change)).double() / len(change)))
        ranks = torch.stack(ranks)
        score = ranks.softmax(0)
        score[ranks > threshold * ranks.mean(1, keepdim=True)] = significant
        scores.append(score)
    factor = (scores[0] + scores[1]) / 2
    return base + sum((m - base) * f for m, f in zip(models, factor))


@pytest.mark.parametrize("spread", [0.3, 1e-3])
def test_against_the_procedure(spread):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(700, 500, generator=generator)  # several blocks of rows
    models = [base + spread * torch.randn(700, 500, generator=generator) * torch.rand(500) for _ in range(3)]
    merged = widen(base, *models, threshold=1.2)
    wrong = ((merged.double() - reference(base, models, threshold=1.2)).abs() > 1e-6).any(0)
    assert wrong.sum() <= 2  # neighbours in rank may change places in fp32
    double = widen(base.double(), *[m.double() for m in models], threshold=1.2, dtype="float64")
    torch.testing.assert_close(double, reference(base, models, threshold=1.2), rtol=1e-12, atol=1e-12)


def test_embeddings_are_taken_by_token():
    generator = torch.Generator().manual_seed(2)
    base, *models = torch.randn(3, 900, 300, generator=generator).double()
    by_token = reference(base.T, [m.T for m in models]).T
    by_column = reference(base, models)

    def run(name, **parameters):
        return widen(base, *models, name=name, dtype="float64", **parameters)

    for name in ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"):
        torch.testing.assert_close(run(name), by_token)
    for name in ("lm_head.weight", "embed_out.weight", "model.layers.0.mlp.up_proj.weight"):
        torch.testing.assert_close(run(name), by_column)
    torch.testing.assert_close(run("lm_head.weight", axis="rows"), by_token)
    torch.testing.assert_close(run("shared.weight", axis="columns"), by_column)


def test_zero_columns_and_unchanged_tensors():
    base = torch.tensor([[0.0, 1, 0], [0, 2, 0]])
    merged = widen(base, [[0.0, 1.5, 1], [0, 2, 1]], base)
    assert merged.isfinite().all() and merged[:, 2].tolist() == [1, 1] and merged[:, 0].tolist() == [0, 0]
    assert torch.equal(widen(base, base, base), base)


def test_convolutions_are_matrices():
    generator = torch.Generator().manual_seed(3)
    base, *models = torch.randn(3, 6, 3, 5, 5, generator=generator).double()
    flat = widen(base.view(6, 75), *[m.view(6, 75) for m in models], dtype="float64")
    torch.testing.assert_close(widen(base, *models, dtype="float64").view(6, 75), flat)
