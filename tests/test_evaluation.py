"""Evaluation on small real data: standard-library source and docstrings, digits, tiny models trained here."""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import json
import math
import shutil
import sys
import textwrap
import types
import weakref
from pathlib import Path

import pytest
import torch

from hf_fuse.errors import FuseError
from hf_fuse.evaluation import METRICS, EvaluationReport, EvaluationRow, evaluate_models, perplexity
from hf_fuse.evaluation_data import LabelledSet, class_ids

WORDS, CONTEXT = 400, 64


def docstrings(*modules) -> str:
    found = [inspect.getdoc(thing) for module in modules for _, thing in sorted(vars(module).items())]
    return "\n\n".join(text for text in found if text)


CODE, PROSE = inspect.getsource(textwrap), docstrings(shutil, difflib, inspect, functools)


def make_tokenizer(vocabulary: int, bos: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([CODE, PROSE], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **special)


def make_language_model(vocabulary: int = WORDS, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**sizes, **config, **changes}))


def train_language_model(model, tokenizer, text: str, steps: int):
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - CONTEXT, (8,), generator=generator)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS, bos=True)


@pytest.fixture(scope="module")
def language_models(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Two experts of the same kind, one trained on source code and one on documentation."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "code.txt").write_text(CODE[-6000:])
    (folder / "prose.txt").write_text(PROSE[-6000:])
    for name, text in (("code", CODE[:-6000]), ("prose", PROSE[:-6000])):
        train_language_model(make_language_model(), tokenizer, text, 20).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(language_models):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(language_models["code"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[str, object]:
    """A ViT trained for a moment on 8x8 handwritten digits, and the held-out digits as a dataset of images."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PIL
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    folder, (pixels, labels) = tmp_path_factory.mktemp("digits"), load_digits(return_X_y=True)
    shades = (pixels.reshape(-1, 8, 8) / 16 * 255).round().astype("uint8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    classifier = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3)
    inputs = torch.tensor(shades[:1500] / 255, dtype=torch.float32)[:, None]
    for step in range(60):
        part = slice(step * 50 % 1500, step * 50 % 1500 + 50)
        classifier(pixel_values=inputs[part], labels=torch.tensor(labels[:1500][part])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.eval().save_pretrained(folder / "vit")
    held_out = {"image": [PIL.fromarray(shade) for shade in shades[1500:]], "label": labels[1500:].tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=[f"LABEL_{index}" for index in range(10)])})
    data = Dataset.from_dict(held_out, features=features)
    data.to_parquet(folder / "digits.parquet")
    with torch.no_grad():
        logits = classifier(torch.tensor(shades[1500:] / 255, dtype=torch.float32)[:, None]).logits
    return {"model": folder / "vit", "data": folder / "digits.parquet", "logits": logits, "labels": labels[1500:]}


@pytest.fixture(scope="module")
def line_classifier(tokenizer, tmp_path_factory) -> dict[str, object]:
    """A decoder trained for a moment to tell lines of code from lines of documentation."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("lines")
    lines = {0: CODE.splitlines(), 1: PROSE.splitlines()}
    rows = [(line, label) for label, found in lines.items() for line in found if len(line.split()) > 3][::2]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=CONTEXT, pad_token_id=2, **sizes, id2label={0: "code", 1: "prose"}
    )
    config.label2id = {"code": 0, "prose": 1}
    classifier = LlamaForSequenceClassification(config)
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3)
    for step in range(40):
        part = [rows[(step * 37 + index * 11) % len(rows)] for index in range(16)]
        inputs = tokenizer(
            [text for text, _ in part], padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        labels = torch.tensor([label for _, label in part])
        classifier(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.eval().save_pretrained(folder / "lines")
    tokenizer.save_pretrained(folder / "lines")
    held_out = rows[1::5][:60]
    write_rows(folder / "lines.jsonl", [{"text": text, "label": label} for text, label in held_out])
    with torch.no_grad():
        predicted = []
        for text, _ in held_out:
            ids = tokenizer(text, truncation=True, max_length=CONTEXT, return_tensors="pt")["input_ids"]
            predicted.append(int(classifier(ids).logits.argmax()))
    true = [label for _, label in held_out]
    return {"model": folder / "lines", "data": folder / "lines.jsonl", "predicted": predicted, "labels": true}


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def values(report: EvaluationReport) -> dict[tuple[str, str, str], float]:
    return {(row.model, row.dataset, row.metric): row.value for row in report.rows}


# --- perplexity ---------------------------------------------------------------------------------------------------


def test_one_window_matches_the_loss_of_transformers(model, tokenizer):
    text = CODE[-6000:-5900]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert 10 < ids.shape[1] <= CONTEXT
    found = perplexity(model, tokenizer, [text])
    assert found.loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.tokens == ids.shape[1] - 1
    assert found.bytes == len(text.encode())
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / found.bytes)


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (16, 5), (16, 15), (16, 1), (7, 3), (2, 1), (64, 63)])
def test_every_token_but_the_first_is_scored_once_with_the_longest_context_its_window_gives(
    model, tokenizer, max_length, stride
):
    text = PROSE[-500:]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    length = max_length or CONTEXT
    step = stride or length // 2
    total, logits = 0.0, {}
    with torch.no_grad():
        for position in range(1, len(ids)):
            # Start of the first window that holds this position.
            begin = 0 if position < length else step * math.ceil((position - length + 1) / step)
            if begin not in logits:
                logits[begin] = model(ids[None, begin : begin + length]).logits[0].double().log_softmax(-1)
            total -= logits[begin][position - begin - 1, ids[position]].item()
    found = perplexity(model, tokenizer, [text], max_length=max_length, stride=stride)
    assert found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_batch_size_and_padding_do_not_change_the_result(model, tokenizer):
    texts = [PROSE[:900], "a", "Return the", CODE[:333], "x = 1\n", PROSE[-50:]]
    alone = [perplexity(model, tokenizer, [text], batch_size=1) for text in texts]
    tokens = sum(found.tokens for found in alone)
    expected = sum(found.loss * found.tokens for found in alone) / tokens
    for batch_size in (1, 3, 8, 64):
        found = perplexity(model, tokenizer, iter(texts), batch_size=batch_size)
        assert found.tokens == tokens
        assert found.loss == pytest.approx(expected, abs=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer):
    uniform = make_language_model()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    found = perplexity(uniform, tokenizer, [PROSE[:500]])
    assert found.perplexity == pytest.approx(WORDS, rel=1e-5)


