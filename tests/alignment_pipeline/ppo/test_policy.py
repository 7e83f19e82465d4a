from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.sequences import TokenBatch, pack

PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]]
RESPONSES = [[44, 45, 1], [99, 98, 97, 96, 95, 1], [3], [210, 1]]
ROUNDING = 1e-5  # batched and one-by-one matrix products add in another order, float32
CASES = [("opt", "lora"), ("opt", "full"), ("opt_projected", "lora"), ("gpt2", "lora"), ("llama", "full")]


@pytest.fixture
def batch(tiny_models: Any) -> TokenBatch:
    return pack(PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id)


def policy_of(tiny_models: Any, architecture: str, method: str) -> PolicyWithValue:
    torch.manual_seed(0)
    return PolicyWithValue(tiny_models.build(architecture), PpoConfig(method=method, lora_rank=2))


def take_a_step(policy: PolicyWithValue, batch: TokenBatch) -> None:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(2):  # a fresh adapter's first gradient leaves one of its factors alone
        logprobs, values, _ = policy.evaluate(batch, 1.0)
        optimizer.zero_grad()
        (-logprobs.sum() + (values - 1).square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def reference_logprobs(policy: PolicyWithValue, batch: TokenBatch) -> torch.Tensor:
    with torch.no_grad(), policy.as_reference():
        return policy.evaluate(batch, 1.0)[0]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_at_the_start_policy_and_reference_are_the_same_to_the_bit_and_values_are_zero(
    tiny_models: Any, batch: TokenBatch, architecture: str, method: str
) -> None:
    policy = policy_of(tiny_models, architecture, method)
    logprobs, values, _ = policy.evaluate(batch, 1.0)
    assert torch.equal(logprobs, reference_logprobs(policy, batch))
    assert (values == 0).all()


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_a_step_moves_the_policy_and_leaves_the_reference(
    tiny_models: Any, batch: TokenBatch, architecture: str, method: str
) -> None:
    policy = policy_of(tiny_models, architecture, method)
    before = reference_logprobs(policy, batch)
    take_a_step(policy, batch)
    assert torch.equal(reference_logprobs(policy, batch), before)
    logprobs, values, _ = policy.evaluate(batch, 1.0)
    assert (logprobs - before).abs().max() > 0.01
    assert values.abs().max() > 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_policy_is_back_after_the_reference_was_used_and_after_an_error_in_between(
    tiny_models: Any, batch: TokenBatch, method: str
) -> None:
    policy = policy_of(tiny_models, "opt", method)
    take_a_step(policy, batch)
    now = policy.evaluate(batch, 1.0)[0]
    reference_logprobs(policy, batch)
    assert torch.equal(policy.evaluate(batch, 1.0)[0], now)
    with pytest.raises(RuntimeError, match="interrupted"), policy.as_reference():
        raise RuntimeError("interrupted")
    assert torch.equal(policy.evaluate(batch, 1.0)[0], now)


def test_log_probabilities_and_entropies_are_those_of_the_full_logits_at_the_temperature(
    tiny_models: Any, batch: TokenBatch
) -> None:
    model, temperature = tiny_models.build("opt"), 0.7
    logprobs, _, entropies = PolicyWithValue(tiny_models.build("opt"), PpoConfig(lora_rank=2)).evaluate(batch, 0.7)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.inference_mode():
            full = (model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)
        for number, token in enumerate(response):
            column = len(prompt) + number
            assert logprobs[row, column].item() == pytest.approx(full[column - 1, token].item(), abs=ROUNDING)
            entropy = torch.distributions.Categorical(logits=full[column - 1]).entropy().item()
            assert entropies[row, column].item() == pytest.approx(entropy, abs=ROUNDING)


def test_everything_is_zero_outside_the_responses(tiny_models: Any, batch: TokenBatch) -> None:
    policy = policy_of(tiny_models, "opt", "lora")
    torch.nn.init.ones_(policy.value_head.bias)
    for values in policy.evaluate(batch, 1.0):
        assert (values[~batch.response_mask] == 0).all()
        assert (values[batch.response_mask] != 0).all()


def test_a_value_does_not_depend_on_the_token_that_it_is_the_value_before(tiny_models: Any) -> None:
    policy = policy_of(tiny_models, "opt", "lora")
    torch.nn.init.normal_(policy.value_head.weight)
    first, other = (policy.evaluate(pack([[7, 12]], [[44, last]], 0), 1.0)[1] for last in (45, 46))
    assert torch.equal(first, other)
    changed_earlier = policy.evaluate(pack([[7, 12]], [[43, 45]], 0), 1.0)[1]
    assert changed_earlier[0, 2] == first[0, 2] and changed_earlier[0, 3] != first[0, 3]


@pytest.mark.parametrize("minibatch_size", [1, 2, 3])
def test_the_first_ratio_is_one_whatever_minibatches_the_old_log_probabilities_came_from(
    tiny_models: Any, batch: TokenBatch, minibatch_size: int
) -> None:
    policy = policy_of(tiny_models, "opt", "lora")
    take_a_step(policy, batch)
    with torch.no_grad():
        parts = torch.split(torch.arange(4), minibatch_size)
        old_logprobs, old_values = policy.evaluate_in_parts(batch, parts, 1.0)
    for rows in parts:
        part = batch.rows(rows)
        logprobs, values, _ = policy.evaluate(part, 1.0)
        width = part.input_ids.shape[1]
        first_log_ratio = (logprobs - old_logprobs[rows, :width]).abs().max().item()
        assert first_log_ratio < 1e-6  # the same computation: a bit of float32 at most
        assert torch.equal(values, old_values[rows, :width])
    whole, _, _ = policy.evaluate(batch, 1.0)
    torch.testing.assert_close(old_logprobs, whole.detach(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_trained_state_brings_policy_and_values_back(tiny_models: Any, batch: TokenBatch, method: str) -> None:
    policy = policy_of(tiny_models, "opt", method)
    take_a_step(policy, batch)
    state = {name: tensor.clone() for name, tensor in policy.trained_state().items()}
    expected = [values.detach() for values in policy.evaluate(batch, 1.0)]
    fresh = policy_of(tiny_models, "opt", method)
    fresh.load_trained_state(state)
    for found, wanted in zip(fresh.evaluate(batch, 1.0), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(reference_logprobs(fresh, batch), reference_logprobs(policy, batch))


def test_the_optimizer_gets_what_is_trained_and_nothing_else(tiny_models: Any) -> None:
    lora, full = policy_of(tiny_models, "opt", "lora"), policy_of(tiny_models, "opt", "full")
    assert all("lora_" in name or name.startswith("value_head") for name in lora.trained_state())
    trunk = sum(parameter.numel() for parameter in tiny_models.build("opt").parameters())
    assert sum(parameter.numel() for parameter in full.parameters()) == trunk + 16 + 1
    assert len(lora.parameters()) == len(lora.trained_state())
