"""Stores of Twin-Merging, made and read back."""

import json

import pytest
import torch
from checks_spectral import low_rank
from safetensors.torch import load_file, save_file

import hf_fuse
from hf_fuse import cli
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.merge.extract import extract, parse_weights, store
from hf_fuse.merge.twin_restore import extract_twin
from hf_fuse.merge.twin_store import compress_twin, kept_rank

SHAPES = {
    "embed_tokens.weight": (40, 16), "layers.0.up.weight": (48, 32), "layers.0.norm.weight": (32,),
    "classifier.weight": (10, 32), "conv.weight": (4, 3, 2, 2), "scale": (),
}  # fmt: skip


def write(folder, state):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def family(tmp_path):
    """A base and three fine-tunes; the embedding is frozen, one matrix changes by rank 2."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    states = {"base": base}
    for k, task in enumerate(("math", "code", "chat")):
        states[task] = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        states[task]["embed_tokens.weight"] = base["embed_tokens.weight"].clone()
        states[task]["layers.0.up.weight"] = base["layers.0.up.weight"] + 0.1 * low_rank(48, 32, 2, seed=k)
    for state in states.values():
        state["ids"] = torch.arange(5)
    return {name: write(tmp_path / name, state) for name, state in states.items()}, states


def recipe(paths, **more):
    return {
        "method": "task_arithmetic",
        "base_model": paths["base"],
        "models": [paths[task] for task in ("math", "code", "chat")],
        "parameters": {"lambda": 0.3},
        **more,
    }


def test_worked_example(tmp_path):
    names = {"base": torch.zeros(2, 2), "one": torch.eye(2), "two": torch.diag(torch.tensor([2.0, 4.0]))}
    paths = {name: write(tmp_path / name, {"w": t}) for name, t in names.items()}
    plain = {"method": "task_arithmetic", "base_model": paths["base"], "models": [paths["one"], paths["two"]],
             "parameters": {"lambda": 0.3}}  # fmt: skip
    made = compress_twin(plain, tmp_path / "store", density=0.5)
    torch.testing.assert_close(weights(made / "shared")["w"], torch.diag(torch.tensor([0.9, 1.5])))
    for task, own in (("one", [0.0, -0.5]), ("two", [0.0, 2.5])):
        parts = load_file(made / f"expert-{task}.safetensors")
        assert parts["w.left"].shape == (2, 1) and parts["w.right"].shape == (1, 2)
        torch.testing.assert_close(parts["w.left"] @ parts["w.right"], torch.diag(torch.tensor(own)))
    mixed = extract(made, tmp_path / "mix", weights={"one": 0.5, "two": 0.5})
    torch.testing.assert_close(weights(mixed)["w"], torch.diag(torch.tensor([0.9, 2.5])))


def test_one_task_is_restored_up_to_its_rank(family, tmp_path):
    paths, states = family
    made = store("twin", recipe(paths), tmp_path / "store", density=[{"filter": "up", "value": 0.3}, {"value": 1}])
    for task in ("math", "code", "chat"):
        out = extract(made, tmp_path / f"{task}-again", task=task)
        for name, tensor in weights(out).items():
            # 0.3 of 32 directions are 9; the difference from the shared model has rank 6.
            torch.testing.assert_close(tensor, states[task][name], rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "1 x chat" in card and "3 fine-tunes merged by task_arithmetic" in card and str(tmp_path) not in card
    assert not (out / "fuse_recipe.yaml").exists()


def test_what_is_kept_and_how_large(family, tmp_path):
    paths, states = family
    made = compress_twin(recipe(paths), tmp_path / "store")
    assert sorted(path.name for path in made.iterdir()) == [
        "expert-chat.safetensors", "expert-code.safetensors", "expert-math.safetensors", "shared", "store.json",
    ]  # fmt: skip
    parts = load_file(made / "expert-math.safetensors")
    assert {name: tuple(t.shape) for name, t in parts.items()} == {
        "layers.0.up.weight.left": (48, 3), "layers.0.up.weight.right": (3, 32), "layers.0.norm.weight": (32,),
        "classifier.weight": (10, 32), "conv.weight": (4, 3, 2, 2), "scale": (),
    }  # fmt: skip
    shared = hf_fuse.merge(recipe(paths), tmp_path / "merged")
    assert (made / "shared" / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()
    own = states["math"]["layers.0.up.weight"] - weights(shared)["layers.0.up.weight"]
    left, values, right = torch.linalg.svd(own, full_matrices=False)
    found = parts["layers.0.up.weight.left"] @ parts["layers.0.up.weight.right"]
    torch.testing.assert_close(found, (left[:, :3] * values[:3]) @ right[:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, density, expected",
    [((768, 768), 0.1, 76), ((10, 10), 0.1, 1), ((10, 10), 1 - 0.9, 1), ((4, 4), 0.1, 1), ((100, 100), 0.5, 50),
     ((100, 100), 0.51, 0), ((100, 100), 1, 0), ((100,), 0.1, 0), ((8, 8, 3), 0.1, 0)],
)  # fmt: skip
def test_ranks_are_counted_in_integers(shape, density, expected):
    """int((1 - 0.9) * 10) is 0: a task's difference would vanish."""
    assert kept_rank("w", shape, density) == expected


