"""Scores of a reward model for prompt and response: how it reads them, and how two responses compare.

Belongs here: everything that turns text into a reward model's scores, in training, evaluation and use alike. How well
the scores tell held-out pairs apart is in `reward_report`.

A reward model on the trunk reads the policy's tokens: prompt and response are encoded apart, as they are sampled. One
that started from another model has a tokenizer of its own and reads both as one text, with the special tokens that it
expects. In both, the end token follows a response that came to its end, where the tokenizer has one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignment_pipeline.classifier import padded, token_ids
from alignment_pipeline.errors import ModelError
from alignment_pipeline.limits import max_positions
from alignment_pipeline.models import MODEL_FOLDER, load_scorer, load_tokenizer
from alignment_pipeline.padding import without_padding
from alignment_pipeline.sequences import by_length, causal_lm_of
from alignment_pipeline.statistics import wilson_interval, win_rate
from alignment_pipeline.tokenization import TokenIds, encode_prompts, encode_responses

SUMMARY = "summary.json"
OWN_TOKENIZER = "own_tokenizer"
MAX_TOKENS = "max_tokens"
_NO_LIMIT = 10**9
"""A tokenizer without a limit says 1e30."""


@dataclass(frozen=True)
class RewardEncoder:
    """What a reward model reads of prompts and responses: one function for training and for scoring.

    Attributes:
        tokenizer: The trunk's, or the model's own.
        own: Whether the tokenizer is the model's own; prompt and response are then one text.
        max_tokens: Longest prompt and response, special tokens included; None: no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    own: bool
    max_tokens: int | None

    @classmethod
    def within(
        cls, tokenizer: PreTrainedTokenizerBase, positions: int | None, max_tokens: int | None, *, own: bool
    ) -> Self:
        """With the lowest limit of what was asked for, the model's positions and its own tokenizer's length."""
        limits = (max_tokens, positions, tokenizer.model_max_length if own else None)
        known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
        return cls(tokenizer, own, min(known, default=None))

    @classmethod
    def load(cls, artifact: Path, trunk: Path | None) -> Self:
        """How a reward model's artifact reads; see `RewardScorer.load`.

        Raises:
            ModelError: The tokenizer cannot be read, or the trunk is missing.
        """
        summary = _summary(artifact)
        if summary.get(OWN_TOKENIZER):
            tokenizer = AutoTokenizer.from_pretrained(artifact / MODEL_FOLDER, local_files_only=True)
            return cls.within(tokenizer, max_positions(artifact), summary[MAX_TOKENS], own=True)
        if trunk is None:
            raise ModelError(f"{artifact}: the reward model reads its trunk's tokens; expected the trunk's artifact.")
        return cls.within(load_tokenizer(trunk), max_positions(trunk), summary.get(MAX_TOKENS), own=False)

    def encode(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[TokenIds]:
        """Token ids of each prompt with its response, whole even where that is too long.

        Args:
            prompts: Texts in the recipe's template.
            responses: Texts without the end token.
            ended: Whether each response came to its end.
        """
        if self.own:
            texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            rows = token_ids(self.tokenizer, texts, None)
            return [self._with_end(row) if end else row for row, end in zip(rows, ended, strict=True)]
        answers = encode_responses(self.tokenizer, responses)
        return [
            [*prompt, *(answer if end else answer[:-1])]
            for prompt, answer, end in zip(encode_prompts(self.tokenizer, prompts), answers, ended, strict=True)
        ]

    def fits(self, row: TokenIds) -> bool:
        """Whether the model reads all of it."""
        return self.max_tokens is None or len(row) <= self.max_tokens

    def cut(self, row: TokenIds) -> TokenIds:
        """A row as it is scored: of a longer one the special tokens before it, and the end, where the response is."""
        if self.max_tokens is None or len(row) <= self.max_tokens:
            return row
        special = set(self.tokenizer.all_special_ids)
        start = next((place for place, token in enumerate(row) if token not in special), 0)
        return [*row[:start], *row[start - self.max_tokens :]]

    def _with_end(self, row: TokenIds) -> TokenIds:
        end = self.tokenizer.eos_token_id
        return row if end is None or row[-1] == end else [*row, end]


@dataclass(frozen=True)
class RewardScorer:
    """A reward model ready to score, whatever it was trained from.

    Attributes:
        model: Classifier with one output, in evaluation mode.
        encoder: How it reads text.
    """

    model: Any
    encoder: RewardEncoder

    @classmethod
    def load(cls, artifact: Path, trunk: Path | None = None, device: str = "cpu") -> Self:
        """Read a reward model's artifact; `trunk` is the artifact it was trained on, where it was trained on one.

        Raises:
            ModelError: The model or its tokenizer cannot be read, or the trunk is missing.
        """
        encoder = RewardEncoder.load(artifact, trunk)
        return cls(load_scorer(artifact, trunk, device), encoder)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
        batch_size: int = 32,
    ) -> list[float]:
        """Score of each response to its prompt, in order; without `ended` all came to their end."""
        rows = self.encoder.encode(prompts, responses, [True] * len(responses) if ended is None else ended)
        return score_rows(self.model, [self.encoder.cut(row) for row in rows], self._pad_id, batch_size)

    def score_sampled(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        batch_size: int,
    ) -> list[float]:
        """Score of each sampled response, given in the tokens of the policy, a complete one with its end token.

        A model on the trunk reads the tokens. One with a tokenizer of its own reads texts, as preference pairs hold
        them: a chat template's special tokens are part of a prompt's text, and decoding would lose them.

        Args:
            tokenizer: The policy's.
            texts: The prompts in the recipe's template.
            prompts: The same in tokens.
            responses: In tokens.
            batch_size: Rows at a time.
        """
        if not self.encoder.own:
            rows = [self.encoder.cut([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
            return score_rows(self.model, rows, self._pad_id, batch_size)
        answered = tokenizer.batch_decode(list(responses), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = [row[-1:] == [tokenizer.eos_token_id] for row in responses]
        return self.score(texts, answered, ended, batch_size)

    @property
    def _pad_id(self) -> int:
        pad_id: int = self.encoder.tokenizer.pad_token_id
        return pad_id


@dataclass(frozen=True)
class Preference:
    """How often one of two sets of responses is preferred, with the 95% interval (Wilson's); ties count half."""

    win_rate: float
    low: float
    high: float
    pairs: int

    @classmethod
    def between(cls, scores: Sequence[float], opponent: Sequence[float]) -> Self:
        """How often `scores` is above `opponent`, pair by pair."""
        rate = win_rate(scores, opponent)
        return cls(rate, *wilson_interval(rate, len(scores)), len(scores))


@torch.inference_mode()
def score_rows(model: Any, rows: Sequence[TokenIds], pad_id: int, batch_size: int) -> list[float]:
    """Score of each prompt with its response, in order; a complete response carries the end token, as in training."""
    scores: dict[int, float] = {}
    with without_padding(causal_lm_of(model).base_model):
        for numbers in by_length([len(row) for row in rows], batch_size):
            batch = padded([rows[number] for number in numbers], pad_id, str(model.device))
            scores.update(zip(numbers, model(**batch).logits[:, 0].float().tolist(), strict=True))
    return [scores[number] for number in range(len(rows))]


def _summary(artifact: Path) -> dict[str, Any]:
    """What the artifact says of itself; nothing in one that was made on the trunk before there was a summary."""
    path = artifact / SUMMARY
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return summary
