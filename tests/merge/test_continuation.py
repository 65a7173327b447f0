"""Sequential merges: --continue-from adds models to an earlier merge."""

import hashlib

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import hf_fuse
from hf_fuse import cli
from hf_fuse.errors import FuseError, RecipeError

SHAPES = {"layers.0.up.weight": (30, 20), "layers.0.down.weight": (20, 30), "norm.weight": (20,)}


@pytest.fixture
def family(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for folder in ("base", "other", "m0", "m1", "m2", "m3"):
        change = 0.0 if folder == "base" else 0.1
        state = {name: t + change * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    return tmp_path


def recipe(family, *models, **more):
    return {"method": "opcm", "base_model": str(family / "base"), "models": [str(family / m) for m in models], **more}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-13)])
def test_one_after_the_other_is_all_at_once(family, dtype, tolerance):
    precision = {"dtype": dtype, "out_dtype": dtype}
    at_once = hf_fuse.merge(recipe(family, "m0", "m1", "m2", "m3", **precision), family / "all")
    first = hf_fuse.merge(recipe(family, "m0", "m1", **precision), family / "first")
    second = hf_fuse.merge(recipe(family, "m2", **precision), family / "second", continue_from=first)
    third = hf_fuse.merge(recipe(family, "m3", **precision), family / "third", continue_from=str(second))
    for name, tensor in weights(at_once).items():
        torch.testing.assert_close(weights(third)[name], tensor, rtol=0, atol=tolerance)
    parts = yaml.safe_load((third / "fuse_recipe.yaml").read_text())["provenance"]["continuation"]["parameters"]
    whole = yaml.safe_load((at_once / "fuse_recipe.yaml").read_text())["provenance"]["continuation"]["parameters"]
    assert parts["earlier_count"] == whole["earlier_count"] == 4
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_stored_recipe_makes_the_same_bytes(family):
    first = hf_fuse.merge(recipe(family, "m0", "m1"), family / "first")
    second = hf_fuse.merge(recipe(family, "m2"), family / "second", continue_from=first)
    again = hf_fuse.merge(second / "fuse_recipe.yaml", family / "again")
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (second, again)}
    assert len(digests) == 1


def test_command_line_and_no_base_in_the_recipe(family, capsys):
    (family / "a.yaml").write_text(yaml.safe_dump(recipe(family, "m0", "m1")))
    short = recipe(family, "m2")
    del short["base_model"]
    (family / "b.yaml").write_text(yaml.safe_dump(short))
    cli.app(["merge", str(family / "a.yaml"), "-o", str(family / "first")], standalone_mode=False)
    cli.app(
        ["merge", str(family / "b.yaml"), "-o", str(family / "second"), "--continue-from", str(family / "first")],
        standalone_mode=False,
    )
    assert "method: opcm" in capsys.readouterr().out
    direct = hf_fuse.merge(recipe(family, "m0", "m1", "m2"), family / "all")
    for name, tensor in weights(direct).items():
        torch.testing.assert_close(weights(family / "second")[name], tensor, rtol=0, atol=2e-5)
    assert sorted(path.name for path in (family / "second").iterdir()) == [
        "README.md", "fuse_recipe.yaml", "model.safetensors",
    ]  # fmt: skip


def test_mistakes_are_named(family):
    first = hf_fuse.merge(recipe(family, "m0", "m1"), family / "first")
    out = family / "out"
    with pytest.raises(RecipeError, match="another base.*Name the right one"):
        hf_fuse.merge(recipe(family, "m2") | {"base_model": str(family / "other")}, out, continue_from=first)
    with pytest.raises(RecipeError, match="m1 has no fuse_recipe.yaml that says how to go on"):
        hf_fuse.merge(recipe(family, "m2"), out, continue_from=family / "m1")
    with pytest.raises(RecipeError, match="ties can't go on.*opcm"):
        hf_fuse.merge(recipe(family, "m2") | {"method": "ties"}, out, continue_from=first)
    with pytest.raises(RecipeError, match="earlier_count comes from"):
        hf_fuse.merge(recipe(family, "m2", parameters={"earlier_count": 3}), out, continue_from=first)
    with pytest.raises(FuseError, match="nowhere"):
        hf_fuse.merge(recipe(family, "m2"), out, continue_from="/nowhere/at-all")
    other = hf_fuse.merge(recipe(family, "m0") | {"method": "ties"}, family / "ties")
    with pytest.raises(RecipeError, match="says how to go on"):
        hf_fuse.merge(recipe(family, "m2"), out, continue_from=other)
    assert not out.exists()


def test_room_for_what_is_kept_aside_is_asked_for(family, monkeypatch):
    from hf_fuse.merge import plan as plans

    made = hf_fuse.plan(recipe(family, "m0", "m1", output=str(family / "out")))
    numbers = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert made.bytes_kept_aside == 4 * numbers
    monkeypatch.setattr(plans, "SPARE_BYTES", 0)
    monkeypatch.setattr(plans, "_free", lambda _: made.layout.nbytes + 4 * numbers - 1)
    with pytest.raises(FuseError, match="the disk has"):
        hf_fuse.plan(recipe(family, "m0", "m1", output=str(family / "out")))
