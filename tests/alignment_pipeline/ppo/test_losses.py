import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignment_pipeline.ppo.losses import LOG_RATIO_LIMIT, approx_kls, masked_mean, policy_losses, value_losses

FLOAT32 = 1e-6  # a few float32 operations on numbers of size 1
MASK = torch.tensor([[True, True, False, False], [True, False, False, False]])
ROW = torch.ones(1, 4, dtype=torch.bool)
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def with_garbage(values: torch.Tensor, garbage: float) -> torch.Tensor:
    return torch.where(MASK, values, garbage)


def random_inputs(seed: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(MASK.shape, generator=generator) for name in names}


def policy_case(ratios: list[float], advantages: list[float], **clips: Any) -> tuple[list[float], list[bool]]:
    """Losses and clipped tokens of one response with these ratios, ε = 0.2."""
    old_logprobs = tensor([-1.0, -2.0, -3.0, -0.5][: len(ratios)])
    mask = torch.ones_like(old_logprobs, dtype=torch.bool)
    losses, clipped = policy_losses(
        old_logprobs + tensor(ratios).log(), old_logprobs, tensor(advantages), mask, 0.2, **clips
    )
    return losses[0].tolist(), clipped[0].tolist()


def policy_gradient(ratios: list[float], advantages: list[float], **clips: Any) -> torch.Tensor:
    logprobs = tensor(ratios).log().requires_grad_()
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    losses, _ = policy_losses(logprobs, torch.zeros_like(logprobs), tensor(advantages), mask, 0.2, **clips)
    losses.sum().backward()
    assert logprobs.grad is not None
    return logprobs.grad


def test_a_mean_is_over_the_columns_that_count() -> None:
    assert masked_mean(with_garbage(torch.full(MASK.shape, 2.0), float("nan")), MASK).item() == 2.0


def test_the_clipped_losses_of_a_hand_computed_case() -> None:
    # min(3.0, 2.4) = 2.4 clipped; min(-0.5, -0.8) = -0.8 clipped; 1.1 inside; min(-1.5, -1.2) = -1.5 not clipped.
    losses, clipped = policy_case([1.5, 0.5, 1.1, 1.5], [2.0, -1.0, 1.0, -1.0])
    assert losses == pytest.approx([-2.4, 0.8, -1.1, 1.5], abs=FLOAT32)
    assert clipped == [True, True, False, False]


def test_the_clip_above_one_may_be_wider_than_the_one_below() -> None:
    # 1.25 is inside 1.4; 1.5 is cut to 1.4; 0.7 is still cut to 0.8.
    losses, clipped = policy_case([1.25, 1.5, 0.7], [1.0, 1.0, -1.0], clip_range_high=0.4)
    assert losses == pytest.approx([-1.25, -1.4, 0.8], abs=FLOAT32)
    assert clipped == [False, True, True]


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    # A = -1: 5 is cut to 3, 2 is below it. A = 1: the plain clip at 1.2 as ever. A = -2: 4 · 2 = 8 is cut to 3 · 2.
    losses, clipped = policy_case([5.0, 2.0, 5.0, 4.0], [-1.0, -1.0, 1.0, -2.0], dual_clip=3.0)
    assert losses == pytest.approx([3.0, 2.0, -1.2, 6.0], abs=FLOAT32)
    assert clipped == [True, False, True, True]


@pytest.mark.parametrize(
    ("ratios", "advantages", "clips", "flows"),
    [
        ([1.5, 0.5, 1.1, 1.5], [2.0, -1.0, 1.0, -1.0], {}, [0, 0, 1, 1]),
        ([1.25, 1.5, 0.7, 0.9], [1.0, 1.0, -1.0, -1.0], {"clip_range_high": 0.4}, [1, 0, 0, 1]),
        ([5.0, 2.0, 5.0, 4.0], [-1.0, -1.0, 1.0, -2.0], {"dual_clip": 3.0}, [0, 1, 0, 0]),
    ],
    ids=["plain", "asymmetric", "dual"],
)
def test_a_clipped_token_has_no_gradient_and_the_others_have_the_plain_surrogates(
    ratios: list[float], advantages: list[float], clips: dict[str, float], flows: list[int]
) -> None:
    expected = -tensor(ratios) * tensor(advantages) * torch.tensor([flows])
    torch.testing.assert_close(policy_gradient(ratios, advantages, **clips), expected, rtol=0, atol=FLOAT32)
    old = torch.zeros(1, 4)
    clipped = policy_losses(tensor(ratios).log(), old, tensor(advantages), ROW, 0.2, **clips)[1]
    assert clipped[0].tolist() == [not flow for flow in flows]


def test_at_ratio_one_each_loss_is_the_negative_advantage_and_nothing_is_clipped() -> None:
    inputs = random_inputs(0, "logprobs", "advantages")
    losses, clipped = policy_losses(inputs["logprobs"], inputs["logprobs"], inputs["advantages"], MASK, 0.2)
    assert torch.equal(losses, torch.where(MASK, -inputs["advantages"], 0))
    assert not clipped.any()


