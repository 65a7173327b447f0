"""Fused generation: the same tokens as by running all models anew for each, at one position per token and model."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_adapters import gpt2, llama, train

from hf_fuse.decode import FusedModels, dynamic_logits_fusion, ensemble, proxy_tuning
from hf_fuse.errors import FuseError

NEW = 8


@pytest.fixture(scope="module")
def models():
    return [llama(seed=seed).eval() for seed in range(3)]


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(0)
    ids = torch.randint(4, 40, (3, 6))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, prompts, **settings):
    settings = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, "do_sample": False} | settings
    return model.generate(**prompts, **settings)


def step_by_step(models, fuse, prompts):
    """Greedy decoding without any cache: each row alone, without padding, all of it anew for each token."""
    rows = []
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"]):
        row = ids[mask.bool()]
        for _ in range(NEW):
            with torch.no_grad():
                logits = [model(row[None]).logits[:, -1:].float() for model in models]
            row = torch.cat([row, fuse(logits)[0, -1].argmax()[None]])
        rows.append(row[-NEW:])
    return torch.stack(rows)


def fusions(models):
    a, b, c = models
    return {
        "linear": ensemble(models, weights=[1, 2, 3]),
        "geometric": ensemble(models, mode="geometric"),
        "proxy": proxy_tuning(a, b, c),
        "dynamic": dynamic_logits_fusion(a, [b, c], c),
    }


@pytest.mark.parametrize("name", ["linear", "geometric", "proxy", "dynamic"])
def test_generation_with_caches_is_that_of_running_all_models_anew(models, prompts, name):
    fused = fusions(models)[name]
    cached = generate(fused, prompts)[:, -NEW:]
    assert torch.equal(cached, step_by_step(fused.models, fused.fuse, prompts))
    assert torch.equal(cached, generate(fused, prompts, use_cache=False)[:, -NEW:])
    assert not torch.equal(cached, generate(models[0], prompts)[:, -NEW:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"num_beams": 3},
        {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
    ],
)
def test_a_model_with_itself_is_itself(models, prompts, settings):
    def drawn(model):
        torch.manual_seed(1)
        return generate(model, prompts, **settings)

    expected = drawn(models[0])
    for mode in ("linear", "geometric"):
        assert torch.equal(drawn(ensemble([models[0], copy.deepcopy(models[0])], mode=mode)), expected)
    assert torch.equal(drawn(proxy_tuning(*models, alpha=0)), expected)


def test_beams_take_the_caches_of_all_models_along(models, prompts):
    fused = ensemble(models)
    settings = {"num_beams": 4, "length_penalty": 0.0}
    # Without a cache there is nothing to reorder.
    assert torch.equal(generate(fused, prompts, **settings), generate(fused, prompts, use_cache=False, **settings))


def test_each_new_token_costs_one_position_per_model(models, prompts):
    read = []
    hooks = [
        model.register_forward_pre_hook(
            lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        for model in models
    ]
    try:
        generate(ensemble(models), prompts)
    finally:
        for hook in hooks:
            hook.remove()
    assert read == [6] * 3 + [1] * 3 * (NEW - 1)


def test_temperature_comes_after_the_fusion(models, prompts):
    made = generate(
        proxy_tuning(*models), prompts, do_sample=True, temperature=0.5, top_k=0, output_scores=True,
        output_logits=True, return_dict_in_generate=True, max_new_tokens=2,
    )  # fmt: skip
    position = prompts["attention_mask"].cumsum(-1) - 1
    with torch.no_grad():
        large, expert, base = (model(**prompts, position_ids=position.clamp(min=0)).logits[:, -1] for model in models)
    torch.testing.assert_close(made.logits[0], large + expert - base)
    torch.testing.assert_close(made.scores[0], (large + expert - base) / 0.5)


def test_generation_goes_on_from_a_returned_cache(models, prompts):
    fused = ensemble(models)
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True}
    first = generate(fused, prompts, **settings)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    more = {"input_ids": first.sequences, "attention_mask": mask}
    second = generate(fused, more, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, generate(fused, prompts))


def test_the_forward_pass_gives_all_positions(models):
    ids = torch.randint(4, 40, (2, 5))
    with torch.no_grad():
        whole = ensemble(models, weights=[2, 1, 1])(ids).logits
        probabilities = [model(ids).logits.softmax(-1) for model in models]
        last = ensemble(models, weights=[2, 1, 1])(ids, logits_to_keep=2).logits
    torch.testing.assert_close(whole.softmax(-1), (2 * probabilities[0] + probabilities[1] + probabilities[2]) / 4)
    torch.testing.assert_close(last, whole[:, -2:])


def test_models_of_different_families_and_adapters_go_together(models, prompts):
    adapted = train(copy.deepcopy(models[0]), target_modules=["q_proj", "v_proj"]).eval()
    fused = proxy_tuning(gpt2().eval(), adapted, models[0])
    assert torch.equal(generate(fused, prompts)[:, -NEW:], step_by_step(fused.models, fused.fuse, prompts))
    with torch.no_grad():
        ids = prompts["input_ids"]
        assert torch.equal(FusedModels([adapted], lambda logits: logits[0])(ids).logits, adapted(ids).logits)


def wider(model, rows):
    """The same model with rows of padding in its vocabulary, which would win if they could."""
    copied = copy.deepcopy(model)
    copied.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        copied.lm_head.weight[40:] = 100.0
    return copied


def beside(model, tokenizer, folder):
    """The model as loaded from a folder with its tokenizer."""
    model = copy.deepcopy(model)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def small_tokenizer(changed=False):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(40)]
    if changed:
        words[7], words[8] = words[8], words[7]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


@pytest.mark.parametrize("larger", [0, 1])
def test_padding_rows_of_the_vocabulary_are_never_chosen(models, prompts, tmp_path, larger):
    given = [models[0], models[1]]
    given[larger] = wider(given[larger], 64)
    fused = ensemble([beside(model, small_tokenizer(), tmp_path / str(n)) for n, model in enumerate(given)])
    assert fused.vocabulary == 40
    with torch.no_grad():
        logits = fused(prompts["input_ids"]).logits
    assert logits.shape[-1] == (40 if larger else 64) and (logits[..., 40:] == -torch.inf).all()
    assert torch.equal(generate(fused, prompts), generate(ensemble(models[:2]), prompts))


def test_vocabularies_that_differ_need_known_tokenizers(models):
    with pytest.raises(FuseError, match="40 and 64 entries.*has none beside it"):
        ensemble([models[0], wider(models[1], 64)])


def test_other_tokenizers_are_refused(models, tmp_path):
    ours = beside(models[0], small_tokenizer(), tmp_path / "ours")
    theirs = beside(models[1], small_tokenizer(changed=True), tmp_path / "theirs")
    with pytest.raises(FuseError, match="theirs: has another tokenizer than ours.*'w[78]' is [78] instead of [78]"):
        ensemble([ours, theirs])


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(models, tmp_path):
    narrow = llama(seed=4)
    narrow.resize_token_embeddings(39)
    given = [beside(model, small_tokenizer(), tmp_path / str(n)) for n, model in enumerate((models[0], narrow))]
    with pytest.raises(FuseError, match="39 entries, but the tokenizer has 40"):
        ensemble(given)


def test_a_checkpoint_s_own_wish_for_a_cache_is_no_obstacle(models, prompts):
    wishful = copy.deepcopy(models[0])
    wishful.generation_config.cache_implementation = "static"
    assert torch.equal(generate(ensemble([wishful, models[1]]), prompts), generate(ensemble(models[:2]), prompts))


def test_what_several_models_cannot_do_is_refused(models, prompts):
    from tiny_adapters import bert, t5

    fused = ensemble(models)
    for setting in (
        {"assistant_model": models[1]},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"output_attentions": True},
    ):
        with pytest.raises(FuseError, match=f"{next(iter(setting))}: not possible with fused models"):
            generate(fused, prompts, **setting)
    alone = generate(models[0], prompts, return_dict_in_generate=True).past_key_values
    with pytest.raises(FuseError, match="DynamicCache, which is the cache of one model"):
        fused(prompts["input_ids"], past_key_values=alone)
    for other in (t5(), bert()):
        with pytest.raises(FuseError, match="Expected a decoder-only language model"):
            ensemble([models[0], other])
