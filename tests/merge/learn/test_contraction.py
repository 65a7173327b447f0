"""Gradients of coefficients: contraction against autograd through merged weights, in fp64."""

import pytest
import tiny_adapters
import torch
from tiny_models import save_tokenizer
from torch.func import functional_call
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_fuse
from hf_fuse.errors import CheckpointError
from hf_fuse.merge.columns import columns
from hf_fuse.merge.contraction import Contraction
from hf_fuse.merge.learned_weights import chunk_numbers
from hf_fuse.merge.live import regions
from hf_fuse.merge.stream import Merger

IDS = torch.tensor([[5, 6, 7, 8, 4, 9], [4, 9, 11, 12, 13, 5]])


def opened(base, models, dtype=torch.float64):
    recipe = {"method": "task_arithmetic", "base_model": str(base), "models": [str(model) for model in models]}
    plan = hf_fuse.plan(recipe)
    sources = {key: parent.source for key, parent in plan.parents.items()}
    return Merger(plan.method, sources, plan.units, dtype), plan.units


def live(folder, dtype=torch.float64, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def loss_of(model, ids=IDS):
    return cross_entropy(model(ids).logits, ids)


def cross_entropy(logits_BTV, ids=IDS):
    """Not the model's own loss, which is computed in fp32."""
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def states(base, models):
    """Parameters of base and models, by live names."""
    return [dict(live(folder).named_parameters()) for folder in (base, *models)]


def by_autograd(model, base, models, units, layout, coefficients_KG, chunks=None):
    """The same gradient through one graph that holds every merged tensor."""
    origin, *others = states(base, models)
    leaf_KG = coefficients_KG.double().requires_grad_()
    merged = {}
    for name, value in origin.items():
        own = layout[name]
        merged[name] = value.detach()
        for k, other in enumerate(others):
            if own.count == 1:
                factor = leaf_KG[k, own.first]
            else:
                factor = leaf_KG[k, own.first + chunks(name, value.numel(), own.count)].view(value.shape)
            merged[name] = merged[name] + factor * (other[name] - value).detach()
    loss = cross_entropy(functional_call(model, merged, (IDS,)).logits)
    loss.backward()
    return loss.detach(), leaf_KG.grad


def start(units, layout, count, models=2, seed=0):
    return torch.rand(models, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_is_what_autograd_finds(tiny_family, kind, granularity):
    base, models = tiny_family(kind).base, tiny_family(kind).tuned
    merger, units = opened(base, models)
    layout, count = columns(units, granularity)
    coefficients_KG = start(units, layout, count)
    model = live(base)
    with Contraction(model, merger, units, layout, count) as contraction:
        contraction.write(coefficients_KG)
        loss = loss_of(model)
        loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        gradient_KG = contraction.taken_gradient()
        assert not contraction.gradient_KG.any()
    expected, expected_KG = by_autograd(live(base), base, models, units, layout, coefficients_KG)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_KG, expected_KG, rtol=1e-9, atol=1e-14)
    assert (expected_KG != 0).float().mean() > 0.9


@pytest.mark.parametrize("cut", ["slices", "scattered"])
def test_of_chunks(tiny_family, cut):
    base, models = tiny_family("llama").base, tiny_family("llama").tuned
    merger, units = opened(base, models)
    layout, count = columns(units, "chunk", chunks=5)
    assert count == 5 * len(units)
    coefficients_KG = start(units, layout, count)
    model = live(base)
    with Contraction(model, merger, units, layout, count, cut=cut, seed=3) as contraction:
        contraction.write(coefficients_KG)
        loss_of(model).backward()
        gradient_KG = contraction.taken_gradient()

    def chunks(name, numel, count):
        return chunk_numbers(name, numel, count, cut, 3, 0, numel)

    _, expected_KG = by_autograd(live(base), base, models, units, layout, coefficients_KG, chunks)
    torch.testing.assert_close(gradient_KG, expected_KG, rtol=1e-9, atol=1e-14)


def test_chunks_of_a_tensor():
    whole = chunk_numbers("a", 10, 7, "slices", 0, 0, 10)
    assert [int(n) for n in whole.bincount()] == [len(part) for part in torch.tensor_split(torch.arange(10), 7)]
    assert torch.equal(whole.sort().values, whole)
    drawn = chunk_numbers("a", 30000, 3, "scattered", 0, 0, 30000)
    assert torch.equal(drawn[777:2001], chunk_numbers("a", 30000, 3, "scattered", 0, 777, 2001))
    assert (drawn.bincount(minlength=3) / 30000 - 1 / 3).abs().max() < 0.02
    assert not torch.equal(drawn, chunk_numbers("b", 30000, 3, "scattered", 0, 0, 30000))


def test_experts_that_the_files_keep_apart(tmp_path):
    """A stack of experts is one parameter, and each of its stored tensors has a coefficient of its own."""
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, experts_implementation="eager",
    )  # fmt: skip
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(tmp_path / str(seed))
        MixtralForCausalLM(config).save_pretrained(folders[-1])
    merger, units = opened(folders[0], folders[1:])
    layout, count = columns(units, "tensor")
    model = live(folders[0], experts_implementation="eager")
    coefficients_KG = start(units, layout, count)
    with Contraction(model, merger, units, layout, count) as contraction:
        for k in (0, 1):  # e_k is model k
            contraction.write(torch.nn.functional.one_hot(torch.tensor(k), 2)[:, None].expand(2, count))
            other = live(folders[k + 1], experts_implementation="eager")
            torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
        contraction.write(coefficients_KG)
        loss_of(model).backward()
        gradient_KG = contraction.taken_gradient()
        name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
        step, own = 0.02, layout[name].first  # norms compute in fp32
        found = []
        for sign in (1, -1):
            moved_KG = coefficients_KG.clone()
            moved_KG[1, own] += sign * step
            contraction.write(moved_KG)
            found.append(loss_of(model).item())
    assert gradient_KG[1, own].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.01)


