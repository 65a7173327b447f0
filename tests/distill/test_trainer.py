"""DistillTrainer: the numbers of a plain loop, the same ones in every layout, and teachers that stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from distill_cases import CASES, KL, another, make_trainer
from safetensors.torch import load_file
from tiny_models import save_tokenizer
from training_cases import bert, llama, mixlora, train
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_fuse import DistillConfig, DistillTrainer, FuseConfig
from hf_fuse.distill.methods.pld import pld
from hf_fuse.errors import FuseError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def same(one, other, *, logs_to=2e-5, parameters_to=1e-6):
    for left, right in zip(one[0], other[0], strict=True):
        assert right == pytest.approx(left, rel=logs_to, abs=logs_to)
    for name, value in one[1].items():
        assert (value - other[1][name]).abs().max() < parameters_to, name


# ---- the numbers


def test_a_plain_loop_gives_the_same(tmp_path):
    trainer = make_trainer("language", tmp_path, 2, 4, objectives=KL)
    student, teacher = llama(), another(llama)().eval()
    rows = [trainer.data_collator(trainer.train_dataset[8 * step : 8 * step + 8]) for step in range(3)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for batch in rows:
        labels = batch["labels"][:, 1:]
        ours, theirs = (
            model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1] for model in (student, teacher)
        )
        # The mask comes once, and before the softmax.
        ours, theirs, labels = ours[labels != -100], theirs[labels != -100].detach(), labels[labels != -100]
        log_p, log_q = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        loss = 0.5 * F.cross_entropy(ours, labels) + 0.5 * 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, trained = train(trainer)
    for name, parameter in student.named_parameters():
        assert (parameter - trained[name]).abs().max() < 1e-6, name


def gpt2(seed=0):
    torch.manual_seed(seed)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2, **still))


def test_labels_are_shifted_for_models_whose_name_does_not_tell(tmp_path):
    given = {"model": gpt2, "teacher": lambda: gpt2(1), "objectives": {"pld": 1.0}, "max_steps": 1}
    trainer = make_trainer("language", tmp_path, 8, 1, **given)
    batch = trainer.data_collator(trainer.train_dataset[:8])
    labels, mask = batch["labels"][:, 1:], batch["attention_mask"]
    kept = labels != -100
    with torch.no_grad():
        ours, theirs = (gpt2(seed)(batch["input_ids"], attention_mask=mask).logits[:, :-1][kept] for seed in (0, 1))
    logs, _ = train(trainer)
    assert logs[0]["task_loss"] == pytest.approx(F.cross_entropy(ours, labels[kept]).item(), rel=1e-5)
    assert logs[0]["pld"] == pytest.approx((pld(ours, theirs, labels[kept]) / kept.sum()).item(), rel=1e-5)
    chunks = train(make_trainer("language", tmp_path, 8, 1, chunk_size=5, **given))
    same(train(make_trainer("language", tmp_path, 2, 4, **given)), chunks)


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case, tmp_path):
    same(train(make_trainer(case, tmp_path, 8, 1)), train(make_trainer(case, tmp_path, 2, 4)))


def test_chunks_train_as_the_whole(tmp_path):
    whole, chunks = (train(make_trainer("chunks", tmp_path, 4, 2, chunk_size=size)) for size in (0, 5))
    same(whole, chunks)
    # With adapters whose routers have a loss of their own, and the base as teacher.
    routed = {"peft_config": lambda: mixlora(router_aux_loss_coef=0.5), "teacher": lambda: "base"}
    whole, chunks = (train(make_trainer("chunks", tmp_path, 4, 2, chunk_size=size, **routed)) for size in (0, 5))
    same(whole, chunks)
    assert whole[0][0]["aux_loss"] > 0


def test_an_equal_teacher_leaves_the_student_alone(tmp_path):
    only = {"task": 0.0, "forward_kl": 1.0}
    logs, trained = train(make_trainer("language", tmp_path, 4, 2, teacher=llama, objectives=only))
    assert logs[0]["forward_kl"] == pytest.approx(0, abs=1e-6)
    for name, value in llama().named_parameters():
        assert (value - trained[name]).abs().max() < 1e-6, name


def test_teachers_weights(tmp_path):
    def terms(**changes):
        logs, _ = train(make_trainer("two_teachers", tmp_path, 8, 1, max_steps=1, **changes))
        return logs[0]["jsd"]

    teachers = CASES["two_teachers"]["teacher"]
    apart = [terms(teacher=lambda index=index: teachers()[index], teacher_weights=None) for index in (0, 1)]
    assert abs(apart[0] - apart[1]) > 0.01
    assert terms() == pytest.approx(0.25 * apart[0] + 0.75 * apart[1], rel=1e-5)
    assert terms(teacher_weights=None) == pytest.approx(sum(apart) / 2, rel=1e-5)


# ---- teachers


def test_a_teacher_is_frozen_and_saved_nowhere(tmp_path):
    teacher = another(llama, attention_dropout=0.5)().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer("language", tmp_path, 8, 1, teacher=lambda: teacher, save_strategy="steps", save_steps=3)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    train(trainer)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(map(id, teacher.parameters()))
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() <= trainer.model.state_dict().keys()


def test_a_teacher_by_name_keeps_its_precision(tmp_path):
    another(llama)().bfloat16().save_pretrained(tmp_path / "teacher")
    trainer = make_trainer("language", tmp_path, 8, 1, teacher=lambda: str(tmp_path / "teacher"))
    assert trainer.teachers[0].model.dtype == torch.bfloat16
    logs, _ = train(trainer)
    exact, _ = train(make_trainer("language", tmp_path, 8, 1))
    assert logs[0]["forward_kl"] == pytest.approx(exact[0]["forward_kl"], rel=0.05)
    widened = {"teacher_model_init_kwargs": '{"dtype": "float32"}'}
    trainer = make_trainer("language", tmp_path, 8, 1, teacher=lambda: str(tmp_path / "teacher"), **widened)
    assert trainer.teachers[0].model.dtype == torch.float32


def test_the_base_as_teacher_is_the_model_without_its_adapter(tmp_path):
    options = {"task": 0.0, "forward_kl": 1.0}
    base = train(make_trainer("base", tmp_path, 4, 2, objectives=options))
    same(base, train(make_trainer("base", tmp_path, 4, 2, objectives=options, teacher=llama)))
    dropping = {"model": lambda: llama(attention_dropout=0.5)}
    trainer = make_trainer("base", tmp_path, 4, 2, **dropping)
    frozen = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    trained = [p.requires_grad for p in trainer.model.parameters()]
    trainer.model.train()
    batch = trainer.data_collator(trainer.train_dataset[:4])
    torch.testing.assert_close(
        trainer.teachers[0].logits(batch), llama().eval()(batch["input_ids"], batch["attention_mask"]).logits
    )
    assert all(module.training for module in trainer.model.modules())
    assert [p.requires_grad for p in trainer.model.parameters()] == trained


# ---- vocabularies and classes


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("ours", "other")]
    save_tokenizer(folders[0])
    save_tokenizer(folders[1], words=["a", "the", "cat"])
    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


def test_padding_of_the_vocabulary_is_cut_off(tokenizers, tmp_path):
    ours, _ = tokenizers

    def longer():
        """Equal to the student, and certain of an entry that no token has."""
        model = llama()
        model.resize_token_embeddings(40, mean_resizing=False)
        model.lm_head.weight.data[32:] = 5.0
        return model

    given = {"processing_class": ours, "teacher_tokenizer": ours, "objectives": {"forward_kl": 1.0}, "max_steps": 1}
    for size in (0, 5):
        logs, _ = train(make_trainer("language", tmp_path, 8, 1, teacher=longer, chunk_size=size, **given))
        assert logs[0]["forward_kl"] == pytest.approx(0, abs=1e-6)
        logs, _ = train(make_trainer("language", tmp_path, 8, 1, model=longer, teacher=llama, chunk_size=size, **given))
        assert logs[0]["forward_kl"] == pytest.approx(0, abs=1e-6)


def refused(match, tmp_path, case="language", error=FuseError, **changes):
    with pytest.raises(error, match=match):
        make_trainer(case, tmp_path, 8, 1, **changes)


def test_other_vocabularies_are_refused(tokenizers, tmp_path):
    ours, other = tokenizers
    wide = another(llama, vocab_size=40)
    refused("vocabulary has 40 entries, the student's 32.*Give processing_class", tmp_path, teacher=wide)
    refused("another tokenizer.*7 and 19 tokens", tmp_path, processing_class=ours, teacher_tokenizer=other)
    narrow = another(llama, vocab_size=12)
    both = {"processing_class": ours, "teacher_tokenizer": ours}
    refused("tokenizer has 19 tokens, but vocabularies have 12", tmp_path, teacher=narrow, **both)


def test_a_teachers_own_tokenizer_is_found(tokenizers, tmp_path):
    ours, other = tokenizers
    another(llama)().save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    refused("another tokenizer", tmp_path, processing_class=ours, teacher=lambda: str(tmp_path / "teacher"))


def test_other_classes_are_refused(tmp_path):
    refused("predicts 4 classes, the student 3", tmp_path, "classes", teacher=lambda: bert(num_labels=4))
    names = {0: "cat", 1: "dog", 2: "bird"}
    turned = {0: "dog", 1: "cat", 2: "bird"}
    refused(
        "class 0 is 'dog', the student's 'cat'", tmp_path, "classes",
        model=lambda: bert(id2label=names), teacher=lambda: bert(id2label=turned),
    )  # fmt: skip


# ---- evaluation and refusals


def test_evaluation_keeps_its_outputs_small(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    for size in (0, 5):
        logs, _ = train(make_trainer("chunks", tmp_path, 4, 2, chunk_size=size, compute_metrics=metrics))
        assert logs[-1].keys() >= {"eval_loss", "eval_forward_kl"}
        assert shapes.pop()[-1] == 32
    trainer = make_trainer("chunks", tmp_path, 4, 2)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    trainer.model.eval()
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert "logits" not in outputs


def test_settings_are_checked(tmp_path):
    refused("forward_kl: needs a teacher, and none is given", tmp_path, teacher=list)
    refused("no objective learns from one", tmp_path, objectives={"mesa": 1.0})
    refused("2 numbers for 1 teacher", tmp_path, teacher_weights=[0.5, 0.5])
    refused("without an adapter", tmp_path, teacher=lambda: "base")
    refused("can't be loaded", tmp_path, teacher=lambda: str(tmp_path / "nowhere"))
    refused("teacher is a int", tmp_path, teacher=lambda: 3)
    refused("for teachers given by name", tmp_path, teacher_model_init_kwargs={"dtype": "float32"})
    refused("no loss 'forwrd_kl'. Did you mean 'forward_kl'", tmp_path, error=RecipeError, objectives={"forwrd_kl": 1})
    refused("none of them is a distillation", tmp_path, error=RecipeError, objectives={"task": 1})
    refused("chunk_size is -1", tmp_path, error=RecipeError, chunk_size=-1)
    student = llama()
    refused("is the student itself", tmp_path, model=lambda: student, teacher=lambda: student)
    with pytest.raises(FuseError, match="expected a DistillConfig"):
        DistillTrainer(llama(), FuseConfig(str(tmp_path), use_cpu=True), teacher=llama())
    split = llama()
    next(split.parameters()).ds_id = 0
    refused("ZeRO-3", tmp_path, teacher=lambda: split)
    assert [objective.name for objective in DistillConfig(str(tmp_path), use_cpu=True).read_objectives()[1]] == [
        "forward_kl"
    ]


def test_chunks_are_refused_where_they_would_be_wrong(tmp_path):
    refused("causal language models", tmp_path, "classes", chunk_size=5)
    refused("logit_z: needs all logits", tmp_path, "language", chunk_size=5)
    refused("label_smoothing_factor", tmp_path, "chunks", label_smoothing_factor=0.1)
    capped = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, pad_token_id=0,
    )  # fmt: skip

    def soft():
        return Gemma2ForCausalLM(capped)

    for models in ({"model": soft}, {"teacher": soft}):
        with pytest.raises(FuseError, match="Gemma2ForCausalLM changes its logits"):
            train(make_trainer("chunks", tmp_path, 4, 2, **models))
    train(make_trainer("chunks", tmp_path, 4, 2, teacher=soft, chunk_size=0, max_steps=1))