def test_bytes_leave_out_a_first_token_that_is_not_scored():
    plain = make_tokenizer(WORDS, bos=False)
    text = "Überall return the value"
    first = plain.decode(plain(text)["input_ids"][:1])
    found = perplexity(make_language_model(), plain, [text])
    assert first == "\ufffd" or len(first.encode()) >= 1
    assert found.bytes == len(text.encode()) - 1  # the vocabulary splits the two-byte capital letter
    assert found.tokens == len(plain(text)["input_ids"]) - 1


def test_logits_changed_after_the_head_are_taken_as_the_model_gives_them(tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma2Config(
        vocab_size=WORDS, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, **sizes, pad_token_id=2
    )
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(capped.model.embed_tokens.weight)  # tied to the head: logits large enough to be capped
    text = PROSE[:100]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = capped(input_ids=ids, labels=ids).loss.item()
        capped.config.final_logit_softcapping = None
        assert abs(capped(input_ids=ids, labels=ids).loss.item() - expected) > 1e-3
        capped.config.final_logit_softcapping = 0.5
    assert perplexity(capped, tokenizer, [text], max_length=64).loss == pytest.approx(expected, abs=1e-5)


def test_logits_of_a_whole_batch_are_never_made(model, tokenizer, monkeypatch):
    monkeypatch.setattr("hf_fuse.perplexity.LOGIT_BYTES", 5 * WORDS * 4)
    widest = 0

    def watch(_module, _inputs, output):
        nonlocal widest
        widest = max(widest, output.numel())

    expected = perplexity(model, tokenizer, [PROSE[:3000]], batch_size=4)
    handle = model.lm_head.register_forward_hook(watch)
    try:
        found = perplexity(model, tokenizer, [PROSE[:3000]], batch_size=4)
    finally:
        handle.remove()
    assert widest <= 5 * WORDS
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)


