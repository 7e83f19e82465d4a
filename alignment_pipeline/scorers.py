"""Where PPO's scores come from: a reward model, a text classifier, or a function written in Python.

Each scorer is called with prompts and responses and gives a score for each response. A response was cut at its first
end token; a reward model on the trunk reads its tokens, everything else its text.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from alignment_pipeline.classifier import ClassifierScorer, whole_texts
from alignment_pipeline.errors import RecipeError
from alignment_pipeline.generation import Response
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.rollout import Prompt
from alignment_pipeline.reward import RewardEncoder, RewardScorer
from alignment_pipeline.sequences import by_length, pack


class RewardModelScorer:
    """A reward model in its own memory; it may have another tokenizer than the policy."""

    def __init__(self, scorer: RewardScorer, tokenizer: Any, batch_size: int) -> None:
        self._scorer, self._tokenizer, self._batch_size = scorer, tokenizer, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """Scores in the order of the responses."""
        return self._scorer.score_sampled(
            self._tokenizer, [prompt.text for prompt in prompts], [prompt.token_ids for prompt in prompts],
            [response.token_ids for response in responses], self._batch_size,
        )  # fmt: skip


class SharedTrunkScorer:
    """A reward model that is an adapter and a score head on the policy's own trunk."""

    def __init__(self, policy: PolicyWithValue, encoder: RewardEncoder, batch_size: int) -> None:
        self._policy, self._encoder, self._batch_size = policy, encoder, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """Scores in the order of the responses."""
        read = [self._encoder.cut([*p.token_ids, *r.token_ids]) for p, r in zip(prompts, responses, strict=True)]
        scores = torch.zeros(len(read))
        pad_id = self._encoder.tokenizer.pad_token_id
        for rows in by_length([len(row) for row in read], self._batch_size):
            batch = pack([read[row] for row in rows], [[]] * len(rows), pad_id, self._policy.device)
            scores[rows] = self._policy.reward_scores(batch).cpu()
        return scores.tolist()


class ClassifierReward:
    """A text classifier's logit for its label; it reads prompt and response as one text, by its own tokenizer."""

    def __init__(self, classifier: ClassifierScorer, tokenizer: Any, batch_size: int) -> None:
        self._classifier, self._tokenizer, self._batch_size = classifier, tokenizer, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """Scores in the order of the responses."""
        texts = whole_texts(
            self._tokenizer, [prompt.token_ids for prompt in prompts], [response.token_ids for response in responses]
        )
        return self._classifier.scores(texts, self._batch_size)


class FunctionScorer:
    """A function of two lists of texts, read from a Python file that the recipe names."""

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._function = _load_function(reference)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """Scores in the order of the responses.

        Raises:
            RecipeError: The function raised, or gave something other than one number a response.
        """
        try:
            given = self._function([prompt.text for prompt in prompts], [response.text for response in responses])
            scores = [float(score) for score in given]
        except Exception as error:
            raise RecipeError(f"ppo.reward_function: {self._reference} failed: {error!r}.") from error
        if len(scores) == len(responses):
            return scores
        raise RecipeError(
            f"ppo.reward_function: {self._reference} returned {len(scores)} scores for {len(responses)} responses, "
            "expected one for each."
        )


def _load_function(reference: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    path, _, name = reference.rpartition(":")
    if not path or not Path(path).is_file():
        raise RecipeError(
            f"ppo.reward_function: found {reference!r}, expected file.py:function with a file that exists."
        )
    specification = importlib.util.spec_from_file_location(f"reward_function_{Path(path).stem}", path)
    if specification is None or specification.loader is None:
        raise RecipeError(f"ppo.reward_function: {path} is not a Python file, expected one.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"ppo.reward_function: {path} cannot be imported: {error!r}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = ", ".join(sorted(key for key, value in vars(module).items() if callable(value))) or "none"
        raise RecipeError(
            f"ppo.reward_function: {path} has no function {name!r}, expected one of those in it: {defined}."
        )
    loaded: Callable[[list[str], list[str]], Sequence[float]] = function
    return loaded
