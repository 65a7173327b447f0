"""The same recipe makes the same bytes, in every file: whatever the threads, the pieces, the process, its hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checks_merge import statistics_of
from safetensors.torch import save_file
from tiny_models import Family, digests, llama_family, load_weights, save_tokenizer, save_weights, seeded

import hf_fuse
from hf_fuse import registry
from hf_fuse.merge import stream
from hf_fuse.merge.sources import BLOCK
from hf_fuse.method_list import method_facts

VARIANTS: dict[str, dict[str, Any]] = {
    "ties_by_tensor": {"method": "ties", "parameters": {"scope": "tensor"}},
    "dare_linear_l1": {"method": "dare_linear", "parameters": {"rescale": "l1_norm", "density": 0.5}},
    "dare_ties_seed": {"method": "dare_ties", "seed": 7},
    "model_stock_rows": {"method": "model_stock", "parameters": {"rows": True}},
    "linear_float64": {"method": "linear", "dtype": "float64", "out_dtype": "bfloat16"},
    "ties_bfloat16": {"method": "ties", "out_dtype": "bfloat16", "max_shard_size": "300KB"},
    "linear_union": {"method": "linear", "tokenizer": "union"},
    "ties_union": {"method": "ties", "tokenizer": "union"},
    "task_arithmetic_adapter": {"method": "task_arithmetic"},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Large enough that the embedding is cut into blocks, small enough to be merged a hundred times."""
    folder = tmp_path_factory.mktemp("determinism")
    family = llama_family(folder, width=32, vocabulary=9000, layers=2)
    assert load_weights(family.base)["lm_head.weight"].numel() > BLOCK
    words = llama_family(folder / "words", vocabulary=60, layers=1)
    for number, path in enumerate(words.tuned):  # each has learnt other words
        save_tokenizer(path, added=[f"w{number}_{k * 7 % 40}" for k in range(40)])
    make_adapter(folder / "adapter", family.base)
    return family


def make_adapter(folder: Path, base: Path) -> None:
    random, state = seeded(5), {}
    for name, value in load_weights(base).items():
        if name.endswith("q_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            state[f"{module}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=random)
            state[f"{module}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=random)
    save_weights(folder, state)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
              "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def recipe_of(name: str, family: Family) -> dict[str, Any]:
    """A recipe for a method of the registry or one of the variants."""
    recipe = {"method": name} | VARIANTS.get(name, {})
    facts = method_facts(registry.get("merge", recipe["method"]))
    required = {key: 0.3 for key, option in facts["parameters"].items() if option["required"]}
    count = {"1": 1, "2": 2}.get(facts["models"], 3)
    if "union" in name:
        words = family.base.parent / "words"
        family = Family(words / "base", [words / f"tuned-{number}" for number in (1, 2, 3)])
    recipe["models"] = [{"path": str(path)} for path in family.tuned[:count]]
    if "adapter" in name:
        recipe["models"][0] = {"path": str(family.base.parent / "adapter")}
    if facts["base"] != "no" and count != 2:
        recipe["base_model"] = str(family.base)
    if count > 1 and "weight" in facts["parameters"]:
        for model, weight in zip(recipe["models"], (0.5, 0.3, 0.9)):
            model["weight"] = weight
    if facts["statistics"]:
        folders = [Path(model["path"]) for model in recipe["models"]]
        for folder, model, found in zip(folders, recipe["models"], statistics_of(name, map(load_weights, folders))):
            model["statistics"] = str(folder.parent / f"{folder.name}-{name}.safetensors")
            save_file(found, model["statistics"])
    recipe["parameters"] = required | recipe.get("parameters", {})
    return recipe


NAMES = [*registry.names("merge"), *VARIANTS]


Reference = Callable[[str], tuple[Path, dict[str, str]]]


@pytest.fixture(scope="module")
def reference(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Output folder and digests by recipe: one thread, blocks of the usual size."""
    folder = tmp_path_factory.mktemp("references")

    @cache
    def make(name: str) -> tuple[Path, dict[str, str]]:
        output = hf_fuse.merge(recipe_of(name, family), folder / name / "merged", workers=1)
        return output, digests(output)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_pieces(name: str, reference: Reference, family: Family, tmp_path: Path) -> None:
    _, expected = reference(name)
    recipe = recipe_of(name, family)
    for workers, chunk in ((2, 3 * 1024), (3, 64 * 1024)):
        output = hf_fuse.merge(recipe, tmp_path / f"{workers}" / "merged", workers=workers, chunk_elements=chunk)
        assert digests(output) == expected, f"{workers} threads, {chunk} elements at a time"


@pytest.mark.parametrize("name", NAMES)
def test_stored_recipe_makes_the_same_again(name: str, reference: Reference, tmp_path: Path) -> None:
    output, expected = reference(name)
    again = hf_fuse.merge(output / "fuse_recipe.yaml", tmp_path / "merged")
    assert digests(again) == expected


def test_many_jobs_on_many_threads(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the whole model are added in a fixed order, whoever is first."""
    monkeypatch.setattr(stream, "SPLIT_ABOVE", BLOCK)
    for name in ("ties", "dare_ties", "model_stock", "consensus"):
        found = [
            digests(hf_fuse.merge(recipe_of(name, family), tmp_path / f"{name}-{count}" / "merged", workers=count))
            for count in (1, 5)
        ]
        assert found[0] == found[1]


def test_outputs_differ_where_they_should(reference: Reference) -> None:
    """The comparisons above would notice something."""
    names = ("linear", "ties", "ties_by_tensor", "dare_ties", "dare_ties_seed", "model_stock", "model_stock_rows")
    assert len({reference(name)[1]["model.safetensors"] for name in names}) == len(names)


RUN = """
import json, sys
from pathlib import Path
import hf_fuse
folder, recipes = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, recipe in recipes.items():
    hf_fuse.merge(recipe, folder / name / "merged")
print(hash("a"))
"""


def test_hash_seeds_and_cores(reference: Reference, family: Family, tmp_path: Path) -> None:
    """Two processes of their own, with other hash seeds and other numbers of torch threads."""
    names = ["ties", "dare_linear", "dare_ties", "model_stock", "slerp", "linear_union", "ties_union",
             "task_arithmetic_adapter", "ties_bfloat16"]  # fmt: skip
    recipes = json.dumps({name: recipe_of(name, family) for name in names})
    started = []
    for seed, threads in (("1", "1"), ("4242", "2")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", RUN, str(tmp_path / seed), recipes]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    hashes = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert hashes[0] != hashes[1]
    for name in names:
        for seed in ("1", "4242"):
            assert digests(tmp_path / seed / name / "merged") == reference(name)[1], f"{name} with hash seed {seed}"