def test_the_model_is_left_as_it_was(model, tokenizer):
    hooks = len(model.lm_head._forward_pre_hooks)
    model.train()
    perplexity(model, tokenizer, ["some text"])
    assert model.training
    model.eval()
    assert len(model.lm_head._forward_pre_hooks) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["fine", ""], {}, "text 1 .* is empty"),
        ([], {}, "nothing to score in 0 text"),
        (["fine"], {"max_length": CONTEXT + 1}, "has 64 positions. Pass at most 64"),
        (["fine"], {"max_length": 1}, "at least 2"),
        (["fine"], {"max_length": 16, "stride": 16}, "expected 1 to 15"),
        (["fine"], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_perplexity_refuses_what_cannot_be_scored(model, tokenizer, texts, options, message):
    with pytest.raises(FuseError, match=message):
        perplexity(model, tokenizer, texts, **options)


def test_a_tokenizer_of_another_model_is_named(tokenizer):
    with pytest.raises(FuseError, match="embeds ids below 20 only"):
        perplexity(make_language_model(20), tokenizer, [CODE[:200]])


# --- shipped metrics ----------------------------------------------------------------------------------------------


def test_shipped_metrics_agree_with_scikit_learn(monkeypatch):
    import evaluate
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    def no_network(*args, **kwargs):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    accuracy, f1 = (evaluate.load(str(METRICS / name), keep_in_memory=True) for name in ("accuracy", "f1"))
    random = np.random.default_rng(0)
    # Class 4 is never predicted, class 5 and 7 never true.
    true, predicted = random.choice([0, 1, 2, 3, 4], 200), random.choice([0, 1, 2, 3, 5, 7], 200)
    weight = random.random(200)
    found = accuracy.compute(predictions=predicted, references=true)["accuracy"]
    assert found == pytest.approx(accuracy_score(true, predicted))
    assert accuracy.compute(predictions=predicted, references=true, normalize=False)["accuracy"] == (
        accuracy_score(true, predicted, normalize=False)
    )
    for average in ("macro", "micro", "weighted", None):
        for options in ({}, {"sample_weight": weight}, {"labels": [1, 3, 4, 9]}):
            found = f1.compute(predictions=predicted, references=true, average=average, **options)["f1"]
            assert found == pytest.approx(f1_score(true, predicted, average=average, zero_division=0, **options))
    binary = f1.compute(predictions=predicted % 2, references=true % 2, pos_label=0)["f1"]
    assert binary == pytest.approx(f1_score(true % 2, predicted % 2, pos_label=0))
    with pytest.raises(ValueError, match="at most two classes"):
        f1.compute(predictions=predicted, references=true)


# --- several models -----------------------------------------------------------------------------------------------


def test_each_expert_wins_its_own_text(language_models, model, tokenizer):
    files = [language_models["code.txt"], language_models["prose.txt"]]
    report = evaluate_models([language_models["code"], str(language_models["prose"])], texts=files)
    found = values(report)
    assert found["code", "code.txt", "perplexity"] < found["prose", "code.txt", "perplexity"]
    assert found["prose", "prose.txt", "perplexity"] < found["code", "prose.txt", "perplexity"]
    own = perplexity(model, tokenizer, [CODE[-6000:]])
    assert found["code", "code.txt", "perplexity"] == pytest.approx(own.perplexity, rel=1e-5)
    assert found["code", "code.txt", "bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-5)
    assert [row.n for row in report.rows if row.dataset == "code.txt"][:2] == [own.tokens, own.bytes]
    assert json.loads(report.to_json())["rows"] == report.to_dict()["rows"]


def test_models_are_loaded_one_at_a_time_and_freed(language_models, monkeypatch):
    import hf_fuse.evaluation as evaluation

    alive, counts, original = weakref.WeakSet(), [], evaluation.loaded

    def counting(*args, **kwargs):
        model = original(*args, **kwargs)
        alive.add(model)
        counts.append(len(alive))
        return model

    monkeypatch.setattr(evaluation, "loaded", counting)
    evaluate_models([language_models["code"], language_models["prose"]], texts=[language_models["code.txt"]])
    assert counts == [1, 1]
    assert len(alive) == 0


def test_a_column_of_a_dataset_leaves_out_blank_rows(language_models, tmp_path):
    texts = ["def one():", "", "   \n", "    return 1", None]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        from datasets import Dataset

        rows, file = Dataset.from_dict({"content": texts}), tmp_path / name
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[file.suffix[1:]](file)
        report = evaluate_models([language_models["code"]], dataset=str(file), text_column="content")
        assert [(row.dataset, row.metric) for row in report.rows] == [(name, "perplexity"), (name, "bits_per_byte")]
        assert report.rows[1].n == len("def one():" + "    return 1")
    limited = evaluate_models([language_models["code"]], dataset=str(file), text_column="content", limit=1)
    assert limited.rows[1].n == len("def one():")


def test_splits_of_a_folder_and_of_a_saved_dataset(language_models, tmp_path):
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({name: Dataset.from_dict({"text": [name * 5]}) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "saved")
    for name, rows in splits.items():
        rows.to_json(tmp_path / "folder" / f"{name}.jsonl")
    for folder in ("saved", "folder"):
        report = evaluate_models([language_models["code"]], dataset=tmp_path / folder, split="train")
        assert (report.rows[1].dataset, report.rows[1].n) == (folder, len("train" * 5))
        with pytest.raises(FuseError, match="has no split 'validation'. It has .*'test'"):
            evaluate_models([language_models["code"]], dataset=tmp_path / folder, split="validation")


def test_live_models_and_adapters(language_models, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(language_models["code"])
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    file = language_models["prose.txt"]
    report = evaluate_models(
        [adapted, tmp_path / "adapter", language_models["code"]], texts=[file], tokenizer=tokenizer
    )
    live, stored, plain = (row.value for row in report.rows if row.metric == "perplexity")
    assert live == pytest.approx(stored, rel=1e-5)
    assert abs(live - plain) > 0.1
    assert set(report.folders) == {"adapter", "code"}
    assert [row.model for row in report.rows[::2]] == ["code #2", "adapter", "code"]


def test_a_model_on_the_hub_is_fetched_and_named_by_its_id(language_models, hub, hub_cache, repo_id):
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=language_models["code"])
    report = evaluate_models([repo_id, language_models["code"]], texts=[language_models["code.txt"]])
    remote, local = (row for row in report.rows if row.metric == "perplexity")
    assert remote.model == repo_id
    assert remote.value == local.value
    assert list(report.folders) == ["code"]


# --- classifiers --------------------------------------------------------------------------------------------------


def test_digits_match_scikit_learn(digits):
    from sklearn.metrics import accuracy_score, f1_score

    predicted = digits["logits"].argmax(-1).numpy()
    expected = accuracy_score(digits["labels"], predicted)
    assert expected > 0.3  # the comparison means something
    for batch_size in (7, 64):
        report = evaluate_models([digits["model"]], dataset=digits["data"], label_column="label", batch_size=batch_size)
        accuracy, macro = report.rows
        assert (accuracy.metric, macro.metric, accuracy.task) == ("accuracy", "macro_f1", "image-classification")
        assert accuracy.value == pytest.approx(expected)
        assert macro.value == pytest.approx(f1_score(digits["labels"], predicted, average="macro"))
        assert accuracy.n == len(predicted)


def test_lines_match_predictions_made_one_by_one(line_classifier):
    from sklearn.metrics import accuracy_score, f1_score

    true, predicted = line_classifier["labels"], line_classifier["predicted"]
    assert accuracy_score(true, predicted) > 0.6
    report = evaluate_models([line_classifier["model"]], dataset=line_classifier["data"], label_column="label")
    assert report.rows[0].value == pytest.approx(accuracy_score(true, predicted))
    assert report.rows[1].value == pytest.approx(f1_score(true, predicted, average="macro"))
    assert report.rows[0].task == "text-classification"


def test_class_names_decide_over_numbers(line_classifier, tmp_path):
    """A dataset that numbers the same classes the other way round, and one that holds names."""
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [json.loads(line) for line in line_classifier["data"].read_text().splitlines()]
    expected = (
        evaluate_models([line_classifier["model"]], dataset=line_classifier["data"], label_column="label").rows[0].value
    )
    swapped = Dataset.from_dict(
        {"text": [row["text"] for row in rows], "label": [1 - row["label"] for row in rows]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["prose", "code"])}),
    )
    swapped.save_to_disk(tmp_path / "swapped")
    named = write_rows(
        tmp_path / "named.jsonl", [{"text": row["text"], "label": ["Code", "prose"][row["label"]]} for row in rows]
    )
    for data in (tmp_path / "swapped", named):
        report = evaluate_models([line_classifier["model"]], dataset=data, label_column="label")
        assert report.rows[0].value == expected


def test_class_ids_of_datasets_that_name_their_classes():
    config = types.SimpleNamespace(num_labels=12, label2id={f"LABEL_{index}": index for index in range(12)})

    def ids(names: list[str], labels: list[int], config=config) -> list[int]:
        return class_ids(LabelledSet("data", "image", [], labels, names, "label"), config, "model")

    assert ids(["0", "10", "2"], [0, 1, 2, 1]) == [0, 10, 2, 10]
    assert ids([f"label_{index}" for index in range(11, -1, -1)], [0, 11]) == [11, 0]
    assert ids(list("abcdefghijkl"), [3, 5]) == [3, 5]
    with pytest.raises(FuseError, match="has 12 classes .*'LABEL_0'.* has 2 under other names .'cat', 'dog'"):
        ids(["cat", "dog"], [0, 1])
    with pytest.raises(FuseError, match="has 12 classes"):
        ids(["0", "12"], [0, 1])


def test_damaged_weights_show_as_not_finite(digits, language_models, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    broken = AutoModelForImageClassification.from_pretrained(digits["model"])
    with torch.no_grad():
        broken.classifier.weight[3] = math.nan
    report = evaluate_models([broken], dataset=digits["data"], label_column="label", limit=8)
    assert all(math.isnan(row.value) for row in report.rows)
    broken = AutoModelForCausalLM.from_pretrained(language_models["code"])
    with torch.no_grad():
        broken.model.norm.weight[:] = math.nan
    report = evaluate_models([broken], texts=[language_models["code.txt"]], tokenizer=tokenizer)
    assert report.to_dict()["rows"][0]["value"] is None
    assert "NaN" not in report.to_json()
    assert "not finite" in printed(report)
    with pytest.raises(FuseError, match="nothing to draw"):
        report.chart(tmp_path / "chart.png")


# --- lm-eval tasks ------------------------------------------------------------------------------------------------


def test_tasks_without_the_harness_name_the_extra(language_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(FuseError, match=r'pip install "hf-fuse\[eval\]"'):
        evaluate_models([language_models["code"]], tasks=["arc_easy"])


def test_scores_are_read_from_what_the_harness_returns(language_models, tokenizer, monkeypatch):
    """The harness's own result layout, for a group that it aggregates, a member of it and a task with a filter."""
    asked = {}

    def simple_evaluate(wrapped, **options):
        asked.update(options, model=wrapped)
        member = {"alias": "part", "acc,none": 0.25, "acc_stderr,none": 0.1}
        group = {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": "N/A"}
        maths = {"exact_match,strict": 0.75, "exact_match_stderr,strict": 0.125, "word_perplexity,none": 9.0}
        return {
            "results": {"part": member, "whole": group, "maths": maths},
            "groups": {"whole": group},
            "group_subtasks": {"whole": ["part"]},
            "higher_is_better": {"maths": {"exact_match": True}, "whole": {"acc": True}},
            "n-samples": {"part": {"original": 40, "effective": 4}, "maths": {"original": 50, "effective": 5}},
        }

    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda include_path=None: types.SimpleNamespace(all_tasks=["part", "whole", "maths"])
    huggingface = types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **options: options
    package = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    for module in (package, tasks, types.ModuleType("lm_eval.models"), huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    report = evaluate_models([language_models["code"]], tasks=["whole", "maths"], limit=5, batch_size=3)
    found = {(row.dataset, row.metric): (row.value, row.n, row.higher_is_better, row.stderr) for row in report.rows}
    assert found == {
        ("maths", "exact_match (strict)"): (0.75, 5, True, 0.125),
        ("maths", "word_perplexity"): (9.0, 5, False, None),
        ("whole", "acc"): (0.5, 4, True, None),
    }
    assert (asked["tasks"], asked["limit"], asked["model"]["batch_size"]) == (["whole", "maths"], 5, 3)
    with pytest.raises(FuseError, match="'hole': unknown .* Did you mean whole"):
        evaluate_models([language_models["code"]], tasks=["hole"])


def test_a_real_task_file(language_models, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    rows = [{"text": f"def method_{index}(self):\n    ", "label": int(index % 4 == 0)} for index in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "choice.yaml").write_text(
        "task: fuse_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: ['return self', 'zxqj vkw']\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    report = evaluate_models([language_models["code"]], tasks=[str(tmp_path / "choice.yaml")], limit=8)
    (row,) = report.rows
    assert (row.dataset, row.metric, row.n, row.higher_is_better) == ("fuse_choice", "acc", 8, True)
    assert row.value == pytest.approx(0.75)  # "return self" is likelier every time


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_mistakes_are_found_before_any_model_is_loaded(language_models, line_classifier, digits, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hf_fuse.evaluation.loaded", never)
    code, text = language_models["code"], language_models["code.txt"]
    lines, data = line_classifier["model"], line_classifier["data"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "odd.xyz").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    three = write_rows(tmp_path / "three.jsonl", [{"text": "a", "label": label} for label in (0, 2, 1)])
    hidden = write_rows(tmp_path / "hidden.jsonl", [{"text": "a", "label": -1}])
    words = write_rows(tmp_path / "words.jsonl", [{"text": "a", "label": "poetry"}])
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": 1, "label": 0.5}])
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": " "}])
    damaged = tmp_path / "damaged"
    shutil.copytree(code, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    headless = tmp_path / "headless"
    shutil.copytree(code, headless)
    for file in headless.glob("token*"):
        file.unlink()
    mistakes = [
        (([],), {"texts": [text]}, "no model"),
        (([code],), {}, "nothing to evaluate on"),
        (([code],), {"texts": str(text)}, "expected a list"),
        (([code],), {"texts": [tmp_path / "none.txt"]}, "none.txt: no such text file"),
        (([code],), {"texts": [tmp_path]}, "is a folder"),
        (([code],), {"texts": [tmp_path / "empty.txt"]}, "holds no text"),
        (([code],), {"texts": [tmp_path / "latin.txt"]}, "not UTF-8 text .byte 3."),
        (([code],), {"texts": [text, text]}, "given twice as a text"),
        (([code, code],), {"texts": [text]}, "given twice as a model"),
        (([tmp_path / "none"],), {"texts": [text]}, "no such folder"),
        (([damaged],), {"texts": [text]}, "model.safetensors"),
        (([headless],), {"texts": [text]}, "tokenizer cannot be loaded"),
        (([make_language_model()],), {"texts": [text]}, "Pass its tokenizer"),
        (([code],), {"texts": [text], "max_length": 4096}, "has 64 positions"),
        (([code],), {"texts": [text], "limit": 0}, "limit is 0"),
        (([code],), {"texts": [text], "device": "cuda:99"}, "device 'cuda:99': cannot be used"),
        (([code],), {"texts": [text], "dtype": "int8"}, "dtype 'int8': expected"),
        (([code],), {"texts": [text], "label_column": "label"}, "no dataset is given"),
        (([code],), {"texts": [text], "dataset": data, "label_column": "label"}, "classifiers, which have no"),
        (([code],), {"dataset": data, "label_column": "label"}, "is LlamaForCausalLM, not a text classifier"),
        (([lines],), {"texts": [text]}, "is LlamaForSequenceClassification, not a causal language model"),
        (([code],), {"dataset": data, "text_column": "body"}, "no text column 'body'. Its columns are 'text', 'label'"),
        (([lines],), {"dataset": data, "label_column": "y"}, "no label column 'y'. Its columns are 'text', 'label'"),
        (([lines],), {"dataset": data, "label_column": "text"}, "no class"),
        (([lines],), {"dataset": three, "label_column": "label"}, "has 2 classes .ids 0 to 1.* holds 2"),
        (([lines],), {"dataset": hidden, "label_column": "label"}, "rows without a label"),
        (([lines],), {"dataset": words, "label_column": "label"}, "no class 'poetry'.*'code', 'prose'"),
        (([lines],), {"dataset": numbers, "label_column": "label"}, "'text' holds int64, expected text"),
        (([lines],), {"dataset": numbers, "text_column": "label"}, "expected text"),
        (([code],), {"dataset": blank}, "all 1 rows are blank"),
        (([code],), {"dataset": tmp_path / "odd.xyz"}, "unknown kind of dataset file"),
        (([code],), {"dataset": tmp_path / "bad.jsonl"}, "bad.jsonl: cannot be loaded"),
        (([code],), {"dataset": "./nowhere/at/all"}, "no such file or folder"),
        (([code],), {"dataset": "lab/nothing-here"}, "lab/nothing-here: cannot be loaded as a dataset"),
        (([code],), {"dataset": data, "subset": "fr"}, "has no subset 'fr'"),
        (([digits["model"]],), {"dataset": data, "label_column": "label"}, "not a text classifier"),
    ]
    for arguments, options, message in mistakes:
        with pytest.raises(FuseError, match=message) as caught:
            evaluate_models(*arguments, **options)
        assert "\n" not in str(caught.value), caught.value


def test_a_checkpoint_without_its_head_is_not_evaluated_with_a_random_one(line_classifier, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(line_classifier["model"], tmp_path / "headless")
    weights = tmp_path / "headless" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if name != "score.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(FuseError, match=r"lacks 1 weight.* 'score.weight'"):
        evaluate_models([tmp_path / "headless"], dataset=line_classifier["data"], label_column="label")


# --- report -------------------------------------------------------------------------------------------------------


def printed(report: EvaluationReport, width: int = 120) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    report.print(console)
    return console.file.getvalue()


def rows_of(*figures: tuple) -> EvaluationReport:
    return EvaluationReport([EvaluationRow(*figure) for figure in figures])


def test_the_table_marks_the_best_of_each_column():
    report = rows_of(
        ("a", "x.txt", "perplexity", 12.0, 100, False),
        ("a", "x.txt", "bits_per_byte", 1.5, 300, False),
        ("a", "task", "acc", 0.5, 40, True),
        ("b", "x.txt", "perplexity", 8.0, 100, False),
        ("b", "x.txt", "bits_per_byte", 1.25, 300, False),
        ("b", "task", "acc", 0.25, 40, True),
    )
    table = printed(report)
    assert "\x1b[1;32m" in table
    bold = [part.split("\x1b")[0].strip() for part in table.split("\x1b[1;32m")[1:]]
    assert bold == ["0.5000", "8.000"]
    assert "bits per byte" not in table
    assert "perplexity ↓" in table
    assert "acc ↑" in table
    narrow = printed(report, width=30)
    assert "8.000" in narrow


def test_different_tokenizers_are_compared_by_bits_per_byte(tmp_path):
    report = rows_of(
        ("a", "x.txt", "perplexity", 12.0, 100, False),
        ("a", "x.txt", "bits_per_byte", 1.5, 300, False),
        ("b", "x.txt", "perplexity", 8.0, 120, False),
        ("b", "x.txt", "bits_per_byte", 1.75, 300, False),
    )
    table = printed(report)
    assert [part.split("\x1b")[0].strip() for part in table.split("\x1b[1;32m")[1:]] == ["1.500"]
    assert "compare bits per byte" in table
    assert set(report._charts()) == {"bits per byte"}


def test_charts_of_different_scales_go_to_different_files(tmp_path):
    report = rows_of(
        ("a", "x.txt", "perplexity", 12.0, 100, False),
        ("a", "arc", "acc", 0.5, 40, True),
        ("a", "mmlu", "acc", 0.4, 40, True),
        ("b", "x.txt", "perplexity", 8.0, 100, False),
        ("b", "arc", "acc", 0.25, 40, True),
        ("b", "mmlu", "acc", 0.3, 40, True),
    )
    files = report.chart(tmp_path / "chart.png")
    assert [file.name for file in files] == ["chart.png", "chart-acc.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_cards_of_local_models_carry_the_figures(tmp_path):
    import yaml

    (tmp_path / "carded").mkdir()
    (tmp_path / "carded" / "README.md").write_text("---\nlicense: mit\n---\n\n# Carded\n\nWords.\n")
    (tmp_path / "bare").mkdir()
    report = EvaluationReport(
        [
            EvaluationRow("carded", "org/data:en", "perplexity", 12.5, 100, False),
            EvaluationRow("carded", "x.txt", "perplexity", 7.5, 100, False),
            EvaluationRow("bare", "x.txt", "perplexity", 6.5, 100, False),
            EvaluationRow("bare", "x.txt", "broken", math.nan, 100, False),
            EvaluationRow("org/remote", "x.txt", "perplexity", 6.0, 100, False),
        ],
        {"carded": tmp_path / "carded", "bare": tmp_path / "bare"},
        {"dataset": "org/data", "subset": "en", "split": "test"},
    )
    for _ in range(2):  # writing again replaces the figures
        assert report.write_card() == [tmp_path / "carded" / "README.md", tmp_path / "bare" / "README.md"]
    text = (tmp_path / "carded" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "mit"
    assert "Words." in text
    results = {result["dataset"]["type"]: result for result in metadata["model-index"][0]["results"]}
    assert results["org/data"]["dataset"]["config"] == "en"
    assert results["org/data"]["metrics"] == [{"type": "perplexity", "value": 12.5}]
    assert results["x.txt"]["metrics"] == [{"type": "perplexity", "value": 7.5}]
    bare = yaml.safe_load((tmp_path / "bare" / "README.md").read_text().split("---")[1])
    assert [result["metrics"] for result in bare["model-index"][0]["results"]] == [
        [{"type": "perplexity", "value": 6.5}]
    ]
    with pytest.raises(FuseError, match="none of the evaluated models is a local folder"):
        EvaluationReport(report.rows).write_card()
