"""Path ensembles: one is nothing, zero is a shorter sum, and what is saved comes back."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from tiny_adapters import llama

from hf_fuse.compress.path_ensemble import EnsembleScale, add_path_ensemble, load_path_ensemble
from hf_fuse.errors import FuseError

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "num_labels": 10, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SHAPE)),
    "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**SHAPE)),
    "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**SHAPE)),
}
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def _new(kind: str = "vit"):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(IMAGES).logits


@pytest.mark.parametrize("kind", MODELS)
def test_factors_of_one_change_no_bit(kind):
    model = _new(kind)
    before = _logits(model)
    made = add_path_ensemble(model)
    assert isinstance(made, EnsembleScale) and made.scale_PD.shape == (7, 16)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("kind", MODELS)
def test_without_the_last_layer_s_terms_the_head_reads_a_shorter_model(kind):
    model = _new(kind)
    add_path_ensemble(model, pruned=[5, 6])
    found = _logits(model)
    shorter = _new(kind)
    stack = next(m for m in shorter.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    del stack[2]
    for config in {id(m.config): m.config for m in shorter.modules() if hasattr(m, "config")}.values():
        config.num_hidden_layers = 2
    torch.testing.assert_close(found, _logits(shorter), rtol=1e-4, atol=1e-5)


def test_the_head_reads_the_weighted_sum_of_paths_while_layers_read_the_stream():
    model, plain = _new(), _new()
    made = add_path_ensemble(model)
    torch.nn.init.normal_(made.scale_PD)
    terms, seen = [], []
    for layer in plain.vit.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer.layernorm_after.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain.vit.layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain(IMAGES)
        terms = [seen[0], *(after - before for before, after in zip(seen, seen[1:]))]
        total = sum(scale * term for scale, term in zip(made.scale_PD, terms))
        expected = plain.classifier(plain.vit.layernorm(total)[:, 0])
    assert len(terms) == 7
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_factors_are_trained_and_pruned_paths_get_no_gradient():
    model = _new()
    made = add_path_ensemble(model, pruned=[1])
    model.requires_grad_(False)
    made.requires_grad_(True)
    for _ in range(2):  # nothing of the first pass is left behind
        made.scale_PD.grad = None
        model(IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradient = made.scale_PD.grad
    assert gradient[1].abs().max() == 0 and all(gradient[path].abs().max() > 0 for path in (0, 2, 3, 4, 5, 6))
    step = 1e-3
    with torch.no_grad():

        def loss(change):
            made.scale_PD[3, 5] += change
            found = model(IMAGES, labels=torch.tensor([0, 1, 2])).loss.item()
            made.scale_PD[3, 5] -= change
            return found

        assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(gradient[3, 5].item(), rel=0.05, abs=1e-3)


def test_what_a_trainer_saves_comes_back(tmp_path):
    model = _new()
    made = add_path_ensemble(model, pruned=[2])
    rows = [{"pixel_values": image, "labels": number} for number, image in enumerate(IMAGES)]
    options = {"max_steps": 2, "report_to": "none", "use_cpu": True, "learning_rate": 0.1, "disable_tqdm": True}
    trainer = t.Trainer(model, t.TrainingArguments(str(tmp_path / "run"), **options), train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model.eval()
    loaded = load_path_ensemble(tmp_path / "saved").eval()
    assert torch.equal(_logits(loaded), _logits(model))
    assert (made.scale_PD - 1).abs().max() > 1e-2 and loaded.vit.ensemble_scale.kept_P.tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_mistakes_get_one_clear_error(tmp_path):
    model = _new()
    for pruned, words in (([7], "from 0 to 6"), ([-1], "from 0"), (range(7), "at least one")):
        with pytest.raises(FuseError, match=words):
            add_path_ensemble(_new(), pruned=pruned)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(FuseError, match="holds no path ensemble"):
        load_path_ensemble(tmp_path / "plain")
    add_path_ensemble(model)
    with pytest.raises(FuseError, match="already"):
        add_path_ensemble(model)
    with pytest.raises(FuseError, match="not known to be pre-norm"):
        add_path_ensemble(llama())
    with pytest.raises(FuseError, match="Expected a ViT"):
        add_path_ensemble(torch.nn.Linear(2, 2))
