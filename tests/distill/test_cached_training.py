"""Training from a teacher's cache, and with a second head: the numbers of a plain loop, the same in every layout."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from cached_cases import K, make_trainer, write_cache
from distill_cases import another, lora
from safetensors.torch import load_file
from tiny_models import save_tokenizer
from training_cases import bert, language_data, llama, padded, train
from transformers import AutoTokenizer

from hf_fuse.distill.attached.dual_head import dual_head
from hf_fuse.distill.cache import TeacherCache, tokenizer_key
from hf_fuse.distill.cached_teacher import CACHED as CACHED_COLUMN
from hf_fuse.distill.cached_teacher import CachedTeacher, WithPredictions
from hf_fuse.distill.methods.dhkd import dhkd
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.distill.methods.pld import pld
from hf_fuse.errors import FuseError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "teacher", language_data(), another(llama)())


def same(one, other, *, logs_to=2e-5, parameters_to=1e-6):
    for left, right in zip(one[0], other[0], strict=True):
        assert right == pytest.approx(left, rel=logs_to, abs=logs_to)
    for name, value in one[1].items():
        assert (value - other[1][name]).abs().max() < parameters_to, name


# ---- from a cache


def test_a_plain_loop_gives_the_same(cache, tmp_path):
    rows, known, student = language_data(), TeacherCache(cache), llama()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(3):
        kept = range(8 * step, 8 * step + 8)  # rows are in the cache in this order
        batch = padded([rows[number] for number in kept])
        labels = batch["labels"][:, 1:]
        logits = student(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][labels != -100]
        labels = labels[labels != -100]
        splits = [len(known.positions(number)) for number in kept]
        loss = 0.5 * F.cross_entropy(logits, labels, reduction="sum")
        for number, some, answers in zip(kept, logits.split(splits), labels.split(splits)):
            top = known.row(number).predictions
            loss = loss + 0.5 * forward_kl(some, top) + 0.2 * pld(some, top, answers)
        optimizer.zero_grad()
        (loss / len(labels)).backward()
        optimizer.step()
    _, trained = train(make_trainer("cached", tmp_path, 2, 4, cache))
    for name, parameter in student.named_parameters():
        assert (parameter - trained[name]).abs().max() < 1e-6, name


def test_with_all_tokens_a_cache_is_the_teacher(tmp_path):
    whole = write_cache(tmp_path / "whole", language_data(), another(llama)(), k=32)
    objectives = {"task": 0.2, "forward_kl": 1.0, "reverse_kl": 0.5, "jsd": 0.5, "uld": 0.3, "dhkd": 0.01, "pld": 0.2}
    cached = train(make_trainer("cached", tmp_path, 8, 1, whole, objectives=objectives))
    live = train(make_trainer("cached", tmp_path, 8, 1, teacher=another(llama), objectives=objectives))
    same(live, cached, logs_to=2e-3, parameters_to=1e-3)  # fp16


@pytest.mark.parametrize("case", ["cached", "dual_language", "dual_classes"])
def test_accumulation_changes_nothing(case, cache, tmp_path):
    same(train(make_trainer(case, tmp_path, 8, 1, cache)), train(make_trainer(case, tmp_path, 2, 4, cache)))


def test_chunks_train_as_the_whole(cache, tmp_path):
    whole, chunks = (train(make_trainer("cached_chunks", tmp_path, 4, 2, cache, chunk_size=size)) for size in (0, 5))
    same(whole, chunks)
    assert whole[0][-1]["eval_forward_kl"] > 0


def test_a_cache_beside_a_model_and_another_cache(cache, tmp_path):
    """Three teachers, of which two are one and the same, once as a cache of all its tokens."""
    whole = write_cache(tmp_path / "whole", language_data(), another(llama)(), k=32)
    objectives = {"task": 0.2, "forward_kl": 1.0}
    mixed = make_trainer(
        "cached", tmp_path, 8, 1, objectives=objectives, teacher_weights=[0.5, 0.2, 0.3],
        teacher=lambda: [str(whole), another(llama)(), TeacherCache(whole)],
    )  # fmt: skip
    one = make_trainer("cached", tmp_path, 8, 1, objectives=objectives, teacher=another(llama))
    same(train(one), train(mixed), logs_to=2e-3, parameters_to=1e-3)


def test_no_model_is_in_memory(cache, tmp_path):
    trainer = make_trainer("cached", tmp_path, 8, 1, cache)
    assert not any(isinstance(value, torch.nn.Module) for each in trainer.teachers for value in vars(each).values())
    loader = pickle.loads(pickle.dumps(WithPredictions(padded, trainer.teachers)))  # as worker processes get it
    assert loader(language_data()[:2])[CACHED_COLUMN][0]["covered"].any()


# ---- texts of a batch


def batch_of(rows, **columns):
    return {name: torch.tensor(values) for name, values in {"input_ids": rows, **columns}.items()}


def test_padded_and_packed_texts_are_found(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 4, 3], "labels": [-100, 4, 3]},
    ]
    teacher = CachedTeacher(TeacherCache(write_cache(tmp_path / "cache", rows, another(llama)())))
    ids, ignored = [[5, 6, 7, 8], [9, 4, 3]], -100

    def found(batch):
        made = teacher.look_up(batch)
        top = teacher.predictions(made, batch["labels"], shifted=True)
        assert made["ids"].shape == (*batch["input_ids"].shape, K)
        assert made["log_probs"][~made["covered"]].isneginf().all() and not made["ids"][~made["covered"]].any()
        return top

    right = batch_of(
        [ids[0], [*ids[1], 0]], labels=[rows[0]["labels"], [ignored, 4, 3, ignored]],
        attention_mask=[[1] * 4, [1, 1, 1, 0]],
    )  # fmt: skip
    left = batch_of(
        [ids[0], [0, *ids[1]]], labels=[rows[0]["labels"], [ignored, ignored, 4, 3]],
        attention_mask=[[1] * 4, [0, 1, 1, 1]],
    )  # fmt: skip
    packed = batch_of(
        [[*ids[0], *ids[1], 0, 0]], labels=[[*rows[0]["labels"], ignored, 4, 3, ignored, ignored]],
        position_ids=[[0, 1, 2, 3, 0, 1, 2, 0, 0]],
    )  # fmt: skip
    expected = found(right)
    assert len(expected) == 4
    assert expected.ids_NK.equal(torch.cat([teacher.cache.row(number).predictions.ids_NK for number in (0, 1)]))
    for batch in (left, packed):
        assert all(one.equal(other) for one, other in zip(found(batch).tensors, expected.tensors, strict=True))
    # Some of the labels will do, and shifted ones of the caller's own.
    fewer = right | {"labels": torch.tensor([[ignored, ignored, ignored, 8], [ignored] * 4])}
    assert found(fewer).ids_NK.equal(expected.ids_NK[1:2])
    assert not list(teacher.missing(right))
    more = right | {"labels": torch.tensor([ids[0], [ignored] * 4])}
    assert "have no prediction" in next(teacher.missing(more))
    assert "no text of 3 such tokens" in next(teacher.missing(batch_of([[1, 2, 3]], labels=[[1, 2, 3]])))
    with pytest.raises(FuseError, match="a label of the batch has no prediction"):
        found(more)
    with pytest.raises(FuseError, match="other tokens than its input_ids"):
        found(right | {"labels": right["labels"].clamp(max=5)})
    with pytest.raises(FuseError, match="needs batches with input_ids and labels; they have input_ids"):
        teacher.look_up(batch_of([[1, 2]]))


# ---- refusals


def refused(match, cache, tmp_path, **changes):
    with pytest.raises(FuseError, match=match):
        make_trainer("cached", tmp_path, 8, 1, cache, **changes)


def test_other_texts_are_refused_before_training(cache, tmp_path):
    data = language_data()
    other = [*data[:20], {"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([-100, 4, 5])}, *data[20:]]
    refused(
        "lacks 1 of the 33 training rows. The first is row 21: no text of 3 such tokens", cache, tmp_path, data=other
    )
    ids = data[0]["input_ids"]
    refused("row 1: some of its labels have no prediction", cache, tmp_path, data=[{"input_ids": ids, "labels": ids}])
    cut = [{name: values[:-1] for name, values in data[0].items()}]
    refused("lacks 1 of the 1 training rows", cache, tmp_path, data=cut)


def test_caches_that_do_not_fit_are_refused(cache, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("ours", "other")]
    for folder, words in zip(folders, (["a", "the"], ["a", "cat"])):
        folder.mkdir()
        save_tokenizer(folder, words=words)
    ours, other = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    rows, teacher = language_data(), another(llama)()
    known = write_cache(tmp_path / "known", rows, teacher, tokenizer=tokenizer_key(ours), revision="abc123")
    make_trainer("cached", tmp_path, 8, 1, known, processing_class=ours)
    refused("made with another tokenizer than the student's", known, tmp_path, processing_class=other)
    make_trainer("cached", tmp_path, 8, 1, known, teacher_model_init_kwargs={"revision": "abc1"})
    refused(
        "made with revision abc123 of teacher, expected def4", known, tmp_path,
        teacher_model_init_kwargs={"revision": "def4"},
    )  # fmt: skip
    refused("dtype is for models", known, tmp_path, teacher_model_init_kwargs={"dtype": "float32"})
    refused("vocabulary of 32 entries, the student 40", cache, tmp_path, model=lambda: llama(vocab_size=40))
    refused(
        "tokenizer has 6 tokens, but vocabularies have 32 .* and 5", known, tmp_path,
        processing_class=ours, model=lambda: llama(vocab_size=5),
    )  # fmt: skip
    refused("temperature 1, but the loss has 2", cache, tmp_path, objectives={"forward_kl": {"temperature": 2}})
    monkeypatch.setattr(dual_head, "takes_top_k", False)
    refused("objectives.dual_head: needs whole distributions", cache, tmp_path, objectives={"dual_head": 1.0})
    refused("is for causal language models; the student is a Bert", cache, tmp_path, model=bert, data=rows)


def test_the_vocabularys_padding_does_not_matter(tmp_path):
    tokens = 19
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"input_ids": row["input_ids"] % (tokens - 1) + 1, "labels": row["labels"]} for row in language_data()]
    rows = [row | {"labels": row["input_ids"].where(row["labels"] != -100, -100)} for row in rows]

    def wide(size):
        def made():
            model = another(llama)()
            model.resize_token_embeddings(size, mean_resizing=False)
            return model

        return made

    logs = []
    for ours, theirs in ((32, 32), (40, 32), (32, 40)):
        teacher = wide(theirs)()
        if theirs == 40:
            teacher.lm_head.weight.data[32:] = -1e3  # never likely, as in real models
        known = write_cache(tmp_path / f"{ours}-{theirs}", rows, teacher, tokenizer=tokenizer_key(tokenizer))
        trainer = make_trainer(
            "cached", tmp_path, 8, 1, known, model=wide(ours), data=rows, processing_class=tokenizer, max_steps=1,
            objectives={"forward_kl": 1.0},
        )  # fmt: skip
        logs.append(train(trainer)[0][0]["forward_kl"])
    assert logs[0] == pytest.approx(0, abs=1e-4) and logs[1] == pytest.approx(0, abs=1e-4)


def test_an_evaluation_set_that_is_not_cached_has_no_distillation_terms(cache, tmp_path, caplog):
    other = [{"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([-100, 4, 5])}] * 3
    logs, _ = train(make_trainer("cached", tmp_path, 8, 1, cache, eval_dataset=other, max_steps=1))
    assert logs[0]["forward_kl"] > 0 and "eval_forward_kl" not in logs[-1] and logs[-1]["eval_loss"] > 0
    assert "lacks rows of the evaluation set" in caplog.text
    logs, _ = train(make_trainer("cached", tmp_path, 8, 1, cache, max_steps=1))
    assert logs[-1]["eval_forward_kl"] > 0


def test_a_partial_cache_teaches_where_it_knows(tmp_path):
    rows = language_data()
    known = [row | {"labels": row["labels"].clone()} for row in rows]
    for row in known:
        row["labels"][-2:] = -100  # the last two labels of each have no prediction
    part = write_cache(tmp_path / "part", known, another(llama)(), partial=True)
    only = {"task": 0.0, "forward_kl": 1.0}
    logs, _ = train(make_trainer("cached", tmp_path, 8, 1, part, objectives=only, max_steps=1))
    whole, _ = train(make_trainer("cached", tmp_path, 8, 1, part, objectives=only, max_steps=1, data=known))
    shares = [sum(int((row["labels"][1:] != -100).sum()) for row in data[:8]) for data in (known, rows)]
    # A mean over all predictions, of which some count 0.
    assert logs[0]["forward_kl"] == pytest.approx(whole[0]["forward_kl"] * shares[0] / shares[1], rel=1e-4)


# ---- the second head


def gradients(trainer, rows, weight):
    """Of both losses, for the parameters of the student and of the head."""
    batch, head = padded(rows), trainer.objectives[0].loss.head
    student, kept = trainer.model.train(), batch["labels"][:, 1:] != -100
    outputs = student(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    hidden, labels = outputs.hidden_states[-1][:, :-1][kept], batch["labels"][:, 1:][kept]
    with torch.no_grad():
        teacher = trainer.teachers[0].logits(batch)[:, :-1][kept]
    task = F.cross_entropy(outputs.logits[:, :-1][kept], labels)
    auxiliary = weight * dhkd(head(hidden), teacher, mean_over_classes=True) / len(labels)
    names = [name for name, _ in student.named_parameters()]
    found = [
        dict(zip(names, torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)))
        for loss in (task, auxiliary)
    ]
    return *found, torch.autograd.grad(auxiliary, list(head.parameters()))


@pytest.mark.parametrize("opposed", [True, False])
def test_gradients_are_aligned_on_what_both_losses_share(opposed, tmp_path):
    rows = language_data()[:8]

    def made(sign):
        def teacher():
            model = another(llama)()
            model.lm_head.weight.data *= sign
            return model

        return make_trainer("dual_language", tmp_path, 2, 4, teacher=teacher, max_steps=1, data=rows)

    # One of the two moves the backbone against the labels.
    for trainer in map(made, (1, -1)):
        task, auxiliary, of_head = gradients(trainer, rows, 0.7)
        shared = [name for name, value in auxiliary.items() if value is not None]
        product = sum((task[name] * auxiliary[name]).sum() for name in shared)
        if (product < 0) == opposed:
            break
    assert (product < 0) == opposed and "lm_head.weight" not in shared and len(shared) == len(task) - 1
    square = sum(task[name].square().sum() for name in shared)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    head_before = [value.detach().clone() for value in trainer.objectives[0].loss.head.parameters()]
    _, after = train(trainer)
    left = 0.0
    for name, value in before.items():
        moved = (value - after[name]) / 0.1
        expected = task[name]
        if name in shared:
            expected = expected + auxiliary[name] - min(product / square, 0) * task[name]
            left += ((moved - task[name]) * task[name]).sum().item()
        torch.testing.assert_close(moved, expected, atol=2e-5, rtol=1e-3)
    assert abs(left) < 1e-4 if opposed else left == pytest.approx(product.item(), rel=1e-2)
    for value, now, gradient in zip(head_before, trainer.objectives[0].loss.head.parameters(), of_head):
        torch.testing.assert_close((value - now) / 0.1, gradient, atol=2e-5, rtol=1e-3)


def test_the_classifier_learns_from_the_labels_alone_and_the_backbone_from_both(tmp_path):
    plain, dual = (
        train(make_trainer("dual_language", tmp_path, 8, 1, max_steps=1, objectives={"dual_head": weight}))[1]
        for weight in (1e-9, 1.0)
    )
    moved = {name: (plain[name] - dual[name]).abs().max() > 1e-5 for name in plain}
    assert not moved.pop("lm_head.weight") and all(moved.values())


@pytest.mark.parametrize("head", ["linear", "nonlinear", "low_rank"])
def test_the_head_is_in_checkpoints_and_not_in_the_model(head, tmp_path):
    options = {"objectives": {"dual_head": {"head": head, "size": 5, "align_gradients": True}}}
    whole = make_trainer("dual_classes", tmp_path / "whole", 8, 1, save_strategy="steps", save_steps=2, **options)
    keys = {*bert().state_dict()}
    expected = train(whole)
    whole.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-2"):
        assert {*load_file(folder / "model.safetensors")} <= keys
    states = load_file(tmp_path / "whole" / "checkpoint-2" / "objective_states_0.safetensors")
    assert any(name.startswith("dual_head.head") for name in states)
    again = make_trainer("dual_classes", tmp_path / "again", 8, 1, **options)
    resumed = train(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same((expected[0][-1:], expected[1]), (resumed[0][-1:], resumed[1]))


def test_adapters_have_a_second_head_too(tmp_path):
    trainer = make_trainer("dual_language", tmp_path, 4, 2, peft_config=lora)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    train(trainer)
    moved = {name for name, value in trainer.model.named_parameters() if not value.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


def test_one_head_is_the_ablation(tmp_path):
    logs, trained = train(make_trainer("dual_language", tmp_path, 8, 1, objectives={"dhkd": 1.0}, max_steps=1))
    assert logs[0]["dhkd"] > 0
    plain = train(make_trainer("dual_language", tmp_path, 8, 1, objectives={"dual_head": 1e-9}, max_steps=1))[1]
    assert (trained["lm_head.weight"] - plain["lm_head.weight"]).abs().max() > 1e-5


def test_a_second_head_needs_logits_of_one_teacher(tmp_path):
    with pytest.raises(FuseError, match="objectives.dual_head: needs a teacher"):
        make_trainer("dual_language", tmp_path, 8, 1, teacher=lambda: None)
    with pytest.raises(FuseError, match="learns from one teacher, and 2 are given"):
        make_trainer("dual_language", tmp_path, 8, 1, teacher=lambda: [another(llama)(), another(llama)()])
    with pytest.raises(FuseError, match="objectives.dual_head: needs all logits"):
        make_trainer("dual_language", tmp_path, 8, 1, chunk_size=5)
