"""How well a reward model tells held-out pairs apart, beside what needs no reward model.

Belongs here: what is measured of the scores of pairs. The scores themselves are in `reward`.

Three rows make the report. The reward model: how often the chosen response scores higher. Length alone: how often it is
the longer one (or the shorter, as the training pairs favour). Shuffled prompts: the reward model again, each pair with
another pair's prompt; what is left of the accuracy needs no prompt, only the look of a response.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment_pipeline.preferences import PreferencePair
from alignment_pipeline.reward import RewardScorer
from alignment_pipeline.statistics import mean, wilson_interval, win_rate

_BINS = 10
PLAUSIBLE_ACCURACY = 0.95
"""People agree with one another on some 73% of pairs (InstructGPT, arXiv 2203.02155): far more is mostly a pattern."""

ScoredPair = Mapping[str, Any]
"""A row of `scores.jsonl`: {id, prompt_id, chosen_score, rejected_score, margin, shuffled_chosen_score,
shuffled_rejected_score}, the last two null where all held-out pairs have one prompt."""


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose preferences the model is about equally sure of."""

    confidence: float
    accuracy: float
    pairs: int


def score_pairs(
    scorer: RewardScorer, pairs: Sequence[PreferencePair], seed: int, batch_size: int
) -> list[dict[str, Any]]:
    """A row of `scores.jsonl` for each pair, in order."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = pair_scores(scorer, pairs, prompts, batch_size)
    others = shuffled_prompts(prompts, seed)
    nothing: tuple[Sequence[float | None], ...] = ([None] * len(pairs), [None] * len(pairs))
    shuffled = nothing if others is None else pair_scores(scorer, pairs, others, batch_size)
    return [
        {"id": pair["id"], "prompt_id": pair["prompt_id"], "chosen_score": better, "rejected_score": worse,
         "margin": better - worse, "shuffled_chosen_score": other_better, "shuffled_rejected_score": other_worse}
        for pair, better, worse, other_better, other_worse in zip(pairs, chosen, rejected, *shuffled, strict=True)
    ]  # fmt: skip


def pair_scores(
    scorer: RewardScorer, pairs: Sequence[PreferencePair], prompts: Sequence[str], batch_size: int
) -> tuple[list[float], list[float]]:
    """Scores of the chosen and of the rejected responses, each to the prompt at its place."""
    return (
        scorer.score(prompts, [p["chosen"] for p in pairs], [p["chosen_ended"] for p in pairs], batch_size),
        scorer.score(prompts, [p["rejected"] for p in pairs], [p["rejected_ended"] for p in pairs], batch_size),
    )


def shuffled_prompts(prompts: Sequence[str], seed: int) -> list[str] | None:
    """For each prompt another one of them, a derangement of the distinct prompts; None where there is only one."""
    distinct = sorted(set(prompts))
    if len(distinct) < 2:
        return None
    random.Random(seed).shuffle(distinct)
    next_of = dict(zip(distinct, [*distinct[1:], distinct[0]], strict=True))
    return [next_of[prompt] for prompt in prompts]


def length_baseline_accuracy(train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> float:
    """Held-out accuracy of preferring the longer (or the shorter) response, whichever the training pairs favour."""

    def prefers_longer(pairs: Sequence[PreferencePair]) -> float:
        return win_rate([len(pair["chosen"]) for pair in pairs], [len(pair["rejected"]) for pair in pairs])

    accuracy = prefers_longer(held_out)
    return accuracy if prefers_longer(train) >= 0.5 else 1 - accuracy


def calibration(margins: Sequence[float]) -> list[CalibrationBin]:
    """Pairs by how sure the model is: σ(|margin|), the Bradley–Terry probability of the response that it prefers.

    Ten bins of equal width from 1/2 to 1; those without a pair are left out. A margin of 0 is right half the time.
    """
    bins: list[list[float]] = [[] for _ in range(_BINS)]
    for margin in margins:
        bins[min(_BINS - 1, int((_confidence(margin) - 0.5) * 2 * _BINS))].append(margin)
    return [
        CalibrationBin(
            confidence=mean([_confidence(margin) for margin in inside]),
            accuracy=win_rate(inside, [0.0] * len(inside)),
            pairs=len(inside),
        )
        for inside in bins
        if inside
    ]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error, Σ (pairs of the bin / pairs) · |accuracy - confidence|.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3; there confidence is a classifier's highest probability.
    """
    total = sum(each.pairs for each in bins)
    return sum(each.pairs / total * abs(each.accuracy - each.confidence) for each in bins)


def report(
    scored: Sequence[ScoredPair], train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of the report, and its metrics.

    Args:
        scored: Rows of `scores.jsonl`, one for each held-out pair.
        train: Pairs that were trained on.
        held_out: Pairs that were not.
    """
    margins = [row["margin"] for row in scored]
    accuracy = win_rate([row["chosen_score"] for row in scored], [row["rejected_score"] for row in scored])
    length, error = length_baseline_accuracy(train, held_out), calibration_error(calibration(margins))
    metrics = {
        "reward/held_out_accuracy": accuracy,
        "reward/held_out_margin": mean(margins),
        "reward/calibration_error": error,
        "reward/length_baseline_accuracy": length,
    }
    table = [
        _row("reward model", accuracy, len(scored), mean_margin=mean(margins), calibration_error=error),
        _row("length alone", length, len(scored)),
    ]
    if scored[0]["shuffled_chosen_score"] is not None:
        without_prompt = win_rate(
            [row["shuffled_chosen_score"] for row in scored], [row["shuffled_rejected_score"] for row in scored]
        )
        metrics["reward/shuffled_prompt_accuracy"] = without_prompt
        table.append(_row("shuffled prompts", without_prompt, len(scored)))
    return table, metrics


def _row(
    scorer: str, accuracy: float, count: int, mean_margin: float | None = None, calibration_error: float | None = None
) -> dict[str, Any]:
    low, high = wilson_interval(accuracy, count)
    return {"scorer": scorer, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
            "mean_margin": mean_margin, "calibration_error": calibration_error}  # fmt: skip


def _confidence(margin: float) -> float:
    return 1 / (1 + math.exp(-abs(margin)))
