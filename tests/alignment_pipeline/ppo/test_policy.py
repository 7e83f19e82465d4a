import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.models import save_trained
from alignment_pipeline.ppo.policy import PolicyWithValue, entropies_of
from alignment_pipeline.sequences import TokenBatch, pack

PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]]
RESPONSES = [[44, 45, 1], [99, 98, 97, 96, 95, 1], [3], [210, 1]]
ROUNDING = 1e-5  # batched and one-by-one matrix products add in another order, float32
CASES = [("opt", "lora"), ("opt", "full"), ("opt_projected", "lora"), ("gpt2", "lora"), ("llama", "full")]
TRUNKS = [*itertools.product(["lora", "full"], ["shared", "detached", "separate"])]

RewardArtifact = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def batch(tiny_models: Any) -> TokenBatch:
    return pack(PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id)


def policy_of(
    tiny_models: Any, architecture: str = "opt", method: str = "lora", reward: Path | None = None, **config: Any
) -> PolicyWithValue:
    torch.manual_seed(0)
    return PolicyWithValue(tiny_models.build(architecture), PpoConfig(method=method, lora_rank=2, **config), reward)


def parameters(policy: PolicyWithValue) -> list[torch.nn.Parameter]:
    return [*policy.policy_parameters(), *policy.value_parameters()]


def take_a_step(policy: PolicyWithValue, batch: TokenBatch) -> None:
    optimizer = torch.optim.SGD(parameters(policy), lr=0.1)
    for _ in range(2):  # a fresh adapter's first gradient leaves one of its factors alone
        now = policy.evaluate(batch, 1.0)
        optimizer.zero_grad()
        (-now.logprobs.sum() + (now.values - 1).square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters(policy), 1.0)
        optimizer.step()


def logprobs_of(policy: PolicyWithValue, batch: TokenBatch) -> torch.Tensor:
    return policy.evaluate(batch, 1.0).logprobs.detach()


def reference_of(policy: PolicyWithValue, batch: TokenBatch) -> torch.Tensor:
    return policy.reference_logprobs(batch, 1.0)[0]


def all_tensors(policy: PolicyWithValue) -> Iterator[torch.Tensor]:
    """Every tensor that the policy holds, in whatever module."""
    modules = [value for value in vars(policy).values() if isinstance(value, torch.nn.Module)]
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def bytes_held(policy: PolicyWithValue) -> int:
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in all_tensors(policy)}.values())


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_at_the_start_policy_and_reference_are_the_same_to_the_bit_and_values_are_zero(
    tiny_models: Any, batch: TokenBatch, architecture: str, method: str
) -> None:
    policy = policy_of(tiny_models, architecture, method)
    for temperature in (1.0, 0.7):
        now = policy.evaluate(batch, temperature)
        assert torch.equal(now.logprobs, policy.reference_logprobs(batch, temperature)[0])
        assert (now.values == 0).all()


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_a_step_moves_the_policy_and_leaves_the_reference(
    tiny_models: Any, batch: TokenBatch, architecture: str, method: str
) -> None:
    policy = policy_of(tiny_models, architecture, method)
    before = reference_of(policy, batch)
    take_a_step(policy, batch)
    assert torch.equal(reference_of(policy, batch), before)
    now = policy.evaluate(batch, 1.0)
    assert (now.logprobs - before).abs().max() > 0.01
    assert now.values.abs().max() > 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_policy_is_back_and_trains_after_the_reference_was_used_and_after_an_error_in_between(
    tiny_models: Any, batch: TokenBatch, method: str
) -> None:
    policy = policy_of(tiny_models, "opt", method)
    take_a_step(policy, batch)
    now = logprobs_of(policy, batch)
    reference_of(policy, batch)
    assert torch.equal(logprobs_of(policy, batch), now)
    with pytest.raises(RuntimeError, match="interrupted"), policy.as_reference():
        raise RuntimeError("interrupted")
    assert torch.equal(logprobs_of(policy, batch), now)
    assert all(parameter.requires_grad for parameter in parameters(policy))
    policy.evaluate(batch, 1.0).logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.policy_parameters())


