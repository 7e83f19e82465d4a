"""Shape key as in `alignment_pipeline.ppo.advantages`."""

import pytest
import torch

from alignment_pipeline.ppo.advantages import gae, whiten

# Double precision, sums of up to thirty terms of size 1 to 10.
ROUNDING = 1e-12
NAN = float("nan")
# A prompt of one and of three tokens, responses of four, one and three, padding on the right.
MASK = torch.tensor(
    [
        [False, True, True, True, True, False],
        [False, False, False, True, False, False],
        [False, False, False, True, True, True],
    ]
)


def random_pair(seed: int, mask: torch.Tensor = MASK) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    return first, second


def rows_of(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_advantages_of_a_hand_computed_case() -> None:
    # γ = 0.5, λ = 0.5, rewards 1, 2 and values 4, 8: δ = 1 + 0.5·8 - 4 = 1 and 2 - 8 = -6; A = 1 + 0.25·(-6) and -6.
    mask = torch.tensor([[False, True, True, False]])
    rewards, values = torch.tensor([[NAN, 1.0, 2.0, NAN]]), torch.tensor([[NAN, 4.0, 8.0, NAN]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.0, -0.5, -6.0, 0.0]]
    assert returns.tolist() == [[0.0, 3.5, 2.0, 0.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.5, 1e-9)])
@pytest.mark.parametrize("lengths", [None, (7, 1, 4, 30, 12)], ids=["anywhere in the row", "from the first column"])
def test_advantages_are_the_papers_double_sum(
    gamma: float, gae_lambda: float, lengths: tuple[int, ...] | None
) -> None:
    mask = MASK if lengths is None else torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards, values = random_pair(3, mask)
    expected = torch.zeros_like(rewards)
    for row, columns in enumerate(rows_of(mask)):
        value_at = {column: values[row, column].item() for column in columns}
        deltas = [
            rewards[row, column].item() + gamma * value_at.get(column + 1, 0.0) - value_at[column] for column in columns
        ]
        for start, column in enumerate(columns):
            expected[row, column] = sum(
                (gamma * gae_lambda) ** power * delta for power, delta in enumerate(deltas[start:])
            )
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8)])
def test_advantages_are_the_weighted_mean_of_n_step_advantages(gamma: float, gae_lambda: float) -> None:
    """Second implementation: (1 - λ) Σ λ^(n-1) A^(n), the rest of the weight on the Monte Carlo one."""
    rewards, values = random_pair(4)
    advantages, _ = gae(rewards, values, MASK, gamma, gae_lambda)
    for row, columns in enumerate(rows_of(MASK)):
        r, v = rewards[row, columns], torch.cat([values[row, columns], torch.zeros(1).double()])
        for start, column in enumerate(columns):
            left = len(columns) - start
            n_step = [
                sum(gamma**k * r[start + k] for k in range(n)) + gamma**n * v[start + n] - v[start]
                for n in range(1, left + 1)
            ]
            weights = [(1 - gae_lambda) * gae_lambda ** (n - 1) for n in range(1, left)] + [gae_lambda ** (left - 1)]
            expected = sum(weight * advantage for weight, advantage in zip(weights, n_step, strict=True))
            assert advantages[row, column].item() == pytest.approx(expected.item(), abs=ROUNDING)


def test_without_discounts_returns_are_the_rewards_to_go() -> None:
    rewards, values = random_pair(5)
    _, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    to_go = torch.where(MASK, torch.where(MASK, rewards, 0).flip(1).cumsum(1).flip(1), 0)
    close(returns, to_go)


def test_a_perfect_value_function_leaves_no_advantage() -> None:
    rewards, _ = random_pair(6)
    values = torch.where(MASK, torch.where(MASK, rewards, 0).flip(1).cumsum(1).flip(1), 0)
    advantages, _ = gae(rewards, values, MASK, gamma=1.0, gae_lambda=0.95)
    close(advantages, torch.zeros_like(advantages))


def test_advantages_ignore_what_stands_outside_the_mask_and_are_zero_there() -> None:
    rewards, values = random_pair(7)
    clean = gae(rewards, values, MASK, 0.9, 0.95)
    dirty = gae(torch.where(MASK, rewards, NAN), torch.where(MASK, values, NAN), MASK, 0.9, 0.95)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours[~MASK] == 0).all()


def test_more_padding_changes_no_advantage() -> None:
    rewards, values = random_pair(8)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    wide = [torch.cat([x, torch.ones(3, 4).double()], 1) for x in (rewards, values)]
    for short, long in zip(
        gae(rewards, values, MASK, 0.9, 0.95), gae(*wide, torch.cat([MASK, nothing], 1), 0.9, 0.95), strict=True
    ):
        assert torch.equal(long[:, : MASK.shape[1]], short)


def test_whitened_values_have_mean_zero_and_variance_one_over_the_columns_that_count() -> None:
    values = 7 + 3 * random_pair(9)[0]
    whitened = whiten(torch.where(MASK, values, NAN), MASK)
    counted = whitened[MASK]
    epsilon = 1e-8  # added to the variance, which is about 9 here
    assert counted.mean().item() == pytest.approx(0, abs=ROUNDING)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=epsilon)
    assert (whitened[~MASK] == 0).all()
    assert torch.equal(counted.argsort(), values[MASK].argsort())


def test_equal_values_are_whitened_to_zero() -> None:
    whitened = whiten(torch.full(MASK.shape, 3.0), MASK)
    assert (whitened == 0).all()


def test_rewards_are_whitened_to_variance_one_and_keep_their_mean() -> None:
    rewards = 7 + 3 * random_pair(10)[0]
    scaled = whiten(torch.where(MASK, rewards, NAN), MASK, shift_mean=False)
    assert scaled[MASK].mean().item() == pytest.approx(rewards[MASK].mean().item(), abs=ROUNDING)
    assert scaled[MASK].var(unbiased=False).item() == pytest.approx(1, abs=1e-8)  # the epsilon of the variance
    assert (scaled[~MASK] == 0).all()