def test_lora_experts_without_their_product(tmp_path, monkeypatch):
    """<G, s B A> = s <B' G, A>: the dense change is never read, and the numbers are those of dense experts."""
    model = tiny_adapters.llama()
    base, _ = tiny_adapters.save(tmp_path, model)
    save_tokenizer(base)
    folders, dense = [], []
    for seed in (1, 2):
        peft = tiny_adapters.train(
            tiny_adapters.llama(), seed, target_modules=["q_proj", "down_proj"] if seed == 1 else ["q_proj", "up_proj"]
        )
        folders.append(tmp_path / f"lora-{seed}")
        peft.save_pretrained(folders[-1])
        dense.append(tmp_path / f"dense-{seed}")
        peft.double().merge_and_unload().save_pretrained(dense[-1])
    found = []
    for models in (dense, folders):
        if models is folders:
            monkeypatch.setattr("hf_fuse.checkpoint.adapter.BoundAdapter.delta", None)
        merger, units = opened(base, models)
        layout, count = columns(units, "tensor")
        live_model = live(base)
        with Contraction(live_model, merger, units, layout, count) as contraction:
            contraction.write(start(units, layout, count))
            loss_of(live_model).backward()
            found.append((contraction.taken_gradient(), live_model(IDS).logits.detach()))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert found[1][0].count_nonzero() == 2 * 4, "two modules of two layers, for each of two adapters"


def test_accumulation_checkpointing_and_bfloat16(tiny_family):
    base, models = tiny_family("llama").base, tiny_family("llama").tuned
    merger, units = opened(base, models, torch.float32)
    layout, count = columns(units, "tensor")
    coefficients_KG = start(units, layout, count)
    found = {}
    for way in ("plain", "parts", "checkpointed", "bfloat16"):
        model = live(base, torch.bfloat16 if way == "bfloat16" else torch.float32)
        if way == "checkpointed":
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Contraction(model, merger, units, layout, count) as contraction:
            contraction.write(coefficients_KG)
            for ids in IDS.split(1) if way == "parts" else [IDS]:
                (loss_of(model, ids) / (2 if way == "parts" else 1)).backward()
            found[way] = contraction.taken_gradient()
    assert found["bfloat16"].dtype == torch.float32
    torch.testing.assert_close(found["parts"], found["plain"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["checkpointed"], found["plain"])
    cosine = torch.nn.functional.cosine_similarity(found["bfloat16"].flatten(), found["plain"].flatten(), 0)
    assert cosine > 0.99


def test_what_is_not_learned_gets_no_gradient_and_what_is_unchanged_is_not_written(tiny_family):
    base, models = tiny_family("llama").base, tiny_family("llama").tuned
    merger, units = opened(base, models)
    chunks = {unit.name: 2 for unit in units if "mlp" in unit.name}
    layout, count = columns(units, "chunk", chunks=chunks)
    model = live(base)
    with Contraction(model, merger, units, layout, count) as contraction:
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert wanted == set(chunks)
        coefficients_KG = torch.zeros(2, count)
        contraction.write(coefficients_KG)
        for name, value in live(base).named_parameters():
            assert torch.equal(value, model.get_parameter(name)), "all zero is the base"
        model.model.norm.weight.data.fill_(7)
        coefficients_KG[0, layout["model.layers.0.mlp.up_proj.weight"].first] = 1
        contraction.write(coefficients_KG)
        assert model.model.norm.weight.eq(7).all()
        contraction.write(coefficients_KG, everything=True)
        assert not model.model.norm.weight.eq(7).any()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_change_and_watch(tiny_family):
    """A mask on the elements of task vectors, as another estimator learns it."""
    base, models = tiny_family("llama").base, tiny_family("llama").tuned
    merger, units = opened(base, models)
    layout, count = columns(units, "task")
    random = torch.Generator().manual_seed(0)
    masks = {unit.name: torch.rand(unit.numel, generator=random, dtype=torch.float64) for unit in units}
    seen = {unit.name: torch.zeros(unit.numel, dtype=torch.float64) for unit in units}
    coefficients_KG = torch.tensor([[0.4], [0.7]], dtype=torch.float64)

    def change(unit, start, deltas_KN):
        return deltas_KN * masks[unit.name][start : start + deltas_KN.shape[1]]

    def watch(unit, start, gradient_N, deltas_KN):
        seen[unit.name][start : start + len(gradient_N)] += gradient_N * (coefficients_KG[:, 0] @ deltas_KN)

    model = live(base)
    with Contraction(model, merger, units, layout, count, change=change, watch=watch) as contraction:
        contraction.write(coefficients_KG)
        loss_of(model).backward()
        gradient_KG = contraction.taken_gradient()
    origin, *others = states(base, models)
    leaves = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    leaf_KG = coefficients_KG.clone().requires_grad_()
    merged = {
        name: value.detach()
        + sum(leaf_KG[k, 0] * leaves[name].view(value.shape) * (o[name] - value).detach() for k, o in enumerate(others))
        for name, value in origin.items()
    }
    cross_entropy(functional_call(live(base), merged, (IDS,)).logits).backward()
    torch.testing.assert_close(gradient_KG, leaf_KG.grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(seen[name], leaf.grad, rtol=1e-9, atol=1e-14)


def test_a_parameter_that_nothing_fills_is_named(tiny_family):
    model = live(tiny_family("llama").base)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        regions(model, shapes)
    inside = {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)}
    assert set(regions(model, shapes, inside)) == set(shapes)
