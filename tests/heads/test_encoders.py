"""Heads on encoders of transformers: features are what the last layer takes, and a linear head becomes that layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.demo_training import byte_tokenizer
from hf_fuse.errors import FuseError
from hf_fuse.heads.analytic import Analytic
from hf_fuse.heads.features import EncoderFeatures
from hf_fuse.heads.linear import install_head
from hf_fuse.heads.moment_probing import MomentProbing
from hf_fuse.heads.naive_bayes import NaiveBayes
from hf_fuse.heads.nearest_mean import NearestMean

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def texts():
    domains = {domain.name: domain for domain in stdlib_domains(source_characters=200_000)}
    found = [(text[:80], name) for name in ("source", "docs") for text in domains[name].train[:24]]
    return [text for text, _ in found], np.array([name for _, name in found])


def text_model(kind, tokenizer):
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": 300, "max_position_embeddings": 400}
    config, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
        "llama": (LlamaConfig, LlamaForSequenceClassification),
    }[kind]
    return model(config(**SMALL, **special))


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_head_on_texts_becomes_the_last_layer(kind, texts, tmp_path):
    tokenizer = byte_tokenizer(64)
    model = text_model(kind, tokenizer)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    head = Analytic(ridge=1e-3) if kind == "llama" else NaiveBayes()
    pipeline = make_pipeline(EncoderFeatures(str(tmp_path / "encoder"), max_length=64, batch_size=5), head)
    pipeline.fit(*texts)
    install_head(head, model).save_pretrained(tmp_path / "classifier")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    batch = tokenizer(texts[0], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        logits = found(**batch).logits
    assert found.config.id2label == {0: "docs", 1: "source"}
    predicted = np.array([found.config.id2label[number] for number in logits.argmax(1).tolist()])
    certain = np.abs(pipeline.predict_proba(texts[0])[:, 0] - 0.5) > 0.01  # elsewhere rounding to fp32 decides
    assert certain.sum() > len(texts[0]) / 3 and (predicted == pipeline.predict(texts[0]))[certain].all()
    assert (predicted == texts[1]).mean() > 0.6, "better than chance even on random layers"
    if kind != "llama":
        assert logits.softmax(-1).numpy() == pytest.approx(pipeline.predict_proba(texts[0]), abs=1e-3)


def test_features_do_not_depend_on_the_batch(texts):
    tokenizer = byte_tokenizer(64)
    model = text_model("llama", tokenizer).train()
    rows = [EncoderFeatures(model, tokenizer, batch_size=size).transform(texts[0][:7]) for size in (1, 3, 7)]
    assert rows[1] == pytest.approx(rows[0], abs=1e-6) and rows[2] == pytest.approx(rows[0], abs=1e-6)
    assert model.training, "left as it was"
    mean = EncoderFeatures(model.model, tokenizer, max_length=100).transform(texts[0][:2])
    ids = tokenizer(texts[0][0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert mean[0] == pytest.approx(model.model.eval()(ids).last_hidden_state[0].mean(0).numpy(), abs=1e-6)
    tokens = EncoderFeatures(model, tokenizer, tokens=True, batch_size=2, max_length=100).transform(texts[0][:3])
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts[0][:3]]
    assert tokens.shape == (3, max(lengths), 16)
    assert [int((~np.isnan(row[:, 0])).sum()) for row in tokens] == lengths
    head = MomentProbing(projection=16, parts=2, epochs=1).fit(tokens, [0, 1, 1])
    assert head.predict(tokens).shape == (3,)


def test_an_encoder_that_is_changed_and_one_without_padding(texts, tmp_path):
    tokenizer, other = byte_tokenizer(64), byte_tokenizer(16)
    for name, kind, found in (("first", "bert", tokenizer), ("second", "roberta", other)):
        text_model(kind, found).save_pretrained(tmp_path / name)
        found.save_pretrained(tmp_path / name)
    changed = EncoderFeatures(str(tmp_path / "first"))
    changed.transform(texts[0][:2])
    changed.set_params(model=str(tmp_path / "second"))
    fresh = EncoderFeatures(str(tmp_path / "second"))
    assert np.array_equal(changed.transform(texts[0][:2]), fresh.transform(texts[0][:2])), "its own tokenizer, too"
    model = text_model("llama", tokenizer)
    expected = EncoderFeatures(model, tokenizer).transform(texts[0][:3])
    model.config.pad_token_id = tokenizer.pad_token = None
    assert EncoderFeatures(model, tokenizer).transform(texts[0][:3]) == pytest.approx(expected, abs=1e-6)
    assert tokenizer.pad_token is None, "left as it was"
    with pytest.raises(FuseError, match="has no pad_token"):
        EncoderFeatures(model, tokenizer, tokens=True).transform(texts[0][:3])


def test_a_head_on_images_becomes_the_last_layer(tmp_path):
    X, y = load_digits(return_X_y=True)
    images = [np.repeat(image.reshape(8, 8, 1) * 15.9, 3, axis=2).astype(np.uint8) for image in X[:200]]
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    head = NearestMean()
    pipeline = make_pipeline(EncoderFeatures(model, processor), head).fit(images, y[:200])
    predicted = pipeline.predict(images)
    install_head(head, model).save_pretrained(tmp_path)
    found = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = found(**processor(images, return_tensors="pt")).logits
    assert logits.shape == (200, 10) and (logits.argmax(1).numpy() == predicted).all()


def test_what_cannot_be_installed_says_why(texts, tmp_path):
    tokenizer = byte_tokenizer(64)
    llama = text_model("llama", tokenizer)
    rows, names = np.random.default_rng(0).standard_normal((16, 16)), ["a", "b"] * 8
    with pytest.raises(FuseError, match="has no bias, which the head needs"):
        install_head(NaiveBayes().fit(rows, names), llama)
    install_head(LogisticRegression(fit_intercept=False).fit(rows, names), llama)
    with pytest.raises(FuseError, match="learned from 3 features, but BertForSequenceClassification classifies 16"):
        install_head(NaiveBayes().fit(np.eye(3), [0, 1, 1]), text_model("bert", tokenizer))
    with pytest.raises(FuseError, match="LlamaModel: has no layer that classifies"):
        install_head(NaiveBayes().fit(rows, names), llama.model)
    for nothing in ([], "a text instead of a list of them"):
        with pytest.raises(FuseError, match="X is empty"):
            EncoderFeatures(llama, tokenizer).transform(nothing)
    llama.save_pretrained(tmp_path)
    with pytest.raises(FuseError, match="holds neither a tokenizer"):
        EncoderFeatures(str(tmp_path)).transform(["text"])
