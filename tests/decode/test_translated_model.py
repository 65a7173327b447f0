"""Models with different tokenizers predict together: exactly where the tokenizers differ in numbers only."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.decode import ensemble
from hf_fuse.decode.methods.ensemble import mean_prediction
from hf_fuse.decode.translated_model import TranslatedModel
from hf_fuse.distill.vocabulary_map import vocabulary_map
from hf_fuse.errors import FuseError, RecipeError

NEW = 8


@pytest.fixture(scope="module")
def texts():
    return [domain.held_out[0] for domain in stdlib_domains(source_characters=100_000)]


def bpe(texts, size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def saved(folder, tokenizer, seed: int):
    """A tiny model loaded from a folder with its tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def fine(texts, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("fine"), bpe(texts, 290), seed=1)


@pytest.fixture(scope="module")
def coarse(texts, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("coarse"), bpe(texts, 420), seed=2)


def tokenizer_of(model):
    return transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)


def prompts(tokenizer, texts=("def find(self, sub", "the naïve", "x")):
    return tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")


def generate(model, given, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1} | settings
    return model.generate(**given, **settings)


def test_a_model_whose_tokens_have_other_numbers_is_itself(texts, tmp_path):
    """The same model with its vocabulary in another order. Its tokens are bytes: a text has one tokenization."""
    tokenizer = bpe(texts, 258)
    model = saved(tmp_path / "one", tokenizer, seed=1)
    moved = torch.cat([torch.tensor([0, 1]), 2 + torch.randperm(256)])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: int(moved[number]) for token, number in state["model"]["vocab"].items()}
    backend = Tokenizer.from_str(json.dumps(state))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (twin.model.embed_tokens, twin.lm_head):
            layer.weight[moved] = layer.weight.clone()
    twin.save_pretrained(tmp_path / "twin")
    other.save_pretrained(tmp_path / "twin")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    with pytest.raises(FuseError, match="twin: has another tokenizer than one"):
        ensemble([model, twin])
    given = prompts(tokenizer)
    # Parts of characters are no text yet, so what follows them would be predicted from less.
    parts = [number for number in range(2, 258) if not tokenizer.decode([number]).isascii()]
    for settings in ({}, {"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 3}):
        drawn = []
        for one in (model, ensemble([model, twin], align="exact")):
            torch.manual_seed(0)
            drawn.append(generate(one, given, suppress_tokens=parts, **settings))
        assert torch.equal(*drawn)


@pytest.mark.parametrize("align", ["exact", "min_ed"])
def test_what_is_generated_is_what_both_find_likely_behind_the_same_text(fine, coarse, align):
    """Step by step, everything read anew."""
    ours, theirs = tokenizer_of(fine), tokenizer_of(coarse)
    partners = vocabulary_map(theirs, ours, align).ids_V
    given = prompts(ours)
    read = []
    hook = coarse.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    fused = ensemble([fine, coarse], align=align)
    try:
        made = generate(fused, given, eos_token_id=None)[:, -NEW:]
    finally:
        hook.remove()
    assert sum(read) < 3 * (20 + 3 * NEW)  # few tokens are read a second time
    for row, ids, mask in zip(made, given["input_ids"], given["attention_mask"]):
        ids = ids[mask.bool()]
        for token in row:
            text = ours.decode(ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
            with torch.no_grad():
                own = fine(ids[None]).logits[0, -1]
                p_U = coarse(torch.tensor([theirs(text)["input_ids"]])).logits[0, -1].softmax(-1)
            p_V = torch.zeros(len(ours))
            for number, partner in enumerate(partners.tolist()):
                if partner >= 0:
                    p_V[partner] += p_U[number]
            assert mean_prediction([own, p_V.log()], [0.5, 0.5], "linear").argmax() == token
            ids = torch.cat([ids, token[None]])
    assert not torch.equal(made, generate(fine, given, eos_token_id=None)[:, -NEW:])


def test_tokens_that_new_text_changes_are_read_again(coarse, texts, tmp_path):
    """Letter by letter, as another tokenizer sees it, the last tokens keep changing."""
    letters = saved(tmp_path, bpe(texts, 258), seed=1)
    translated = TranslatedModel(coarse, tokenizer_of(coarse), letters, tokenizer_of(letters), "exact")
    text = "def find(self, substring): return"
    ids = tokenizer_of(letters)(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == len(text)
    cache, again = None, 0
    for end in range(1, len(text) + 1):
        before = [] if cache is None else cache.rows[0].own
        outputs = translated(ids[:, end - 1 : end], past_key_values=cache, logits_to_keep=1)
        cache = outputs.past_key_values
        own = tokenizer_of(coarse)(text[:end])["input_ids"]
        assert cache.rows[0].own == own and cache.rows[0].cache.get_seq_length() == len(own)
        again += before != own[: len(before)]
        anew = translated(ids[:, :end], logits_to_keep=1).logits
        torch.testing.assert_close(outputs.logits, anew, atol=1e-5, rtol=1e-4)
    assert again > 5


def test_beams_take_the_rows_along_and_windows_are_read_anew(fine, coarse, tmp_path):
    given = prompts(tokenizer_of(fine), ["def find(self, sub"])
    config = transformers.MistralConfig(**{**coarse.config.to_dict(), "model_type": "mistral", "sliding_window": 4})
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "narrow")
    tokenizer_of(coarse).save_pretrained(tmp_path / "narrow")
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    for model in (coarse, narrow):
        fused = ensemble([fine, model], align="min_ed")
        for settings in ({"num_beams": 4}, {}):
            cached = generate(fused, given, **settings)
            assert torch.equal(cached, generate(fused, given, use_cache=False, **settings))


def test_the_end_of_a_text_is_the_end_of_the_other_s(fine, coarse):
    translated = TranslatedModel(coarse, tokenizer_of(coarse), fine, tokenizer_of(fine), "exact")
    ids = prompts(tokenizer_of(fine), ["x"])["input_ids"]
    with torch.no_grad():
        logits_V = translated(ids, logits_to_keep=1).logits[0, 0]
        p_U = coarse(torch.tensor([tokenizer_of(coarse)("x")["input_ids"]])).logits[0, -1].softmax(-1)
    assert tokenizer_of(fine).eos_token_id == tokenizer_of(coarse).eos_token_id == 1
    torch.testing.assert_close(logits_V[1].exp(), p_U[1])
    exact = vocabulary_map(tokenizer_of(coarse), tokenizer_of(fine), "exact").ids_V
    torch.testing.assert_close(logits_V.exp().sum(), p_U[exact >= 0].sum())


def test_what_different_tokenizers_do_not_allow(fine, coarse):
    fused = ensemble([fine, coarse], align="exact")
    with pytest.raises(FuseError, match="has no prediction for every position"):
        fused(prompts(tokenizer_of(fine))["input_ids"])
    with pytest.raises(RecipeError, match="only for linear ensembles"):
        ensemble([fine, coarse], mode="geometric", align="exact")
    nameless = copy.deepcopy(coarse)
    nameless.config._name_or_path = ""
    with pytest.raises(FuseError, match="has no tokenizer beside it"):
        ensemble([fine, nameless], align="exact")
