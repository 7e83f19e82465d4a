"""Intervals and rates of evaluation tables."""

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """95% interval of a rate seen in `count` independent trials.

    For win rates with ties counted half the variance is at most the binomial's, so that the interval is conservative;
    unlike a normal interval it is honest at 0 and 1.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    z2 = _Z95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(scores: Sequence[float], opponent: Sequence[float]) -> float:
    """Share of pairs in which `scores` is higher, ties counted half.

    Raises:
        ValueError: The two have different lengths or are empty.
    """
    pairs = list(zip(scores, opponent, strict=True))
    if not pairs:
        raise ValueError("found no pair of scores, expected at least one")
    return sum(1.0 if ours > theirs else 0.5 if ours == theirs else 0.0 for ours, theirs in pairs) / len(pairs)


def paired_difference(scores: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `scores` less `before`, prompt by prompt, and its 95% interval: 1.96 standard errors to either side.

    Raises:
        ValueError: The two have different lengths.
    """
    differences = [now - then for now, then in zip(scores, before, strict=True)]
    centre, half = mean(differences), _Z95 * standard_error(differences)
    return centre, centre - half, centre + half


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))
