"""PLeaS: the partial merge of one layer and of whole models, and its least squares against a direct solution."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from tiny_models import load_weights, seeded

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.align.least_squares import solve
from hf_fuse.merge.align.partial_merge import Split, partial_merge, split
from hf_fuse.merge.align.spaces import Part

from .align_cases import saved, shuffled, written_texts

pytestmark = pytest.mark.usefixtures("no_charts")

IDS = torch.arange(4, 16)[None]


def of_two(tmp_path, kind="llama", other=None, **parameters):
    source = saved(kind, tmp_path / "model")
    other = other or shuffled(source, tmp_path / "copy")[0]
    data = written_texts(tmp_path / "texts.jsonl")
    recipe = {"method": "pleas", "model": str(other), "reference": str(source), "data": str(data), "batch_size": 24}
    return source, hf_fuse.align(recipe | {"parameters": parameters}, tmp_path / "out")


def logits(folder, kind=t.AutoModelForCausalLM):
    return kind.from_pretrained(folder).eval()(IDS).logits.detach()


@pytest.mark.parametrize("least_squares", [False, True])
def test_a_copy_merges_to_the_model_in_any_width(tmp_path, least_squares):
    source, made = of_two(tmp_path, "qwen3", width=0.25, head_width=0.5, least_squares=least_squares)
    config = t.AutoConfig.from_pretrained(made.output)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (30, 6, 3)
    torch.testing.assert_close(logits(made.output), logits(source), atol=1e-4, rtol=1e-4)
    assert made.difference < 1e-5


def test_in_its_own_width_without_least_squares_it_is_the_mean_after_matching(tmp_path):
    other = saved("gpt2", tmp_path / "other", seed=1)
    source, made = of_two(tmp_path, "gpt2", other, match="weights", least_squares=False)
    recipe = {"method": "weight_matching", "model": str(other), "reference": str(source)}
    aligned = hf_fuse.align(recipe, tmp_path / "aligned").output
    merged = hf_fuse.merge({"method": "linear", "models": [str(source), str(aligned)]}, tmp_path / "mean")
    expected, found = load_weights(tmp_path / "mean"), load_weights(made.output)
    assert merged and expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)


def test_two_layers_kept_apart_give_the_mean_of_their_outputs(tmp_path):
    other = saved("llama", tmp_path / "other", seed=1)
    source, made = of_two(tmp_path, "llama", other, width=1.0, head_width=1.0, least_squares=False)
    state_a, merged = load_weights(source), load_weights(made.output)
    recipe = {"method": "recorded", "model": str(other), "parameters": {"alignment": str(made.output)}}
    state_b = load_weights(hf_fuse.align(recipe, tmp_path / "ordered").output)
    hidden = torch.randn(7, 16, generator=seeded(1))

    def feed_forward(state):
        gate, up, down = (state[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T

    assert merged["model.layers.1.mlp.gate_proj.weight"].shape == (48, 16)
    expected = (feed_forward(state_a) + feed_forward(state_b)) / 2
    torch.testing.assert_close(feed_forward(merged), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(feed_forward(state_a), feed_forward(state_b), atol=0.1)
    heads = [t.AutoConfig.from_pretrained(folder).num_attention_heads for folder in (source, made.output)]
    assert heads == [4, 8] and merged["model.layers.0.self_attn.o_proj.weight"].shape == (16, 32)


def test_least_squares_lowers_the_error_of_every_layer(tmp_path):
    other = saved("t5", tmp_path / "other", seed=1)
    _, made = of_two(tmp_path, "t5", other, width=0.5, head_width=0.5)
    errors = made.to_dict()["squared_errors"]
    assert len(errors) == 4 * 2 + 4 * 4 + 2 * 4  # attention of two encoder layers and of two in each decoder layer
    assert all(after <= before + 1e-9 for before, after in errors.values())
    assert made.to_dict()["squared_error_after"] < 0.8 * made.to_dict()["squared_error_before"]
    config = t.AutoConfig.from_pretrained(made.output)
    assert (config.d_ff, config.num_heads, config.d_kv) == (36, 6, 4)
    model = t.AutoModelForSeq2SeqLM.from_pretrained(made.output)
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def test_the_closed_form_is_the_direct_solution():
    random = seeded(0)
    shapes = [(30, 6), (30, 4), (6, 4)]
    inputs_NI, outputs_NO, prior_IO = (torch.randn(shape, generator=random).double() for shape in shapes)
    gram, cross = inputs_NI.T @ inputs_NI, inputs_NI.T @ outputs_NO
    direct = torch.linalg.lstsq(inputs_NI, outputs_NO).solution
    torch.testing.assert_close(solve(gram, cross, prior_IO, 0.0), direct)
    strength = 0.1 * gram.diagonal().mean()
    rows = torch.cat([inputs_NI, strength.sqrt() * torch.eye(6).double()])
    towards = torch.cat([outputs_NO, strength.sqrt() * prior_IO])
    torch.testing.assert_close(solve(gram, cross, prior_IO, 0.1), torch.linalg.lstsq(rows, towards).solution)
    torch.testing.assert_close(solve(gram, cross, prior_IO, 1e9), prior_IO, atol=1e-6, rtol=0)
    # Two samples do not tell six inputs apart: what they say nothing about stays.
    few = solve(gram_of(inputs_NI[:2]), inputs_NI[:2].T @ outputs_NO[:2], prior_IO, 0.0)
    torch.testing.assert_close(inputs_NI[:2] @ few, outputs_NO[:2])
    unseen = torch.linalg.svd(inputs_NI[:2]).Vh[2:]
    torch.testing.assert_close(unseen @ few, unseen @ prior_IO)


def gram_of(inputs_NI):
    return inputs_NI.T @ inputs_NI


def test_blocks_of_a_partial_merge():
    """Unit 0 is merged, unit 1 kept apart: [mean | the one's | the other's], half of what reads an own unit."""
    found = split(torch.tensor([0.9, 0.1]), 1)
    assert isinstance(found, Split) and found.merged.tolist() == [0] and found.apart.tolist() == [1]
    one, other = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 8]])
    makes, reads = (((Part("x", 0, 2, kind),), ()) for kind in (False, True))
    assert partial_merge(one, other, makes, {"x": found}).tolist() == [[3, 4], [3, 4], [7, 8]]
    assert partial_merge(one, other, reads, {"x": found}).tolist() == [[3, 4], [1.5, 2], [3.5, 4]]
    assert partial_merge(one, other, makes, {}).tolist() == [[3, 4], [5, 6]]


def test_widths_that_an_architecture_can_not_have_are_refused(tmp_path):
    with pytest.raises(FuseError, match="share out the width of the residual stream"):
        of_two(tmp_path, "gpt2", saved("gpt2", tmp_path / "other"), head_width=0.5)
    (tmp_path / "llama").mkdir()
    with pytest.raises(FuseError, match=r"can't have these widths \(.*not a multiple of the number of attention heads"):
        of_two(tmp_path / "llama", "llama", saved("llama", tmp_path / "llama" / "other"), head_width=0.5)
    with pytest.raises(FuseError, match="no setting of its own for the width"):
        recipe = {"method": "pleas", "model": str(saved("dinov2", tmp_path / "vision")), "parameters": {"width": 0.5}}
        hf_fuse.align(recipe | {"reference": recipe["model"], "data": "digits.parquet"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