def test_log_probabilities_and_entropies_are_those_of_the_full_logits_at_the_temperature(
    tiny_models: Any, batch: TokenBatch
) -> None:
    temperature = 0.7
    for architecture in ("opt", "opt_projected", "gpt2", "llama"):
        model, policy = tiny_models.build(architecture), policy_of(tiny_models, architecture)
        now = policy.evaluate(batch, temperature)
        reference, reference_at_1 = policy.reference_logprobs(batch, temperature)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
            at_temperature, at_1 = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
            for column, token in enumerate(response):
                position = len(prompt) + column - 1
                expected = at_temperature[position, token].item(), at_1[position, token].item()
                for found in ((now.logprobs, now.logprobs_at_1), (reference, reference_at_1)):
                    assert [tensor[row, column].item() for tensor in found] == pytest.approx(expected, abs=ROUNDING)
                entropy = torch.distributions.Categorical(logits=at_temperature[position]).entropy().item()
                assert now.entropies[row, column].item() == pytest.approx(entropy, abs=ROUNDING)


def test_a_head_with_a_bias_is_tempered_whole(tiny_models: Any, batch: TokenBatch) -> None:
    model = tiny_models.build("llama")
    model.lm_head = torch.nn.Linear(16, 300)
    policy = PolicyWithValue(copy.deepcopy(model), PpoConfig(method="full"))
    with torch.inference_mode():
        logits = model(input_ids=batch.input_ids[2:3]).logits[0] / 0.7
    expected = logits.log_softmax(-1)[6, RESPONSES[2][0]].item()
    assert policy.evaluate(batch, 0.7).logprobs[2, 0].item() == pytest.approx(expected, abs=ROUNDING)


def test_what_training_does_not_need_is_left_out_when_it_is_not_asked_for(tiny_models: Any, batch: TokenBatch) -> None:
    policy = policy_of(tiny_models)
    now, whole = policy.evaluate(batch, 0.7, all_statistics=False), policy.evaluate(batch, 0.7)
    assert torch.equal(now.logprobs, whole.logprobs) and torch.equal(now.values, whole.values)
    assert torch.equal(now.logprobs_at_1, now.logprobs) and (now.entropies == 0).all()


def test_entropies_are_exact_at_both_ends() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    assert entropies_of(logits).tolist() == pytest.approx([1.3862944, 0.0], abs=1e-6)


@pytest.mark.parametrize("value_trunk", ["shared", "detached", "separate"])
def test_the_head_sees_response_positions_only(tiny_models: Any, batch: TokenBatch, value_trunk: str) -> None:
    policy, rows = policy_of(tiny_models, value_trunk=value_trunk), []
    head = policy.model.get_base_model().get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel() // args[0].shape[-1]))
    policy.evaluate(batch, 0.7)
    policy.reference_logprobs(batch, 0.7)
    response_tokens, whole = sum(map(len, RESPONSES)), batch.input_ids.numel()
    assert rows == [response_tokens] * 2
    assert response_tokens < whole / 2


def test_everything_is_zero_outside_the_responses(tiny_models: Any, batch: TokenBatch) -> None:
    policy = policy_of(tiny_models)
    torch.nn.init.ones_(policy.value_head.bias)
    now, mask = policy.evaluate(batch, 0.7), batch.response_columns
    reference = policy.reference_logprobs(batch, 0.7)
    for values in (now.logprobs, now.logprobs_at_1, now.values, now.entropies, *reference):
        assert (values[~mask] == 0).all()
        assert (values[mask] != 0).all()


def test_a_value_does_not_depend_on_the_token_that_it_is_the_value_before(tiny_models: Any) -> None:
    policy = policy_of(tiny_models)
    torch.nn.init.normal_(policy.value_head.weight)
    first, other = (policy.evaluate(pack([[7, 12]], [[44, last]], 0), 1.0).values for last in (45, 46))
    assert torch.equal(first, other)
    changed_earlier = policy.evaluate(pack([[7, 12]], [[43, 45]], 0), 1.0).values
    assert changed_earlier[0, 0] == first[0, 0] and changed_earlier[0, 1] != first[0, 1]


