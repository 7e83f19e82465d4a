"""Oracles decode one prompt at a time: the whole row through the model's own forward, no padding and no cache."""

import dataclasses
import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignment_pipeline.configs import SftConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.generation import Response, choose, generate, uniforms
from alignment_pipeline.models import with_adapter

ARCHITECTURES = ["opt", "opt_projected", "gpt2", "llama"]
PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]]
SAMPLING: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 8, "seed": 3}
NEARLY_ONE = float(np.nextafter(1.0, 0.0))  # the largest random number there is


def oracle(model: Any, prompt: list[int], eos: int | None, row: int, limit: int, temperature: float) -> list[int]:
    """Token by token, by the full forward pass and the inverse of the cumulative distribution in NumPy."""
    draws = np.random.Generator(np.random.Philox(key=[SAMPLING["seed"], row])).random(limit)
    ids = list(prompt)
    for draw in draws:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        shares = np.cumsum((logits / (temperature or 1)).softmax(-1).numpy())
        ids.append(int(np.argmax(shares > draw * shares[-1])) if temperature else int(logits.argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def token_ids(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


@pytest.fixture
def sampled(tiny_models: Any) -> Any:
    """Samples for 32 prompts by a model whose end token is likely, so that rows end at different steps."""
    model = tiny_models.build("opt", init_std=0.02)  # near uniform over 300 tokens
    with torch.no_grad():  # the head is tied to the embeddings
        model.lm_head.weight[tiny_models.tokenizer.eos_token_id] *= 3

    def sample(prompts: list[list[int]] = PROMPTS * 8, **changes: Any) -> list[Response]:
        return generate(model, tiny_models.tokenizer, prompts, **(SAMPLING | {"temperature": 0.4} | changes))

    sample.model = model  # type: ignore[attr-defined]
    return sample


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7], ids=["greedy", "sampled", "sampled at 0.7"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_batch_gives_what_each_prompt_gives_alone(
    tiny_models: Any, architecture: str, temperature: float
) -> None:
    tokenizer, model = tiny_models.tokenizer, tiny_models.build(architecture)
    found = generate(model, tokenizer, PROMPTS, **(SAMPLING | {"temperature": temperature}))
    expected = [
        oracle(model, prompt, tokenizer.eos_token_id, row, 6, temperature) for row, prompt in enumerate(PROMPTS)
    ]
    assert token_ids(found) == expected


def test_an_adapter_takes_part_in_sampling(tiny_models: Any) -> None:
    model = with_adapter(tiny_models.build("opt"), SftConfig(lora_rank=2), "CAUSAL_LM").eval()
    plain = generate(model, tiny_models.tokenizer, PROMPTS, **SAMPLING)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    eos = tiny_models.tokenizer.eos_token_id
    expected = [oracle(model, prompt, eos, row, 6, 1.0) for row, prompt in enumerate(PROMPTS)]
    assert token_ids(generate(model, tiny_models.tokenizer, PROMPTS, **SAMPLING)) == expected != token_ids(plain)


def test_a_row_is_the_same_in_any_batch_order_and_share(sampled: Any) -> None:
    expected = sampled()
    assert len({tuple(ids) for ids in token_ids(expected)}) > 16  # rows of one prompt differ
    for batch_size in (1, 3, 64):
        assert sampled(batch_size=batch_size) == expected
    order = random.Random(0).sample(range(32), 32)
    prompts = PROMPTS * 8
    shuffled = sampled([prompts[row] for row in order], row_numbers=order)
    assert shuffled == [expected[row] for row in order]
    shares = [sampled(prompts[number::2], row_numbers=range(number, 32, 2)) for number in (0, 1)]
    assert [response for pair in zip(*shares, strict=True) for response in pair] == expected


def test_the_same_seed_gives_the_same_responses_whatever_was_drawn_before_and_another_others(sampled: Any) -> None:
    first = sampled()
    torch.manual_seed(12345)
    torch.rand(7)
    assert sampled() == first
    assert sampled(seed=4) != first


def test_random_numbers_are_a_rows_own_and_a_longer_row_begins_with_the_shorter_ones() -> None:
    assert uniforms(3, 5, 9)[:4].tolist() == uniforms(3, 5, 4).tolist()
    rows = {tuple(uniforms(seed, row, 4)) for seed, row in itertools.product(range(10), range(10))}
    assert len(rows) == 100


def test_a_response_ends_at_its_first_end_token_or_at_its_own_limit(tiny_models: Any, sampled: Any) -> None:
    tokenizer, limits = tiny_models.tokenizer, [1 + row % 7 for row in range(256)]
    responses, longest = sampled(PROMPTS * 64, max_new_tokens=limits), sampled(PROMPTS * 64, max_new_tokens=7)
    assert {response.ended for response in responses} == {True, False}
    for response, limit, long in zip(responses, limits, longest, strict=True):
        assert response.token_ids == long.token_ids[:limit]  # the limit cuts, it changes nothing before
        assert response.ended == (response.token_ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in response.token_ids[:-1]
        assert response.ended or len(response.token_ids) == limit
        assert "</s>" not in response.text
        assert response.text == tokenizer.decode(response.token_ids, skip_special_tokens=True)


def test_rows_that_have_ended_leave_the_batch_and_the_head_sees_one_position_a_row(sampled: Any) -> None:
    model, forward, head = sampled.model, [], []
    hooks = [
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: forward.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ),
        model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: head.append(args[0].numel() // args[0].shape[-1])
        ),
    ]
    responses = sampled(max_new_tokens=[1 + row % 6 for row in range(32)], batch_size=32)
    for hook in hooks:
        hook.remove()
    lengths = [len(response.token_ids) for response in responses]
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert len(set(live)) > 3
    assert forward == [(32, 7), *((rows, 1) for rows in live[1:])]
    assert head == live


def test_without_an_end_token_every_response_has_its_full_length(tiny_models: Any, sampled: Any) -> None:
    tokenizer = tiny_models.tokenizer
    endless = SimpleNamespace(eos_token_id=None, pad_token_id=tokenizer.pad_token_id, decode=tokenizer.decode)
    responses = generate(sampled.model, endless, PROMPTS * 32, **(SAMPLING | {"temperature": 0.4}))
    assert {(len(response.token_ids), response.ended) for response in responses} == {(6, False)}
    assert any(tokenizer.eos_token_id in response.token_ids[:-1] for response in responses)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_padding_token_may_stand_in_a_prompt_and_be_sampled(tiny_models: Any, architecture: str) -> None:
    tokenizer, model = tiny_models.tokenizer, tiny_models.build(architecture)
    plain = generate(model, tokenizer, PROMPTS * 4, **SAMPLING)
    common = max(range(300), key=lambda token: sum(ids.count(token) for ids in token_ids(plain)))
    for pad_id in (12, common):  # one that a prompt holds, and the one that is sampled most
        odd = SimpleNamespace(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id, decode=tokenizer.decode)
        assert generate(model, odd, PROMPTS * 4, **SAMPLING) == plain


def test_no_prompts_give_no_responses(sampled: Any) -> None:
    assert sampled([]) == []


@dataclasses.dataclass
class ChiSquare:
    """Pearson's statistic of drawn tokens, tokens that are expected under 5 times put together."""

    drawn: torch.Tensor
    shares: torch.Tensor

    def standard_deviations(self) -> float:
        """How far it is above its expectation, by Wilson's and Hilferty's normal approximation."""
        counts = torch.bincount(self.drawn, minlength=len(self.shares)).double()
        expected = self.shares.double() / self.shares.double().sum() * len(self.drawn)
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        freedom = len(counts) - 1
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        spread = 2 / (9 * freedom)
        return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


FALSE_ALARM = 4.75  # standard deviations: a right sampler is above with probability 1e-6 (and the seed is fixed)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_follow_the_full_distribution_at_the_temperature(tiny_models: Any, temperature: float) -> None:
    model, tokenizer, draws = tiny_models.build("opt"), tiny_models.tokenizer, 8192
    responses = generate(
        model, tokenizer, [PROMPTS[0]] * draws, max_new_tokens=1, temperature=temperature, batch_size=draws, seed=0
    )
    drawn = torch.tensor([response.token_ids[0] for response in responses])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert ChiSquare(drawn, (logits / temperature).softmax(-1)).standard_deviations() < FALSE_ALARM
    assert ChiSquare(drawn, (logits / 0.85).softmax(-1)).standard_deviations() > FALSE_ALARM  # it can fail


def test_chosen_tokens_follow_the_distribution_over_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, generator=generator)
    noise = torch.from_numpy(uniforms(0, 0, 10_000))
    drawn = torch.cat([choose(logits.expand(len(part), -1), part, 1.0) for part in noise.split(500)])
    assert ChiSquare(drawn, logits.softmax(-1)).standard_deviations() < FALSE_ALARM


def test_the_ends_of_the_random_numbers_choose_the_first_and_the_last_token_that_is_possible() -> None:
    never = -float("inf")
    logits = torch.tensor([[never, 0.0, 1.0, -2.0, never, never]]).expand(2, -1)
    ends = torch.tensor([0.0, NEARLY_ONE], dtype=torch.float64)
    assert choose(logits, ends, 1.0).tolist() == [1, 3]
    for seed in range(20):  # sums over many tokens are not exactly 1
        logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(seed))
        assert choose(logits, ends, 1.0).tolist() == [0, 4999]


def test_a_token_is_chosen_by_its_share_of_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(4, -1)
    noise = torch.tensor([0.19, 0.21, 0.49, 0.51], dtype=torch.float64)
    assert choose(logits, noise, 1.0).tolist() == [0, 1, 1, 2]
    # At temperature 1/2 shares are squared: 4, 9 and 25 of 38.
    assert choose(logits, noise, 0.5).tolist() == [1, 1, 2, 2]


def test_a_model_that_is_not_finite_still_chooses_tokens_of_the_vocabulary() -> None:
    """Its rows are refused when their log-probabilities are looked at, which takes tokens that exist."""
    noise = torch.tensor([0.2, NEARLY_ONE], dtype=torch.float64)
    for broken in (float("nan"), float("inf")):
        tokens = choose(torch.full((2, 5), broken), noise, 1.0)
        assert ((tokens >= 0) & (tokens < 5)).all()


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_a_response_that_the_model_has_no_positions_for_is_refused(tiny_models: Any, architecture: str) -> None:
    model, prompts = tiny_models.build(architecture), [[7], [7] * 60]  # it reads 64 tokens
    settings = {"temperature": 0.0, "batch_size": 2, "seed": 0}
    assert len(generate(model, tiny_models.tokenizer, prompts, max_new_tokens=4, **settings)) == 2
    with pytest.raises(
        DataError, match="a prompt of 60 tokens to be followed by up to 5, expected at most 64 together"
    ):
        generate(model, tiny_models.tokenizer, prompts, max_new_tokens=[60, 5], **settings)
