import pytest
import torch
import yaml
from checks_spectral import low_rank
from safetensors.torch import load_file, save_file

import hf_fuse
from hf_fuse import merge_state_dicts, registry
from hf_fuse.errors import RecipeError
from hf_fuse.merge.post.subspace_boosting import subspace_boosting


@pytest.mark.parametrize(
    "beta, expected",
    [(0.01, [4, 4, 4, 4]), (0.5, [4, 4, 4, 4]), (0.6, [4, 2, 2, 2]), (0.75, [4, 2, 2, 2]),
     (0.9, [4, 2, 1, 1]), (1.0, [4, 2, 1, 1]), (0.0, [4, 4, 4, 4])],
)  # fmt: skip
def test_worked_examples(beta, expected):
    found = subspace_boosting(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])), beta=beta)
    torch.testing.assert_close(found, torch.diag(torch.tensor(expected, dtype=torch.float32)), rtol=0, atol=1e-6)


def test_nothing_to_boost():
    assert torch.equal(subspace_boosting(torch.zeros(3, 4)), torch.zeros(3, 4))
    hole = torch.full((2, 2), float("nan"))
    assert subspace_boosting(hole).isnan().all()


def test_low_rank_is_not_filled_up():
    """Lifting the null space would lengthen this change 4.6 times, in arbitrary directions."""
    low = low_rank(64, 64, 4, seed=0)
    found = subspace_boosting(low)
    assert torch.linalg.matrix_rank(found) == 4 and found.norm() < 2 * low.norm()


def test_tiny_changes_are_boosted_like_large_ones():
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(subspace_boosting(matrix * 2.0**-60) * 2.0**60, subspace_boosting(matrix))


def test_orthogonal_equivariance():
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (8, 12))
    turned = subspace_boosting(left @ matrix @ right)
    torch.testing.assert_close(turned, left @ subspace_boosting(matrix) @ right, rtol=0, atol=1e-12)


def test_stacked_matrices_are_boosted_one_by_one():
    stacked = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    found = subspace_boosting(stacked, parts=3)
    torch.testing.assert_close(found, torch.cat([subspace_boosting(part) for part in stacked.split(4)]))
    with pytest.raises(RecipeError, match="12 rows.*5"):
        subspace_boosting(stacked, parts=5)


NAMES = ("layers.0.q_proj.weight", "layers.1.q_proj.weight", "model.embed_tokens.weight", "layers.0.norm.weight")


def family(count=2):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn((20,) if "norm" in name else (20, 10), generator=generator) for name in NAMES}
    models = [{n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(count)]
    return base, models


def from_folders(tmp_path, recipe, base, models, **options):
    for folder, state in {"base": base, **{f"m{k}": m for k, m in enumerate(models)}}.items():
        if not (tmp_path / folder).exists():
            (tmp_path / folder).mkdir()
            save_file(state, tmp_path / folder / "model.safetensors")
            (tmp_path / folder / "config.json").write_text("{}")
    recipe = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / f"m{k}") for k in range(len(models))],
              **recipe}  # fmt: skip
    out = hf_fuse.merge(recipe, tmp_path / "out", overwrite=True, **options)
    return out, load_file(out / "model.safetensors")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "tsv_m", "opcm", "sce", "della"])
def test_after_any_method_on_task_vectors(method, tmp_path):
    base, models = family()
    plain = merge_state_dicts(models, method, base=base)
    _, found = from_folders(tmp_path, {"method": method, "post": {"subspace_boosting": {"beta": 0.3}}}, base, models)
    for name in NAMES:
        delta = plain[name] - base[name]
        expected = subspace_boosting(delta, beta=0.3) if "q_proj" in name else delta
        torch.testing.assert_close(found[name], base[name] + expected, rtol=0, atol=2e-6)
        assert torch.equal(found[name], plain[name]) == ("q_proj" not in name)


def test_filters_depth_and_switches(tmp_path):
    base, models = family()
    recipe = {"method": "task_arithmetic", "post": {"subspace_boosting": {"beta": [1.0, 0.1]}}}
    plain = merge_state_dicts(models, "task_arithmetic", base=base)
    _, found = from_folders(tmp_path, recipe, base, models)
    assert [torch.equal(found[name], plain[name]) for name in NAMES] == [True, False, True, True]
    recipe["post"] = {"subspace_boosting": {"spectral": [{"filter": "embed", "value": True}, {"value": False}]}}
    _, found = from_folders(tmp_path, recipe, base, models)
    assert [torch.equal(found[name], plain[name]) for name in NAMES] == [True, True, False, True]


def test_pieces_and_threads_and_the_stored_recipe(tmp_path):
    base, models = family()
    recipe = {"method": "ties", "post": "subspace_boosting"}
    out, first = from_folders(tmp_path, recipe, base, models, chunk_elements=1024, workers=1)
    stored = yaml.safe_load((out / "fuse_recipe.yaml").read_text())
    assert stored["post"] == {"subspace_boosting": {}}
    again = hf_fuse.merge(stored, tmp_path / "again", workers=3)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"method": "linear", "post": "subspace_boosting"}, "linear makes whole weights.*base_model"),
        ({"method": "ties", "post": {"subspace_bosting": {}}}, "subspace_bosting.*Did you mean 'subspace_boosting'"),
        ({"method": "ties", "post": {"subspace_boosting": {"bta": 1}}}, "post.subspace_boosting.*'bta'.*'beta'"),
        ({"method": "ties", "post": {"subspace_boosting": {"beta": 2}}}, r"beta is 2, expected float \[0, 1\]"),
        ({"method": "ties", "post": {"subspace_boosting": {"parts": 3}}}, "20 rows.*filter"),
        ({"method": "ties", "post": 3}, "post"),
    ],
)
def test_mistakes_are_named(recipe, message, tmp_path):
    base, models = family()
    with pytest.raises(RecipeError, match=message):
        from_folders(tmp_path, recipe, base, models)


def test_documented():
    step = registry.get("post", "subspace_boosting")
    assert step.summary.endswith(".") and step.paper
    assert all(f"{option.keyword}:" in step.function.__doc__ for option in step.options.values())