@pytest.mark.parametrize(("method", "value_trunk"), TRUNKS)
def test_the_value_loss_reaches_the_policy_through_a_shared_trunk_only(
    tiny_models: Any, batch: TokenBatch, method: str, value_trunk: str
) -> None:
    policy = policy_of(tiny_models, method=method, value_trunk=value_trunk)
    torch.nn.init.normal_(policy.value_head.weight)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.evaluate(batch, 1.0).values.square().sum().backward()
    reached = [p for p in policy.policy_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool(reached) == (value_trunk == "shared")
    assert all(p.grad is not None for p in policy.value_parameters())
    assert len(policy.value_parameters()) > 2 if value_trunk == "separate" else len(policy.value_parameters()) == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_separate_value_trunk_is_its_own_and_the_policys_loss_does_not_reach_it(
    tiny_models: Any, batch: TokenBatch, method: str
) -> None:
    policy = policy_of(tiny_models, method=method, value_trunk="separate")
    torch.nn.init.normal_(policy.value_head.weight)
    policy.evaluate(batch, 1.0).logprobs.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in policy.value_parameters())
    shared = {p.data_ptr() for p in policy.policy_parameters()} & {p.data_ptr() for p in policy.value_parameters()}
    assert shared == set()
    logprobs, reference = logprobs_of(policy, batch), reference_of(policy, batch)
    values = policy.evaluate(batch, 1.0).values.detach()
    with torch.no_grad():
        for parameter in policy.value_parameters():
            parameter.add_(0.1)
    assert torch.equal(logprobs_of(policy, batch), logprobs)
    assert torch.equal(reference_of(policy, batch), reference)
    assert not torch.equal(policy.evaluate(batch, 1.0).values, values)


@pytest.mark.parametrize(("method", "value_trunk"), TRUNKS)
def test_with_values_only_no_gradient_reaches_the_policy(
    tiny_models: Any, batch: TokenBatch, method: str, value_trunk: str
) -> None:
    policy = policy_of(tiny_models, method=method, value_trunk=value_trunk)
    now = policy.evaluate(batch, 1.0, only_values=True)
    (now.values - 1).square().sum().backward()
    assert not now.logprobs.requires_grad
    assert all(p.grad is None for p in policy.policy_parameters())
    assert policy.value_head.bias.grad is not None and policy.value_head.bias.grad.abs() > 0


