"""Training recipes: short forms, overrides, and one message for each way to misspell one."""

from __future__ import annotations

import pytest

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import dump_recipe, read_yaml
from hf_fuse.training_recipe import (
    AdapterEntry,
    TrainingRecipe,
    adapter_config,
    load_training_recipe,
    training_config,
)

LEAST = {"model": "base", "data": "rows.jsonl"}


def test_short_forms_mean_the_long_ones():
    short = load_training_recipe(
        {"model": "org/base@v1+org/adapter", "data": ["a.jsonl", {"path": "b.csv", "limit": 3}]}
    )
    assert (short.model.path, short.model.revision, short.model.adapter) == ("org/base", "v1", "org/adapter")
    assert [(source.path, source.split, source.limit) for source in short.data.train] == [
        ("a.jsonl", "train", None), ("b.csv", "train", 3)
    ]  # fmt: skip
    recipe = load_training_recipe(LEAST | {"adapter": "mixlora", "push": "org/name"})
    assert recipe.adapter.method == "mixlora" and recipe.push.repo == "org/name" and recipe.trains_adapter
    assert not load_training_recipe(LEAST).trains_adapter


def test_overrides_win_and_survive_a_round_trip(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: base\ndata: {train: rows.jsonl}\nadapter: {method: lora, r: 8}\ntrain: {seed: 1}\n")
    overrides = {"adapter.r": 16, "train.learning_rate": 1e-4, "data.train.0.limit": 5, "num_processes": 2}
    with pytest.raises(RecipeError, match="'train.0' is not|no keys to set|has no keys"):
        load_training_recipe(file, overrides)  # a path is no list yet
    del overrides["data.train.0.limit"]
    recipe = load_training_recipe(file, overrides)
    assert recipe.adapter.model_extra == {"r": 16} and recipe.train == {"seed": 1, "learning_rate": 1e-4}
    assert load_training_recipe(read_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": "x"}, "unknown key 'modell'. Did you mean 'model'?"),
        ({"data": {"train": "a", "maxlength": 3}}, "unknown key 'maxlength' in data. Did you mean 'max_length'?"),
        (
            {"data": {"train": [{"path": "a", "slit": "x"}]}},
            "unknown key 'slit' in data.train.0. Did you mean 'split'?",
        ),
        ({"learning_rate": 1e-4}, "'learning_rate' belongs into train. Write train.learning_rate."),
        ({"packing": True}, "'packing' belongs into data. Write data.packing."),
        ({"objectives": {"router_z": 0.1}}, "belongs into train. Write train.objectives."),
        ({"merge_method": "ties"}, "recipe for merging. Run it with hf-fuse merge"),
        ({"data": {"train": "a", "eval": "b", "eval_fraction": 0.1}}, "give eval .* or eval_fraction .*, not both"),
        ({"data": {"train": "a", "eval_fraction": 1.5}}, "data.eval_fraction: .*less than 1"),
        ({"data": {}}, "the key 'data.train' is missing"),
        ({"num_processes": 0}, "num_processes: .*greater than or equal to 1"),
        ({"model": "a+b", "adapter": "lora"}, "model has an adapter to go on with"),
        ({"model": {"path": "a", "dtype": "int8"}}, "model.dtype: .*'float32'"),
    ],
)
def test_a_mistake_is_one_message(change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_training_recipe(LEAST | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "mixlorra"}, "no method is called 'mixlorra'. Did you mean 'mixlora'?"),
        ({"method": "lora", "lora_alfa": 3}, "adapter: unknown key 'lora_alfa'. Did you mean 'lora_alpha'?"),
        ({"method": "lora", "r": "many"}, "adapter.r is 'many', expected int"),
        ({"method": "lora", "peft_type": "IA3"}, "unknown key 'peft_type'"),
        ({"method": "mixlora", "num_experts": 2, "top_k": 3}, "adapter: .*top_k"),
        ({"method": "mixlora", "routing_strategy": "magic"}, "adapter: .*magic"),
    ],
)
def test_a_mistake_in_the_adapter_is_one_message(entry, message):
    with pytest.raises(RecipeError, match=message):
        adapter_config(AdapterEntry(**entry), "CAUSAL_LM")


def test_adapter_keys_reach_the_config_verbatim():
    config = adapter_config(AdapterEntry(method="MixLoRA", r=4, num_experts=6, target_modules=["up_proj"]), "CAUSAL_LM")
    assert type(config).__name__ == "MixLoraConfig"
    assert (config.r, config.num_experts, set(config.target_modules), config.task_type) == (
        4,
        6,
        {"up_proj"},
        "CAUSAL_LM",
    )
    lora = adapter_config(AdapterEntry(method="lora", task_type="SEQ_CLS", lora_alpha=3), "CAUSAL_LM")
    assert (lora.task_type, lora.lora_alpha) == ("SEQ_CLS", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1}, "train: unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, "train.learning_rate is 'fast', expected float"),
        ({"eval_strategy": "sometimes"}, "train: sometimes is not a valid IntervalStrategy"),
        ({"output_dir": "x"}, "train: output_dir can't be set here: say output"),
        ({"push_to_hub": True}, "push_to_hub can't be set here: say push"),
        ({"hub_token": "hf_secret"}, "hub_token can't be set here: run `hf auth login`, or set HF_TOKEN"),
        ({"teacher_model_init_kwargs": {"token": "hf_secret"}}, "kwargs.token can't be set here: run `hf auth login`"),
        ({"resume_from_checkpoint": "x"}, "pass --resume"),
        ({"objectives": {"router_zz": 0.1}}, "router_z"),
    ],
)
def test_a_mistake_in_the_training_arguments_is_one_message(options, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as error:
        training_config(options, tmp_path)
    assert "secret" not in str(error.value)


def test_training_arguments_reach_the_config_verbatim(tmp_path):
    options = {"learning_rate": 1e-4, "warmup_steps": 3, "lr_scheduler_kwargs": {"num_cycles": 2}, "use_cpu": True}
    config = training_config(options, tmp_path, seed=7, learning_rate=1.0)
    assert (config.learning_rate, config.warmup_steps, config.seed) == (1e-4, 3, 7)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2} and config.output_dir == str(tmp_path)


def test_every_key_has_a_place_in_the_schema():
    schema = TrainingRecipe.model_json_schema()
    assert schema["additionalProperties"] is False and {"model", "adapter", "data", "train"} <= set(
        schema["properties"]
    )
