"""Corpus BLEU (sacrebleu's defaults), and its change between two sets of responses to the same prompts.

BLEU is no mean over responses. The interval of a change is a paired bootstrap's: prompts are drawn with replacement,
both corpora are scored on the same draw, and the interval has 95% of the differences. Of each response only its counts
(matching and possible n-grams, lengths) are needed for that, which are taken once.

Source: Koehn 2004, https://aclanthology.org/W04-3250; BLEU's counts and smoothing are sacrebleu's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

_RESAMPLES = 1000
_ORDER = 4
_SENTENCES = BLEU(effective_order=True)  # for its counts; the order does not change them, and without it warns


def corpus_bleu(responses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of responses with one reference each, from 0 to 100."""
    return float(BLEU(effective_order=False).corpus_score(responses, [references]).score)


def bleu_change(
    responses: Sequence[str], before: Sequence[str], references: Sequence[str], seed: int
) -> tuple[float, float, float]:
    """BLEU of `responses` less that of `before`, and the paired bootstrap's 95% interval.

    Args:
        responses: One a prompt.
        before: Other responses to the same prompts.
        references: Of the same prompts.
        seed: Of the bootstrap's draws.
    """
    ours, theirs = _counts(responses, references), _counts(before, references)
    rows = len(references)
    # How often each prompt is in each draw, (resamples, prompts).
    drawn = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=_RESAMPLES)
    changes = [_bleu(our) - _bleu(their) for our, their in zip(drawn @ ours, drawn @ theirs, strict=True)]
    low, high = np.quantile(changes, (0.025, 0.975))
    return _bleu(ours.sum(0)) - _bleu(theirs.sum(0)), float(low), float(high)


def _counts(responses: Sequence[str], references: Sequence[str]) -> Any:
    """What BLEU is computed from, (B, 10): response and reference length, matching and all n-grams of each order."""
    scores = [
        _SENTENCES.sentence_score(response, [reference])
        for response, reference in zip(responses, references, strict=True)
    ]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])


def _bleu(counts: Any) -> float:
    """BLEU of summed counts (10,)."""
    values = counts.tolist()
    score = BLEU.compute_bleu(
        correct=values[2 : 2 + _ORDER], total=values[2 + _ORDER :], sys_len=values[0], ref_len=values[1],
        smooth_method="exp",
    )  # fmt: skip
    return float(score.score)
