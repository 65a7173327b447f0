"""Every method on models of other kinds than decoders of text: by tensor names and shapes alone."""

from __future__ import annotations

import copy

import pytest
import torch
from checks_merge import assert_same, count_of, method_names, run
from torch import Tensor

from hf_fuse import merge_state_dicts

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("bert", "t5", "vit", "clip", "mixtral")


def build(kind: str):
    import transformers as t

    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(vocab_size=40, max_position_embeddings=16, **SMALL))
    if kind == "t5":
        config = t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        return t.T5ForConditionalGeneration(config)
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**vision, num_labels=5))
    if kind == "clip":
        text = t.CLIPTextConfig(vocab_size=40, max_position_embeddings=16, **SMALL)
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=t.CLIPVisionConfig(**vision), projection_dim=8))
    config = t.MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SMALL)
    return t.MixtralForCausalLM(config)


def run_forward(kind: str, model) -> Tensor:
    model.eval()
    ids, image = torch.arange(6)[None], torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    inputs = {
        "t5": {"input_ids": ids, "decoder_input_ids": ids},
        "vit": {"pixel_values": image},
        "clip": {"input_ids": ids, "pixel_values": image},
    }.get(kind, {"input_ids": ids})
    with torch.no_grad():
        found = model(**inputs)
    return found.logits_per_image if kind == "clip" else found.logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_gives_a_model_that_runs(kind):
    torch.manual_seed(0)
    model = build(kind)
    base = copy.deepcopy(model.state_dict())
    tuned = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        one = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
        tuned.append(one.state_dict())
    before = run_forward(kind, model)
    target = copy.deepcopy(model)
    for name in method_names():
        merged = run(name, base, tuned[: count_of(name)], workers=1)
        assert merged.keys() == base.keys(), name
        for key, tensor in merged.items():
            assert tensor.dtype == base[key].dtype and tensor.shape == base[key].shape, (name, key)
            if not tensor.is_floating_point():
                assert torch.equal(tensor, base[key]), (name, key)
        target.load_state_dict(merged)
        after = run_forward(kind, target)
        assert after.isfinite().all() and not torch.equal(after, before), name


def test_tied_weights_of_a_state_dict_are_merged_once():
    """Two names of the same memory: one result, counted once where the whole model is measured, drawn for once."""
    torch.manual_seed(0)
    base = build("t5").state_dict()
    names = [name for name in base if base[name].data_ptr() == base["shared.weight"].data_ptr()]
    assert len(names) >= 3
    tuned = []
    for seed in range(2):
        torch.manual_seed(1 + seed)
        tuned.append(build("t5").state_dict())
    for method, parameters in (("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5})):
        merged = merge_state_dicts(tuned, method, base=base, parameters=parameters)
        assert all(merged[name].data_ptr() == merged["shared.weight"].data_ptr() for name in names)
        alone = [{key: value for key, value in state.items() if key not in names[1:]} for state in (base, *tuned)]
        expected = merge_state_dicts(alone[1:], method, base=alone[0], parameters=parameters)
        assert_same({key: merged[key] for key in expected}, expected)
    untied = {name: value.clone() for name, value in tuned[1].items()}  # then every name has its own numbers
    merged = merge_state_dicts([tuned[0], untied], "linear")
    assert merged["shared.weight"].data_ptr() != merged[names[1]].data_ptr()


# --- experts stored as one stack -------------------------------------------------------------------------

STACK = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS, ROWS, COLUMNS = 3, 10, 16


@pytest.fixture(scope="module")
def stacks() -> list[Tensor]:
    """A base and two models' experts, ``[E, M, N]``."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(EXPERTS, ROWS, COLUMNS, generator=random)
    return [base, *(base + 0.1 * torch.randn(base.shape, generator=random) for _ in range(2))]


@pytest.mark.parametrize(
    ("method", "parameters", "post"),
    [
        ("tsv_m", {}, None), ("iso_c", {}, None), ("iso_cts", {}, None), ("opcm", {}, None),
        ("model_stock", {"rows": True}, None), ("nuslerp", {"axis": "rows"}, None),
        ("nuslerp", {"axis": "columns"}, None), ("task_arithmetic", {}, "subspace_boosting"),
    ],
)  # fmt: skip
def test_a_stack_of_experts_is_merged_matrix_by_matrix(stacks, method, parameters, post):
    base, *tuned = ({STACK: stack} for stack in stacks)
    merged = merge_state_dicts(tuned, method, base=base, parameters=parameters, post=post)[STACK]
    singles = [{f"e{number}.weight": matrix for number, matrix in enumerate(stack)} for stack in stacks]
    expected = merge_state_dicts(singles[1:], method, base=singles[0], parameters=parameters, post=post)
    assert torch.equal(merged, torch.stack([expected[f"e{number}.weight"] for number in range(EXPERTS)]))


@pytest.mark.parametrize("method", ["della", "della_linear", "arcee_fusion", "widen"])
def test_rows_of_a_stack_are_those_of_its_matrices(stacks, method):
    stacks = stacks[:2] if method == "arcee_fusion" else stacks
    base, *tuned = ({STACK: stack} for stack in stacks)
    merged = merge_state_dicts(tuned, method, base=base)[STACK]
    base, *tuned = ({STACK: stack.reshape(-1, COLUMNS)} for stack in stacks)  # the same draws: they go by the name
    assert torch.equal(merged.reshape(-1, COLUMNS), merge_state_dicts(tuned, method, base=base)[STACK])