def test_mixes_follow_the_formula_in_any_precision(family, tmp_path):
    paths, states = family
    made = compress_twin(recipe(paths, out_dtype="bfloat16"), tmp_path / "store", density=1)
    shared = weights(made / "shared")
    mix = {"math": 0.7, "chat": -0.2}
    wide = weights(extract(made, tmp_path / "wide", weights=mix, out_dtype="float32"))
    for name, tensor in wide.items():
        if tensor.is_floating_point():
            own = {t: (states[t][name] - shared[name].float()).bfloat16().float() for t in mix}
            expected = shared[name].float() + 0.7 * own["math"] - 0.2 * own["chat"]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
    narrow = weights(extract(made, tmp_path / "narrow", weights=mix, workers=1))
    assert all(torch.equal(narrow[name], wide[name].to(narrow[name].dtype)) for name in wide)


def test_command_line(family, tmp_path, capsys):
    import yaml

    paths, states = family
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(paths)))
    place = str(tmp_path / "store")
    names = ["--task", "a", "--task", "b", "--task", "c"]
    cli.app(["store", "twin", str(tmp_path / "r.yaml"), "-o", place, "--density", "0.5", *names], standalone_mode=False)
    assert f"store: {place}" in capsys.readouterr().out
    cli.app(["extract", place, "-o", str(tmp_path / "b"), "--task", "b"], standalone_mode=False)
    assert f"restored: {tmp_path / 'b'}" in capsys.readouterr().out
    name = "layers.0.up.weight"
    torch.testing.assert_close(weights(tmp_path / "b")[name], states["code"][name], rtol=0, atol=1e-5)
    cli.app(["extract", place, "-o", str(tmp_path / "m"), "--weight", "a=0.5", "--weight", "c=0.5"],
            standalone_mode=False)  # fmt: skip
    same = extract(place, tmp_path / "same", weights={"a": 0.5, "c": 0.5})
    assert (same / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()


def test_masks_are_made_and_read_by_the_same_commands(family, tmp_path):
    paths, states = family
    masks = {key: value for key, value in recipe(paths).items() if key not in ("method", "parameters")}
    made = store("tall-masks", masks, tmp_path / "store")
    out = extract(made, tmp_path / "out", task="math")
    assert weights(out).keys() == states["math"].keys()
    with pytest.raises(RecipeError, match="one task at a time"):
        extract(made, tmp_path / "mix", weights={"math": 0.5})


def test_mistakes_are_named(family, tmp_path):
    paths, _ = family
    made = compress_twin(recipe(paths), tmp_path / "store")
    out = tmp_path / "out"
    for message, call in {
        "holds no task 'maths'. Its tasks: chat, code, math": lambda: extract(made, out, task="maths"),
        "say which task.*Its tasks: chat, code, math|say which task.*math": lambda: extract(made, out),
        "expected a number": lambda: extract_twin(made, out, {"math": float("nan")}),
        "no store is called 'twins'. Did you mean 'twin'": lambda: store("twins", recipe(paths), out),
        "2 names for 3 models": lambda: compress_twin(recipe(paths), out, tasks=["a", "b"]),
        r"expected a number in \(0, 1\]": lambda: compress_twin(recipe(paths), out, density=0),
        "has no store.json": lambda: extract(paths["base"], out, task="math"),
        "base is not something that a store of kind twin": lambda: extract(made, out, task="math", base="b"),
        "density is not something that a store of kind tall-masks": lambda: store(
            "tall-masks", recipe(paths), out, density=1
        ),
        "slices": lambda: compress_twin(
            {"method": "passthrough",
             "slices": [{"sources": [{"model": paths["base"], "layers": [0, 1]}]}]}, out),
    }.items():  # fmt: skip
        with pytest.raises(FuseError, match=message):
            call()
        assert not out.exists() and not list(tmp_path.glob("*.partial"))
    with pytest.raises(OutputError, match="exists"):
        compress_twin(recipe(paths), made)
    compress_twin(recipe(paths), made, overwrite=True)
    with pytest.raises(RecipeError, match="TASK=NUMBER"):
        parse_weights(["math"])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda facts: facts["tasks"]["math"].update(expert="../base/model.safetensors"), "damaged"),
        (lambda facts: facts["tasks"]["math"].update(expert="expert-/../x.safetensors"), "damaged"),
        (lambda facts: facts.update(shared="../base"), "damaged"),
        (lambda facts: facts.update(tasks=[]), "damaged"),
        (lambda facts: facts.update(format=2), "format 2"),
        (lambda facts: facts.update(kind="other"), "'other'"),
    ],
)
def test_hostile_descriptions(family, tmp_path, damage, message):
    made = compress_twin(recipe(family[0]), tmp_path / "store")
    facts = json.loads((made / "store.json").read_text())
    damage(facts)
    (made / "store.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=message):
        extract(made, tmp_path / "out", task="math")


def test_factors_that_do_not_fit(family, tmp_path):
    made = compress_twin(recipe(family[0]), tmp_path / "store")
    file = made / "expert-math.safetensors"
    good = load_file(file)
    name = "layers.0.up.weight"
    for parts in (
        good | {f"{name}.left": torch.zeros(47, 3)},
        good | {f"{name}.right": torch.zeros(2, 32)},
        good | {"unknown": torch.zeros(3)},
        {key: value for key, value in good.items() if key != f"{name}.right"},
        good | {"layers.0.norm.weight": torch.zeros(31)},
    ):
        save_file(parts, file)
        with pytest.raises(CheckpointError, match="does not fit the shared model"):
            extract(made, tmp_path / "out", task="math")


def test_a_task_that_equals_the_shared_model_needs_no_file(family, tmp_path):
    paths, _ = family
    made = compress_twin({"method": "passthrough", "models": [paths["math"]]}, tmp_path / "store")
    assert json.loads((made / "store.json").read_text())["tasks"]["math"]["expert"] is None
    out = extract(made, tmp_path / "out", task="math")
    assert all(torch.equal(t, weights(out)[n]) for n, t in load_file(paths["math"] + "/model.safetensors").items())


def test_a_store_of_real_models_loads_with_transformers(tiny_family, tmp_path):
    import transformers

    found = tiny_family("llama")
    made = compress_twin(
        {"method": "task_arithmetic", "base_model": str(found.base), "models": [str(m) for m in found.tuned]},
        tmp_path / "store",
        density=1,
        tasks=[f"task-{k}" for k in range(len(found.tuned))],
    )
    out = extract(made, tmp_path / "out", task="task-0")
    one = transformers.AutoModelForCausalLM.from_pretrained(out)
    other = transformers.AutoModelForCausalLM.from_pretrained(found.tuned[0])
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=2e-3, msg=name)
    transformers.AutoModelForCausalLM.from_pretrained(made / "shared")
