"""The model of Twin-Merging: its mixes are those of the store, sample by sample; its router tells tasks apart."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from tiny_adapters import bert
from tiny_models import Family, transformers_family

import hf_fuse
from hf_fuse import TwinModel, train_router
from hf_fuse.errors import CheckpointError, FuseError

TASKS = ["one", "two"]
KINDS = {"llama": t.AutoModelForCausalLM, "llama_tied": t.AutoModelForCausalLM, "gpt2": t.AutoModelForCausalLM,
         "vit": t.AutoModelForImageClassification}  # fmt: skip
IDS = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Family] = {}

    def build(kind: str) -> Family:
        if kind not in made:
            made[kind] = transformers_family(kind, tmp_path_factory.mktemp(kind))
            for path, seed in zip(made[kind].tuned, (5, 6)):  # far enough apart to be told apart
                model = KINDS[kind].from_pretrained(path)
                random = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
                model.save_pretrained(path)
        return made[kind]

    return build


def _store(family: Family, out, **options):
    recipe = {"method": "task_arithmetic", "base_model": str(family.base), "parameters": {"lambda": 0.3},
              "models": [str(path) for path in family.tuned]}  # fmt: skip
    return hf_fuse.store("twin", recipe, out, tasks=TASKS, **options)


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@torch.no_grad()
def _logits(model, kind: str = "llama", **options) -> torch.Tensor:
    return model(**_inputs(kind), **options).logits


@pytest.mark.parametrize("kind", KINDS)
def test_whole_differences_give_each_fine_tune_and_their_mean(families, tmp_path, kind):
    family = families(kind)
    model = TwinModel.from_store(_store(family, tmp_path / "store", density=1.0))
    tuned = [KINDS[kind].from_pretrained(path).eval() for path in family.tuned]
    for task, one in zip(TASKS, tuned):
        torch.testing.assert_close(
            _logits(model, kind, task_weights={task: 1.0}), _logits(one, kind), rtol=1e-3, atol=1e-3
        )
    mean = KINDS[kind].from_pretrained(family.tuned[0]).eval()
    with torch.no_grad():
        for own, other in zip(mean.parameters(), tuned[1].parameters()):
            own.lerp_(other, 0.5)
    uniform = {"one": 0.5, "two": 0.5}
    torch.testing.assert_close(_logits(model, kind, task_weights=uniform), _logits(mean, kind), rtol=1e-3, atol=1e-3)
    shared = KINDS[kind].from_pretrained(tmp_path / "store" / "shared").eval()
    assert torch.equal(_logits(model, kind, task_weights={}), _logits(shared, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_own_mix_and_all_survive_saving(families, tmp_path, kind):
    store = _store(families(kind), tmp_path / "store", density=0.3)
    model = TwinModel.from_store(store)
    weights = torch.tensor([[0.9, 0.1], [0.0, 1.0], [-0.5, 2.0]])
    found = _logits(model, kind, task_weights=weights)
    for row, (one, two) in enumerate(weights.tolist()):
        folder = hf_fuse.extract(store, tmp_path / f"{row}", weights={"one": one, "two": two})
        rebuilt = _logits(KINDS[kind].from_pretrained(folder).eval(), kind)
        torch.testing.assert_close(found[row], rebuilt[row], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for value in model.router.state_dict().values():
            value.add_(1)
    model.save_pretrained(tmp_path / "saved")
    loaded = TwinModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(_logits(loaded, kind, task_weights=weights), found)
    assert torch.equal(_logits(loaded, kind), _logits(model, kind))
    tied = kind in ("llama_tied", "gpt2")
    if "llama" in kind or tied:
        assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied


def test_the_router_learns_and_its_weights_stay_while_tokens_are_generated(families, tmp_path):
    model = TwinModel.from_store(_store(families("llama"), tmp_path / "store", density=0.5))
    low, high = (
        torch.randint(a, b, (40, 6), generator=torch.Generator().manual_seed(a)) for a, b in ((4, 14), (18, 30))
    )
    merged = {name: value.clone() for name, value in model.model.state_dict().items()}
    examples = {"one": [{"input_ids": low}], "two": [{"input_ids": high[:20]}, {"input_ids": high[20:]}]}
    assert train_router(model, examples, epochs=40, learning_rate=1e-2) >= 0.8
    assert all(torch.equal(value, merged[name]) for name, value in model.model.state_dict().items())
    prompt = torch.stack([low[0], high[0]])
    weights = model.task_weights({"input_ids": prompt})
    assert weights.argmax(1).tolist() == [0, 1]
    # Step by step with a cache, in one go, and with fixed weights and no cache.
    tokens = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids, cache, step = prompt, None, prompt
    with torch.no_grad():
        for _ in range(5):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            again = model(input_ids=ids, task_weights=weights).logits[:, -1:]
            torch.testing.assert_close(out.logits[:, -1:], again, rtol=1e-4, atol=1e-4)
            model(input_ids=prompt)  # so that the next step's prompt is the last one again
            ids = torch.cat([ids, step], 1)
    assert torch.equal(tokens, ids)
    beams = model.generate(input_ids=prompt, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    alone = model.generate(input_ids=prompt[:1], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    assert torch.equal(beams[:1], alone)


def test_padding_does_not_reach_the_router(families, tmp_path):
    model = TwinModel.from_store(_store(families("llama"), tmp_path / "store"))
    alone = model.features({"input_ids": IDS[:1]})
    padded = torch.cat([IDS[:1], torch.full((1, 4), 3)], 1)
    mask = torch.tensor([[1] * 7 + [0] * 4])
    torch.testing.assert_close(model.features({"input_ids": padded, "attention_mask": mask}), alone)


def test_half_precision_and_classifiers(tmp_path):
    family = Family(tmp_path / "base", [tmp_path / "a", tmp_path / "b"])
    for seed, path in enumerate(family.all):
        model = bert()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * seed * torch.randn_like(parameter))
        model.save_pretrained(path)
    model = TwinModel.from_store(_store(family, tmp_path / "store"), dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16 and model.router[0].weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = TwinModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert loaded.router[0].weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_layers_that_mix_the_samples_are_refused(tmp_path):
    """T5 adds its position bias to all samples alike."""
    family = transformers_family("t5", tmp_path / "t5")
    with pytest.raises(FuseError, match="not one row per sample.*Extract one model per mix"):
        TwinModel.from_store(_store(family, tmp_path / "store"))


def test_mistakes_get_one_clear_error(families, tmp_path):
    store = _store(families("llama"), tmp_path / "store")
    with pytest.raises(FuseError, match="store.json"):
        TwinModel.from_store(tmp_path)
    model = TwinModel.from_store(store)
    for weights, words in (
        ({"three": 1}, "no task 'three'.*one, two"),
        ([[1.0, 0.0]], r"\[1, 2\], expected.* 3 samples"),
    ):
        with pytest.raises(FuseError, match=words):
            model(input_ids=IDS, task_weights=weights)
    batch = [{"input_ids": IDS}]
    with pytest.raises(FuseError, match="each task"):
        train_router(model, {"one": batch})
    with pytest.raises(FuseError, match="two has 3, expected at least 4"):
        train_router(model, {"one": batch * 2, "two": batch})
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        model(input_ids=IDS[:1])
    with pytest.raises(FuseError, match="another prompt"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_a_damaged_store_is_refused_in_one_sentence(families, tmp_path):
    store = _store(families("llama"), tmp_path / "store", density=1.0)
    file = sorted(store.glob("expert-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=file.name):
        TwinModel.from_store(store)
