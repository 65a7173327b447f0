"""``hf-fuse teach``: what it keeps is what the teacher says, once, whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_fuse
from hf_fuse import cli, teach
from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model
from hf_fuse.distill import teach_predictions, teach_sequences
from hf_fuse.distill.cache import CacheWriter, TeacherCache, row_key, text_key
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError

LENGTH = 48
SIZE = ModelSize(hidden=16, feed_forward=32, layers=1, heads=2, context=LENGTH)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher of random weights, texts of more than one piece, completions and chats."""
    folder = tmp_path_factory.mktemp("teach")
    tokenizer = byte_tokenizer(LENGTH)
    model = new_model(SIZE, tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder / "teacher")
    new_model(SIZE, tokenizer, 1).save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    new_model(SIZE, tokenizer, 1).save_pretrained(folder / "words")
    save_tokenizer(folder / "words")
    _, docs, _ = stdlib_domains(source_characters=50_000)
    words = "".join(docs.train)
    texts = [words[150 * number :][:length] for number, length in enumerate((31, 100, 60, 35, 32, 70))]
    rows = {
        "texts": [{"text": text} for text in [*texts, texts[0]]],
        "completions": [{"prompt": text[:9], "completion": text[9:30]} for text in texts],
        "chats": [
            {"messages": [{"role": "user", "content": text[:7]}, {"role": "assistant", "content": text[7:15]}]}
            for text in texts
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return folder


def recipe_of(home, data="texts", **changes):
    return {"teacher": str(home / "teacher"), "batch_size": 3} | {"data": str(home / f"{data}.jsonl")} | changes


# ---- predictions


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cache_holds_what_the_teacher_says(temperature, home, tmp_path):
    made = teach(recipe_of(home, k=5, temperature=temperature), tmp_path / "cache")
    cache = TeacherCache(made.output)
    assert len(cache) == made.figures["rows"] > 6
    assert any("1 rows are in the data more than once" in note for note in made.notes)
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(home / "teacher")
    text = json.loads((home / "texts.jsonl").read_text().splitlines()[1])
    pieces = [cache.row(number) for number in cache.of_text(text_key(text))]
    assert len(pieces) > 1
    whole = torch.cat([piece.input_ids_S for piece in pieces]).tolist()
    assert whole[:-1] == tokenizer(text["text"])["input_ids"] and whole[-1] == tokenizer.eos_token_id
    for piece in pieces:
        with torch.no_grad():
            logits = model(piece.input_ids_S[None]).logits[0, :-1]
        expected = TopK.of(logits, 5, piece.input_ids_S[1:], temperature=temperature)
        assert piece.positions_N.tolist() == list(range(1, len(piece.input_ids_S)))
        assert piece.predictions.ids_NK.equal(expected.ids_NK)
        torch.testing.assert_close(piece.predictions.log_probs_NK, expected.log_probs_NK, rtol=1e-3, atol=1e-4)
        for name in ("tail_log_prob_N", "label_log_prob_N", "log_z_N"):
            torch.testing.assert_close(getattr(piece.predictions, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(logits, piece.input_ids_S[1:]).item()
        assert piece.cross_entropy == pytest.approx(loss, rel=1e-4)


def test_only_completions_are_predicted(home, tmp_path):
    made = teach(recipe_of(home, "completions", k=3), tmp_path / "cache")
    cache = TeacherCache(made.output)
    row = json.loads((home / "completions.jsonl").read_text().splitlines()[0])
    (number,) = cache.of_text(text_key(row))
    prompt = len(AutoTokenizer.from_pretrained(home / "teacher")(row["prompt"])["input_ids"])
    ids = cache.row(number).input_ids_S
    assert cache.positions(number).tolist() == list(range(prompt, len(ids)))
    assert cache.find(row_key(ids)) == [number]
    assert made.figures["predictions"] == sum(len(cache.positions(n)) for n in range(len(cache)))


def test_batches_and_the_whole_output_layer_change_nothing(home, tmp_path, monkeypatch):
    teach(recipe_of(home, k=4), tmp_path / "one")
    monkeypatch.setattr(teach_predictions, "ROWS_OF_LOGITS", 7)
    monkeypatch.setattr(teach_predictions, "_has_plain_head", lambda *_: False)
    teach(recipe_of(home, k=4, batch_size=1), tmp_path / "other")
    one, other = TeacherCache(tmp_path / "one"), TeacherCache(tmp_path / "other")
    assert one.facts == other.facts and len(one) == len(other)
    for number in range(len(one)):
        torch.testing.assert_close(one.row(number).predictions.log_z_N, other.row(number).predictions.log_z_N)


class Killed(Exception):
    pass


def test_a_stopped_run_leaves_no_cache_and_can_be_resumed(home, tmp_path, monkeypatch):
    recipe, output = recipe_of(home, k=4, batch_size=3), tmp_path / "cache"
    add, shard = CacheWriter.add, 600

    def stop_after_five(self, row):
        self.shard_bytes = shard
        add(self, row)
        if self.rows == 5:
            raise Killed

    monkeypatch.setattr(CacheWriter, "add", stop_after_five)
    with pytest.raises(Killed):
        teach(recipe, output)
    assert not output.exists() and any((tmp_path / "cache.partial").glob("*.safetensors"))
    monkeypatch.setattr(CacheWriter, "add", add)
    with pytest.raises(OutputError, match="unfinished run left it.*--resume"):
        teach(recipe, output)
    with pytest.raises(CheckpointError, match="another cache than the recipe's: its k is 4, not 3.*--overwrite"):
        teach(recipe | {"k": 3}, output, resume=True)
    teach(recipe, output, resume=True)
    teach(recipe, tmp_path / "whole")
    resumed, whole = TeacherCache(output), TeacherCache(tmp_path / "whole")
    assert not (tmp_path / "cache.partial").exists() and len(resumed) == len(whole)
    for number in range(len(whole)):
        # Also in the batch that the run was stopped in: with other rows in it, sums are rounded otherwise.
        tensors = (cache.row(number).predictions.tensors for cache in (resumed, whole))
        assert all(one.equal(other) for one, other in zip(*tensors))
    with pytest.raises(OutputError, match="no unfinished run"):
        teach(recipe | {"k": 3}, tmp_path / "new", resume=True)


def test_a_run_that_fails_early_leaves_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setattr(CacheWriter, "add", lambda self, row: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        teach(recipe_of(home), tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_same_again_costs_nothing_and_another_is_refused(home, tmp_path, monkeypatch, capsys):
    recipe, output = recipe_of(home, k=4), tmp_path / "cache"
    assert teach(recipe, output).made
    with monkeypatch.context() as patched:
        patched.setattr(teach_predictions.CacheWriter, "add", None)
        assert not teach(recipe, output).made
    assert "already" in capsys.readouterr().err
    (shard,) = output.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="safetensors: truncated.*Start hf-fuse teach with --overwrite"):
        teach(recipe, output)
    shard.write_bytes(content)
    (home / "other.jsonl").write_text(json.dumps({"text": "another text"}))
    for change, what in (
        ({"k": 5}, "k is 4, not 5"),
        ({"data": str(home / "other.jsonl")}, "data is"),
        ({"data": {"train": str(home / "texts.jsonl"), "max_length": 20}}, "data is"),
        ({"dtype": "bfloat16"}, "dtype is float32, not bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=f"another cache than the recipe's: its {what}"):
            teach(recipe | change, output)
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher")
    teacher.lm_head.weight.data += 1
    teacher.save_pretrained(tmp_path / "revised")
    AutoTokenizer.from_pretrained(home / "teacher").save_pretrained(tmp_path / "revised")
    with pytest.raises(CheckpointError, match="its teacher is teacher, not revised; weights is"):
        teach(recipe | {"teacher": str(tmp_path / "revised")}, output)
    assert teach(recipe | {"k": 5}, output, overwrite=True).made and TeacherCache(output).facts.k == 5


def test_sizes_are_told_before_the_teacher_runs(home, tmp_path, monkeypatch, capsys):
    result = teach(recipe_of(home, k=4), tmp_path / "cache", dry_run=True)
    assert "the 4 likeliest of" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    written = teach(recipe_of(home, k=4), tmp_path / "cache")
    size = sum(path.stat().st_size for path in written.output.glob("*.safetensors"))
    assert 0 < size - result.figures["bytes"] < 52 * written.figures["rows"] + 1200
    monkeypatch.setattr("hf_fuse.merge.plan._free", lambda _: 1000)
    with pytest.raises(OutputError, match="the disk has 0.00 GB free"):
        teach(recipe_of(home, k=4), tmp_path / "other")


# ---- sequences


def test_sequences_are_what_the_teacher_writes_and_train_a_student(home, tmp_path):
    recipe = recipe_of(home, "completions", kind="sequences", generation={"max_new_tokens": 8, "keep_unfinished": True})
    made = teach(recipe, tmp_path / "answers")
    assert made.figures == {"prompts": 6, "sequences": 6}
    rows = [json.loads(line) for path in made.output.glob("*.jsonl") for line in path.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(home / "teacher")
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        config = GenerationConfig(
            max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
        )
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(alone, skip_special_tokens=True)
    settings = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "per_device_train_batch_size": 6}
    trained = hf_fuse.train(
        {"model": str(home / "teacher"), "data": str(made.output), "train": settings}, output=tmp_path / "student"
    )
    assert trained.steps == 1


def test_sampling_is_repeated_by_its_seed_and_after_a_stop(home, tmp_path, monkeypatch):
    generation = {"max_new_tokens": 6, "sample": True, "samples": 2, "keep_unfinished": True}
    data = {"train": str(home / "chats.jsonl"), "chat_template": TEMPLATE}
    recipe = recipe_of(home, kind="sequences", generation=generation, batch_size=2) | {"data": data}
    monkeypatch.setattr(teach_sequences, "BATCHES_OF_FILE", 1)

    def lines(folder):
        return [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]

    whole = lines(teach(recipe, tmp_path / "whole").output)
    assert len(whole) == 12 and len(set(whole)) > 6
    assert json.loads(whole[0])["completion"][0]["role"] == "assistant"
    answers, calls = teach_sequences._answers, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return answers(*arguments)

    monkeypatch.setattr(teach_sequences, "_answers", stopping)
    with pytest.raises(Killed):
        teach(recipe, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(CheckpointError, match="made with another seed"):
        teach(recipe | {"seed": 1}, tmp_path / "stopped", resume=True)
    torch.manual_seed(7)  # what else the process draws doesn't matter
    assert lines(teach(recipe, tmp_path / "stopped", resume=True).output) == whole
    assert lines(teach(recipe | {"seed": 1}, tmp_path / "other").output) != whole
    assert not teach(recipe, tmp_path / "whole").made


def test_answers_without_an_end_are_left_out(home, tmp_path):
    recipe = recipe_of(home, "completions", kind="sequences", generation={"max_new_tokens": 1})
    with pytest.raises(FuseError, match="ended none of its answers within 1 tokens"):
        teach(recipe, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


# ---- training recipes that learn from it


def student_recipe(home, teacher, data="completions", **settings):
    objectives = {"objectives": {"task": 0.5, "forward_kl": 0.5}}
    fast = {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 6, "save_strategy": "no", "seed": 1}
    data = data if isinstance(data, dict) else {"train": str(home / f"{data}.jsonl")}
    return {"model": str(home / "student"), "data": data, "teacher": teacher, "train": fast | objectives | settings}


def test_a_recipe_that_learns_from_a_cache_trains_as_with_the_teacher(home, tmp_path):
    cache = teach(recipe_of(home, "completions", k=257), tmp_path / "cache").output
    both = {
        "cache": hf_fuse.train(student_recipe(home, str(cache)), output=tmp_path / "cached"),
        "live": hf_fuse.train(student_recipe(home, str(home / "teacher")), output=tmp_path / "live"),
    }
    losses = [result.figures["train_loss"] for result in both.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cached", "live")]
    before = load_file(home / "student" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[0][name] - weights[1][name]).abs().max() < 0.05 * (weights[1][name] - before[name]).abs().max()
    card = (tmp_path / "cached" / "README.md").read_text()
    assert "learning from cache too" in card and str(tmp_path) not in card


def test_packed_texts_learn_from_the_same_cache(home, tmp_path):
    cache = teach(recipe_of(home, k=4), tmp_path / "cache").output
    data = {"train": str(home / "texts.jsonl"), "packing": True}
    packed = hf_fuse.train(
        student_recipe(home, str(cache), data, per_device_train_batch_size=16, max_steps=1), output=tmp_path / "packed"
    )
    plain = hf_fuse.train(
        student_recipe(home, str(cache), "texts", per_device_train_batch_size=16, max_steps=1),
        output=tmp_path / "plain",
    )
    assert packed.figures["train_loss"] == pytest.approx(plain.figures["train_loss"], rel=1e-4)


def test_a_recipe_that_the_cache_does_not_fit_is_refused(home, tmp_path):
    cache = str(teach(recipe_of(home, "completions", k=4), tmp_path / "cache").output)
    for recipe, message in (
        (student_recipe(home, cache, "texts"), "lacks 11 of the 11 training rows. The first is row 1: no text of"),
        (student_recipe(home, cache, {"train": str(home / "completions.jsonl"), "max_length": 20}), "training rows"),
    ):
        with pytest.raises(FuseError, match=message):
            hf_fuse.train(recipe, output=tmp_path / "student")
        assert not (tmp_path / "student").exists()
    with pytest.raises(RecipeError, match="is a cache of predictions in texts"):
        (tmp_path / "kinds.jsonl").write_text("\n".join(json.dumps({"text": "a", "label": n}) for n in (0, 1)))
        hf_fuse.train(
            student_recipe(home, cache, {"train": str(tmp_path / "kinds.jsonl")}), output=tmp_path / "student"
        )


# ---- refusals and the command


def test_a_dry_run_finds_teachers_that_do_not_fit(home, tmp_path):
    cache = str(teach(recipe_of(home, "completions", k=4), tmp_path / "cache").output)
    words, cut, two = str(home / "words"), tmp_path / "cut", {"forward_kl": {"weight": 1, "temperature": 2}}
    shutil.copytree(home / "teacher", cut)
    (cut / "model.safetensors").write_bytes((home / "teacher" / "model.safetensors").read_bytes()[:-9])
    live = student_recipe(home, None, objectives={"task": 0.5, "fuse_llm": 0.5})
    for recipe, message in (
        (student_recipe(home, cache, teacher_model_init_kwargs={"revision": "abc"}), "revision unknown of teacher"),
        (student_recipe(home, cache) | {"model": words}, "another tokenizer than the student's"),
        (student_recipe(home, cache, objectives=two), "forward_kl: .* at temperature 1, but the loss has 2"),
        (student_recipe(home, cache, objectives={"logit_z": 1.0}), "none of them is a distillation method"),
        (student_recipe(home, cache, teacher_weights=[1, 2]), "teacher_weights has 2 numbers for 1 teacher"),
        (student_recipe(home, None), "objectives.forward_kl: needs a teacher, and none is given"),
        (student_recipe(home, "base"), "base is the model without its adapter, but no adapter is trained"),
        (student_recipe(home, str(home)), "no model.safetensors"),
        (student_recipe(home, "no/where"), "no/where"),
        (student_recipe(home, str(cut)), "model.safetensors"),
        (student_recipe(home, words), "has another tokenizer than the student"),
        (live | {"teacher": words}, "fuse_llm: fuses models .* under sources"),
        (live | {"sources": str(cut)}, "model.safetensors"),
    ):
        with pytest.raises(FuseError, match=message):
            hf_fuse.train(recipe, output=tmp_path / "student", dry_run=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kk": 3}, RecipeError, "unknown key 'kk'. Did you mean 'k'"),
        ({"k": 0}, RecipeError, "k: "),
        ({"model": "x"}, RecipeError, "hf-fuse train"),
        ({"seed": 1}, RecipeError, "seed is not for kind: predictions"),
        ({"kind": "sequences", "k": 3}, RecipeError, "k is not for kind: sequences"),
        ({"kind": "sequences", "temperature": 2}, RecipeError, "temperature belongs into generation"),
        ({"kind": "sequences", "generation": {"top_p": 0.5}}, RecipeError, "top_p is for sampling"),
        ({"kind": "sequences"}, FuseError, "texts without prompts"),
        ({"teacher": "nowhere/at/all"}, CheckpointError, "nowhere/at/all"),
        ({"device": "cuda:9"}, FuseError, "cannot be used here"),
    ],
)
def test_mistakes_are_found_before_any_work(change, error, message, home, tmp_path):
    with pytest.raises(error, match=message):
        teach(recipe_of(home) | change, tmp_path / "cache")
    assert not any(tmp_path.iterdir())


def test_classes_and_foreign_folders_are_refused(home, tmp_path):
    (tmp_path / "kinds.jsonl").write_text(json.dumps({"text": "a", "label": 1}))
    with pytest.raises(FuseError, match="holds classes"):
        teach(recipe_of(home) | {"data": str(tmp_path / "kinds.jsonl")}, tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="mine: "):
            teach(recipe_of(home), tmp_path / "mine", **options)


def test_the_command(home, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(home)))
    cli.run_command(["teach", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "cache"), "--k", "4", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == len(TeacherCache(tmp_path / "cache")) and TeacherCache(tmp_path / "cache").facts.k == 4
    record = (tmp_path / "cache" / "fuse_recipe.yaml").read_text()
    assert "k: 4" in record and str(tmp_path) not in record
