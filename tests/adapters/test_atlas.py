"""aTLAS: coefficients of LoRA task vectors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checks_adapters import batch, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_adapters import bert, gpt2, llama, train
from torch import nn

from hf_fuse import AtlasConfig, FuseError
from hf_fuse.adapters.atlas import atlas_layers, coefficient_penalty, coefficients, plot_coefficients
from hf_fuse.adapters.low_rank import to_lora
from hf_fuse.checkpoint.adapter import open_adapter

LORAS = {
    "narrow": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "wide": {"r": 3, "target_modules": ["q_proj", "v_proj", "lm_head"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> list[str]:
    """Two LoRAs of different ranks, scales and modules."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed, (name, settings) in enumerate(LORAS.items()):
        train(llama(), seed, **settings).save_pretrained(folder / name)
    return [str(folder / name) for name in LORAS]


def atlas(vectors, **settings):
    return get_peft_model(llama(), AtlasConfig(task_vectors=vectors, task_type="CAUSAL_LM", **settings))


def set_coefficients(model, *values: float):
    for layer in atlas_layers(model, "default"):
        layer.atlas_lambda["default"].data = torch.tensor(values)
    return model


def test_zero_is_the_base_and_one_hot_is_that_model(vectors):
    model = atlas(vectors)
    assert torch.equal(logits(model), logits(llama()))
    for number, vector in enumerate(vectors):
        set_coefficients(model, *(float(number == other) for other in range(2)))
        expected = logits(PeftModel.from_pretrained(llama(), vector))
        assert (expected - logits(llama())).abs().max() > 0.1
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_the_weighted_sum_of_task_vectors(vectors):
    """``theta_0 + sum lambda tau`` tensor by tensor, against PEFT's own merges of each LoRA."""
    base = llama().state_dict()
    merged = [PeftModel.from_pretrained(llama(), v).merge_and_unload().state_dict() for v in vectors]
    model = atlas(vectors)
    random = torch.Generator().manual_seed(0)
    expected = dict(base)
    for layer in atlas_layers(model, "default"):
        weights = torch.randn(2, generator=random)
        layer.atlas_lambda["default"].data = weights
        name = f"{layer.name}.weight"
        expected[name] = base[name] + sum(w * (state[name] - base[name]) for w, state in zip(weights, merged))
    found = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_one_coefficient_per_vector_and_module(vectors):
    model = atlas(vectors)
    assert len(atlas_layers(model, "default")) == 7  # q, v and down of two layers, and the head
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 7
    learned = coefficients(model)
    assert learned["model.layers.0.mlp.down_proj"] == {vectors[0]: 0.0}
    assert learned["lm_head"] == {vectors[1]: 0.0}
    assert learned["model.layers.1.self_attn.q_proj"] == {vectors[0]: 0.0, vectors[1]: 0.0}


def test_gradient_is_the_product_with_the_task_vector(vectors):
    model, inputs = atlas(vectors), batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    plain = llama()
    plain(**inputs, labels=inputs["input_ids"]).loss.backward()
    base = llama().state_dict()
    states = [PeftModel.from_pretrained(llama(), v).merge_and_unload().state_dict() for v in vectors]
    for layer in atlas_layers(model, "default"):
        name = f"{layer.name}.weight"
        gradient = plain.get_parameter(name).grad
        expected = torch.stack([(gradient * (state[name] - base[name])).sum() for state in states])
        torch.testing.assert_close(layer.atlas_lambda["default"].grad, expected, rtol=1e-3, atol=1e-5)


