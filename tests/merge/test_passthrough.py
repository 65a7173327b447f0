import torch

from hf_fuse import merge_state_dicts

MODEL = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()}


def test_bit_for_bit():
    assert torch.equal(merge_state_dicts([MODEL], "passthrough")["w"], MODEL["w"])


def test_scale_by_filter():
    state = {"a.o_proj.weight": torch.ones(2, 2), "a.q_proj.weight": torch.ones(2, 2)}
    scale = [{"filter": "o_proj", "value": 0}, {"value": 1}]
    merged = merge_state_dicts([state], "passthrough", parameters={"scale": scale})
    assert not merged["a.o_proj.weight"].any() and merged["a.q_proj.weight"].all()
