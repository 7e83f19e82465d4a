"""Oracles compute one row at a time, unpadded, by the full logits of two separate models: the policy merged into its
trunk, and the trunk."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import NonFiniteError
from alignment_pipeline.models import load_scorer
from alignment_pipeline.ppo.advantages import gae, whiten
from alignment_pipeline.ppo.plan import microbatches, minibatches
from alignment_pipeline.ppo.rewards import ScoreStatistics, token_kls, token_rewards
from alignment_pipeline.ppo.rollout import Prompt, Rollout, require_finite, response_limits

ROUNDING = 1e-5  # batched and one-by-one matrix products add in another order, float32
NAN = float("nan")
Cases = Callable[..., Any]


def logprobs_of(model: Any, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).squeeze(1)


def on_tokens(rollout: Rollout, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths as (B, T)."""
    return torch.zeros(rollout.mask.shape).masked_scatter(rollout.mask, torch.cat(list(rows)))


def test_a_rollout_holds_the_prompts_and_what_was_sampled(ppo_case: Cases) -> None:
    case = ppo_case()
    rollout, _ = case.collect()
    lengths = [len(response.token_ids) for response in rollout.responses]
    assert len(set(lengths)) > 2
    assert rollout.mask.tolist() == [[column < length for column in range(max(lengths))] for length in lengths]
    for row, (prompt, response) in enumerate(zip(case.prompts[:8], rollout.responses, strict=True)):
        whole = prompt.token_ids + response.token_ids
        assert rollout.batch.input_ids[row, : len(whole)].tolist() == whole
        assert rollout.ended[row] == response.ended
    torch.testing.assert_close(rollout.scores, torch.tensor(case.score(rollout.prompts, rollout.responses)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_log_probabilities_and_kls_are_those_of_the_full_logits_of_two_models(
    ppo_case: Cases, tiny_models: Any, method: str, temperature: float
) -> None:
    case = ppo_case(method=method, temperature=temperature, microbatch_size=2).shaken()
    rollout, _ = case.collect()
    reference, policy = tiny_models.build("opt"), case.policy.model
    policy = policy.merge_and_unload() if method == "lora" else policy
    pairs = [(p.token_ids, r.token_ids) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    old = [logprobs_of(policy, *pair, temperature) for pair in pairs]
    ratios = [now - logprobs_of(reference, *pair, temperature) for now, pair in zip(old, pairs, strict=True)]
    at_1 = [logprobs_of(policy, *pair, 1.0) - logprobs_of(reference, *pair, 1.0) for pair in pairs]
    torch.testing.assert_close(rollout.old_logprobs, on_tokens(rollout, old), rtol=0, atol=10 * ROUNDING)  # merged
    for found, expected in (
        (rollout.kl_nats, [ratio.sum() for ratio in ratios]),
        (rollout.kl_nats_at_1, [ratio.sum() for ratio in at_1]),
        (rollout.kl_nats_k3, [((-ratio).exp() - 1 + ratio).sum() for ratio in ratios]),
    ):
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=20 * ROUNDING)  # eight of them, merged
    assert rollout.kl_nats.abs().max() > 0.1
    same = torch.equal(rollout.kl_nats, rollout.kl_nats_at_1)
    assert same == (temperature == 1.0)


@pytest.mark.parametrize(("first", "then"), [*itertools.product([None, 1, 2], [None, 1, 2])])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one_exactly_on_the_same_microbatches_and_nearly_on_others(
    ppo_case: Cases, temperature: float, first: int | None, then: int | None
) -> None:
    case = ppo_case(microbatch_size=first, temperature=temperature).shaken()
    rollout, _ = case.collect()
    lengths, farthest = rollout.batch.attention_mask.sum(1).tolist(), 0.0
    for minibatch in minibatches(8, 4, 1, seed=0)[0]:
        for rows in microbatches(minibatch, lengths, then or 4):
            now = case.policy.evaluate(rollout.batch.rows(rows), temperature, all_statistics=False)
            columns = now.logprobs.shape[1]
            farthest = max(farthest, (now.logprobs - rollout.old_logprobs[rows, :columns]).abs().max().item())
            if first == then:
                assert torch.equal(now.values, rollout.old_values[rows, :columns])
    # The same products added in another order: a few units in the last place of logits of size 1 to 10.
    assert farthest == 0.0 if first == then else farthest < 5e-6


def test_the_head_is_applied_to_each_response_token_once_for_each_use(ppo_case: Cases) -> None:
    case, rows = ppo_case(microbatch_size=2), []
    head = case.policy.model.get_base_model().get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel() // args[0].shape[-1]))
    rollout, _ = case.collect()
    tokens = int(rollout.mask.sum())
    assert sum(rows) == 3 * tokens < rollout.batch.input_ids.numel() * 2  # sampling, policy, reference


def test_response_lengths_are_drawn_within_their_bounds_by_the_seed() -> None:
    config = PpoConfig(max_new_tokens_min=3, max_new_tokens=6)
    limits = response_limits(400, config, seed=0)
    assert set(limits) == {3, 4, 5, 6}
    # Binomial counts of 100 with a standard deviation of 8.7: five of them.
    assert all(abs(limits.count(length) - 100) < 44 for length in set(limits))
    assert response_limits(400, config, seed=0) == limits != response_limits(400, config, seed=1)
    assert response_limits(5, PpoConfig(max_new_tokens=6), seed=0) == [6] * 5


def test_no_response_is_longer_than_was_drawn_for_it(ppo_case: Cases) -> None:
    case = ppo_case(max_new_tokens_min=2, max_new_tokens=8)
    rollout, _ = case.collect(seed=5)
    limits = response_limits(8, case.config, seed=5)
    for response, limit in zip(rollout.responses, limits, strict=True):
        assert len(response.token_ids) == limit or (response.ended and len(response.token_ids) < limit)
    assert len(set(limits)) > 2


def test_without_extras_returns_count_score_kl_and_the_missing_end_and_advantages_are_whitened(
    ppo_case: Cases,
) -> None:
    case = ppo_case(missing_eos_penalty=2.0, kl_coef=0.3, kl_estimator="k1").shaken()
    rollout, _ = case.collect(kl_coef=0.7)  # the coefficient of the moment, which is no longer the first one
    reference, _ = case.policy.reference_logprobs(rollout.batch, 1.0)
    rewards = torch.where(rollout.mask, -0.7 * (rollout.old_logprobs - reference), 0)
    for row, response in enumerate(rollout.responses):
        rewards[row, len(response.token_ids) - 1] += rollout.scores[row] - (0 if response.ended else 2.0)
    advantages, returns = gae(rewards, rollout.old_values, rollout.mask, 1.0, 0.95)
    torch.testing.assert_close(rollout.returns, returns, rtol=0, atol=ROUNDING)
    counted = advantages[rollout.mask]
    expected = (counted - counted.mean()) / counted.std(unbiased=False)
    torch.testing.assert_close(rollout.advantages[rollout.mask], expected, rtol=0, atol=10 * ROUNDING)  # by their std


def test_scores_are_normalised_then_clipped_then_less_the_penalty_and_rewards_whitened(ppo_case: Cases) -> None:
    settings = {"score_normalization": "running", "score_clip": 0.4, "missing_eos_penalty": 0.5,
                "kl_estimator": "k3", "reward_whitening": "scale"}  # fmt: skip
    case = ppo_case(**settings).shaken()
    before = ScoreStatistics().including(torch.tensor([3.0, -2.0, 4.0]))
    rollout, after = case.collect(statistics=before)
    seen = [3.0, -2.0, 4.0, *rollout.scores.tolist()]
    mean = sum(seen) / len(seen)
    deviation = (sum((score - mean) ** 2 for score in seen) / len(seen)) ** 0.5
    assert (after.count, after.mean) == (11, pytest.approx(mean))
    clipped = [min(0.4, max(-0.4, (score - mean) / deviation)) for score in rollout.scores.tolist()]
    assert 0.4 in clipped and -0.4 in clipped and len(set(clipped)) > 3
    expected = [score - 0.5 * (not ended) for score, ended in zip(clipped, rollout.ended.tolist(), strict=True)]
    assert rollout.rewarded_scores.tolist() == pytest.approx(expected, abs=ROUNDING)
    reference, _ = case.policy.reference_logprobs(rollout.batch, 1.0)
    kls = token_kls(rollout.old_logprobs, reference, rollout.mask, "k3")
    rewards = token_rewards(rollout.rewarded_scores, kls, rollout.mask, 0.3)
    rewards = whiten(rewards, rollout.mask, shift_mean=False)
    _, returns = gae(rewards, rollout.old_values, rollout.mask, 1.0, 0.95)
    torch.testing.assert_close(rollout.returns, returns, rtol=0, atol=10 * ROUNDING)  # divided by a deviation


def normalised_twice(ppo_case: Cases, how: str) -> tuple[Rollout, Rollout]:
    """Two rollouts in a row, of unlike scores."""
    case = ppo_case(score_normalization=how, missing_eos_penalty=0.0)
    first, statistics = case.collect(seed=0)
    plain, case.score = case.score, lambda p, r: [10 + 5 * score for score in plain(p, r)]
    return first, case.collect(seed=1, statistics=statistics)[0]


def test_running_normalisation_goes_by_all_scores_seen(ppo_case: Cases) -> None:
    first, second = normalised_twice(ppo_case, "running")
    seen = torch.cat([first.scores, second.scores])
    expected = (second.scores - seen.mean()) / seen.std(unbiased=False)
    torch.testing.assert_close(second.rewarded_scores, expected, rtol=0, atol=ROUNDING)
    assert first.rewarded_scores.mean().item() == pytest.approx(0, abs=ROUNDING)


def test_normalisation_by_the_first_rollout_stays_as_it_was(ppo_case: Cases) -> None:
    first, second = normalised_twice(ppo_case, "first_rollout")
    expected = (second.scores - first.scores.mean()) / first.scores.std(unbiased=False)
    torch.testing.assert_close(second.rewarded_scores, expected, rtol=1e-5, atol=ROUNDING)
    assert expected.mean() > 5


def test_without_normalisation_scores_are_rewarded_as_they_are(ppo_case: Cases) -> None:
    for rollout in normalised_twice(ppo_case, "none"):
        assert torch.equal(rollout.rewarded_scores, rollout.scores)


def test_the_same_seed_gives_the_same_rollout_and_another_another(ppo_case: Cases) -> None:
    case = ppo_case()
    (first, _), (again, _), (other, _) = case.collect(3), case.collect(3), case.collect(4)
    assert first.responses == again.responses != other.responses
    assert torch.equal(first.advantages, again.advantages)


def test_a_rollout_carries_no_gradient_and_leaves_the_policy_trainable(ppo_case: Cases) -> None:
    case = ppo_case(value_trunk="separate")
    rollout, _ = case.collect()
    tensors = [value for value in vars(rollout).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 8 and not any(tensor.requires_grad for tensor in tensors)
    trained = [*case.policy.policy_parameters(), *case.policy.value_parameters()]
    assert all(parameter.requires_grad for parameter in trained)


def test_an_untrained_policy_has_no_kl_at_any_temperature(ppo_case: Cases) -> None:
    for temperature in (1.0, 0.5):
        rollout, _ = ppo_case(temperature=temperature).collect()
        assert (rollout.kl_nats == 0).all() and (rollout.kl_nats_k3 == 0).all() and (rollout.kl_nats_at_1 == 0).all()


class TestValuesThatStartAsTheRewardModel:
    @pytest.mark.parametrize("apart", [False, True], ids=["on the policy's trunk", "in its own memory"])
    @pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
    def test_a_value_is_the_score_of_what_was_seen_before_its_token(
        self, ppo_case: Cases, reward_artifact: Callable[[str], tuple[Path, Path]], architecture: str, apart: bool
    ) -> None:
        trunk, reward = reward_artifact(architecture)
        scorer = load_scorer(reward, trunk)
        given = {"reward_model": scorer} if apart else {"reward_adapter": reward}
        case = ppo_case(architecture, value_trunk="reward_model", microbatch_size=2, **given)
        rollout, _ = case.collect()
        for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            with torch.inference_mode():
                states = scorer.base_model(torch.tensor([prompt.token_ids + response.token_ids])).last_hidden_state
                seen = scorer.score(states)[0, len(prompt.token_ids) - 1 : -1, 0]
            found = rollout.old_values[row, : len(response.token_ids)].tolist()
            assert found == pytest.approx(seen.tolist(), abs=10 * ROUNDING)  # the adapter merged or not

    def test_a_value_of_normalised_scores_is_zero(
        self, ppo_case: Cases, reward_artifact: Callable[[str], tuple[Path, Path]]
    ) -> None:
        _, reward = reward_artifact("opt")
        settings = {"value_trunk": "reward_model", "score_normalization": "running"}
        rollout, _ = ppo_case(reward_adapter=reward, **settings).collect()
        assert (rollout.old_values == 0).all()

    def test_without_a_reward_model_it_is_refused(self, ppo_case: Cases) -> None:
        with pytest.raises(ValueError, match="value_trunk is reward_model, expected a reward model to start from"):
            ppo_case(value_trunk="reward_model")


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
    def test_scores_name_their_rows(self, ppo_case: Cases, bad: float) -> None:
        def score(prompts: Sequence[Prompt], responses: Sequence[Any]) -> list[float]:
            return [bad if prompt.row_id in ("row 2", "row 5") else 1.0 for prompt in prompts]

        with pytest.raises(NonFiniteError, match=r"the score .* in 2 responses \(rows row 2, row 5\)") as caught:
            ppo_case(score=score).collect()
        assert caught.value.row_ids == ("row 2", "row 5")

    def test_rows_and_tokens_are_looked_at_one_by_one(self, ppo_case: Cases) -> None:
        prompts = [Prompt(f"row {row}", "", [1]) for row in range(3)]
        require_finite("a thing", torch.zeros(3), prompts)
        require_finite("a thing", torch.zeros(3, 4), prompts)
        tokens = torch.zeros(3, 4)
        tokens[0, 3], tokens[2, 1] = NAN, float("inf")
        with pytest.raises(NonFiniteError) as caught:
            require_finite("a thing", tokens, prompts)
        assert caught.value.row_ids == ("row 0", "row 2")

    def test_a_long_list_of_rows_is_cut_in_the_message_and_whole_in_the_error(self) -> None:
        prompts = [Prompt(f"row {row}", "", [1]) for row in range(9)]
        with pytest.raises(NonFiniteError, match=r"in 9 responses \(rows row 0, .*, row 3 and others\)") as caught:
            require_finite("a thing", torch.full((9,), NAN), prompts)
        assert len(caught.value.row_ids) == 9

    def test_log_probabilities_of_a_broken_policy_are_refused(self, ppo_case: Cases) -> None:
        case = ppo_case()
        with torch.no_grad():
            case.policy.policy_parameters()[-1][0, 0] = NAN  # not in a key: torch's attention on a CPU makes that 0
        with pytest.raises(NonFiniteError, match="log-probability of a token") as caught:
            case.collect()
        assert caught.value.row_ids == tuple(prompt.row_id for prompt in case.prompts[:8])

    def test_log_probabilities_name_the_rows_whose_prompts_break_the_model(self, ppo_case: Cases) -> None:
        case = ppo_case(method="full")
        with torch.no_grad():  # the token that only row 3 begins with; untied, so that no other row's head sees it
            head = case.policy.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.clone())
            case.policy.model.get_input_embeddings().weight[case.prompts[3].token_ids[0]] = NAN
        holders = [p.row_id for p in case.prompts[:8] if case.prompts[3].token_ids[0] in p.token_ids]
        with pytest.raises(NonFiniteError, match="log-probability") as caught:
            case.collect()
        assert set(holders) <= set(caught.value.row_ids) != {p.row_id for p in case.prompts[:8]}

    def test_values_are_refused(self, ppo_case: Cases) -> None:
        case = ppo_case()
        torch.nn.init.constant_(case.policy.value_head.bias, float("inf"))
        with pytest.raises(NonFiniteError, match="the value of a token"):
            case.collect()


def test_a_rollout_is_the_same_whatever_the_sizes_of_its_batches(ppo_case: Cases) -> None:
    found = []
    for sizes in ({}, {"microbatch_size": 1, "generation_batch_size": 3}):
        found.append(ppo_case(**sizes).shaken().collect()[0])
    one, other = found
    assert one.responses == other.responses
    for field in dataclasses.fields(Rollout):
        first = getattr(one, field.name)
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            tolerance = 20 * ROUNDING  # advantages are divided by their deviation
            torch.testing.assert_close(first, getattr(other, field.name), rtol=0, atol=tolerance)


def test_equal_scores_of_the_first_rollout_give_no_unit_and_the_next_rollouts_do(ppo_case: Cases) -> None:
    """A reward of 0 or 1 is often 0 everywhere at first; its standard deviation of 0 must not be kept."""
    case = ppo_case(score_normalization="first_rollout", missing_eos_penalty=0.0)
    case.score = lambda prompts, responses: [0.0] * len(responses)
    first, statistics = case.collect()
    assert (first.rewarded_scores == 0).all()
    case.score = lambda prompts, responses: [float(row == 0) for row in range(len(responses))]
    second, statistics = case.collect(statistics=statistics)
    assert 1 < second.rewarded_scores.max() < 10
    third, _ = case.collect(statistics=statistics)
    assert torch.equal(third.rewarded_scores, second.rewarded_scores)
