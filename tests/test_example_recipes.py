"""Every recipe in ``recipes/`` runs, on toy models under the names that the demo gives its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_fuse

RECIPES = Path(__file__).parents[1] / "recipes"
EXPERTS = ("expert-source", "expert-docs", "expert-manual")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``hf-fuse-demo`` (base and experts, four layers) and two LoRA adapters for the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES / "benchmarks")
        from checkpoint_family import FamilySize, build_family

    root = tmp_path_factory.mktemp("examples")
    size = FamilySize(layers=4, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=64, shards=1)
    base, *tuned = build_family(size, root / "hf-fuse-demo")
    for path, name in zip(tuned, EXPERTS):
        path.rename(path.with_name(name))
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(root / "adapters" / name)
    return root


MERGES = sorted(path for path in RECIPES.glob("*.yaml") if path.stem not in ("sweep", "mixlora"))


@pytest.mark.parametrize("recipe", MERGES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    output = hf_fuse.merge(recipe, output=tmp_path / "merged")
    if recipe.stem == "merge_adapters":
        factors = load_file(output / "adapter_model.safetensors")
        assert len(factors) == 16 and all(6 in t.shape and t.isfinite().all() for t in factors.values())
        return
    merged = load_file(output / "model.safetensors")
    base = load_file(models / "hf-fuse-demo" / "base" / "model.safetensors")
    if recipe.stem == "passthrough_stack":
        assert len({name.split(".")[2] for name in merged if ".layers." in name}) == 6
        return
    assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in base.items()}
    name = "model.layers.3.self_attn.q_proj.weight"
    assert merged[name].isfinite().all()
    assert not torch.equal(merged[name], base[name])


def test_sweep_runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fuse.merge.sweep import sweep
    from hf_fuse.merge.sweep_settings import read_sweep

    monkeypatch.chdir(models)
    data, settings = read_sweep(RECIPES / "sweep.yaml")
    # The toy models have no tokenizer to read the text with.
    section = settings.model_dump(exclude_unset=True) | {"goal": "minimize"}
    section["metric"] = {"command": f"{sys.executable} -c 'print(1)' {{model}}"}
    result = sweep(data | {"sweep": section}, tmp_path / "best")
    assert len(result.trials) == 9 and all(trial.second > 0 for trial in result.trials)
    assert (tmp_path / "best" / "model.safetensors").exists()
