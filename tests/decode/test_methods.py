"""What each method makes of logits, and of routers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_adapters import llama
from torch import tensor

from hf_fuse import MixLoraConfig, registry
from hf_fuse.decode import scmoe
from hf_fuse.decode.methods.dynamic_logits_fusion import best_move, moved_as_far
from hf_fuse.decode.methods.ensemble import ensemble, mean_prediction
from hf_fuse.decode.methods.proxy_tuning import shifted
from hf_fuse.decode.methods.scmoe import contrasted, routing_of_rank
from hf_fuse.errors import FuseError, RecipeError

GRID = [step / 10 for step in range(21)]


def test_ensembles_average_probabilities_or_their_logarithms():
    one, other = tensor([0.9, 0.1, 0.0]).log(), tensor([0.1, 0.4, 0.5]).log() + 3
    linear = mean_prediction([one, other], [0.75, 0.25], "linear").softmax(-1)
    torch.testing.assert_close(linear, tensor([0.7, 0.175, 0.125]))
    geometric = mean_prediction([one, other], [0.5, 0.5], "geometric").softmax(-1)
    torch.testing.assert_close(geometric, tensor([0.6, 0.4, 0.0]))  # sqrt(.09) to sqrt(.04)
    assert mean_prediction([one, other], [0.0, 1.0], "geometric").isfinite().all()
    for mode in ("linear", "geometric"):
        torch.testing.assert_close(mean_prediction([other, other], [0.3, 0.7], mode), other)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_weights_that_are_none(weights):
    with pytest.raises(RecipeError, match="expected 2 numbers >= 0"):
        ensemble([llama(), llama()], weights=weights)


def test_proxy_tuning_adds_what_experts_learned():
    large, base, one, two = torch.randn(4, 2, 7)
    torch.testing.assert_close(shifted([large, base, one, two], 0.5), large + 0.5 * (one - base) + 0.5 * (two - base))
    assert torch.equal(shifted([large, base, base], 1.0), large)
    assert torch.equal(shifted([large, base, one], 0.0), large)


def test_dynamic_fusion_finds_the_example_of_the_paper_s_objective():
    large, base, expert = tensor([2.0, 1.5, 0.0]), tensor([1.0, 1.0, 0.5]), tensor([0.5, 2.0, 0.5])
    cost, strength, _ = best_move([large, base, expert], GRID)
    assert strength.item() == pytest.approx(0.9)
    costs = [objective(large, base, [expert], a * (expert - base)) for a in GRID]
    assert cost.item() == pytest.approx(min(costs), rel=1e-4) and costs.index(min(costs)) == 9
    torch.testing.assert_close(moved_as_far([large, base, expert], GRID), large + 0.9 * (expert - base))


def objective(large, base, experts, move):
    """As the paper writes it."""
    p, q, moved = (logits.softmax(-1) for logits in (large, base, large + move))

    def divergence(a, b):
        return (a * (a / b).log()).sum()

    total = 0
    for expert in experts:
        e = expert.softmax(-1)
        total += (divergence(moved, p) - divergence(e, q)) ** 2 + (divergence(p, moved) - divergence(q, e)) ** 2
    return total.item()


def test_dynamic_fusion_at_its_ends():
    torch.manual_seed(0)
    large, expert = torch.randn(2, 4, 3, 30)
    _, strength, _ = best_move([large, large, expert], GRID)
    assert (strength == 1).all()  # the large model is the small one, so it has to move as far
    assert torch.equal(moved_as_far([large, expert, expert], GRID), large)  # the expert has learned nothing


def test_dynamic_fusion_chooses_one_of_several_experts_for_each_token():
    torch.manual_seed(0)
    large, base, one, two = torch.randn(4, 5, 12)
    cost, strength, chosen = best_move([large, base, one, two], GRID)
    for row in range(5):
        tried = {
            (number, a): objective(large[row], base[row], [one[row], two[row]], a * (expert[row] - base[row]))
            for number, expert in enumerate((one, two))
            for a in GRID
        }
        number, a = min(tried, key=tried.get)
        assert (chosen[row].item(), strength[row].item()) == (number, pytest.approx(a))
        assert cost[row].item() == pytest.approx(tried[number, a], rel=1e-4)
        moved = large[row] + a * ((one, two)[number][row] - base[row])
        torch.testing.assert_close(moved_as_far([large, base, one, two], GRID)[row], moved)
    assert chosen.unique().numel() == 2


def test_self_contrast_of_the_example():
    usual, weak = tensor([3.0, 2.8, 0.0]), tensor([3.5, 1.0, 0.0])
    found = contrasted([usual, weak], beta=0.5, alpha=0.1)
    torch.testing.assert_close(found, tensor([2.75, 3.7, -torch.inf]))
    assert usual.argmax() == 0 and found.argmax() == 1
    torch.testing.assert_close(contrasted([usual, weak], beta=0.0, alpha=0.1), tensor([3.0, 2.8, -torch.inf]))
    torch.testing.assert_close(contrasted([usual, usual], beta=0.9, alpha=0.1), tensor([3.0, 2.8, -torch.inf]))
    assert contrasted([usual, weak], beta=0.5, alpha=1.0).isfinite().tolist() == [True, False, False]


def mixture(kind: str):
    import transformers as t

    torch.manual_seed(0)
    common = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32, "num_experts_per_tok": 2,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **common))
    elif kind == "qwen":
        model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, head_dim=8, **common))
    elif kind == "olmoe":
        model = t.OlmoeForCausalLM(t.OlmoeConfig(num_experts=4, **common))
    else:
        from peft import get_peft_model

        config = MixLoraConfig(r=4, num_experts=4, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
        model = get_peft_model(llama(), config)
    # Random routers and experts of the usual size hardly change the logits.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("gate.weight", "experts", "router", "lora")):
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe", "mixlora"])
def test_self_contrast_with_two_caches_is_that_of_running_both_routings_anew(kind):
    model = mixture(kind)
    fused = scmoe(model, beta=2.0, alpha=0.001)
    ids = torch.randint(4, 40, (1, 5))
    row = ids[0]
    for _ in range(6):
        with torch.no_grad():
            usual = model(row[None]).logits[:, -1]
            with routing_of_rank(model, 2):
                weak = model(row[None]).logits[:, -1]
        assert not torch.allclose(usual, weak)
        row = torch.cat([row, contrasted([usual, weak], 2.0, 0.001)[0].argmax()[None]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **settings)[0], row)
    plain = model.generate(ids, **settings)
    assert torch.equal(scmoe(model, beta=0.0).generate(ids, **settings), plain)
    assert torch.equal(scmoe(model, beta=2.0, alpha=1.0).generate(ids, **settings), plain)


def test_the_weak_routing_uses_one_expert_with_weight_one():
    model = mixture("mixtral")
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(7, 16)
    usual_logits, _, usual = router(hidden)
    with routing_of_rank(model, 2):
        logits, weights, chosen = router(hidden)
    assert torch.equal(weights, torch.ones(7, 1)) and torch.equal(logits, usual_logits)
    assert torch.equal(chosen[:, 0], logits.argsort(-1, descending=True)[:, 2])
    assert not (usual == chosen).any()
    assert torch.equal(router(hidden)[2], usual)  # the hook is gone


def test_self_contrast_needs_experts():
    with pytest.raises(FuseError, match="no routers as Mixtral's"):
        scmoe(llama())
    with pytest.raises(FuseError, match="weak_rank is 4, but .* has 4 experts. Use 0 to 3"):
        scmoe(mixture("mixtral"), weak_rank=4)


def test_every_method_says_what_it_does():
    assert registry.names("decode") == [
        "dynamic_logits_fusion", "ensemble", "fusion_of_n", "kv_prediction", "proxy_tuning", "scmoe",
    ]  # fmt: skip
    for name in registry.names("decode"):
        method = registry.get("decode", name)
        assert method.summary.endswith(".") and method.options