def test_the_clipped_losses_agree_with_a_second_implementation() -> None:
    clipped_counts = set()
    for seed in range(8):
        inputs = random_inputs(seed, "logprobs", "old", "advantages")
        losses, clipped = policy_losses(
            inputs["logprobs"], inputs["old"], inputs["advantages"], MASK, 0.3, clip_range_high=0.5, dual_clip=1.6
        )
        for row, column in MASK.nonzero().tolist():
            advantage = inputs["advantages"][row, column].item()
            ratio = math.exp(inputs["logprobs"][row, column].item() - inputs["old"][row, column].item())
            term = min(ratio * advantage, min(max(ratio, 0.7), 1.5) * advantage)
            term = max(term, 1.6 * advantage) if advantage < 0 else term
            assert losses[row, column].item() == pytest.approx(-term, abs=FLOAT32)
            assert clipped[row, column].item() == (abs(term - ratio * advantage) > FLOAT32)
        clipped_counts.add(int(clipped.sum()))
    assert len(clipped_counts) > 1  # the cases differ in how much is clipped


@pytest.mark.parametrize(("distance", "sign"), [(100.0, -1.0), (1e6, -1.0), (-100.0, 1.0)])
def test_a_far_log_ratio_is_clamped_before_its_exponential(distance: float, sign: float) -> None:
    logprobs = torch.full((1, 1), distance, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    losses, _ = policy_losses(logprobs, torch.zeros(1, 1), torch.full((1, 1), sign), one, 0.2)
    kls = approx_kls(logprobs, torch.zeros(1, 1), one)
    limited = math.copysign(LOG_RATIO_LIMIT, distance)
    # exp(20) = 4.85e8 in float32 has seven digits.
    assert losses.item() == pytest.approx(-sign * math.exp(limited), rel=FLOAT32)
    assert kls.item() == pytest.approx(math.expm1(limited) - limited, rel=FLOAT32)
    (losses + kls).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.item() == 0.0


def test_the_value_losses_of_a_hand_computed_case() -> None:
    # ε = 0.2. Value 1.5 (old 1, return 1.4): unclipped 0.01, clipped to 1.2: 0.04. Value 0.9 (old 1, return 0): 0.81
    # both. Value 3 (old 1, return 1): 4, clipped to 1.2: 0.04. Value 0.5 (old 1, return 0.6): 0.01, to 0.8: 0.04.
    values, old_values, returns = tensor([1.5, 0.9, 3.0, 0.5]), torch.ones(1, 4), tensor([1.4, 0.0, 1.0, 0.6])
    losses, clipped = value_losses(values, old_values, returns, ROW, 0.2)
    assert losses[0].tolist() == pytest.approx([0.02, 0.405, 2.0, 0.02], abs=FLOAT32)
    assert clipped[0].tolist() == [True, False, False, True]


def test_a_clipped_value_has_no_gradient_and_the_others_have_their_error() -> None:
    values = tensor([1.5, 0.9, 3.0, 0.5]).requires_grad_()
    value_losses(values, torch.ones(1, 4), tensor([1.4, 0.0, 1.0, 0.6]), ROW, 0.2)[0].sum().backward()
    torch.testing.assert_close(values.grad, tensor([0.0, 0.9, 2.0, 0.0]), rtol=0, atol=FLOAT32)


def test_values_at_their_returns_cost_nothing() -> None:
    values = random_inputs(2, "values")["values"]
    losses, clipped = value_losses(values, values, values, MASK, 0.2)
    assert (losses == 0).all() and not clipped.any()


def test_the_approximate_kl_is_k3_and_never_negative() -> None:
    # log-ratios ln 2 and -ln 2: 2 - 1 - ln 2, and 1/2 - 1 + ln 2.
    found = approx_kls(tensor([math.log(2), 0.0]), tensor([0.0, math.log(2)]), torch.ones(1, 2, dtype=torch.bool))
    assert found[0].tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5], abs=FLOAT32)
    for seed in range(5):
        inputs = random_inputs(seed, "now", "old")
        assert (approx_kls(inputs["now"], inputs["old"], MASK)[MASK] > 0).all()
        assert (approx_kls(inputs["now"], inputs["now"], MASK) == 0).all()


def test_the_approximate_kl_of_a_small_step_is_not_lost_to_rounding() -> None:
    # x²/2 at x = 1e-4; exp(x) - 1 computed plainly in float32 would have an error of 1e-7 beside 5e-9.
    found = approx_kls(torch.full((1, 1), 1e-4), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert found.item() == pytest.approx(5e-9, abs=1e-9)


def test_the_approximate_kl_is_an_unbiased_estimate_of_the_kl() -> None:
    old, now = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    exact = (old.exp() * (old - now)).sum()
    expectation = (old.exp() * approx_kls(now[None], old[None], torch.ones(1, 5, dtype=torch.bool))[0]).sum()
    assert expectation.item() == pytest.approx(exact.item(), abs=1e-12)  # five terms in double precision


Loss = Callable[..., torch.Tensor]
LOSSES: list[Loss] = [
    lambda *x: policy_losses(*x, MASK, 0.2)[0],
    lambda *x: policy_losses(*x, MASK, 0.2, 0.3, 3.0)[0],
    lambda *x: value_losses(*x, MASK, 0.2)[0],
    lambda *x: approx_kls(*x[:2], MASK),
]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("loss", LOSSES, ids=["policy", "policy, dual clip", "value", "kl"])
def test_columns_outside_the_mask_may_hold_anything_and_are_zero_in_loss_and_gradient(
    loss: Loss, garbage: float
) -> None:
    inputs = random_inputs(4, "a", "b", "c")
    found = []
    for arguments in (inputs.values(), [with_garbage(values, garbage) for values in inputs.values()]):
        first, *others = arguments
        leaf = first.detach().clone().requires_grad_()
        losses = loss(leaf, *others)
        losses.sum().backward()
        found.append((losses.detach(), leaf.grad))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
        assert (dirty[~MASK] == 0).all() and (dirty[MASK] != 0).any()
