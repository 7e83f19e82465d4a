"""PPO and DPO against the exact optimum of a model whose 64 responses can be listed, and the mathematics of it."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline import oracle
from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.oracle import (
    PROMPT_IDS,
    RESPONSE_TOKENS,
    Optimum,
    Problem,
    all_responses,
    build_problem,
    check_gradient,
    dpo_sampling_error,
    draw_pairs,
    enumeration_costs,
    exact_gradient,
    frontier,
    gae_by_definition,
    gae_error,
    highest_reward,
    kl_divergence,
    mean_reward,
    optimum,
    point_of,
    response_index,
    response_logprobs,
    reward,
    score_vectors,
    text_of,
)
from alignment_pipeline.oracle_training import (
    EPSILON_NATS,
    FIRST_LOSS_TOLERANCE,
    pairs_needed,
    ppo_config,
    train_dpo,
    train_ppo,
)
from alignment_pipeline.ppo.losses import policy_losses
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.sequences import pack, sum_logprobs

EXACT = 1e-12  # float64 sums of 64 terms of order one are right to about 1e-15
SEARCHED = 1e-9  # the curve's bound is searched for to about 1e-11
FLOAT32 = 1e-5  # a log-probability in float32, summed over three tokens, is right to about 1e-6
BETA = 2.0  # the reference policy is eight times as far from its optimum as ε


@pytest.fixture(scope="module")
def problem() -> Problem:
    return build_problem(0)


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def best(problem: Problem, beta: float) -> Optimum:
    return optimum(problem.ref_logprobs, problem.rewards, beta)


def objective(problem: Problem, logprobs: torch.Tensor, beta: float) -> float:
    return mean_reward(logprobs, problem.rewards) - beta * kl_divergence(logprobs, problem.ref_logprobs)


def random_policies(count: int) -> list[torch.Tensor]:
    """From nearly uniform to nearly deterministic."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 64, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 20, count)[:, None]
    return list(logits.log_softmax(1))


# The enumeration


def test_every_response_is_listed_once_and_knows_its_place() -> None:
    responses = all_responses(4, RESPONSE_TOKENS)
    assert len(responses) == len(responses.unique(dim=0)) == 64
    assert response_index(responses).tolist() == list(range(64))
    assert [text_of(responses[row]) for row in (0, 1, 27, 63)] == ["aaa", "aab", "bcd", "ddd"]


@pytest.mark.parametrize(
    ("text", "points"), [("bca", 4), ("bcd", 3), ("aaa", 2), ("dcb", 1), ("bba", 3), ("abb", 1), ("aab", 1)]
)
def test_rewards_are_steps_up_from_the_prompt_and_two_for_coming_home(text: str, points: float) -> None:
    assert reward(torch.tensor([["abcd".index(letter) for letter in text]])).tolist() == [points]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_the_probabilities_of_all_responses_of_a_length_sum_to_one(problem: Problem, length: int) -> None:
    with torch.no_grad():
        logprobs = response_logprobs(problem.model, all_responses(4, length))
    assert logprobs.logsumexp(0).item() == pytest.approx(0, abs=EXACT)


def test_the_reference_policy_is_far_from_uniform_and_every_response_can_be_sampled(problem: Problem) -> None:
    probabilities = problem.ref_logprobs.exp()
    assert math.log(64) + (probabilities * problem.ref_logprobs).sum() > 0.5  # nats from uniform
    assert probabilities.min() > 1e-4


def test_listed_log_probabilities_are_those_of_the_pipeline(problem: Problem) -> None:
    """Second implementation: the enumeration reads full logits in float64, the pipeline only the labelled ones."""
    ours = sum_logprobs(problem.model, [PROMPT_IDS] * 64, problem.responses.tolist(), 0, batch_size=16)
    assert ours == pytest.approx(problem.ref_logprobs.tolist(), abs=FLOAT32)


# The optimum and the curve


def test_the_optimum_of_a_hand_computed_case() -> None:
    # π_ref = (½, ½) and r / β = (0, ln 3): Z = ½ + ½·3 = 2 and π* = (¼, ¾).
    found = optimum(float64(0.5, 0.5).log(), float64(0.0, 2 * math.log(3)), beta=2.0)
    assert found.logprobs.exp().tolist() == pytest.approx([0.25, 0.75], abs=EXACT)
    assert found.log_z == pytest.approx(math.log(2), abs=EXACT)


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_no_perturbation_of_the_optimum_has_a_higher_objective(problem: Problem, beta: float) -> None:
    found = best(problem, beta)
    highest = objective(problem, found.logprobs, beta)
    assert highest == pytest.approx(beta * found.log_z, abs=EXACT)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(50):
            noise = scale * torch.randn(64, generator=generator, dtype=torch.float64)
            perturbed = (found.logprobs + noise).log_softmax(0)
            loss = highest - objective(problem, perturbed, beta)
            assert loss > 0
            assert loss == pytest.approx(beta * kl_divergence(perturbed, found.logprobs), abs=EXACT)


