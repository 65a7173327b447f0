"""A model reads several answers to a prompt and writes a better one out of them; best-of-N is computed beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_fuse.decode.completions import completions, encoded, padded, tokenizer_beside
from hf_fuse.decode.vocabularies import check_decoder, named
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2510.00931"


def fusion_of_n(
    model: nn.Module,
    models: Sequence[nn.Module] | None = None,
    reward_model: nn.Module | None = None,
    *,
    candidates: Annotated[int, Between(2, 64)] = 5,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    rubric: str | None = None,
    seed: int = 0,
) -> FusionOfN:
    """One answer written from several. (By summaries of the paper, whose code is not public: it helps from two
    candidates on, hardly more beyond seven, takes a fusor of some size, and best-of-N is better where an answer is
    either right or wrong.)

    Args:
        model: the fusor.
        models: who writes candidates, with any tokenizers; the fusor itself if there are none.
        reward_model: a classifier with one output that scores (prompt, answer) for best-of-N; without one, the
            candidate that the fusor finds likeliest per token is the best.
        candidates: how many in all; each model writes about as many.
        temperature: of the candidates' sampling.
        rubric: what a good answer is like, for the fusor.
        seed: of the order in which the fusor sees the candidates.

    Raises:
        FuseError: fewer candidates than models, models without tokenizers, or a reward model with several outputs.
    """
    models = list(models or [model])
    if candidates < len(models):
        raise RecipeError(f"candidates is {candidates}, but there are {len(models)} models. Ask for one of each.")
    for writer in (model, *models):
        check_decoder(writer)
    if reward_model is not None and reward_model.config.num_labels != 1:
        raise FuseError(f"reward_model: has {reward_model.config.num_labels} outputs, expected one score.")
    return FusionOfN(model, models, reward_model, candidates, temperature, rubric, seed)


def build_fusion_prompt(prompt: str, candidates: Sequence[str], rubric: str | None = None) -> str:
    """What the fusor is asked."""
    answers = "\n\n".join(f"### Answer {number}\n{text.strip()}" for number, text in enumerate(candidates, 1))
    wanted = f"\nA good answer is like this: {rubric.strip()}\n" if rubric else ""
    return (
        f"Below are a task and {len(candidates)} answers to it. Write one final answer that is better than each of "
        "them. Take over what is right and useful, from whichever answer it comes; leave out what is wrong, weak or "
        "beside the point, and trust no statement only because it is there. Give the final answer alone: do not speak "
        f"of the other answers.\n{wanted}\n### Task\n{prompt.strip()}\n\n{answers}\n\n### Final answer\n"
    )


class FusionOfN:
    """See :func:`fusion_of_n`."""

    def __init__(self, model, models, reward_model, candidates, temperature, rubric, seed) -> None:
        self.model, self.models, self.reward_model = model, models, reward_model
        self.counts = [len(range(number, candidates, len(models))) for number in range(len(models))]
        self.temperature, self.rubric, self.seed = temperature, rubric, seed
        self.tokenizer = tokenizer_beside(model, named(model))

    def answer(
        self, prompts: Sequence[str], *, chat: bool = False, batch_size: int = 8, **generation: Any
    ) -> list[dict[str, Any]]:
        """One row per prompt: ``prompt``, ``completion`` (fused), ``candidates`` and their ``scores``, ``best_of_n``
        (the candidate with the highest score) and ``fusor``. Rows are training data of the completion format.

        Args:
            generation: of ``generate()``, for the candidates and the fused answer; candidates are always sampled.
        """
        asked = {"chat": chat, "batch_size": batch_size}
        answers: list[list[str]] = [[] for _ in prompts]
        for model, count in zip(self.models, self.counts):
            sampling = {"do_sample": True, "temperature": self.temperature, "num_return_sequences": count}
            tokenizer = tokenizer_beside(model, named(model))
            texts = completions(model, tokenizer, prompts, **asked, **(generation | sampling))
            answers = [[*before, *new] for before, new in zip(answers, texts)]
        scores = [self._scores(prompt, texts, chat) for prompt, texts in zip(prompts, answers)]
        questions = [
            build_fusion_prompt(prompt, self._shuffled(prompt, texts), self.rubric)
            for prompt, texts in zip(prompts, answers)
        ]
        fused = completions(self.model, self.tokenizer, questions, **asked, **generation)
        return [
            {
                "prompt": prompt,
                "completion": completion.strip(),
                "candidates": texts,
                "scores": scored,
                "best_of_n": texts[scored.index(max(scored))],
                "fusor": named(self.model),
            }
            for prompt, texts, scored, (completion, *_) in zip(prompts, answers, scores, fused)
        ]

    def _shuffled(self, prompt: str, texts: list[str]) -> list[str]:
        # Models prefer the answer they read first or last, so no model's is to be always there.
        return random.Random(f"{self.seed} {prompt}").sample(texts, len(texts))

    @torch.no_grad()
    def _scores(self, prompt: str, texts: Sequence[str], chat: bool) -> list[float]:
        if self.reward_model is None:
            return [self._likelihood(encoded(self.tokenizer, prompt, chat), text) for text in texts]
        tokenizer = tokenizer_beside(self.reward_model, named(self.reward_model))
        return [self.reward_model(**self._rated(tokenizer, prompt, text)).logits.item() for text in texts]

    def _likelihood(self, prompt_ids: list[int], text: str) -> float:
        """Mean log-probability of a candidate's tokens by the fusor; -inf for an empty one."""
        answer_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not answer_ids:
            return float("-inf")
        inputs = padded([prompt_ids + answer_ids], 0, self.model.device)
        logits_NV = self.model(**inputs).logits[0, len(prompt_ids) - 1 : -1].float()
        return -F.cross_entropy(logits_NV, inputs["input_ids"][0, len(prompt_ids) :]).item()

    def _rated(self, tokenizer: Any, prompt: str, text: str) -> Any:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            given = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
        else:
            given = tokenizer(prompt, text, return_tensors="pt", truncation=True)
        return given.to(self.reward_model.device)
