"""Low-rank experts: exact where the matrices are of low rank or nothing is cut, and what is written and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import EXPERTS, MODELS, logits_of, new_experts, save_experts, stock, write_text
from tiny_models import load_weights

import hf_fuse
from hf_fuse.compress.factored_experts import FACTORS_FILE, FactoredLinear, composed, expert_matrices
from hf_fuse.compress.grouped_experts import expert_blocks
from hf_fuse.compress.methods.low_rank_experts import _prune, _Sum, kept_share
from hf_fuse.errors import FuseError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def _compress(folder: Path, text: Path, out: Path, **parameters):
    recipe = {
        "method": "low_rank_experts", "model": str(folder), "dtype": "float32",
        "calibration": {"path": str(text), "sequences": 4, "length": 32},
        "parameters": {"epochs": 1, "batch_size": 2, "rank": 2} | parameters,
    }  # fmt: skip
    return hf_fuse.compress(recipe, out)


def _lower_rank(model, rank: int) -> None:
    for block in expert_blocks(model).values():
        for module, name, _, roles in expert_matrices(block.experts):
            weight = getattr(module, name).data.view(-1, len(roles), getattr(module, name).shape[-2] // len(roles),
                                                     getattr(module, name).shape[-1])  # fmt: skip
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            values[..., rank:] = 0
            weight.copy_(left @ (values[..., None] * right))


@pytest.mark.parametrize("kind", MODELS)
def test_experts_of_low_rank_lose_nothing_when_all_rows_go(text, tmp_path, kind):
    model = new_experts(kind)
    _lower_rank(model, 2)
    made = _compress(save_experts(model, tmp_path / "model"), text, tmp_path / "out", keep=0, learning_rate=0)
    for load in (stock, hf_fuse.load_compressed):
        torch.testing.assert_close(logits_of(load(made.output).eval()), logits_of(model), atol=1e-4, rtol=1e-4)
    assert made.after["parameters"] < made.before["parameters"]


@pytest.mark.parametrize("kind", MODELS)
def test_trained_factors_compute_what_the_stock_checkpoint_does_in_less_room(text, tmp_path, kind):
    source = save_experts(new_experts(kind), tmp_path / "model")
    made = _compress(source, text, tmp_path / "out", keep=0.25, learning_rate=1e-3, epochs=2)
    light = hf_fuse.load_compressed(made.output).eval()
    torch.testing.assert_close(logits_of(light), logits_of(stock(made.output)), atol=1e-5, rtol=1e-5)
    before, after = load_weights(source), load_weights(made.output)
    factors = load_file(made.output / FACTORS_FILE)
    after = {name: value for name, value in after.items() if name not in factors}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".experts." in name}
    stems = {name.rpartition(".")[0] for name in factors}
    kept = sum(len(factors[f"{stem}.kept"]) for stem in stems)
    rows = sum(len(factors[f"{stem}.left"]) for stem in stems)
    assert len(stems) == len(changed) and kept == round(0.25 * rows)
    held = sum(factors[f"{stem}.{part}"].numel() for stem in stems for part in ("left", "right", "rows"))
    dense = sum(before[name].numel() for name in changed)
    assert made.before["parameters"] - made.after["parameters"] == dense - held > 0
    assert sum(isinstance(module, FactoredLinear) for module in light.modules()) == len(stems)


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_merged_experts_stay_merged_and_their_groups_are_factored_once(text, tmp_path, kind):
    source = save_experts(new_experts(kind), tmp_path / "model")
    recipe = {"method": "expert_merging", "model": str(source), "parameters": {"groups": 2},
              "calibration": {"path": str(text), "sequences": 4, "length": 32}}  # fmt: skip
    merged = hf_fuse.compress(recipe, tmp_path / "merged")
    made = _compress(merged.output, text, tmp_path / "out", teacher=str(source))
    after = load_weights(made.output)
    groups = json.loads((made.output / "config.json").read_text())["expert_groups"]
    assert groups == merged.facts["groups"]
    matrices = 3 if kind == "mixtral" else 2
    assert len(load_file(made.output / FACTORS_FILE)) == 4 * matrices * sum(len(set(of)) for of in groups.values())
    names = [name for name in after if ".experts." in name and ".weight" in name]
    distinct = {after[name].numpy().tobytes() for name in names}
    assert len(names) == len(groups) * EXPERTS * matrices
    assert len(distinct) == matrices * sum(len(set(of)) for of in groups.values())
    light = hf_fuse.load_compressed(made.output).eval()
    torch.testing.assert_close(logits_of(light), logits_of(stock(made.output)), atol=1e-5, rtol=1e-5)
    with pytest.raises(FuseError, match="factored already"):
        _compress(made.output, text, tmp_path / "again")


def test_half_precision_is_written_as_what_was_measured(text, tmp_path):
    source = save_experts(new_experts("mixtral").bfloat16(), tmp_path / "model")
    made = _compress(source, text, tmp_path / "out", keep=0.5, learning_rate=1e-3)
    assert {value.dtype for value in load_weights(tmp_path / "model").values()} == {torch.bfloat16}
    floats = {value.dtype for value in load_file(made.output / FACTORS_FILE).values() if value.is_floating_point()}
    assert floats == {torch.bfloat16}
    light = hf_fuse.load_compressed(made.output).eval()
    torch.testing.assert_close(logits_of(light), logits_of(stock(made.output)), atol=0.1, rtol=0.1)


def test_training_comes_nearer_to_the_teacher(text, tmp_path):
    source = save_experts(new_experts("mixtral"), tmp_path / "model")
    losses = [
        _compress(source, text, tmp_path / str(rate), keep=0.1, epochs=8, learning_rate=rate).facts["loss"]
        for rate in (0, 1e-2)
    ]
    assert losses[0]["before"] == pytest.approx(losses[1]["before"], rel=1e-4)
    assert losses[1]["after"] < losses[0]["after"]


def test_the_share_of_rows_falls_as_a_cube_between_warm_up_and_end():
    assert [kept_share(step, 100, 10, 0.2) for step in (0, 10, 60, 99)] == [1, 1, 0.2, 0.2]
    assert kept_share(35, 100, 10, 0.2) == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert kept_share(1, 1, 0, 0.2) == 0.2


def test_the_least_important_rows_of_all_matrices_go():
    sums = [_Sum(torch.zeros(1, 1, n, 1), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, n, 2)) for n in (3, 2)]
    _prune(sums, [torch.tensor([[[0.3, 0.1, 0.2]]]), torch.tensor([[[0.05, 0.4]]])], 0.4)
    assert [one.rows[0, 0, :, 0].tolist() for one in sums] == [[1, 0, 0], [0, 1]]


def test_a_factored_layer_is_its_matrix():
    torch.manual_seed(0)
    left, right, rows, kept = torch.randn(5, 2), torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1, 4])
    x = torch.randn(4, 7, 3)
    torch.testing.assert_close(FactoredLinear(left, right, rows, kept)(x), x @ composed(left, right, rows, kept).T)
    assert torch.equal(composed(left, right, rows, kept)[0], (left @ right)[0])


def test_mistakes_get_one_clear_error(text, tmp_path, tiny_family):
    source = save_experts(new_experts("mixtral"), tmp_path / "model")
    for parameters, words in (
        ({"rank": 10}, "rank is 10.*Use at most 9"),
        ({"rank": 0}, "rank"),
        ({"teacher": str(tmp_path / "nowhere")}, "nowhere"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(FuseError, match=words):
            _compress(source, text, tmp_path / "out", **parameters)
    with pytest.raises(FuseError, match="has no experts"):
        _compress(tiny_family("plain").base, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = _compress(source, text, tmp_path / "out")
    factors = load_file(made.output / FACTORS_FILE)
    name = next(name for name in factors if name.endswith("left"))
    save_file(factors | {name: factors[name] + 1}, made.output / FACTORS_FILE)
    with pytest.raises(FuseError, match="another matrix.*Remove it"):
        hf_fuse.load_compressed(made.output)
