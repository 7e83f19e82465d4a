import pytest

from alignment_pipeline.diversity import distinct, repetition


def test_distinct_counts_different_grams_of_all_responses_over_all_tokens() -> None:
    responses = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct(responses, 1) == 3 / 7
    assert distinct(responses, 2) == 2 / 7  # (1, 2) and (2, 1); none goes from one response to the next
    assert distinct([[], []], 2) == 0


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ([1, 2, 3, 4, 5, 6], 0),
        ([1, 2, 3], 0),
        ([], 0),
        ([7] * 8, 4 / 5),  # five 4-grams, all alike
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_stood_there_before(response: list[int], share: float) -> None:
    assert repetition(response) == pytest.approx(share, abs=1e-12)
