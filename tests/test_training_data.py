"""Training data: formats told from columns, labels only where something is to be learnt, and packing that changes none
of it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaConfig

from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model
from hf_fuse.errors import FuseError
from hf_fuse.training_data import TrainingData, encode, encode_images, read_rows, set_classes
from hf_fuse.training_encoding import collate_tokens, packed
from hf_fuse.training_recipe import DataEntry

CONTEXT = 256
CHAT = [
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "A wren."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "A kite."},
]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] + '#' }}"
    "{% endgeneration %}{% else %}U: {{ m['content'] + '#' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As in templates that drop the reasoning of earlier turns.
FORGETFUL = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else '...' }}#{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(CONTEXT)


@pytest.fixture(scope="module")
def model(tokenizer):
    return new_model(ModelSize(hidden=16, feed_forward=24, layers=2, heads=2, context=CONTEXT), tokenizer, 0).eval()


def rows_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / name)


def encoded(tokenizer, **entry) -> TrainingData:
    entry = DataEntry(**entry)
    return encode(read_rows(entry), entry, tokenizer, LlamaConfig(max_position_embeddings=CONTEXT))


def learnt(tokenizer, row: dict) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# Formats and files


def test_every_kind_of_file_gives_the_same_rows(tmp_path, tokenizer):
    texts = ["one wren", "two kites", "three owls"]
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.to_json(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    rows.to_csv(tmp_path / "c.csv")
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "several")
    wanted = [tokenizer(text + "<|endoftext|>")["input_ids"] for text in texts]
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "saved", "several"):
        made = encoded(tokenizer, train=str(tmp_path / name))
        assert made.format == "text" and list(made.train["input_ids"]) == wanted, name
    test_split = encoded(tokenizer, train={"path": str(tmp_path / "several"), "split": "test"})
    assert list(test_split.train["input_ids"]) == wanted[:1]
    both = encoded(tokenizer, train=[str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "c.csv"), "limit": 2}])
    assert len(both.train) == 5 and both.facts["tokens"] == sum(map(len, wanted)) + sum(map(len, wanted[:2]))


def test_a_long_text_is_cut_into_pieces_and_nothing_is_lost(tmp_path, tokenizer):
    text = "".join(f"line {number}\n" for number in range(40))
    (tmp_path / "book.txt").write_text(text)
    made = encoded(tokenizer, train=str(tmp_path / "book.txt"), max_length=50)
    ids = [token for row in made.train for token in row["input_ids"]]
    assert ids == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert {len(row["input_ids"]) for row in made.train} == {50, len(ids) % 50}
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in made.train)
    assert made.notes == []


def test_only_the_completion_is_learnt(tmp_path, tokenizer):
    data = rows_file(tmp_path, [{"question": "2 + 2 =", "answer": " 4", "prompt": "unused"}])
    source = {"path": data, "columns": {"prompt": "question", "completion": "answer"}}
    row = encoded(tokenizer, train=source).train[0]
    assert tokenizer.decode(row["input_ids"]) == "<|endoftext|>2 + 2 = 4<|endoftext|>"
    assert learnt(tokenizer, row) == " 4<|endoftext|>"


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_what_the_assistant_says_is_learnt(tmp_path, tokenizer, template):
    data = rows_file(tmp_path, [{"messages": CHAT}])
    row = encoded(tokenizer, train=data, chat_template=template).train[0]
    assert tokenizer.decode(row["input_ids"]) == "U: Name a bird.#A: A wren.#U: Another?#A: A kite.#"
    assert learnt(tokenizer, row) == "A wren.#A kite.#"
    everything = encoded(tokenizer, train=data, chat_template=template, train_on="all").train[0]
    assert everything["labels"] == [-100, *row["input_ids"][1:]]
    pair = rows_file(tmp_path, [{"prompt": CHAT[:3], "completion": CHAT[3:]}], "pair.jsonl")
    assert learnt(tokenizer, encoded(tokenizer, train=pair, chat_template=template).train[0]) == "A kite.#"


def test_a_named_template_and_its_unknown_markers(tmp_path, tokenizer):
    made = encoded(tokenizer, train=rows_file(tmp_path, [{"messages": CHAT}]), chat_template="chatml")
    assert learnt(tokenizer, made.train[0]) == "A wren.<|im_end|>\nA kite.<|im_end|>\n"
    assert "<|im_end|>, <|im_start|> are no token of this tokenizer" in made.notes[0]


def test_rows_cut_off_or_without_anything_to_learn_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": "p" * 5, "completion": "c" * n} for n in (3, 40)] + [{"prompt": "p" * 60, "completion": "c"}]
    made = encoded(tokenizer, train=rows_file(tmp_path, rows), max_length=30)
    assert [len(row["input_ids"]) for row in made.train] == [10, 30]
    assert made.notes == [
        "rows.jsonl: 1 of 3 rows were cut off at max_length.",
        "rows.jsonl: 1 of 3 rows have nothing to train on within max_length.",
    ]


def test_evaluation_rows_are_split_off_once(tmp_path, tokenizer):
    data = rows_file(tmp_path, [{"text": f"text {number}"} for number in range(10)])
    made = [encoded(tokenizer, train=data, eval_fraction=0.3) for _ in range(2)]
    train, evaluation = ({tuple(ids) for ids in part["input_ids"]} for part in (made[0].train, made[0].eval))
    assert len(train) == 7 and len(evaluation) == 3 and not train & evaluation
    assert list(made[0].eval["input_ids"]) == list(made[1].eval["input_ids"])


# Batches


def test_a_batch_is_padded_where_nothing_is_learnt():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    batch = collate_tokens(rows, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_packing_fills_rows_and_changes_no_loss(tmp_path, tokenizer, model):
    texts = ["a wren", "a longer text about a kite", "an owl", "two", "a text about owls and wrens", "b"]
    data = rows_file(tmp_path, [{"text": text} for text in texts])
    single = encoded(tokenizer, train=data, max_length=40)
    made = encoded(tokenizer, train=data, max_length=40, packing=True)
    assert sorted(index for bin in made.train.bins for index in bin) == list(range(len(texts)))
    lengths = [len(made.train[index]["input_ids"]) for index in range(len(made.train))]
    assert sum(lengths) == sum(single.train["length"]) and max(lengths) <= 40
    assert len(made.train) == 3 == made.facts["packed rows"]  # 99 tokens do not fit into two rows

    def loss(data: TrainingData) -> float:
        batch = data.collator([data.train[index] for index in range(len(data.train))])
        with torch.no_grad():
            return model(**batch, use_cache=False).loss.item()

    assert ("attention_mask" in made.collator([made.train[0]])) is False
    assert loss(made) == pytest.approx(loss(single), abs=1e-6)
    # Had the texts of a row seen each other, the loss would differ.
    batch = made.collator([made.train[0]])
    with torch.no_grad():
        apart = model(**batch, use_cache=False).logits
        del batch["position_ids"]
        together = model(**batch, use_cache=False).logits
    first = len(single.train[made.train.bins[0][0]]["input_ids"])
    assert torch.allclose(apart[:, :first], together[:, :first], atol=1e-5)
    assert not torch.allclose(apart[:, first:], together[:, first:], atol=1e-3)


def test_best_fit_takes_the_fullest_row_with_room():
    rows = datasets.Dataset.from_dict({"length": [6, 5, 4, 3, 2], "input_ids": [[0] * n for n in (6, 5, 4, 3, 2)]})
    assert packed(rows, 10).bins == [[0, 2], [1, 3, 4]]


# Classes


def test_classes_are_named_and_numbered(tmp_path, tokenizer):
    rows = [{"sentence1": "a wren", "sentence2": "sings", "label": "bird"}, {"sentence1": "a cat", "label": "beast"}]
    entry = DataEntry(train=rows_file(tmp_path, rows))
    read, config = read_rows(entry), LlamaConfig(max_position_embeddings=CONTEXT)
    assert set_classes(config, read) and config.id2label == {0: "beast", 1: "bird"}
    made = encode(read, entry, tokenizer, config)
    assert made.train["labels"][:] == [1, 0] and made.facts["classes"] == 2
    assert tokenizer.decode(made.train[0]["input_ids"]) == "<|endoftext|>a wren<|endoftext|>sings"
    batch = made.collator(list(made.train))
    assert batch["labels"].tolist() == [1, 0] and batch["attention_mask"].sum(1).tolist() == made.train["length"][:]


def test_a_classifier_keeps_the_classes_it_knows(tmp_path):
    rows = [{"text": "x", "label": "cat"}, {"text": "y", "label": "bird"}]
    read = read_rows(DataEntry(train=rows_file(tmp_path, rows)))

    def classifier(*names: str) -> LlamaConfig:
        numbers = dict(enumerate(names))
        named = {"id2label": numbers, "label2id": {name: number for number, name in numbers.items()}}
        return LlamaConfig(architectures=["LlamaForSequenceClassification"], **named)

    config = classifier("bird", "dog", "cat")
    assert set_classes(config, read) is False and config.num_labels == 3
    config = classifier("bird", "dog")
    assert set_classes(config, read) is True and set(config.label2id) == {"bird", "cat"}


def test_images_become_pixels_batch_by_batch():
    from PIL import Image
    from transformers import ViTConfig

    from hf_fuse.training_data import Part, Rows

    pictures = [Image.new("L", (8, 8), value) for value in (0, 255)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1]}, features=features)
    config = ViTConfig(image_size=8, num_channels=1)
    read = Rows("classification", [Part("pictures", rows)], [])
    assert read.has_images and set_classes(config, read)
    made = encode_images(read, None, config, torch.float32)
    batch = made.collator([made.train[0], made.train[1]])
    assert batch["pixel_values"].shape == (2, 1, 8, 8) and batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"].flatten(1).mean(1).tolist() == [0.0, 1.0]


# What can be wrong with it


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            {},
            "columns question, answer are of no known format. .* columns: {prompt",
        ),
        ([{"text": "a"}], {"format": "chat"}, "has no column 'messages'"),
        ([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], {}, "row 1: has no completion"),
        ([{"messages": CHAT[:1]}], {"chat_template": PLAIN}, "row 1: the assistant says nothing"),
        ([{"messages": CHAT}], {}, "no chat template .* data.chat_template: chatml"),
        ([{"messages": CHAT}], {"chat_template": "chatmll"}, "Did you mean 'chatml'"),
        ([{"messages": CHAT}], {"chat_template": FORGETFUL}, "shows a turn differently once others follow"),
        ([{"messages": [{"from": "human"}]}], {"chat_template": PLAIN}, "row 1: a message is .* expected {role"),
        ([{"text": "  "}], {}, "nothing to train on is left"),
        ([{"text": "a"}], {"max_length": 500}, "max_length is 500, but the model reads 256 tokens at most"),
        ([{"text": "a"}], {"eval_fraction": 0.5}, "eval_fraction 0.5 of 1 rows leaves nothing"),
        ([{"text": 3}], {}, "column 'text' holds .*, expected text"),
        ([{"text": "a", "label": 0.5}], {}, "label column 'label' holds float"),
        ([{"text": "a", "label": 1}], {"packing": True}, "packing is for texts"),
    ],
)
def test_a_mistake_is_one_message(rows, entry, message, tmp_path, tokenizer):
    entry = DataEntry(train=rows_file(tmp_path, rows), **entry)
    config = LlamaConfig(max_position_embeddings=CONTEXT)
    with pytest.raises(FuseError, match=message) as caught:
        read = read_rows(entry)
        if read.format == "classification":
            set_classes(config, read)
        tokenizer.chat_template = None
        encode(read, entry, tokenizer, config)
    assert "\n" not in str(caught.value)


def test_mistakes_in_naming_the_data(tmp_path, tokenizer):
    texts, classes = (
        rows_file(tmp_path, rows, name)
        for rows, name in (([{"text": "a"}], "a.jsonl"), ([{"text": "a", "label": 1}], "b.jsonl"))
    )
    with pytest.raises(FuseError, match="b.jsonl: its columns are those of classification, but a.jsonl holds text"):
        encoded(tokenizer, train=[texts, classes])
    assert len(encoded(tokenizer, train=[texts, classes], format="text").train) == 2
    with pytest.raises(FuseError, match="nowhere.jsonl: no such file"):
        encoded(tokenizer, train=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FuseError, match="has no column 'txt'. Did you mean 'text'"):
        encoded(tokenizer, train={"path": texts, "columns": {"text": "txt"}})


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(tmp_path, tokenizer):
    config = LlamaConfig(vocab_size=100, hidden_size=16, num_attention_heads=2, max_position_embeddings=CONTEXT)
    entry = DataEntry(train=[rows_file(tmp_path, [{"text": "words"}])])
    with pytest.raises(FuseError, match="row 1: the tokenizer gives token id 256, but the model embeds ids below 100"):
        encode(read_rows(entry), entry, tokenizer, config)
