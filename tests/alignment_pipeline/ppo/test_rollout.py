from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.models import new_scorer
from alignment_pipeline.ppo.advantages import gae, token_rewards
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.rollout import Rollout, collect
from alignment_pipeline.reward import score_responses

PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]] * 8
ROUNDING = 1e-5  # batched and one-by-one matrix products add in another order, float32


class Case:
    def __init__(self, folder: Path, tiny_models: Any, **config: Any) -> None:
        self.tokenizer = tiny_models.tokenizer
        settings = {"lora_rank": 2, "minibatch_size": 4, "max_new_tokens": 24, "kl_coef": 0.3}
        self.config = PpoConfig(**(settings | {"missing_eos_penalty": 2.0} | config))
        self.scorer = new_scorer(tiny_models.save(tiny_models.build("opt", seed=1), folder) / "model").eval()
        torch.manual_seed(0)
        self.policy = PolicyWithValue(tiny_models.build("opt"), self.config)
        for name, parameter in self.policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.init.normal_(self.policy.value_head.weight)

    def collect(self, seed: int = 0) -> Rollout:
        return collect(self.policy, self.scorer, self.tokenizer, PROMPTS, self.config, seed)


@pytest.fixture
def case(tmp_path: Path, tiny_models: Any) -> Case:
    return Case(tmp_path, tiny_models)


def test_a_rollout_holds_the_prompts_and_what_was_sampled(case: Case) -> None:
    rollout = case.collect()
    for row, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses, strict=True)):
        whole = prompt + response.token_ids
        assert rollout.batch.input_ids[row, : len(whole)].tolist() == whole
        assert rollout.batch.response_mask[row].sum() == len(response.token_ids)
        assert rollout.ended[row] == response.ended
    pad_id = case.tokenizer.pad_token_id
    responses = [response.token_ids for response in rollout.responses]
    expected = score_responses(case.scorer, PROMPTS, responses, pad_id, 1)
    torch.testing.assert_close(rollout.scores, torch.tensor(expected), rtol=0, atol=ROUNDING)


def test_the_kl_of_a_response_is_the_sum_of_its_log_ratios_to_the_reference(case: Case) -> None:
    rollout = case.collect()
    with torch.no_grad(), case.policy.as_reference():
        ref_logprobs = case.policy.evaluate(rollout.batch, case.config.temperature)[0]
    expected = [
        sum(
            (rollout.old_logprobs[row, column] - ref_logprobs[row, column]).item()
            for column in range(rollout.batch.input_ids.shape[1])
            if rollout.batch.response_mask[row, column]
        )
        for row in range(len(PROMPTS))
    ]
    assert rollout.kl_nats.tolist() == pytest.approx(expected, abs=ROUNDING)
    assert rollout.kl_nats.abs().max() > 0.01


def test_advantages_are_whitened_and_returns_count_score_kl_and_the_missing_end(case: Case) -> None:
    rollout = case.collect()
    assert {bool(ended) for ended in rollout.ended} == {True, False}
    with torch.no_grad(), case.policy.as_reference():
        ref_logprobs = case.policy.evaluate(rollout.batch, case.config.temperature)[0]
    mask, config = rollout.batch.response_mask, case.config
    scores = torch.stack(
        [score - (0 if ended else 2.0) for score, ended in zip(rollout.scores, rollout.ended, strict=True)]
    )
    rewards = token_rewards(scores, rollout.old_logprobs, ref_logprobs, mask, config.kl_coef)
    advantages, returns = gae(rewards, rollout.old_values, mask, config.gamma, config.gae_lambda)
    torch.testing.assert_close(rollout.returns, returns, rtol=0, atol=ROUNDING)
    counted = advantages[mask]
    expected = (counted - counted.mean()) / counted.std(unbiased=False)
    torch.testing.assert_close(rollout.advantages[mask], expected, rtol=0, atol=10 * ROUNDING)  # divided by their std


def test_the_same_seed_gives_the_same_rollout(case: Case) -> None:
    first, again, other = case.collect(3), case.collect(3), case.collect(4)
    assert first.responses == again.responses != other.responses
    assert torch.equal(first.advantages, again.advantages)


def test_a_rollout_carries_no_gradient(case: Case) -> None:
    rollout = case.collect()
    for tensor in (rollout.old_logprobs, rollout.old_values, rollout.advantages, rollout.returns):
        assert not tensor.requires_grad


def test_an_untrained_policy_has_no_kl_and_the_temperature_applies_to_it_too(tmp_path: Path, tiny_models: Any) -> None:
    case = Case(tmp_path, tiny_models, temperature=0.5)
    for name, parameter in case.policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    rollout = case.collect()
    assert (rollout.kl_nats == 0).all()
    with torch.no_grad():
        at_temperature = case.policy.evaluate(rollout.batch, 0.5)[0]
    torch.testing.assert_close(rollout.old_logprobs, at_temperature, rtol=0, atol=ROUNDING)
