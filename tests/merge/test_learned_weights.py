"""Coefficients from a file as weights of a merge: what they do, and when they are refused."""

import json
import shutil

import pytest
import torch
from tiny_models import load_weights
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

import hf_fuse
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.merge.coefficients import FILE, Coefficients, fingerprint, read_coefficients
from hf_fuse.merge.learned_weights import chunk_numbers


def written(family, folder, value, *, method="task_arithmetic", parameters=None, heads=(), cut="slices", seed=0):
    """A file for both models of a family; ``value(k, name)`` is a list of numbers."""
    plan = hf_fuse.plan({"method": "task_arithmetic", "base_model": str(family.base), "models": models_of(family)})
    base, *others = plan.parents.values()
    names = [unit.name for unit in plan.units if unit.name not in heads]
    values = [{name: value(k, name) for name in names} for k in range(len(others))]
    found = Coefficients(
        "test", method, parameters or {}, (base.ref.key, fingerprint(base)),
        [(other.ref.key, fingerprint(other)) for other in others], values, list(heads), cut, seed,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(found.to_json())
    return str(folder)


def models_of(family):
    return [str(model) for model in family.tuned[:2]]


def recipe_of(family, file, method="task_arithmetic", **parameters):
    return {"method": method, "base_model": str(family.base), "models": models_of(family),
            "parameters": {"weight": {"learned": file}} | parameters}  # fmt: skip


@pytest.fixture
def family(tiny_family):
    return tiny_family("plain")


def test_every_tensor_has_its_own(family, tmp_path):
    def value(k, name):
        return [(k + 1) * 0.1 + 0.01 * len(name)]

    file = written(family, tmp_path / "c", value)
    assert read_coefficients(file).values[1]["model.norm.weight"] == [value(1, "model.norm.weight")[0]]
    merged = load_weights(hf_fuse.merge(recipe_of(family, file), tmp_path / "merged"))
    base, one, two = (load_weights(folder) for folder in (family.base, *family.tuned[:2]))
    for name, values in merged.items():
        expected = (
            base[name] + value(0, name)[0] * (one[name] - base[name]) + value(1, name)[0] * (two[name] - base[name])
        )
        torch.testing.assert_close(values, expected)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(tmp_path) not in card and "learned" in card
    again = hf_fuse.merge(tmp_path / "merged" / "fuse_recipe.yaml", tmp_path / "again")
    assert all(torch.equal(values, merged[name]) for name, values in load_weights(again).items())


def test_unit_vectors_are_the_models_and_1_over_k_the_mean(family, tmp_path):
    for k in range(2):
        file = written(family, tmp_path / f"{k}", lambda j, _, k=k: [float(j == k)])
        merged = load_weights(hf_fuse.merge(recipe_of(family, file), tmp_path / f"merged-{k}"))
        torch.testing.assert_close(merged, load_weights(family.tuned[k]))
    half = written(family, tmp_path / "half", lambda *_: [0.5])
    merged = load_weights(hf_fuse.merge(recipe_of(family, half), tmp_path / "merged"))
    mean = hf_fuse.merge({"method": "linear", "models": models_of(family)}, tmp_path / "mean")
    torch.testing.assert_close(merged, load_weights(mean))


@pytest.mark.parametrize("cut", ["slices", "scattered"])
def test_chunks(family, tmp_path, cut):
    def value(k, name):
        return [0.1 * k + 0.2 * chunk for chunk in range(3)]

    file = written(family, tmp_path / "c", value, cut=cut, seed=5)
    merged = load_weights(hf_fuse.merge(recipe_of(family, file), tmp_path / "merged", chunk_elements=1024))
    base, one, two = (load_weights(folder) for folder in (family.base, *family.tuned[:2]))
    for name, values in merged.items():
        chunks = chunk_numbers(name, values.numel(), 3, cut, 5, 0, values.numel()).view(values.shape)
        weights = [torch.tensor(value(k, name))[chunks] for k in (0, 1)]
        expected = base[name] + weights[0] * (one[name] - base[name]) + weights[1] * (two[name] - base[name])
        torch.testing.assert_close(values, expected)
    whole = written(family, tmp_path / "equal", lambda k, _: [0.3] * 4, cut=cut)
    plain = recipe_of(family, whole) | {"parameters": {"weight": 0.3}}
    one = load_weights(hf_fuse.merge(recipe_of(family, whole), tmp_path / "equal-chunks"))
    torch.testing.assert_close(one, load_weights(hf_fuse.merge(plain, tmp_path / "plain")))


def test_ties_vectors(family, tmp_path):
    """All kept and no conflict: task arithmetic. Else what TIES keeps, weighted after the vote."""
    base = load_weights(family.base)
    twice = hf_fuse.merge_state_dicts(
        [load_weights(family.tuned[0])] * 2, "ties_task_arithmetic", base=base, weights=[0.2, 0.5],
        parameters={"density": 1.0},
    )  # fmt: skip
    plain = hf_fuse.merge_state_dicts([load_weights(family.tuned[0])], "task_arithmetic", base=base, weights=[0.7])
    torch.testing.assert_close(twice, plain)
    state = {"x": torch.zeros(5)}
    models = [{"x": torch.tensor(values)} for values in ([3.0, 1.0, -2.0, 4.0, 0.1], [-1.0, 5.0, -3.0, 6.0, 0.2])]
    found = hf_fuse.merge_state_dicts(
        models, "ties_task_arithmetic", base=state, weights=[0.5, 2.0], parameters={"density": 0.5}
    )
    # Of five elements int(2.5) + 1 are kept: 3, -2, 4 and 5, -3, 6; signs +, +, -, +.
    torch.testing.assert_close(found["x"], torch.tensor([1.5, 10.0, -7.0, 14.0, 0.0]))


def test_filters_come_before_what_is_learned(family, tmp_path):
    file = written(family, tmp_path / "c", lambda *_: [0.5])
    weight = [{"filter": "lm_head*", "value": 0}, {"value": {"learned": file}}]
    merged = load_weights(hf_fuse.merge(recipe_of(family, file, weight=weight), tmp_path / "merged"))
    base = load_weights(family.base)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert not torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def changed_file(file, change):
    content = json.loads((file / FILE).read_text())
    change(content)
    (file / FILE).write_text(json.dumps(content))


def test_is_refused_for_others(family, tmp_path):
    file = written(family, tmp_path / "c", lambda *_: [0.5])
    recipe = recipe_of(family, file)
    with pytest.raises(RecipeError, match=r"tuned-3 is none of the models.*tuned-1.*tuned-2"):
        hf_fuse.plan(recipe | {"models": [models_of(family)[0], str(family.tuned[2])]})
    with pytest.raises(RecipeError, match="learned for .*tuned-2 too"):
        hf_fuse.plan(recipe | {"models": models_of(family)[:1]})
    with pytest.raises(RecipeError, match="is not the base"):
        hf_fuse.plan(recipe | {"base_model": str(family.tuned[2])})
    with pytest.raises(RecipeError, match="weights for task_arithmetic, not for ties"):
        hf_fuse.plan(recipe | {"method": "ties"})
    with pytest.raises(CheckpointError, match="no learned coefficients found"):
        hf_fuse.plan(recipe_of(family, str(tmp_path / "nowhere")))
    copied = shutil.copytree(family.tuned[0], tmp_path / "copy")
    hf_fuse.plan(recipe | {"models": [str(copied), models_of(family)[1]]})  # the same weights under another name
    slices = [{"sources": [{"model": models_of(family)[0], "layers": [0, 3], "weight": {"learned": file}}]}]
    with pytest.raises(RecipeError, match="of whole models"):
        hf_fuse.plan({"method": "task_arithmetic", "base_model": str(family.base), "slices": slices})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="x"), "its format is 'x'"),
        (lambda content: content.pop("models"), "not what hf-fuse learn writes"),
        (lambda content: content["models"][0]["coefficients"].update({"a": []}), "not what hf-fuse learn writes"),
        (lambda content: content["models"][0]["coefficients"].update({"a": ["x"]}), "not what hf-fuse learn writes"),
        (lambda content: content["models"][1]["coefficients"].pop("lm_head.weight"), "no coefficient.*lm_head.weight"),
        (lambda content: content.update(parameters={"lambda": 0.5}), "lambda is 1.0, but .* learned with 0.5"),
    ],
)
def test_a_damaged_file(family, tmp_path, change, message):
    file = written(family, tmp_path / "c", lambda *_: [0.5])
    changed_file(tmp_path / "c", change)
    with pytest.raises(FuseError, match=message):
        hf_fuse.plan(recipe_of(family, file))