def test_reaches_the_least_squares_optimum(tmp_path):
    """With a linear model and squared error the problem is convex, and its solution known."""

    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"head": nn.Linear(6, 4, bias=False)})

    for seed in (1, 2, 3):
        train(make(), seed, r=1, target_modules=["head"]).save_pretrained(tmp_path / str(seed))
    paths = [str(tmp_path / str(seed)) for seed in (1, 2, 3)]
    model = get_peft_model(make(), AtlasConfig(task_vectors=paths))
    x, y = torch.randn(20, 6), torch.randn(20, 4)
    layer = atlas_layers(model, "default")[0]
    down, up, owner = (held["default"] for held in (layer.down, layer.up, layer.owner))
    changes = [(x @ down[owner == v].T @ up[:, owner == v].T).flatten() for v in range(3)]
    rest = (y - layer.base_layer(x).detach()).flatten()
    optimum = torch.linalg.lstsq(torch.stack(changes, 1), rest.unsqueeze(1)).solution[:, 0]
    optimizer = torch.optim.LBFGS(layer.atlas_lambda.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = (layer(x) - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(layer.atlas_lambda["default"].detach(), optimum, rtol=1e-3, atol=1e-4)


def test_learns_to_find_the_vector_that_helps(tmp_path):
    """Labels come from one of the models; its coefficients grow towards 1, the other's stay near 0."""
    paths = []
    for seed in (1, 2):
        train(llama(), seed, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / str(seed))
        paths.append(str(tmp_path / str(seed)))
    inputs = batch(rows=6)
    teacher = PeftModel.from_pretrained(llama(), paths[1]).eval()
    with torch.no_grad():
        target = teacher(**inputs).logits.softmax(-1)
    model = atlas(paths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(60):
        loss = -(target * model(**inputs).logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.stack([layer.atlas_lambda["default"].detach() for layer in atlas_layers(model, "default")])
    torch.testing.assert_close(found.mean(0), torch.tensor([0.0, 1.0]), rtol=0, atol=0.15)


def test_saves_coefficients_only_and_knows_its_vectors(vectors, tmp_path):
    copied = [str(shutil.copytree(vector, tmp_path / Path(vector).name)) for vector in vectors]
    model = set_coefficients(atlas(copied), 0.5, -0.25)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert sum(value.numel() for name, value in saved.items() if name.endswith("atlas_lambda")) == 14
    # PEFT adds the frozen weight of an adapted output layer by itself.
    assert [name for name in saved if not name.endswith("atlas_lambda")] == [
        "base_model.model.lm_head.base_layer.weight"
    ]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "saved")), expected)

    # Elsewhere the vectors lie elsewhere.
    moved = [shutil.move(path, f"{path}-moved") for path in copied]
    with pytest.raises(FuseError, match="narrow: no such folder"):
        PeftModel.from_pretrained(llama(), tmp_path / "saved")
    config = AtlasConfig.from_pretrained(tmp_path / "saved")
    config.task_vectors = moved
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved", config=config)
    assert torch.equal(logits(loaded), expected)

    # Other weights, or the same in another order, are not what the coefficients belong to.
    config = AtlasConfig.from_pretrained(tmp_path / "saved")
    config.task_vectors = moved[::-1]
    with pytest.raises(FuseError, match="changed since these coefficients were trained"):
        PeftModel.from_pretrained(llama(), tmp_path / "saved", config=config)


def test_becomes_one_lora(vectors, tmp_path):
    model = set_coefficients(atlas(vectors), 0.7, -0.4)
    to_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    ranks = {module: part["A"].shape[0] for module, part in open_adapter(tmp_path / "lora", "it").factors.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 5 and ranks["model.layers.0.mlp.down_proj"] == 2


def test_conv1d(tmp_path):
    train(gpt2(), target_modules=["c_attn", "c_proj"]).save_pretrained(tmp_path)
    model = set_coefficients(get_peft_model(gpt2(), AtlasConfig(task_vectors=[tmp_path])), 1.0)
    expected = logits(PeftModel.from_pretrained(gpt2(), tmp_path))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


def test_factors_keep_their_precision_beside_a_bf16_base(vectors):
    def q_proj(dtype):
        model = get_peft_model(llama().to(dtype), AtlasConfig(task_vectors=vectors))
        return atlas_layers(model, "default")[0]

    exact, beside = q_proj(torch.float32), q_proj(torch.bfloat16)
    assert torch.equal(exact.down["default"], beside.down["default"])
    assert torch.equal(exact.up["default"], beside.up["default"])


def test_chosen_targets_and_start(vectors):
    model = atlas(vectors, target_modules=["q_proj"], init_coefficient=0.5)
    assert set(coefficients(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert {value for row in coefficients(model).values() for value in row.values()} == {0.5}


def test_penalty():
    model = atlas_of([[3.0, -4.0], [0.0, 2.0]])
    assert coefficient_penalty(model, power=1).item() == pytest.approx(0.5 * (7 + 2) / 2)
    assert coefficient_penalty(model, power=2).item() == pytest.approx(0.5 * (5 + 2) / 2)


def atlas_of(rows):
    from hf_fuse.adapters.atlas import AtlasLayer

    layers = nn.ModuleList()
    for row in rows:
        layer = AtlasLayer(nn.Linear(2, 2), "layer")
        layer.atlas_lambda["default"] = nn.Parameter(torch.tensor(row))
        layers.append(layer)
    return layers


def test_chart(vectors, tmp_path):
    path = plot_coefficients(set_coefficients(atlas(vectors), 0.5, -0.25), tmp_path / "chart.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_classifiers_bring_their_own_heads(tmp_path):
    trained = train(bert(), task_type="SEQ_CLS", target_modules=["query"])
    trained.save_pretrained(tmp_path)
    config = AtlasConfig(task_vectors=[tmp_path], task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    with pytest.raises(FuseError, match="has trained .*classifier.*as a whole"):
        get_peft_model(bert(), AtlasConfig(task_vectors=[tmp_path]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only", "target_modules": ["query"]}, "as a whole"),
        ({"use_dora": True, "target_modules": ["query"]}, "use_dora"),
    ],
)
def test_only_plain_loras(settings, message, tmp_path):
    train(bert(transformers.BertForMaskedLM), **settings).save_pretrained(tmp_path)
    with pytest.raises(FuseError, match=message):
        get_peft_model(bert(transformers.BertForMaskedLM), AtlasConfig(task_vectors=[tmp_path]))


def test_loras_of_the_hub_stay_as_they_were(hub, hub_cache, repo_id, vectors, tmp_path):
    hub.add_repo(repo_id, {path.name: path.read_bytes() for path in Path(vectors[0]).iterdir()})
    model = set_coefficients(atlas([repo_id, vectors[1]]), 0.5, -0.25)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].revisions == [hub.head(repo_id), None]
    # Their author publishes others.
    hub.add_commit(repo_id, {path.name: path.read_bytes() for path in Path(vectors[1]).iterdir()})
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_wrong_vectors(vectors, tmp_path):
    for paths, message in (
        ([], "is empty"),
        ([str(tmp_path)], "is not an adapter"),
        (["/no/such/folder"], "no such folder"),
    ):
        with pytest.raises(FuseError, match=message):
            atlas(paths)
    with pytest.raises(ValueError, match="task_vectors is 'one', expected a list"):
        AtlasConfig(task_vectors="one")
    with pytest.raises(ValueError, match="init_coefficient is 'zero', expected a finite number"):
        AtlasConfig(init_coefficient="zero")
    with pytest.raises(ValueError, match="listed twice"):
        AtlasConfig(task_vectors=[vectors[0], vectors[0]])
    with pytest.raises(FuseError, match="on base BertForSequenceClassification: the base has no weights"):
        get_peft_model(bert(), AtlasConfig(task_vectors=vectors))
