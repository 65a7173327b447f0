"""What FuseTrainer gathers for losses: features, second views, sample ids, heads and tables of their own."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from training_cases import DECODER, ENCODER, bert, classes_data, make_trainer, train

from hf_fuse import FuseConfig, FuseTrainer
from hf_fuse.errors import FuseError
from hf_fuse.losses._sample_table import SampleTable
from hf_fuse.model_features import classifier_inputs, classifier_of, sample_features

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ROWS = [{name: row[name] for name in ("input_ids", "labels")} for row in classes_data()]


def assert_same(run, other, tolerance=2e-5):
    for entry, expected in zip(run[0], other[0], strict=True):
        assert entry == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for name, value in run[1].items():
        assert (value - other[1][name]).abs().max() < tolerance / 10, name


# ---- features


def test_features_of_a_classifier_are_what_its_last_layer_takes():
    model = bert().eval()
    inputs = {"input_ids": torch.randint(3, 30, (4, 6))}
    with classifier_inputs(model) as seen:
        outputs = model(**inputs)
    features = sample_features(model, inputs, outputs, seen)
    assert torch.allclose(model.classifier(features), outputs.logits)
    assert not model.classifier._forward_pre_hooks


def test_features_of_a_decoder_are_those_of_its_last_token():
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_labels=3)).eval()
    ids = torch.randint(3, 30, (3, 6))
    ids[1, 4:], ids[2, :2] = 0, 0  # padded behind and in front
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with classifier_inputs(model) as seen:
        outputs = model(**inputs)
    features = sample_features(model, inputs, outputs, seen)
    assert features.shape == (3, 16)
    assert torch.allclose(model.score(features), outputs.logits, atol=1e-6)


def test_features_without_a_classifier_are_means_over_the_mask():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**ENCODER)).eval()
    inputs = {"input_ids": torch.randint(3, 30, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with classifier_inputs(model) as seen:
        outputs = model(**inputs)
    features = sample_features(model, inputs, outputs, seen)
    assert not seen
    assert torch.allclose(features[1], outputs.last_hidden_state[1, :4].mean(0), atol=1e-6)
    assert torch.allclose(features[0], outputs.last_hidden_state[0].mean(0), atol=1e-6)


def test_the_layer_that_an_adapter_trains_is_the_classifier():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    assert classifier_of(model.get_base_model()).weight.requires_grad
    assert classifier_of(transformers.BertForTokenClassification(transformers.BertConfig(**ENCODER))) is None


def test_features_of_both_views_and_their_samples(tmp_path, third_party):
    seen = []

    def views(features_ND, second_features_ND, labels_N, sample_ids):
        seen.append((features_ND.shape, second_features_ND.shape, sample_ids.tolist()))
        assert not torch.equal(features_ND, second_features_ND)
        return (features_ND - second_features_ND).square().mean()

    third_party(views)
    rows = [row | {"labels": -100 if index == 2 else row["labels"]} for index, row in enumerate(ROWS)]
    changes = {"model": lambda: bert(hidden_dropout_prob=0.2), "objectives": {"views": 1.0}, "data": lambda: rows}
    logs, _ = train(make_trainer("classes", tmp_path, 4, 1, max_steps=2, **changes))
    # The third sample has no label.
    assert seen == [((3, 16), (3, 16), [0, 1, 3]), ((4, 16), (4, 16), [4, 5, 6, 7])]
    assert logs[0]["views"] > 1e-4
    assert "eval_views" not in logs[-1]


# ---- sample ids


@pytest.mark.parametrize("kind", ["rows", "dataset", "own"])
def test_sample_ids_are_places_in_the_training_set(kind, tmp_path, third_party):
    seen = []

    def remember(logits_NC, labels_N, sample_ids):
        seen.extend(zip(sample_ids.tolist(), labels_N.tolist()))
        return logits_NC.sum() * 0

    def data():
        rows = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"]} for row in ROWS]
        if kind == "own":
            rows = [row | {"sample_ids": 100 + index} for index, row in enumerate(rows)]
        return rows if kind == "rows" else Dataset.from_list(rows)

    third_party(remember)
    # A collator that knows only what models take.
    changes = {"objectives": {"remember": 1}, "data": data, "data_collator": _strict}
    train(make_trainer("classes", tmp_path, 8, 1, train_sampling_strategy="random", max_steps=4, **changes))
    seen = seen[:32]
    first = 100 if kind == "own" else 0
    assert sorted(seen) == [(first + index, row["labels"]) for index, row in enumerate(ROWS)]
    assert [index for index, _ in seen] != list(range(first, first + 32))


def _strict(rows):
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    return {name: torch.as_tensor([torch.as_tensor(row[name]).tolist() for row in rows]) for name in rows[0]}


def test_a_stream_has_no_sample_ids(tmp_path, third_party):
    def remember(logits_NC, labels_N, sample_ids):
        return logits_NC.sum() * 0

    third_party(remember)
    stream = Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"]} for row in ROWS]
    ).to_iterable_dataset()
    trainer = make_trainer("classes", tmp_path, 8, 1, objectives={"remember": 1})
    trainer.train_dataset = stream
    with pytest.raises(FuseError, match="training set is a stream.*Add a column sample_ids"):
        train(trainer)


# ---- heads of objectives


class ranks(nn.Module):
    """A loss with a head: it predicts the label as a number from the features."""

    def prepare(self, model, train_dataset):
        self.head = nn.Linear(model.config.hidden_size, 1)

    def forward(self, features_ND, labels_N):
        return (self.head(features_ND).squeeze(-1) - labels_N).square().mean()


def test_a_head_learns_with_the_model_and_is_saved_beside_it(tmp_path, third_party):
    third_party(ranks)
    settings = {"objectives": {"ranks": 1.0}, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make_trainer("classes", tmp_path, 8, 1, **settings)
    head = trainer.objectives[0].loss.head
    start = head.weight.detach().clone()
    whole = train(trainer)
    assert (head.weight - start).abs().max() > 0.01
    small = make_trainer("classes", tmp_path / "small", 1, 8, **settings)
    assert torch.equal(small.objectives[0].loss.head.weight, start)
    assert_same(train(small), whole)
    assert torch.allclose(small.objectives[0].loss.head.weight, head.weight, atol=1e-6)

    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == bert().state_dict().keys()
    resumed = make_trainer("classes", tmp_path, 8, 1, **settings)
    assert_same(train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole, tolerance=1e-6)
    assert torch.equal(resumed.objectives[0].loss.head.weight, head.weight)


def test_a_step_of_a_head_is_its_gradient(tmp_path, third_party):
    """Gradients of former steps would show, since the Trainer resets those of the model alone."""
    third_party(ranks)
    trainer = make_trainer("classes", tmp_path, 8, 1, objectives={"ranks": 1.0, "task": 0}, max_steps=2)
    head, twin = trainer.objectives[0].loss.head, ranks()
    twin.head = nn.Linear(16, 1)
    twin.head.load_state_dict(head.state_dict())
    train(trainer)
    model = bert()
    model.train()
    optimizer = torch.optim.SGD([*model.parameters(), *twin.parameters()], lr=0.1)
    for step in range(2):
        rows = ROWS[8 * step : 8 * step + 8]
        inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
        with classifier_inputs(model) as seen:
            model(**inputs)
        optimizer.zero_grad()
        twin(seen[-1], torch.tensor([row["labels"] for row in rows])).backward()
        optimizer.step()
    assert torch.allclose(twin.head.weight, head.weight, atol=1e-6)


# ---- tables


def test_a_table_knows_what_was_written():
    table = SampleTable(4, 2)
    table.write(torch.tensor([2, 0]), torch.tensor([[1.0, 2], [3, 4]]))
    rows, written = table.read(torch.tensor([0, 1, 2]))
    assert rows.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert written.tolist() == [True, False, True]
    assert table.state_dict().keys() == {"values", "written"}
    with pytest.raises(FuseError, match="sample_ids are from 1 to 4, but the training set has 4 samples"):
        table.read(torch.tensor([1, 4]))


def test_no_labels_are_needed_where_the_task_counts_for_nothing(tmp_path, third_party):
    def apart(features_ND, second_features_ND):
        return (features_ND - second_features_ND).square().mean()

    third_party(apart)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**ENCODER))
    args = FuseConfig(str(tmp_path), objectives={"task": 0, "apart": 1.0}, use_cpu=True, report_to="none", max_steps=2,
                      logging_steps=1, save_strategy="no", disable_tqdm=True)  # fmt: skip
    data = [{"input_ids": row["input_ids"]} for row in ROWS]
    logs, _ = train_only(FuseTrainer(model, args, train_dataset=data))
    assert logs[0]["apart"] == pytest.approx(logs[0]["loss"])
    assert logs[0]["apart"] > 0


def train_only(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer.model


def test_padding_is_no_part_of_features(tmp_path, third_party):
    def length(features_ND):
        return features_ND.square().mean()

    third_party(length)
    changes = {"objectives": {"length": 1.0}, "max_steps": 1}
    whole = train(make_trainer("language", tmp_path, 8, 1, **changes))
    assert_same(train(make_trainer("language", tmp_path, 1, 8, **changes)), whole)
