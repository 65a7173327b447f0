"""The estimator of the diagonal Fisher, against loops that follow its definition."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import digests, load_weights, save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_fuse
from hf_fuse import cli
from hf_fuse.errors import FuseError, OutputError, RecipeError

from .learn_cases import TEXTS, saved, written_texts


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return {"estimator": "fisher", "model": str(saved("classifier", folder / "model")),
            "data": str(written_texts(folder / "rows.jsonl", labels=4)), "examples": 10}  # fmt: skip


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A language model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("writer")
    return {"estimator": "fisher", "model": str(saved("llama_tied", folder / "model")),
            "data": str(written_texts(folder / "texts.jsonl")), "examples": 6}  # fmt: skip


def found(recipe, folder, **parameters):
    options = {name: parameters.pop(name) for name in ("examples", "seed") if name in parameters}
    return load_file(hf_fuse.learn(recipe | options | {"parameters": parameters}, folder) / "fisher.safetensors")


def examples(recipe):
    """Token ids of what a recipe takes, by the tokenizer itself."""
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(recipe.get("seed", 0)))
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    for number in order[: recipe["examples"]].tolist():
        yield number, torch.tensor([tokenizer(TEXTS[number])["input_ids"]]), tokenizer.eos_token_id


def squares(model, value):
    model.zero_grad()
    value.backward(retain_graph=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.square() for n, p in model.named_parameters()}


def test_exact_is_the_expectation_over_classes_of_one_gradient_each(classifier, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(classifier["model"]).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _, ids, _ in examples(classifier):
        log_probs = model(ids).logits[0].log_softmax(-1)
        for log_prob in log_probs:
            for name, square in squares(model, log_prob).items():
                total[name] += log_prob.exp().detach() * square / classifier["examples"]
    exact = found(classifier, tmp_path / "exact", labels="exact")
    assert exact.keys() == load_weights(tmp_path / "exact").keys() == total.keys()
    torch.testing.assert_close(exact, total, rtol=1e-4, atol=1e-9)


def test_draws_come_near_the_exact_one_and_nearer_with_more(classifier, tmp_path):
    exact = found(classifier, tmp_path / "exact", labels="exact", examples=24)
    flat = torch.cat([exact[name].flatten() for name in sorted(exact)])
    correlations = []
    for samples in (1, 16):
        drawn = found(classifier, tmp_path / str(samples), samples=samples, examples=24)
        other = torch.cat([drawn[name].flatten() for name in sorted(exact)])
        correlations.append(torch.corrcoef(torch.stack([flat, other]))[0, 1].item())
    assert 0.5 < correlations[0] < correlations[1] and correlations[1] > 0.98
    assert other.sum() / flat.sum() == pytest.approx(1, abs=0.15), "unbiased, not only proportional"


def test_given_labels_are_squared_example_by_example_with_tied_weights_once(writer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(writer["model"]).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _, ids, end in examples(writer):
        ids = torch.cat([ids, torch.tensor([[end]])], 1)
        loss = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        for name, square in squares(model, loss).items():
            total[name] += square / writer["examples"]
            mean[name] += dict(model.named_parameters())[name].grad / writer["examples"]
    given = found(writer, tmp_path / "given", labels="given")
    assert "lm_head.weight" not in given
    torch.testing.assert_close(given, total, rtol=1e-4, atol=1e-9)
    name = "model.embed_tokens.weight"
    assert not torch.allclose(given[name], mean[name].square(), rtol=0.1), "the squared mean is something else"


def test_the_labels_of_the_data_do_not_matter_to_the_true_fisher(classifier, tmp_path):
    other = classifier | {"data": str(written_texts(tmp_path / "rows.jsonl", labels=3))}
    one, two = found(classifier, tmp_path / "a"), found(other, tmp_path / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = found(classifier, tmp_path / "c", labels="given"), found(other, tmp_path / "d", labels="given")
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_classifier_needs_no_labels(classifier, tmp_path):
    unlabelled = classifier | {"data": str(written_texts(tmp_path / "rows.jsonl"))}
    one, two = found(classifier, tmp_path / "a"), found(unlabelled, tmp_path / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(RecipeError, match="no column label"):
        found(unlabelled, tmp_path / "c", labels="given")


def test_experts_that_a_model_holds_as_a_stack_go_by_their_stored_names(writer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    recipe = writer | {"model": str(tmp_path / "model"), "examples": 1}
    given = found(recipe, tmp_path / "f", labels="given")
    assert {n: t.shape for n, t in given.items()} == {n: t.shape for n, t in load_weights(tmp_path / "model").items()}
    ((_, ids, end),) = examples(recipe)
    ids = torch.cat([ids, torch.tensor([[end]])], 1)
    loss = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    stacked_EIH = squares(model, loss)["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}."
        pair = torch.cat([given[name + "w1.weight"], given[name + "w3.weight"]])
        torch.testing.assert_close(pair, stacked_EIH[expert], rtol=1e-3, atol=1e-10)


def test_digits(tmp_path):
    """Handwritten digits from a folder of images."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    pixels, classes = load_digits(return_X_y=True)
    for number in range(20):
        file = tmp_path / "digits" / "train" / str(classes[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[number].reshape(8, 8) * 15.9).astype("uint8")).save(file)
    names = {"id2label": {k: str(k) for k in range(10)}, "label2id": {str(k): k for k in range(10)}}
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**size, **names, image_size=8, patch_size=2, num_channels=1))
    model.save_pretrained(tmp_path / "model")
    recipe = {"estimator": "fisher", "model": str(tmp_path / "model"), "data": str(tmp_path / "digits")}
    exact = found(recipe, tmp_path / "f", labels="exact", examples=5)
    assert exact.keys() == load_weights(tmp_path / "model").keys()
    assert all((values > 0).any() for name, values in exact.items() if "key.bias" not in name)


