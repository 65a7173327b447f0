"""Statistics beside the models: found, checked before work, counted, and read by the right names."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama_family, load_weights

import hf_fuse
from hf_fuse import merge_state_dicts
from hf_fuse.errors import CheckpointError, OutputError, RecipeError


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return llama_family(tmp_path_factory.mktemp("statistics"), models=2, layers=1)


def written(folder, family, change=None, kind="fisher"):
    """A recipe with statistics of both models on disk; ``change(numbers, metadata)`` spoils those of the second."""
    models = []
    for k, path in enumerate(family.tuned):
        weights = load_weights(path)
        if kind == "fisher":
            numbers = {name: t.square() + 1e-3 for name, t in weights.items()}
        else:
            numbers = {name: t.T @ t for name, t in weights.items() if name.endswith("proj.weight")}
        metadata = {"statistics": kind}
        if k == 1 and change:
            change(numbers, metadata)
        (folder / f"{kind}-{k}").mkdir(parents=True)
        save_file(
            {n: t.contiguous() for n, t in numbers.items()}, folder / f"{kind}-{k}" / f"{kind}.safetensors", metadata
        )
        models.append({"path": str(path), "statistics": str(folder / f"{kind}-{k}")})
    return {"method": "regmean" if kind == "gram" else kind, "models": models}


NAME = "model.layers.0.mlp.up_proj.weight"


def test_are_counted_and_recorded(tmp_path, family):
    recipe = written(tmp_path, family)
    made = hf_fuse.plan(recipe)
    weights = sum(t.nbytes for path in family.tuned for t in load_weights(path).values())
    assert made.bytes_read == 2 * weights and made.passes == 2
    assert made.to_dict()["parents"][0]["statistics"] == recipe["models"][0]["statistics"]
    output = hf_fuse.merge(recipe, tmp_path / "out")
    assert "statistics: fisher-0" in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "README.md").read_text()
    assert recipe["models"][1]["statistics"] in (output / "fuse_recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, m: n.pop(NAME), f"fisher-1 lack tensor {NAME}"),
        (
            lambda n, m: n.update({NAME: n[NAME][:2]}),
            rf"fisher-1: tensor {NAME} is F32 \[2, 16\], expected .* \[24, 16\]",
        ),
        (lambda n, m: n.update({NAME: n[NAME].long()}), rf"tensor {NAME} is I64"),
        (lambda n, m: m.update(statistics="gram"), "holds gram statistics, expected fisher"),
        (lambda n, m: m.update(shared='{"a": "b"}'), "metadata is not what hf-fuse learn writes"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_plan(tmp_path, family, change, message):
    with pytest.raises(CheckpointError, match=message):
        hf_fuse.plan(written(tmp_path, family, change))


def test_grams_that_do_not_fit(tmp_path, family):
    with pytest.raises(CheckpointError, match=rf"gram-1 lack tensor {NAME}, which those of other models have"):
        hf_fuse.plan(written(tmp_path / "a", family, lambda n, m: n.pop(NAME), "gram"))
    with pytest.raises(CheckpointError, match=rf"tensor {NAME} is F32 \[24, 24\], expected floating-point \[16, 16\]"):
        hf_fuse.plan(written(tmp_path / "b", family, lambda n, m: n.update({NAME: torch.eye(24)}), "gram"))
    recipe = written(tmp_path / "c", family, kind="gram")
    for model in recipe["models"]:
        save_file({"other": torch.eye(3)}, model["statistics"] + "/gram.safetensors")
    with pytest.raises(CheckpointError, match="fit no tensor of the models"):
        hf_fuse.plan(recipe)


def test_missing_ones_and_unwanted_ones(tmp_path, family):
    recipe = written(tmp_path, family)
    with pytest.raises(RecipeError, match="models.0: linear uses no statistics"):
        hf_fuse.plan(recipe | {"method": "linear"})
    with pytest.raises(
        RecipeError, match=r"models.1: fisher needs statistics \(fisher\) of every model.*hf-fuse learn"
    ):
        hf_fuse.plan(recipe | {"models": [recipe["models"][0], recipe["models"][1]["path"]]})
    with pytest.raises(CheckpointError, match="no statistics found"):
        hf_fuse.plan(recipe, overrides={"models.0.statistics": str(tmp_path)})
    with pytest.raises(OutputError, match="overlaps with the input"):
        hf_fuse.plan(recipe, output=recipe["models"][0]["statistics"], overwrite=True)
    with pytest.raises(RecipeError, match="1 sets of them for 2 models"):
        merge_state_dicts([{"w": torch.ones(2)}] * 2, "fisher", statistics=[{"w": torch.ones(2)}])


def test_values_that_are_not_finite_are_refused(tmp_path, family):
    recipe = written(tmp_path, family, lambda n, m: n[NAME].__setitem__((0, 0), float("nan")))
    with pytest.raises(CheckpointError, match=f"statistics .*fisher-1: tensor {NAME} holds at least 1 NaN"):
        hf_fuse.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_share_their_inputs_share_one_gram(tmp_path, family):
    recipe = written(tmp_path / "each", family, kind="gram")
    expected = hf_fuse.merge(recipe, tmp_path / "expected")

    def share(folder):
        from safetensors.torch import load_file

        file = folder / "gram.safetensors"
        numbers = load_file(file)
        first, *others = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
        for name in others:
            numbers[name] = numbers[first].clone()
        return file, numbers, first, others

    for k in (0, 1):
        file, numbers, _, _ = share(tmp_path / "each" / f"gram-{k}")
        save_file(numbers, file, {"statistics": "gram"})
    expected = load_weights(hf_fuse.merge(recipe, tmp_path / "expected", overwrite=True))
    for k in (0, 1):
        file, numbers, first, others = share(tmp_path / "each" / f"gram-{k}")
        kept = {name: t for name, t in numbers.items() if name not in others}
        save_file(kept, file, {"statistics": "gram", "shared": json.dumps(dict.fromkeys(others, first))})
    found = load_weights(hf_fuse.merge(recipe, tmp_path / "found"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_matrices_stored_with_inputs_first(tmp_path):
    """GPT-2's square matrices are told apart from others by the file."""
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(4, 4, generator=generator)} for _ in range(2)]
    grams = [{"w": (x := torch.randn(20, 4, generator=generator)).T @ x / 20} for _ in range(2)]
    recipe = {"method": "regmean", "models": []}
    for k in (0, 1):
        folder = tmp_path / f"m{k}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"w": models[k]["w"].T.contiguous()}, folder / "model.safetensors")
        save_file(grams[k], tmp_path / f"gram{k}.safetensors", {"statistics": "gram", "inputs_first": '["w"]'})
        recipe["models"].append({"path": str(folder), "statistics": str(tmp_path / f"gram{k}.safetensors")})
    found = load_weights(hf_fuse.merge(recipe, tmp_path / "out"))["w"]
    expected = merge_state_dicts(models, "regmean", statistics=grams)["w"]
    torch.testing.assert_close(found, expected.T)


def test_slices_take_statistics_of_the_layers_they_take(tmp_path):
    family = llama_family(tmp_path / "models", models=2, layers=2)
    recipe = written(tmp_path / "statistics", family)
    whole = load_weights(hf_fuse.merge(recipe, tmp_path / "whole"))
    sources = [
        {"model": model["path"], "layers": [1, 2], "statistics": model["statistics"]} for model in recipe["models"]
    ]
    sliced = load_weights(
        hf_fuse.merge(
            {"method": "fisher", "slices": [{"sources": sources}], "parameters": {"normalize": False}},
            tmp_path / "sliced",
        )
    )
    plain = load_weights(hf_fuse.merge(recipe | {"parameters": {"normalize": False}}, tmp_path / "plain"))
    assert torch.equal(sliced["model.layers.0.mlp.up_proj.weight"], plain["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(whole["model.norm.weight"], plain["model.norm.weight"])
