import math

import pytest
import torch

from alignment_pipeline.ppo.losses import approx_kl, masked_mean, policy_loss, value_loss

FLOAT32 = 1e-6  # a few float32 operations on numbers of size 1
MASK = torch.tensor([[False, True, True, False], [False, False, True, False]])
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def with_garbage(values: torch.Tensor, garbage: float) -> torch.Tensor:
    return torch.where(MASK, values, garbage)


def random_inputs(seed: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(MASK.shape, generator=generator) for name in names}


def test_a_mean_is_over_the_columns_that_count() -> None:
    assert masked_mean(with_garbage(torch.full(MASK.shape, 2.0), float("nan")), MASK).item() == 2.0


def test_the_clipped_loss_of_a_hand_computed_case() -> None:
    # Ratios 1.5, 0.5, 1.1, 1.5 with advantages 2, -1, 1, -1 and ε = 0.2:
    # min(3.0, 2.4) = 2.4 clipped; min(-0.5, -0.8) = -0.8 clipped; 1.1 inside; min(-1.5, -1.2) = -1.5 not clipped.
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratios, advantages = tensor([1.5, 0.5, 1.1, 1.5]), tensor([2.0, -1.0, 1.0, -1.0])
    old_logprobs = tensor([-1.0, -2.0, -3.0, -0.5])
    loss, clip_fraction = policy_loss(old_logprobs + ratios.log(), old_logprobs, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(2.4 - 0.8 + 1.1 - 1.5) / 4, abs=FLOAT32)
    assert clip_fraction.item() == 0.5


def test_a_clipped_token_has_no_gradient_and_the_others_have_the_plain_surrogates() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratios, advantages = tensor([1.5, 0.5, 1.1, 1.5]), tensor([2.0, -1.0, 1.0, -1.0])
    logprobs = ratios.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, 0.2)[0].backward()
    expected = -(ratios * advantages) / 4 * tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(logprobs.grad, expected, rtol=0, atol=FLOAT32)


def test_at_ratio_one_the_loss_is_the_negative_mean_advantage_and_nothing_is_clipped() -> None:
    inputs = random_inputs(0, "logprobs", "advantages")
    loss, clip_fraction = policy_loss(inputs["logprobs"], inputs["logprobs"], inputs["advantages"], MASK, 0.2)
    assert loss.item() == pytest.approx(-inputs["advantages"][MASK].mean().item(), abs=FLOAT32)
    assert clip_fraction.item() == 0.0


def test_the_clipped_loss_agrees_with_a_second_implementation() -> None:
    shares = set()
    for seed in range(8):
        inputs = random_inputs(seed, "logprobs", "old", "advantages")
        loss, clip_fraction = policy_loss(inputs["logprobs"], inputs["old"], inputs["advantages"], MASK, 0.3)
        terms, clipped = [], 0
        for row, column in MASK.nonzero().tolist():
            advantage = inputs["advantages"][row, column].item()
            ratio = math.exp(inputs["logprobs"][row, column].item() - inputs["old"][row, column].item())
            terms.append(min(ratio * advantage, min(max(ratio, 0.7), 1.3) * advantage))
            clipped += terms[-1] != ratio * advantage
        assert loss.item() == pytest.approx(-sum(terms) / len(terms), abs=FLOAT32)
        assert clip_fraction.item() == pytest.approx(clipped / len(terms), abs=FLOAT32)
        shares.add(clipped)
    assert len(shares) > 1  # the cases differ in how much is clipped


def test_the_value_loss_of_a_hand_computed_case() -> None:
    # ε = 0.2. Value 1.5 (old 1, return 1.4): unclipped 0.01, clipped to 1.2: 0.04. Value 0.9 (old 1, return 0): 0.81
    # both. Value 3 (old 1, return 1): 4, clipped to 1.2: 0.04.
    mask = torch.ones(1, 3, dtype=torch.bool)
    values, old_values, returns = tensor([1.5, 0.9, 3.0]), torch.ones(1, 3), tensor([1.4, 0.0, 1.0])
    loss = value_loss(values, old_values, returns, mask, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.04 + 0.81 + 4.0) / 3, abs=FLOAT32)


def test_values_at_their_returns_cost_nothing() -> None:
    values = random_inputs(2, "values")["values"]
    assert value_loss(values, values, values, MASK, 0.2).item() == 0.0


def test_the_approximate_kl_is_k3_and_never_negative() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    # log-ratios ln 2 and -ln 2: (2 - 1 - ln 2 + 1/2 - 1 + ln 2) / 2
    found = approx_kl(tensor([math.log(2), 0.0]), tensor([0.0, math.log(2)]), mask)
    assert found.item() == pytest.approx(0.25, abs=FLOAT32)
    for seed in range(5):
        inputs = random_inputs(seed, "now", "old")
        assert approx_kl(inputs["now"], inputs["old"], MASK) > 0
        assert approx_kl(inputs["now"], inputs["now"], MASK) == 0


def test_the_approximate_kl_is_an_unbiased_estimate_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    old, now = torch.randn(2, 5, generator=generator).log_softmax(-1)
    exact = (old.exp() * (old - now)).sum()
    drawn = torch.multinomial(old.exp(), 200_000, replacement=True, generator=generator)[None]
    found = approx_kl(now[drawn], old[drawn], torch.ones_like(drawn, dtype=torch.bool))
    # k3 of these two distributions has a standard deviation below 2: five standard errors of 200,000 draws.
    assert found.item() == pytest.approx(exact.item(), abs=5 * 2 / math.sqrt(200_000))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_columns_outside_the_mask_may_hold_anything_in_every_argument(garbage: float) -> None:
    inputs = random_inputs(3, "a", "b", "c")
    a, b, c = inputs["a"], inputs["b"], inputs["c"]
    dirty_a, dirty_b, dirty_c = (with_garbage(values, garbage) for values in (a, b, c))
    for clean, dirty in (
        (policy_loss(a, b, c, MASK, 0.2), policy_loss(dirty_a, dirty_b, dirty_c, MASK, 0.2)),
        ((value_loss(a, b, c, MASK, 0.2),), (value_loss(dirty_a, dirty_b, dirty_c, MASK, 0.2),)),
        ((approx_kl(a, b, MASK),), (approx_kl(dirty_a, dirty_b, MASK),)),
    ):
        assert [value.item() for value in dirty] == [value.item() for value in clean]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gradients_outside_the_mask_are_zero_whatever_stands_there(garbage: float) -> None:
    inputs = random_inputs(4, "a", "b", "c")
    for loss in (lambda *x: policy_loss(*x, MASK, 0.2)[0], lambda *x: value_loss(*x, MASK, 0.2)):
        gradients = []
        for arguments in (inputs.values(), [with_garbage(values, garbage) for values in inputs.values()]):
            first, *others = arguments
            leaf = first.detach().clone().requires_grad_()
            loss(leaf, *others).backward()
            gradients.append(leaf.grad)
        assert torch.equal(gradients[0], gradients[1])
        assert (gradients[0][~MASK] == 0).all() and (gradients[0][MASK] != 0).any()
