"""The demo, quickly: every stage runs, its files load and can be made again, its sentences follow from its figures."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hf_fuse import demo, demo_report, demo_training
from hf_fuse.data.stdlib_text import DOMAIN_NAMES
from hf_fuse.demo import QUICK, DemoResult, print_demo, run_demo
from hf_fuse.errors import FuseError, OutputError
from hf_fuse.merge.engine import merge

EXPERTS = [f"expert-{name}" for name in DOMAIN_NAMES]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: (result, standard output, standard error)."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = run_demo(folder, quick=True)
    return result, out.getvalue(), err.getvalue()


def test_every_model_is_measured_on_every_domain(quick):
    result, _, _ = quick
    merges = [name for name, family in result.families.items() if family == "merge"]
    assert list(result.perplexities) == ["base", *EXPERTS, *merges, "mixture"] and len(merges) == 7
    for name, values in result.perplexities.items():
        assert list(values) == [*DOMAIN_NAMES, "average"]
        assert all(1 < value < 300 for value in values.values()), name
        assert values["average"] == pytest.approx(sum(values[domain] for domain in DOMAIN_NAMES) / 3)
    assert result.perplexities["mixture"]["average"] < result.perplexities["base"]["average"] < 257, "training trains"


def test_the_checkpoints_load_and_hold_nothing_of_the_trainer(quick):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, _, _ = quick
    text = "def naïve(x):\n\treturn 'ok' # ½ 日本 <|endoftext|>"
    for name in result.families:
        model = AutoModelForCausalLM.from_pretrained(result.output / name)
        tokenizer = AutoTokenizer.from_pretrained(result.output / name)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 257)
        assert tokenizer.decode(ids[0, 1:]) == text and ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.is_fast and tokenizer.model_max_length == model.config.max_position_embeddings
    assert len(tokenizer("日")["input_ids"]) == 1 + 3, "one token per byte"
    names = {path.name for path in result.output.rglob("*")}
    assert not names & {"training_args.bin", "optimizer.pt", "trainer_state.json", "scheduler.pt"}
    assert (result.output / "base" / "model.safetensors").is_file()


def test_experts_start_from_the_base_and_the_merges_are_those_of_the_engine(quick):
    folder = quick[0].output
    base, *experts = (load_file(folder / name / "model.safetensors") for name in ("base", *EXPERTS))
    merged = load_file(folder / "merged-linear" / "model.safetensors")
    moved = load_file(folder / "merged-task_arithmetic-0.5" / "model.safetensors")
    for name, weight in base.items():
        deltas = [expert[name] - weight for expert in experts]
        assert all(delta.abs().max() > 0 for delta in deltas), f"{name} was not trained"
        torch.testing.assert_close(merged[name], weight + sum(deltas) / 3)
        torch.testing.assert_close(moved[name], weight + 0.5 * sum(deltas))


@pytest.mark.parametrize("name", ["merged-dare_ties", "merged-slerp"])
def test_a_saved_recipe_makes_the_same_bytes_again(quick, tmp_path, name):
    folder = quick[0].output
    again = merge(folder / "recipes" / f"{name}.yaml", output=tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / name / "model.safetensors").read_bytes()


def test_the_record_and_the_charts_are_there(quick):
    result, _, _ = quick
    record = json.loads((result.output / "demo.json").read_text())
    assert record["finished"] is True and record["perplexity"] == result.perplexities and record["seed"] == 0
    assert record["steps"] == {"base": 12, "expert": 4, "mixture": 12}
    assert [chart.name for chart in result.charts] == ["perplexity.png", "task_vectors.png"]
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in result.charts)
    for name, row in result.cosines.items():
        assert row[name] == pytest.approx(1, abs=1e-3) and all(-1 <= value <= 1 for value in row.values())
    assert result.cosines["merged-linear"]["merged-task_arithmetic-1.0"] == pytest.approx(1, abs=1e-3)


def test_results_go_to_stdout_and_progress_to_stderr(quick):
    result, out, err = quick
    for name in result.families:
        assert name in out
    assert "the figures mean nothing" in " ".join(out.split()) and "hf-fuse merge" in out
    assert "train base" in err and "evaluate" in err
    for word in ("Warning", "Traceback", "it/s", "licence"):
        assert word not in out + err
    assert all(line == line.rstrip() or "  " in line for line in out.splitlines())


def test_the_same_seed_gives_the_same_figures(quick, tmp_path):
    result, _, _ = quick
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        again = run_demo(tmp_path / "again", quick=True)
    assert again.perplexities == result.perplexities and again.cosines == result.cosines


def test_another_seed_gives_other_weights_and_other_sequences():
    tokenizer = demo_training.byte_tokenizer(64)
    stream = torch.arange(4_000)
    first, again, other = (
        (
            demo_training.new_model(QUICK.size, tokenizer, seed).model.embed_tokens.weight,
            demo_training._sequences([stream], 1, 64, seed)[0]["input_ids"],
        )
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(left, right) for left, right in zip(first, again))
    assert not any(torch.equal(left, right) for left, right in zip(first, other))


def test_a_time_budget_decides_the_number_of_steps(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    seen = []

    def merge_all(output, *rest):
        raise Stop

    def record(model, streams, schedule, **rest):
        seen.append(schedule.steps)
        return train(model, streams, demo.Schedule(1, 1e-3), **rest)

    train = demo.train
    monkeypatch.setattr(demo, "train", record)
    monkeypatch.setattr(demo, "_merge_all", merge_all)
    monkeypatch.setattr(demo, "seconds_per_step", lambda *_: 0.5)
    with pytest.raises(Stop), contextlib.redirect_stderr(io.StringIO()):
        run_demo(tmp_path / "out", quick=True, seconds=90)
    # 12 + 3 * 4 + 12 = 36 steps would take 18 s; the budget is five times that.
    assert seen == [60, 20, 20, 20, 60]
    assert not (tmp_path / "out").exists(), "a failed run leaves nothing behind"


def test_a_step_can_be_timed():
    tokenizer = demo_training.byte_tokenizer(QUICK.size.context)
    stream = demo_training.token_stream(tokenizer, ["words " * 100], 10_000)
    assert 0 < demo_training.seconds_per_step(QUICK.size, tokenizer, stream) < 5


def test_a_stream_marks_the_beginning_of_each_document_and_stops_when_it_is_long_enough():
    tokenizer = demo_training.byte_tokenizer(64)
    mark = tokenizer.bos_token_id
    stream = demo_training.token_stream(tokenizer, ["ab", "ü", "never read"], 5)
    assert len(stream) == 6 and (stream == mark).nonzero().flatten().tolist() == [0, 3]


def test_sequences_take_the_domains_in_turn():
    short, long = torch.zeros(40, dtype=torch.long), torch.ones(4_000, dtype=torch.long)
    found = demo_training._sequences([short, long], 10, 32, seed=3)
    assert [example["input_ids"].unique().tolist() for example in found] == [[0], [1]] * 5
    assert all(len(example["labels"]) == 32 for example in found)


def test_an_existing_folder_is_refused_before_any_work(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_train_all", lambda *_: pytest.fail("work began"))
    with pytest.raises(OutputError, match="exists already. Pass --overwrite"):
        run_demo(quick[0].output, quick=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not the folder of an earlier demo"):
        run_demo(tmp_path, quick=True, overwrite=True)
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            run_demo(tmp_path / "file", quick=True, overwrite=overwrite)
    with pytest.raises(OutputError, match="can't be written"):
        run_demo(tmp_path / "file" / "below", quick=True)
    assert (tmp_path / "base" / "precious").read_text() == (tmp_path / "file").read_text() == "mine"


def test_overwriting_replaces_what_a_demo_made_and_nothing_else(quick, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(quick[0].output, folder)
    (folder / "my-merge").mkdir()
    (folder / "expert-mine").mkdir()

    def stop(output, *rest):
        assert sorted(path.name for path in output.iterdir()) == ["demo.json", "expert-mine", "my-merge"]
        assert json.loads((output / "demo.json").read_text())["finished"] is False
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_train_all", stop)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
        run_demo(folder, quick=True, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["expert-mine", "my-merge"]


@pytest.mark.parametrize(("arguments", "message"), [({"seconds": 0}, "seconds is 0"), ({"seed": -1}, "seed is -1")])
def test_impossible_arguments(tmp_path, arguments, message):
    with pytest.raises(FuseError, match=message):
        run_demo(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FuseError, match=r'pip install "hf-fuse\[plot\]"'):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_the_libraries_are_as_loud_as_before():
    from transformers.utils import logging as transformers_logging

    def state():
        return (
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            torch.get_num_threads(),
            os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"),
            logging.getLogger("hf_fuse").level,
            torch.random.get_rng_state().sum().item(),
        )

    before = state()
    with pytest.raises(RuntimeError), demo_training.quiet_and_reproducible():
        assert torch.get_num_threads() == 1
        torch.rand(7)
        raise RuntimeError
    assert state() == before


FAMILIES = {"base": "base", "expert-a": "expert", "expert-b": "expert", "merged-x": "merge", "merged-y": "merge",
            "mixture": "reference"}  # fmt: skip
HOMES = {"expert-a": "a", "expert-b": "b"}


def figures(**pairs):
    """Model -> perplexities on the domains a and b, and their average."""
    return {name.replace("_", "-"): demo_report.with_average(dict(zip("ab", pair))) for name, pair in pairs.items()}


def test_findings_when_merging_pays():
    found = demo_report.findings(
        figures(
            base=(10, 10), expert_a=(8, 13), expert_b=(12, 9),
            merged_x=(9, 9.5), merged_y=(11, 12), mixture=(8.5, 9)),
        FAMILIES, HOMES,
    )  # fmt: skip
    specialisation, gain, price, no_gain, reference = found
    assert "2 of 2 experts beat the base" in specialisation and "worse than the base in 2 of 2 cases" in specialisation
    assert "1 of 2 merges beat every single expert" in gain
    assert "merged-x, has 9.250 (-11.9 % against the best expert, expert-a; -7.5 % against the base)" in gain
    assert "+12.5 % on a, +5.6 % on b" in price and "better than the base on 2 of 2 domains" in price
    assert no_gain.endswith("on average: merged-y (+15.0 %).")
    assert "has 8.750; the best merge does not reach that (+5.7 %)" in reference


def test_findings_when_merging_does_not_pay():
    found = demo_report.findings(
        figures(
            base=(10, 10), expert_a=(9, 9), expert_b=(11, 12),
            merged_x=(10, 11), merged_y=(20, 20), mixture=(30, 30)),
        FAMILIES, HOMES,
    )  # fmt: skip
    specialisation, gain, price, no_gain, reference = found
    assert "1 of 2 experts beat the base" in specialisation and "in 1 of 2 cases" in specialisation
    assert "0 of 2 merges" in gain and "+16.7 % against the best expert, expert-a; +5.0 % against the base" in gain
    assert "-8.3 % on b" in price and "better than the base on 0 of 2 domains" in price
    assert "merged-x (+5.0 %), merged-y (+100.0 %)" in no_gain
    assert "the best merge is better than that (-65.0 %)" in reference


def test_a_merge_that_equals_the_base_is_no_gain():
    equal = figures(
        base=(10, 10), expert_a=(9, 12), expert_b=(12, 9), merged_x=(10, 10), merged_y=(9, 9), mixture=(9, 9)
    )
    assert "merged-x (+0.0 %)" in demo_report.findings(equal, FAMILIES, HOMES)[3]
    without_losers = {name: values for name, values in equal.items() if name not in ("merged-x", "mixture")}
    assert len(demo_report.findings(without_losers, FAMILIES, HOMES)) == 3


def test_the_table_fits_eighty_columns_and_marks_the_best(tmp_path):
    values = figures(base=(10, 123.4), expert_a=(8.0004, 13), expert_b=(8, 9), merged_x=(9, 9.5), merged_y=(11, 12),
                     mixture=(8.5, 9))  # fmt: skip
    result = DemoResult(
        tmp_path / "a folder",
        values,
        FAMILIES,
        {"merged-x": "some [odd] words " * 9},
        ["A sentence."],
        {},
        {},
        61.2,
        [],
    )
    table = demo_report.perplexity_table(values, FAMILIES, {})
    bold = {
        column.header: [str(cell) for cell in column.cells if getattr(cell, "style", "") == "bold"]
        for column in table.columns
    }
    assert bold == {"model": [], "a": ["8.000"], "b": ["9.000", "9.000"], "average": ["8.500"], "made from": []}
    plain = Console(file=io.StringIO(), width=80)
    print_demo(result, plain)
    lines = plain.file.getvalue().splitlines()
    rows = {line.split()[0]: line for line in lines if line.split()}
    assert rows["base"].split()[1:4] == ["10.00", "123.4", "66.70"]
    assert rows["expert-a"].split()[1:4] == ["8.000", "13.00", "10.50"]
    assert "[odd]" in rows["merged-x"] and all(len(line) <= 80 for line in lines[:12])
    assert "  - A sentence." in lines and "(61 s in all)" in plain.file.getvalue()
    assert any("hf-fuse inspect" in line and "'" in line for line in lines), "a folder with a blank is quoted"