def test_the_optimum_goes_from_the_reference_to_the_best_responses_as_beta_falls(problem: Problem) -> None:
    assert kl_divergence(best(problem, 1e6).logprobs, problem.ref_logprobs) < SEARCHED
    greedy = best(problem, 0.01).logprobs.exp()
    highest = problem.rewards == problem.rewards.max()
    assert [text_of(response) for response in problem.responses[highest]] == ["bca", "bda", "cda"]
    assert greedy[highest].sum().item() == pytest.approx(1, abs=SEARCHED)


def test_the_curve_is_where_the_optima_lie_and_no_policy_is_above_it(problem: Problem) -> None:
    curve = frontier(problem)
    assert curve[0].kl_nats == 0 and [p.kl_nats for p in curve] == sorted(p.kl_nats for p in curve)
    for point in curve:
        # at KL 0 the least is only approached as β grows: a millionth of the variance of r is left at β = 1e6
        assert highest_reward(problem, point.kl_nats) == pytest.approx(point.reward, abs=1e-6)
    for policy in random_policies(200):
        point = point_of(problem, policy)
        assert point.reward < highest_reward(problem, point.kl_nats)
    assert highest_reward(problem, 100.0) == pytest.approx(problem.rewards.max().item(), abs=0.02)


# Policy gradients


def test_the_log_derivative_estimate_agrees_with_the_exact_gradient(problem: Problem) -> None:
    """Rejects a right estimator once in 10,000 seeds; this one is fixed."""
    check = check_gradient(problem, samples=16_384, seed=0)
    assert check.holds, check
    assert check.baseline_standard_error < 0.6 * check.standard_error


def test_samples_at_another_temperature_are_found_out(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    true = oracle.generate
    monkeypatch.setattr(
        oracle, "generate", lambda *args, temperature, **options: true(*args, temperature=1.2, **options)
    )
    assert not check_gradient(problem, samples=16_384, seed=0).holds


def test_the_exact_gradient_is_that_of_finite_differences(problem: Problem) -> None:
    model = copy.deepcopy(problem.model).double()
    exact = exact_gradient(model, problem)
    direction = torch.randn(len(exact), generator=torch.Generator().manual_seed(2)).double()
    start, step = torch.nn.utils.parameters_to_vector(model.parameters()).detach(), 1e-5
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * step * direction, model.parameters())
        with torch.no_grad():
            values.append(mean_reward(response_logprobs(model, problem.responses), problem.rewards))
    # The error of central differences is of the order of step², rounding of 1e-15 / step.
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(exact @ direction), rel=1e-6)


def test_ppos_first_gradient_is_the_log_derivative_estimate(problem: Problem) -> None:
    """The clipped surrogate at ratio 1, with the reward as every token's advantage, over a mean of three tokens."""
    policy = PolicyWithValue(copy.deepcopy(problem.model), ppo_config(BETA))
    rows = torch.randint(0, 64, (128,), generator=torch.Generator().manual_seed(3))
    batch = pack([PROMPT_IDS] * len(rows), problem.responses[rows].tolist(), pad_id=0)
    logprobs = policy.evaluate(batch, temperature=1.0).logprobs
    advantages = problem.rewards[rows, None].float().expand_as(logprobs)
    losses, clipped = policy_losses(logprobs, logprobs.detach(), advantages, batch.response_columns, clip_range=0.2)
    gradients = torch.autograd.grad(losses.mean(), list(policy.model.parameters()))
    found = torch.cat([gradient.flatten() for gradient in gradients]).double()
    estimate = (problem.rewards[rows, None] * score_vectors(problem.model, problem.responses)[rows]).mean(0)
    assert not clipped.any()
    torch.testing.assert_close(-RESPONSE_TOKENS * found, estimate, rtol=0, atol=FLOAT32 * float(estimate.norm()))


def test_generalized_advantages_equal_their_double_sum() -> None:
    assert gae_error(seed=0) < oracle.GAE_TOLERANCE


def test_the_double_sum_of_a_hand_computed_case() -> None:
    # γ = λ = ½, rewards 1, 2 and values 4, 8: δ = 1 + ½·8 - 4 = 1 and 2 - 8 = -6; A = 1 - 6/4 and -6.
    assert gae_by_definition([1.0, 2.0], [4.0, 8.0], gamma=0.5, gae_lambda=0.5) == [-0.5, -6.0]


# What Z costs