@pytest.mark.parametrize(("method", "value_trunk"), TRUNKS)
def test_a_trained_state_brings_policy_and_values_back(
    tiny_models: Any, batch: TokenBatch, method: str, value_trunk: str
) -> None:
    policy = policy_of(tiny_models, method=method, value_trunk=value_trunk)
    take_a_step(policy, batch)
    state = {name: tensor.clone() for name, tensor in policy.trained_state().items()}
    expected = policy.evaluate(batch, 0.7)
    fresh = policy_of(tiny_models, method=method, value_trunk=value_trunk)
    fresh.load_trained_state(state)
    found = fresh.evaluate(batch, 0.7)
    for name in ("logprobs", "logprobs_at_1", "values", "entropies"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(reference_of(fresh, batch), reference_of(policy, batch))


def test_what_is_trained_is_the_adapter_or_everything_and_the_value_head(tiny_models: Any) -> None:
    lora, full = policy_of(tiny_models), policy_of(tiny_models, method="full")
    assert all("lora_" in name or name.startswith("value_head") for name in lora.trained_state())
    trunk = sum(parameter.numel() for parameter in tiny_models.build("opt").parameters())
    assert sum(parameter.numel() for parameter in full.policy_parameters()) == trunk
    assert sum(parameter.numel() for parameter in full.value_parameters()) == 16 + 1
    for policy in (lora, full):
        assert len(parameters(policy)) == len(policy.trained_state())


class TestOneTrunk:
    """With LoRA policy, reference, reward model and value model are one model in memory."""

    @pytest.mark.parametrize("value_trunk", ["shared", "detached", "separate"])
    def test_no_copy_of_the_trunk_is_made(
        self, tiny_models: Any, reward_artifact: RewardArtifact, value_trunk: str
    ) -> None:
        _, reward = reward_artifact("opt")
        trunk = tiny_models.build("opt")
        pointers = {name: parameter.data_ptr() for name, parameter in trunk.named_parameters()}
        trunk_bytes = sum(parameter.numel() * 4 for parameter in trunk.parameters())
        policy = PolicyWithValue(trunk, PpoConfig(lora_rank=2, value_trunk=value_trunk), reward)
        held = {tensor.data_ptr() for tensor in all_tensors(policy)}
        assert set(pointers.values()) <= held  # the trunk that was given is the one that is used
        added = sum(p.numel() * 4 for name, p in policy.model.named_parameters() if "lora_" in name)
        heads = (16 + 1) * 4 + 16 * 4  # the value head, and the reward model's
        assert bytes_held(policy) == trunk_bytes + added + heads

    def test_full_training_makes_one_copy_for_the_reference(self, tiny_models: Any) -> None:
        once = bytes_held(policy_of(tiny_models))
        assert 1.5 * once < bytes_held(policy_of(tiny_models, method="full")) < 2.5 * once

    @pytest.mark.parametrize("value_trunk", ["shared", "separate"])
    def test_the_reward_adapter_is_never_trained_and_moves_neither_policy_nor_reference(
        self, tiny_models: Any, batch: TokenBatch, reward_artifact: RewardArtifact, value_trunk: str
    ) -> None:
        _, reward = reward_artifact("opt")
        policy = policy_of(tiny_models, reward=reward, value_trunk=value_trunk)
        plain = policy_of(tiny_models, value_trunk=value_trunk)
        scores = policy.reward_scores(batch)
        assert scores.abs().max() > 0.01 and not scores.requires_grad
        assert torch.equal(logprobs_of(policy, batch), logprobs_of(plain, batch))
        assert torch.equal(reference_of(policy, batch), reference_of(plain, batch))
        trained = {id(parameter) for parameter in parameters(policy)}
        frozen = {n: p for n, p in policy.model.named_parameters() if ".reward." in n}
        assert frozen and not any(id(p) in trained or p.requires_grad for p in frozen.values())
        before = {name: tensor.clone() for name, tensor in frozen.items()}
        take_a_step(policy, batch)
        assert all(p.grad is None and torch.equal(p, before[name]) for name, p in frozen.items())
        assert torch.equal(policy.reward_scores(batch), scores)

    def test_scoring_leaves_the_policy_active_and_trainable_also_after_an_error(
        self, tiny_models: Any, batch: TokenBatch, reward_artifact: RewardArtifact
    ) -> None:
        _, reward = reward_artifact("opt")
        policy = policy_of(tiny_models, reward=reward, value_trunk="separate")
        take_a_step(policy, batch)
        now = policy.evaluate(batch, 1.0)

        def check() -> None:
            assert policy.model.active_adapters == ["default"]
            again = policy.evaluate(batch, 1.0)
            assert torch.equal(again.logprobs, now.logprobs) and torch.equal(again.values, now.values)
            assert all(parameter.requires_grad for parameter in parameters(policy))
            assert not any(p.requires_grad for name, p in policy.model.named_parameters() if ".reward." in name)

        policy.reward_scores(batch)
        check()
        outside = TokenBatch(batch.input_ids + 1000, batch.attention_mask, batch.response_mask)
        for broken in (policy.reward_scores, lambda tokens: policy.evaluate(tokens, 1.0), policy.reference_logprobs):
            arguments = (outside, 1.0) if broken == policy.reference_logprobs else (outside,)
            with pytest.raises(IndexError):
                broken(*arguments)
            check()

    def test_what_is_saved_is_the_policys_adapter_alone(
        self, tiny_models: Any, batch: TokenBatch, reward_artifact: RewardArtifact, tmp_path: Path
    ) -> None:
        _, reward = reward_artifact("opt")
        policy = policy_of(tiny_models, reward=reward, value_trunk="separate")
        take_a_step(policy, batch)
        save_trained(policy.model, tiny_models.tokenizer, tmp_path / "saved")
        files = sorted(str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*.*"))
        assert files == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
        saved = load_file(tmp_path / "saved" / "adapter" / "adapter_model.safetensors")
        state = policy.trained_state()
        adapter = {name: tensor for name, tensor in state.items() if ".default." in name}
        assert len(saved) == len(adapter)
        for name, tensor in saved.items():
            assert torch.equal(tensor, adapter[name.replace(".weight", ".default.weight")])

    def test_a_policy_without_a_reward_adapter_has_no_scores(self, tiny_models: Any, batch: TokenBatch) -> None:
        policy = policy_of(tiny_models)
        assert not policy.holds_reward_adapter
        with pytest.raises(ValueError, match="holds no reward adapter"):
            policy.reward_scores(batch)
