"""Shape key as in `alignment_pipeline.sequences`. Oracles compute every position of one row at a time, unpadded."""

import random
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import SftConfig
from alignment_pipeline.models import with_adapter
from alignment_pipeline.sequences import (
    TokenBatch,
    by_length,
    chosen_logprobs,
    in_columns,
    pack,
    per_row,
    response_logits,
    response_tokens,
    sum_logprobs,
)
from alignment_pipeline.tokenization import encode, encode_responses, encode_side

# Batched and one-by-one matrix products add in another order: float32 rounding of logits and sums of size 1 to 30.
ROUNDING = 1e-5
ARCHITECTURES = ["opt", "opt_projected", "gpt2", "llama"]
PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]]
RESPONSES = [[44, 45, 1], [99, 98, 97, 96, 95, 1], [3], [210, 1]]


def naive_logprobs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log p of each response token: the whole row through the model's own forward and a full log softmax."""
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    start = len(prompt) - 1
    return torch.stack([logprobs[start + number, token] for number, token in enumerate(response)])


def padded(batch: TokenBatch, columns: int, token: int) -> TokenBatch:
    """The batch with more padding on the right."""
    extra = torch.full((batch.input_ids.shape[0], columns), token)
    nothing = torch.zeros_like(extra, dtype=torch.bool)
    return TokenBatch(
        torch.cat([batch.input_ids, extra], 1),
        torch.cat([batch.attention_mask, nothing], 1),
        torch.cat([batch.response_mask, nothing], 1),
    )


def test_a_batch_is_prompts_then_responses_then_padding() -> None:
    batch = pack([[5, 6], [7]], [[8], [9, 10, 11]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert batch.response_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert response_tokens(batch).tolist() == [8, 9, 10, 11]


def test_response_columns_are_left_aligned_and_as_wide_as_the_longest_response() -> None:
    batch = pack([[5, 6], [7], [8, 9, 10]], [[8], [9, 10, 11], [12, 13]], pad_id=0)
    assert batch.response_columns.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    columns = in_columns(response_tokens(batch), batch)
    assert columns.tolist() == [[8, 0, 0], [9, 10, 11], [12, 13, 0]]


def test_rows_of_a_batch_lose_padding_that_none_of_them_needs() -> None:
    part = pack([[5], [7], [8]], [[6], [9, 10, 11], [12, 13]], pad_id=0).rows(torch.tensor([2, 0]))
    assert part.input_ids.tolist() == [[8, 12, 13], [5, 6, 0]]
    assert part.response_mask.tolist() == [[False, True, True], [False, True, False]]
    assert part.attention_mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_prompt_without_its_response_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pack([[5], [6]], [[7]], pad_id=0)


def test_texts_are_encoded_without_special_tokens_and_responses_end(tokenizer: Any) -> None:
    texts = ["def f():\n", "", "</s>x"]
    ids = encode(tokenizer, texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert ids[1] == []
    assert encode_responses(tokenizer, texts) == [[*row, tokenizer.eos_token_id] for row in ids]
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_by_length_hold_each_row_once_shortest_first(batch_size: int) -> None:
    lengths = random.Random(0).choices(range(6), k=50)
    batches = list(by_length(lengths, batch_size))
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    order = [(lengths[row], row) for batch in batches for row in batch]
    assert order == sorted(order)
    assert list(by_length([], batch_size)) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_of_responses_are_those_of_the_full_logits(tiny_models: Any, architecture: str) -> None:
    model = tiny_models.build(architecture)
    batch = pack(PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id)
    with torch.inference_mode():
        found = chosen_logprobs(response_logits(model, batch), response_tokens(batch))
    expected = [naive_logprobs(model, prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=ROUNDING)
    sums = torch.stack([row.sum() for row in expected])
    torch.testing.assert_close(per_row(found, batch), sums, rtol=0, atol=ROUNDING)
    for batch_size in (1, 2, 10):
        scored = sum_logprobs(model, PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id, batch_size)
        torch.testing.assert_close(torch.tensor(scored), sums, rtol=0, atol=ROUNDING)


def test_a_chosen_log_probability_has_the_gradient_of_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.tensor([0, 8, 3, 3, 5]), torch.randn(5, generator=generator, dtype=torch.float64)
    expected = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    found = chosen_logprobs(logits, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # nine terms in double precision
    (gradient,), (wanted,) = (torch.autograd.grad((weights * given).sum(), logits) for given in (found, expected))
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapters_log_probabilities_are_the_wrapped_models(tiny_models: Any, architecture: str) -> None:
    model = with_adapter(tiny_models.build(architecture), SftConfig(lora_rank=2), "CAUSAL_LM").eval()
    plain = naive_logprobs(model, PROMPTS[0], RESPONSES[0]).sum()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    expected = naive_logprobs(model, PROMPTS[0], RESPONSES[0]).sum()
    scored = sum_logprobs(model, PROMPTS[:1], RESPONSES[:1], tiny_models.tokenizer.pad_token_id, 1)
    assert scored[0] == pytest.approx(expected.item(), abs=ROUNDING)
    assert abs(expected - plain) > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_padding_changes_no_log_probability(tiny_models: Any, architecture: str) -> None:
    model = tiny_models.build(architecture)
    batch = pack(PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id)
    with torch.inference_mode():
        short = response_logits(model, batch)
        for token in (tiny_models.tokenizer.pad_token_id, 77):  # what stands in the padding does not count either
            torch.testing.assert_close(response_logits(model, padded(batch, 9, token)), short, rtol=0, atol=ROUNDING)


def test_logits_are_float32_whatever_the_models_type(tiny_models: Any) -> None:
    model = tiny_models.build("opt").to(torch.bfloat16)
    batch = pack(PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id)
    assert response_logits(model, batch).dtype == torch.float32


def test_the_end_token_follows_only_the_side_of_a_pair_that_had_ended(tokenizer: Any) -> None:
    pairs = [{"chosen": "abc", "chosen_ended": True}, {"chosen": "abc", "chosen_ended": False}]
    ended, cut = encode_side(tokenizer, pairs, "chosen")
    assert ended == [*cut, tokenizer.eos_token_id]
