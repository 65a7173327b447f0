"""``hf-fuse generate``: prompts from everywhere, rows to everywhere, one clear message for what can't be."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fuse
from hf_fuse.cli import run_command
from hf_fuse.decode import ensemble, proxy_tuning
from hf_fuse.decode.completions import completions
from hf_fuse.decode.methods.fusion_of_n import build_fusion_prompt, fusion_of_n
from hf_fuse.decode.recipe import load_decode_recipe
from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model
from hf_fuse.errors import CheckpointError, FuseError, RecipeError

RECIPES = Path(__file__).parents[2] / "recipes" / "decode"
PROXY = {
    "method": "proxy_tuning",
    "model": "hf-fuse-demo/base",
    "experts": "hf-fuse-demo/expert-source",
    "base_model": "hf-fuse-demo/expert-docs",
    "generation": {"max_new_tokens": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``hf-fuse-demo`` with four language models of three sizes, a reward model and a mixture."""
    import transformers as t
    from peft import get_peft_model

    root = tmp_path_factory.mktemp("decode")
    tokenizer = byte_tokenizer(4096)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for seed, name in enumerate(("base", "expert-source", "expert-docs", "expert-manual", "short", "small")):
        context = 256 if name == "short" else 4096
        size = ModelSize(hidden=16, feed_forward=24, layers=1 if name == "small" else 2, heads=2, context=context)
        model = new_model(size, tokenizer, seed=seed)
        with torch.no_grad():  # most random bytes are no text
            model.get_input_embeddings().weight[128:] = 0
        model.save_pretrained(root / "hf-fuse-demo" / name)
        tokenizer.save_pretrained(root / "hf-fuse-demo" / name)
    config = model.config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id or 0
    t.LlamaForSequenceClassification(config).save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    base = AutoModelForCausalLM.from_pretrained(root / "hf-fuse-demo" / "base")
    get_peft_model(base, hf_fuse.MixLoraConfig(r=2, num_experts=4, top_k=2)).save_pretrained(root / "mixture")
    (root / "proxy.yaml").write_text(json.dumps(PROXY))
    (root / "train.txt").write_text("Here is some text to learn from. " * 40)
    return root


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(capsys, *arguments):
    run_command(["generate", *map(str, arguments)])
    return capsys.readouterr().out


def failure(capsys, *arguments):
    with pytest.raises(SystemExit):
        run_command(["generate", *map(str, arguments)])
    said = capsys.readouterr().err.splitlines()  # datasets and transformers show progress of their own before
    assert said[-1].startswith("error: ") and not any("Traceback" in line for line in said)
    return said[-1]


def expected(prompts, **settings):
    names = (PROXY["model"], PROXY["experts"], PROXY["base_model"])
    fused = proxy_tuning(*(AutoModelForCausalLM.from_pretrained(name) for name in names))
    tokenizer = AutoTokenizer.from_pretrained(PROXY["model"])
    return [texts[0] for texts in completions(fused, tokenizer, prompts, **{"max_new_tokens": 6, **settings})]