def test_same_seed_same_bytes(writer, tmp_path):
    assert digests(hf_fuse.learn(writer, tmp_path / "a" / "f")) == digests(hf_fuse.learn(writer, tmp_path / "b" / "f"))
    one, two = load_file(tmp_path / "a" / "f" / "fisher.safetensors"), found(writer, tmp_path / "c", seed=1)
    assert not torch.equal(one["model.norm.weight"], two["model.norm.weight"])


def test_from_the_command_line_into_a_merge(writer, tmp_path, capsys):
    recipe = tmp_path / "learn.yaml"
    recipe.write_text(yaml.safe_dump(writer))
    cli.app(["learn", str(recipe), "--output", str(tmp_path / "f"), "--examples", "2"], standalone_mode=False)
    assert "statistics:" in capsys.readouterr().out
    with safe_open(tmp_path / "f" / "fisher.safetensors", "pt") as file:
        assert file.metadata()["statistics"] == "fisher"
    record = yaml.safe_load((tmp_path / "f" / "fuse_recipe.yaml").read_text())
    assert record["examples"] == 2 and record["provenance"]["learned"] == {"examples": 2}
    assert "output" not in record
    model = {"path": writer["model"], "statistics": str(tmp_path / "f")}
    merged = hf_fuse.merge({"method": "fisher", "models": [model]}, tmp_path / "merged")
    torch.testing.assert_close(load_weights(merged), load_weights(Path(writer["model"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"labels": "exact"}}, "exact needs a classifier"),
        ({"parameters": {"labels": "given", "samples": 2}}, "draws none"),
        ({"parameters": {"sample": 2}}, "no parameter 'sample'.*'samples'"),
        ({"parameters": {"samples": 0}}, "samples is 0"),
        ({"estimator": "fischer"}, "no learn method is called 'fischer'.*'fisher'"),
        ({"example": 3}, "unknown key 'example'.*'examples'"),
        ({"data": "/nowhere/x.jsonl"}, "no such file"),
        ({"method": "fisher"}, "recipe for merging"),
        ({"device": "quantum"}, "device"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(writer, tmp_path, change, message):
    with pytest.raises(FuseError, match=message):
        hf_fuse.learn(writer | change, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_output(writer, tmp_path):
    with pytest.raises(RecipeError, match="Run it with hf-fuse learn"):
        hf_fuse.plan(writer)
    with pytest.raises(RecipeError, match="no folder is given"):
        hf_fuse.learn(writer)
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputError, match="exists"):
        hf_fuse.learn(writer, tmp_path / "f")