def test_the_cost_of_z_is_the_vocabulary_to_the_power_of_the_length(problem: Problem) -> None:
    costs = enumeration_costs(problem.model, longest=3, extrapolate=[(50_272, 53)])
    assert [round(10**cost.log10_responses) for cost in costs[:3]] == [4, 16, 64]
    assert [cost.measured for cost in costs] == [True, True, True, False]
    last = costs[-1]
    assert last.log10_responses == pytest.approx(math.log10(50_272**53), abs=EXACT * 1e3)
    per_response = costs[2].log10_seconds - math.log10(64)
    assert last.log10_seconds - last.log10_responses == pytest.approx(per_response, abs=EXACT * 1e3)
    assert last.log10_seconds - last.log10_years == pytest.approx(math.log10(31_557_600), abs=EXACT)


# PPO


def test_ppo_converges_to_the_optimum_from_below_the_curve(problem: Problem) -> None:
    found = best(problem, BETA)
    assert kl_divergence(problem.ref_logprobs, found.logprobs) > 5 * EPSILON_NATS
    trained = train_ppo(problem, ppo_config(BETA), seed=0)
    assert kl_divergence(trained.logprobs, found.logprobs) < EPSILON_NATS
    assert trained.way[0].kl_nats == 0 and trained.first_metrics["objective/kl"] == 0
    assert len(trained.way) == 101
    assert all(point.reward <= highest_reward(problem, point.kl_nats) + SEARCHED for point in trained.way)
    assert trained.way[-1] == point_of(problem, trained.logprobs)


def test_ppo_starts_at_ratio_one_and_the_same_seed_gives_the_same_policy(problem: Problem) -> None:
    config = ppo_config(BETA, updates=1).model_copy(update={"ppo_epochs": 1})
    first, second = (train_ppo(problem, config, seed=0) for _ in range(2))
    assert first.first_metrics["policy/approx_kl"] == 0 and first.first_metrics["policy/clip_fraction"] == 0
    assert torch.equal(first.logprobs, second.logprobs)
    assert not torch.equal(first.logprobs, problem.ref_logprobs)


# DPO


def test_pairs_are_of_different_responses_and_labelled_by_bradley_and_terry(problem: Problem) -> None:
    chosen, rejected = draw_pairs(problem, 200_000, seed=0)
    assert len(chosen) == len(rejected) == 200_000 and (chosen != rejected).all()
    margins = problem.rewards[chosen] - problem.rewards[rejected]
    for margin in (1.0, 2.0, 3.0):
        wins, losses = int((margins == margin).sum()), int((margins == -margin).sum())
        rate, expected = wins / (wins + losses), 1 / (1 + math.exp(-margin))
        standard_error = math.sqrt(expected * (1 - expected) / (wins + losses))
        assert abs(rate - expected) < 4 * standard_error  # once in 16,000 seeds
    again, _ = draw_pairs(problem, 200_000, seed=0)
    assert torch.equal(chosen, again)


def test_the_sampling_error_of_a_hand_computed_case(problem: Problem) -> None:
    # Two responses: the margin's variance is 1 / (n σ'(Δ)), and KL = π₁ π₂ Var / 2β².
    beta, pairs = 2.0, 100
    small = dataclasses.replace(problem, ref_logprobs=float64(0.3, 0.7).log(), rewards=float64(0.0, 1.0))
    odds = 1 / (1 + math.exp(-1.0))
    one = 0.3 / (0.3 + 0.7 * math.exp(1 / beta))
    expected = one * (1 - one) / (2 * beta**2) / (pairs * odds * (1 - odds))
    assert dpo_sampling_error(small, beta, pairs) == pytest.approx(expected, rel=SEARCHED)


def test_too_small_a_beta_is_refused_with_the_number_of_pairs_it_needs(problem: Problem) -> None:
    with pytest.raises(AlignmentError, match=r"β = 0\.5: found that DPO needs [\d,]+ pairs .* Use a larger β"):
        pairs_needed(problem, 0.5)
    assert 40_000 <= pairs_needed(problem, BETA) < pairs_needed(problem, 1.0)


def test_dpo_on_drawn_pairs_starts_at_ln_2_and_converges_to_the_optimum(problem: Problem, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    trained = train_dpo(problem, BETA, 0, tmp_path, watch=lambda step, total: steps.append((step, total)))
    assert trained.first_metrics["train/loss"] == pytest.approx(math.log(2), abs=FIRST_LOSS_TOLERANCE)
    assert kl_divergence(trained.logprobs, best(problem, BETA).logprobs) < EPSILON_NATS
    (point,) = trained.way
    assert point.reward <= highest_reward(problem, point.kl_nats) + SEARCHED
    assert steps[-1][0] == steps[-1][1] == math.ceil(40_000 / 256)
    unchanged: Any = response_logprobs(problem.model, problem.responses).detach()
    assert torch.equal(unchanged, problem.ref_logprobs), "training works on a copy"