def test_prompts_come_from_the_command_line_a_file_a_dataset_or_standard_input(capsys, monkeypatch, tmp_path):
    prompts = ["Once upon a time", "x"]
    texts = expected(prompts)
    assert len({*texts}) == 2 and all(texts)
    assert run(capsys, prompts[0], "--fuse", "proxy.yaml") == f"{texts[0]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompts[0]}\n"))
    assert run(capsys, "--fuse", "proxy.yaml") == f"{texts[0]}\n"
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    assert run(capsys, "--prompts", tmp_path / "prompts.txt", "--fuse", "proxy.yaml") == "\n---\n".join(texts) + "\n"
    rows = [{"prompt": prompt, "other": 1} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = run(capsys, "--prompts", tmp_path / "rows.jsonl", "--fuse", "proxy.yaml", "--json", "--batch_size", 1)
    assert json.loads(out) == [{"prompt": p, "completion": text} for p, text in zip(prompts, texts)]


def test_options_win_over_the_recipe_wherever_the_prompt_stands(capsys):
    longer = expected(["Once"], max_new_tokens=9)[0]
    assert run(capsys, "Once", "--fuse", "proxy.yaml", "--generation.max_new_tokens", 9) == f"{longer}\n"
    assert run(capsys, "--generation.max_new_tokens=9", "--fuse", "proxy.yaml", "Once") == f"{longer}\n"
    assert run(capsys, "--generation.max_new_tokens", 9, "Once", "--fuse", "proxy.yaml") == f"{longer}\n"
    chat = expected(["<user>Once<assistant>"])[0]
    assert run(capsys, "Once", "--fuse", "proxy.yaml", "--chat") == f"{chat}\n"


def test_sampling_repeats_with_the_seed():
    sampled = PROXY | {"generation": {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 8}}
    first, second, other = (hf_fuse.generate(sampled | {"seed": seed}, ["a", "bc"]) for seed in (1, 1, 2))
    assert first == second != other
    assert [row["prompt"] for row in first] == ["a", "a", "bc", "bc"]


def test_rows_are_written_in_one_step(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert "rows: 1" in run(capsys, "a", "--fuse", "proxy.yaml", "-o", out)
    assert json.loads(out.read_text()) == {"prompt": "a", "completion": expected(["a"])[0]}
    assert "exists" in failure(capsys, "b", "--fuse", "proxy.yaml", "-o", out)
    run(capsys, "b", "--fuse", "proxy.yaml", "-o", out, "--overwrite")
    assert json.loads(out.read_text())["prompt"] == "b" and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_is_wrong_is_told_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_fuse.decode.answers.loaded", None)  # no weight is read
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for arguments, message in (
        (("a", "--base_model", "/no/where"), "/no/where: no such folder"),
        (
            ("a", "--reward_model", "reward"),
            "proxy_tuning has no use for reward_model. It takes model, experts, base_mo",
        ),
        (("a", "--parameters.alpa", 1), "has no parameter 'alpa'. Did you mean 'alpha'?"),
        (("a", "--parameters.alpha", "much"), "alpha is 'much', expected float [-100, 100]"),
        (("a", "--method", "proxy"), "Did you mean 'proxy_tuning'?"),
        (("a", "--method", "ties"), "ties works on weights"),
        (("a", "--generation.top_q", 1), "generation: no setting is called 'top_q'. Did you mean 'top_"),
        (("a", "--generation.num_beams", -1), "num_beams is -1, expected an integer >= 1"),
        (("a", "--generation.early_stopping", "maybe"), "generation: `early_stopping` must be"),
        (("a", "--generation.temperature", "hot"), "generation: temperature is 'hot', expected a number > 0"),
        (("a", "--generation.top_p", "hot"), "generation: top_p is 'hot', expected a number from 0 to 1"),
        (("a", "--generation.do_sample", "maybe"), "generation: do_sample is 'maybe', expected true or false"),
        (("a", "--generation.eos_token_id", "x"), "generation: eos_token_id is 'x', expected a token id"),
        (("a", "--parameters.alpha", ".nan"), "alpha is nan, expected float [-100, 100]"),
        (("a", "--device", "nowhere"), "device 'nowhere'"),
        (("a", "b"), "'b' is one argument too many"),
        (("a", "--prompts", "x.txt"), "there is a prompt too"),
        (("a", "-o", "rows.txt"), "Call it rows.jsonl"),
        (("--prompts", tmp_path / "rows.jsonl"), "has no column 'prompt', but text"),
        ((" ",), "there is none, or an empty one"),
    ):
        assert message in failure(capsys, *arguments, "--fuse", "proxy.yaml")
    for change, message in (
        ({"base_model": None}, "proxy_tuning needs base_model"),
        ({"alpha": 1}, "'alpha' is a parameter of proxy_tuning. It belongs under parameters"),
        ({"max_new_tokens": 1}, "'max_new_tokens' is a setting of generate.* belongs under generation"),
        ({"modell": "x"}, "unknown key 'modell'. Did you mean 'model'?"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_decode_recipe(PROXY | change)


def test_what_only_the_models_can_tell(capsys):
    assert "not more than 4096 can be read" in failure(
        capsys, "a", "--fuse", "proxy.yaml", "--generation.max_new_tokens", 4096
    )
    with pytest.raises(FuseError, match="2 tokens, and 4998 more are asked for, but .* or lower max_length"):
        hf_fuse.generate(PROXY | {"generation": {"max_length": 5000}}, "a")
    hf_fuse.generate(PROXY, "a" * 300)
    with pytest.raises(FuseError, match="not more than 256 can be read"):
        hf_fuse.generate(PROXY | {"experts": "hf-fuse-demo/short"}, "a" * 300)
    assert "assisted" in failure(capsys, "a", "--fuse", "proxy.yaml", "--generation.assistant_early_exit", 1)
    assert "generation: " in failure(capsys, "a", "--fuse", "proxy.yaml", "--generation.num_return_sequences", 2)
    with pytest.raises(CheckpointError, match="not a causal language model"):
        hf_fuse.generate(PROXY | {"base_model": "reward"}, "a")


def test_fused_models_are_evaluated_like_one():
    from hf_fuse.perplexity import perplexity

    names = (PROXY["model"], PROXY["experts"])
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    tokenizer, text = AutoTokenizer.from_pretrained(names[0]), "Some text to score."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        p = sum(model(ids).logits.softmax(-1) for model in models)[0, :-1] / 2
    loss = -p.log().gather(-1, ids[0, 1:, None]).mean().item()
    assert perplexity(ensemble(models), tokenizer, [text]).loss == pytest.approx(loss, rel=1e-5)


def test_fusion_of_n_writes_one_answer_from_all(monkeypatch):
    asked = []

    def spy(model, tokenizer, prompts, **settings):
        texts = completions(model, tokenizer, prompts, **settings)
        asked.append((model, list(prompts), settings, texts))
        return texts

    monkeypatch.setattr("hf_fuse.decode.methods.fusion_of_n.completions", spy)
    names = ("expert-docs", "base", "small")
    fusor, *writers = models = [AutoModelForCausalLM.from_pretrained(f"hf-fuse-demo/{name}") for name in names]
    torch.manual_seed(0)
    prompts = ["Name a colour.", "Count to three."]
    rows = fusion_of_n(fusor, writers, candidates=5, rubric="short").answer(prompts, max_new_tokens=5)
    assert [call[0] for call in asked] == [models[1], models[2], fusor]
    assert [call[2].get("num_return_sequences") for call in asked] == [3, 2, None]
    for number, row in enumerate(rows):
        first, second, (_, questions, _, fused) = asked
        assert row["candidates"] == first[3][number] + second[3][number] and len({*row["candidates"]}) > 1
        assert row["prompt"] == prompts[number] and row["completion"] == fused[number][0].strip()
        assert row["best_of_n"] == row["candidates"][row["scores"].index(max(row["scores"]))]
        assert row["fusor"] == "hf-fuse-demo/expert-docs"
        for part in (prompts[number], "short", *(text.strip() for text in row["candidates"])):
            assert part in questions[number]
    orders = [[question.index(text.strip()) for text in row["candidates"]] for question, row in zip(asked[2][1], rows)]
    assert any(order != sorted(order) for order in orders)
    # The score is the mean log-probability of the candidate's tokens.
    tokenizer = AutoTokenizer.from_pretrained("hf-fuse-demo/base")
    text = rows[0]["candidates"][0]
    ids = tokenizer(prompts[0])["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_p = fusor(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = [log_p[place - 1, ids[place]].item() for place in range(len(ids) - count, len(ids))]
    assert rows[0]["scores"][0] == pytest.approx(sum(picked) / count, rel=1e-4)


def test_fused_answers_are_training_data(capsys, tmp_path):
    from hf_fuse.training_data import read_rows
    from hf_fuse.training_recipe import DataEntry

    recipe = {"method": "fusion_of_n", "model": "hf-fuse-demo/base", "parameters": {"candidates": 2}}
    (tmp_path / "fuse.yaml").write_text(json.dumps(recipe | {"generation": {"max_new_tokens": 4}}))
    (tmp_path / "prompts.txt").write_text("Name a colour.\nCount to three.\n")
    run(capsys, "--fuse", tmp_path / "fuse.yaml", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "rows.jsonl")
    rows = read_rows(DataEntry(train=str(tmp_path / "rows.jsonl")))
    assert rows.format == "completion" and len(rows.train[0].rows) == 2
    assert {"candidates", "scores", "best_of_n", "fusor"} < {*rows.train[0].rows.column_names}


def test_a_reward_model_chooses_the_best_of_n():
    recipe = {"method": "fusion_of_n", "model": "hf-fuse-demo/base", "reward_model": "reward", "chat": True,
              "parameters": {"candidates": 3}, "generation": {"max_new_tokens": 4}}  # fmt: skip
    (row,) = hf_fuse.generate(recipe, "Name a colour.")
    from transformers import AutoModelForSequenceClassification

    reward = AutoModelForSequenceClassification.from_pretrained("reward")
    tokenizer = AutoTokenizer.from_pretrained("reward")
    for text, score in zip(row["candidates"], row["scores"]):
        told = f"<user>Name a colour.<assistant>{text}<assistant>"
        ids = tokenizer(told, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            assert reward(**ids).logits.item() == pytest.approx(score, rel=1e-4)
    with pytest.raises(RecipeError, match="candidates is 2, but there are 3 models"):
        hf_fuse.generate(recipe | {"models": ["hf-fuse-demo/base"] * 3, "parameters": {"candidates": 2}}, "a")


def test_the_fusion_prompt_holds_everything_once():
    text = build_fusion_prompt("TASK", ["one", "two"], "RUBRIC")
    assert [text.count(part) for part in ("TASK", "one\n", "two\n", "RUBRIC", "### Answer")] == [1, 1, 1, 1, 2]
    assert text.index("TASK") < text.index("one\n") < text.index("two\n") < text.index("### Final answer")
    assert "RUBRIC" not in build_fusion_prompt("TASK", ["one", "two"])


def test_fusion_of_n_needs_tokenizers():
    from tiny_adapters import llama

    with pytest.raises(FuseError, match="LlamaForCausalLM: has no tokenizer beside it"):
        fusion_of_n(llama())


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_run(recipe, monkeypatch):
    changes = {"generation.max_new_tokens": 4, "dtype": "float32"}
    if recipe.stem == "scmoe":
        changes["model"] = "mixture"
    elif recipe.stem == "fusion_of_n":
        changes |= {"model": "hf-fuse-demo/base", "models": ["hf-fuse-demo/expert-docs", "hf-fuse-demo/small"]}
    elif recipe.stem == "kv_prediction":
        script = [str(RECIPES / "train_kv_prediction.py"), "hf-fuse-demo/base", "hf-fuse-demo/small", "train.txt"]
        monkeypatch.setattr(sys, "argv", [*script, "--steps", "2", "--length", "64"])
        runpy.run_path(script[0], run_name="__main__")
    (row,) = hf_fuse.generate(recipe, "Return the", overrides=changes)
    assert row["prompt"] == "Return the" and row["completion"]
