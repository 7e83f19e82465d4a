"""The oracle scores whole resampled corpora by sacrebleu's own `corpus_score`."""

import random
import time

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from alignment_pipeline.bleu import bleu_change, corpus_bleu

EXACT = 1e-9  # the same formula in double precision
WORDS = ["def", "f", "(", "x", ")", ":", "return", "+", "1", "if", "not", "else", "for", "in", "range", "sum"]


def texts(seed: int, rows: int, share: float, references: list[str]) -> list[str]:
    """Responses that keep a share of their references' words."""
    chance = random.Random(seed)
    return [
        " ".join(word if chance.random() < share else chance.choice(WORDS) for word in references[row].split())
        for row in range(rows)
    ]


@pytest.fixture(scope="module")
def references() -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 25))) for _ in range(300)]


def test_bleu_is_that_of_sacrebleu_and_the_change_is_the_difference_of_two(references: list[str]) -> None:
    better, worse = texts(1, 300, 0.8, references), texts(2, 300, 0.5, references)
    expected = [BLEU().corpus_score(each, [references]).score for each in (better, worse)]
    assert [corpus_bleu(better, references), corpus_bleu(worse, references)] == expected
    change, low, high = bleu_change(better, worse, references, seed=0)
    assert change == pytest.approx(expected[0] - expected[1], abs=EXACT)
    assert 0 < low < change < high
    back = bleu_change(worse, better, references, seed=0)
    assert back == pytest.approx((-change, -high, -low), abs=EXACT)


def test_the_interval_is_of_the_same_draws_scored_whole(references: list[str]) -> None:
    rows = 12
    ours, theirs, references = texts(1, rows, 0.8, references), texts(2, rows, 0.6, references), references[:rows]
    drawn = np.random.default_rng(5).multinomial(rows, [1 / rows] * rows, size=1000)
    changes = []
    for counts in drawn:
        picked = np.repeat(np.arange(rows), counts)
        ours_, theirs_ = (
            BLEU().corpus_score([each[row] for row in picked], [[references[row] for row in picked]]).score
            for each in (ours, theirs)
        )
        changes.append(ours_ - theirs_)
    _, low, high = bleu_change(ours, theirs, references, seed=5)
    assert (low, high) == pytest.approx(tuple(np.quantile(changes, (0.025, 0.975))), abs=EXACT)


def test_equal_responses_have_changed_by_nothing_for_certain(references: list[str]) -> None:
    same = texts(1, 300, 0.5, references)
    assert bleu_change(same, same, references, seed=0) == (0, 0, 0)


def test_responses_without_any_match_have_a_bleu_of_nothing() -> None:
    assert bleu_change(["", ""], [" ", ""], ["a b c", "d"], seed=0) == (0, 0, 0)


def test_the_seed_decides_the_draws_and_the_draws_are_quick(references: list[str]) -> None:
    ours, theirs = texts(1, 300, 0.8, references), texts(2, 300, 0.7, references)
    started = time.process_time()
    first = bleu_change(ours, theirs, references, seed=0)
    assert time.process_time() - started < 2.0  # some 0.1 s; scoring each draw whole takes minutes
    assert bleu_change(ours, theirs, references, seed=0) == first
    assert bleu_change(ours, theirs, references, seed=1) != first
