"""Shape key as in `alignment_pipeline.ppo.rewards`."""

import math
import statistics

import pytest
import torch

from alignment_pipeline.ppo.rewards import (
    KL_LOG_RATIO_LIMIT,
    KlEstimator,
    ScoreStatistics,
    adapted_kl_coef,
    last_column,
    token_kls,
    token_rewards,
    with_missing_end,
)

ROUNDING = 1e-12  # a few double-precision operations on numbers of size 1 to 10
NAN = float("nan")
MASK = torch.tensor([[True, True, True, True], [True, False, False, False], [True, True, True, False]])


def random_pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *MASK.shape, generator=generator, dtype=torch.float64)
    return first, second


def kl_at(log_ratio: float, estimator: KlEstimator) -> float:
    logprobs = torch.tensor([[log_ratio - 3.0]], dtype=torch.float64)
    kls = token_kls(logprobs, torch.full((1, 1), -3.0).double(), torch.ones(1, 1, dtype=torch.bool), estimator)
    return kls.item()


@pytest.mark.parametrize(
    ("estimator", "at_ln_2", "at_minus_ln_2"),
    [
        ("k1", math.log(2), -math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)),
    ],
)
def test_the_kl_estimators_of_hand_computed_cases(
    estimator: KlEstimator, at_ln_2: float, at_minus_ln_2: float
) -> None:
    assert kl_at(math.log(2), estimator) == pytest.approx(at_ln_2, abs=ROUNDING)
    assert kl_at(-math.log(2), estimator) == pytest.approx(at_minus_ln_2, abs=ROUNDING)
    assert kl_at(0.0, estimator) == 0.0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_kl_as_their_expectation_under_the_policy(estimator: KlEstimator) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        policy, reference = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
        kls = token_kls(policy, reference, torch.ones(1, 7, dtype=torch.bool), estimator)
        exact = (policy.exp() * (policy - reference)).sum()
        assert (policy.exp() * kls).sum().item() == pytest.approx(exact.item(), abs=ROUNDING)


def test_k3_and_k2_are_never_negative_and_k1_is() -> None:
    logprobs, ref_logprobs = random_pair(0)
    for estimator in ("k2", "k3"):
        assert (token_kls(logprobs, ref_logprobs, MASK, estimator)[MASK] > 0).all()
    assert (token_kls(logprobs, ref_logprobs, MASK, "k1")[MASK] < 0).any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_log_ratio_is_clamped_in_the_penalty(estimator: KlEstimator) -> None:
    assert kl_at(1e6, estimator) == kl_at(KL_LOG_RATIO_LIMIT, estimator)
    assert kl_at(-1e6, estimator) == kl_at(-KL_LOG_RATIO_LIMIT, estimator)
    assert kl_at(-9.0, estimator) != kl_at(-KL_LOG_RATIO_LIMIT, estimator)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kls_ignore_what_stands_outside_the_mask_and_are_zero_there(estimator: KlEstimator) -> None:
    logprobs, ref_logprobs = random_pair(1)
    clean = token_kls(logprobs, ref_logprobs, MASK, estimator)
    dirty = token_kls(torch.where(MASK, logprobs, NAN), torch.where(MASK, ref_logprobs, -math.inf), MASK, estimator)
    assert torch.equal(clean, dirty)
    assert (clean[~MASK] == 0).all()


def test_the_score_is_on_the_last_response_token_and_the_kl_penalty_on_each() -> None:
    kls, _ = random_pair(2)
    scores = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    rewards = token_rewards(scores, kls, MASK, kl_coef=0.5)
    expected = [
        [-0.5 * kls[0, 0], -0.5 * kls[0, 1], -0.5 * kls[0, 2], 1 - 0.5 * kls[0, 3]],
        [-2 - 0.5 * kls[1, 0], 0, 0, 0],
        [-0.5 * kls[2, 0], -0.5 * kls[2, 1], 3 - 0.5 * kls[2, 2], 0],
    ]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=ROUNDING)
    assert torch.equal(token_rewards(scores, torch.where(MASK, kls, NAN), MASK, kl_coef=0.5), rewards)


def test_without_a_kl_penalty_only_the_score_is_left() -> None:
    rewards = token_rewards(torch.tensor([1.0, -2.0, 3.0]).double(), random_pair(3)[0], MASK, kl_coef=0.0)
    assert rewards[0, 3] == 1 and rewards[1, 0] == -2 and rewards[2, 2] == 3
    assert rewards.count_nonzero() == 3


def test_the_last_column_is_that_of_the_last_response_token() -> None:
    assert last_column(MASK).tolist() == [3, 0, 2]
    assert last_column(torch.tensor([[False, True, True, False]])).tolist() == [2]


def test_a_response_without_its_end_pays_for_it() -> None:
    scores, ended = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert with_missing_end(scores, ended, 0.5).tolist() == [1.0, 1.5, -3.5]
    assert with_missing_end(scores, ended, 0.0).tolist() == scores.tolist()


def test_score_statistics_are_those_of_all_scores_however_they_came() -> None:
    scores = (1000 + 3 * torch.randn(50, generator=torch.Generator().manual_seed(0))).double()
    parts = ScoreStatistics()
    for part in scores.split([1, 8, 20, 21]):
        parts = parts.including(part)
    whole = scores.tolist()
    assert parts.count == 50
    assert parts.mean == pytest.approx(statistics.fmean(whole), rel=ROUNDING)
    assert parts.sum_of_squares == pytest.approx(50 * statistics.pvariance(whole), rel=1e-9)  # the mean is 300 spreads
    normalised = parts.normalised(scores)
    expected = [(score - statistics.fmean(whole)) / statistics.pstdev(whole) for score in whole]
    # The deviation's epsilon is 3e-9 of it.
    assert normalised.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_equal_scores_are_normalised_to_zero_and_not_divided_by_nothing() -> None:
    scores = torch.full((4,), 2.5)
    assert ScoreStatistics().including(scores).normalised(scores).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("kl_nats", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # a tenth above
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # far above: a fifth at most
        (-60.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_the_kl_coefficient_follows_the_proportional_controller(kl_nats: float, expected: float) -> None:
    found = adapted_kl_coef(0.1, kl_nats, target_nats=6.0, episodes=64, horizon=1000)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_brings_a_kl_that_falls_with_it_to_the_target() -> None:
    """A policy whose KL is 1 / coefficient: the target 4 is at 0.25, from both sides."""
    for start in (0.02, 3.0):
        kl_coef = start
        for _ in range(400):
            kl_coef = adapted_kl_coef(kl_coef, 1 / kl_coef, target_nats=4.0, episodes=64, horizon=640)
        # The fixed point: each step takes a fiftieth of what is left, and 400 of them leave nothing.
        assert 1 / kl_coef == pytest.approx(4.0, rel=1e-3)