def test_chunks_are_refused_where_they_mean_nothing(family, tmp_path):
    file = written(family, tmp_path / "c", lambda *_: [0.5, 0.6])
    with pytest.raises(RecipeError, match="normalize would need their sum"):
        hf_fuse.plan(recipe_of(family, file, normalize=True))
    other = written(family, tmp_path / "d", lambda *_: [0.5, 0.6], method="ties")
    with pytest.raises(RecipeError, match="ties takes one weight per tensor"):
        hf_fuse.plan(recipe_of(family, other, "ties"))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A base and two classifiers of 3 and 5 classes."""
    root = tmp_path_factory.mktemp("classifiers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for number, classes in enumerate((2, 3, 5)):
        torch.manual_seed(number)
        labels = {"id2label": {k: f"c{number}-{k}" for k in range(classes)}}
        BertForSequenceClassification(BertConfig(vocab_size=32, **size, **labels)).save_pretrained(root / str(number))
    return root


def test_heads_of_one_model(classifiers, tmp_path):
    base, one, two = (str(classifiers / str(number)) for number in range(3))
    recipe = {"method": "task_arithmetic", "base_model": base, "models": [one, two], "parameters": {"weight": 0.5}}
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[3, 16\]"):
        hf_fuse.plan(recipe)
    merged = hf_fuse.merge(recipe | {"heads": two}, tmp_path / "merged")
    weights = load_weights(merged)
    assert torch.equal(weights["classifier.weight"], load_weights(classifiers / "2")["classifier.weight"])
    states = [load_weights(classifiers / str(number)) for number in range(3)]
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(weights[name], (states[1][name] + states[2][name]) / 2)
    assert AutoConfig.from_pretrained(merged).id2label == {k: f"c2-{k}" for k in range(5)}
    model, info = BertForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert model.num_labels == 5 and not info["missing_keys"] and not info["mismatched_keys"]
    narrow = hf_fuse.merge(recipe | {"heads": one, "out_dtype": "bfloat16"}, tmp_path / "narrow")
    assert {values.dtype for values in load_weights(narrow).values()} == {torch.bfloat16}
    with pytest.raises(RecipeError, match="heads is 'elsewhere', expected one of models"):
        hf_fuse.plan(recipe | {"heads": "elsewhere"})


def test_heads_that_were_not_merged_are_asked_for(tiny_family, tmp_path):
    family = tiny_family("vit")
    file = written(family, tmp_path / "c", lambda *_: [0.5], heads=["classifier.weight", "classifier.bias"])
    recipe = recipe_of(family, file)
    with pytest.raises(RecipeError, match=r"no coefficient for classifier\.\w+, because every model kept its own head"):
        hf_fuse.plan(recipe)
    hf_fuse.plan(recipe | {"heads": models_of(family)[0]})
