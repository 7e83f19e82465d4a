import math
import statistics

import pytest

from alignment_pipeline.statistics import mean, paired_difference, standard_error, wilson_interval, win_rate

ROUNDING = 1e-12  # a few operations in double precision on numbers up to 1


@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [
        # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I,
        # method 3 (score without continuity correction), four decimals.
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0000, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(rate: float, count: int, low: float, high: float) -> None:
    four_decimals = 0.5e-4
    assert wilson_interval(rate, count) == pytest.approx((low, high), abs=four_decimals)


def test_a_wilson_interval_lies_in_zero_to_one_holds_the_rate_and_mirrors() -> None:
    for count in (1, 7, 300):
        for wins in range(count + 1):
            low, high = wilson_interval(wins / count, count)
            assert 0 <= low <= wins / count + ROUNDING
            assert wins / count - ROUNDING <= high <= 1
            mirrored = wilson_interval(1 - wins / count, count)
            assert mirrored == pytest.approx((1 - high, 1 - low), abs=ROUNDING)


def test_ties_count_half() -> None:
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 1]) == (1 + 0.5 + 0 + 1) / 4
    assert win_rate([0.25], [0.25]) == 0.5
    assert win_rate([1, 2], [2, 1]) + win_rate([2, 1], [1, 2]) == 1


def test_scores_without_an_opponents_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        win_rate([1, 2], [1])
    with pytest.raises(ValueError, match="found no pair of scores"):
        win_rate([], [])


def test_the_standard_error_is_the_standard_librarys() -> None:
    values = [1.0, 4.0, 4.5, -2.0]
    assert mean(values) == statistics.fmean(values)
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, abs=ROUNDING)
    assert standard_error([3.0]) == 0.0


def test_a_paired_difference_is_of_the_same_prompts() -> None:
    # Differences 1, 2 and 3: mean 2, standard deviation 1, standard error 1 / sqrt(3).
    centre, low, high = paired_difference([11.0, 102.0, 1003.0], [10.0, 100.0, 1000.0])
    assert centre == 2
    assert (high - centre, centre - low) == pytest.approx((1.959964 / math.sqrt(3),) * 2, abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])
