"""Prompts and responses as tensors: packing, and log-probabilities of responses. Sampling them is in `generation`.

Shape key: `B` responses, `L` prompt and response tokens after right padding, `N` response tokens in a batch, `V`
vocabulary. `*_mask` is True where the token counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from alignment_pipeline.tokenization import TokenIds

HEAD_ROWS = 512
"""Response tokens that the language-model head is applied to at once: of a large vocabulary a batch's logits would not
fit into memory."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts followed by responses, right-padded, so that position ids are the columns' numbers.

    Attributes:
        input_ids: (B, L)
        attention_mask: (B, L), True on prompt and response tokens.
        response_mask: (B, L), True on response tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor

    @property
    def response_columns(self) -> torch.Tensor:
        """(B, T) mask of the responses alone, left-aligned; `T` is the longest one's length."""
        lengths = self.response_mask.sum(1)
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    def rows(self, index: torch.Tensor) -> "TokenBatch":
        """Some of the batch's rows, padding that none of them needs cut off."""
        length = int(self.attention_mask[index].sum(1).max())
        return TokenBatch(
            self.input_ids[index, :length], self.attention_mask[index, :length], self.response_mask[index, :length]
        )


def pack(prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, device: str = "cpu") -> TokenBatch:
    """Concatenate each prompt with its response and pad on the right."""
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), length), dtype=torch.bool)
    response_mask = torch.zeros((len(prompts), length), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        attention_mask[row, :end] = True
        response_mask[row, len(prompt) : end] = True
    return TokenBatch(input_ids.to(device), attention_mask.to(device), response_mask.to(device))


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, rows of similar length together, so that little is padded. Order is deterministic."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def response_logits(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Logits that predict each response token; the head is applied at those positions only.

    Returns:
        (N, V) in float32, rows in the order of `batch.response_mask`'s True entries.
    """
    return apply_head(model, response_hidden(model, batch))


def response_hidden(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Hidden states (N, H) at the positions that predict each response token.

    No attention mask is given: padding is on the right, where a causal model's real tokens cannot see it, and without a
    mask attention takes its fast path.
    """
    hidden = causal_lm_of(model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    selected: torch.Tensor = hidden[:, :-1][batch.response_mask[:, 1:]]
    return selected


def apply_head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) in float32 of hidden states (N, H)."""
    logits: torch.Tensor = causal_lm_of(model).get_output_embeddings()(hidden).float()
    return logits


def causal_lm_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def response_tokens(batch: TokenBatch) -> torch.Tensor:
    """Response token ids (N,), in the order of `response_logits`."""
    return batch.input_ids[:, 1:][batch.response_mask[:, 1:]]


def chosen_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[token]: (N, V), (N,) → (N,)."""
    chosen: torch.Tensor = _ChosenLogprobs.apply(logits, tokens)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return chosen


class _ChosenLogprobs(torch.autograd.Function):
    """Cross entropy's value, with a backward pass that writes (N, V) once: torch's writes a one-hot matrix first."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        log_softmax = logits.log_softmax(-1)
        context.save_for_backward(log_softmax, tokens)
        return log_softmax.gather(-1, tokens[:, None]).squeeze(-1)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d log p[token] / d logit_v = 1{v = token} - p_v."""
        log_softmax, tokens = context.saved_tensors
        wanted = gradients[0][:, None]
        gradient = log_softmax.exp().mul_(-wanted)
        return gradient.scatter_add_(-1, tokens[:, None], wanted), None


def in_columns(values: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Per-token values (N,) as (B, T), a row a response, zero where a response has ended."""
    mask = batch.response_columns
    return torch.zeros(mask.shape, device=values.device, dtype=values.dtype).masked_scatter(mask, values)


def per_row(values: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Sums of per-token values by response: (N,) → (B,)."""
    rows = batch.response_mask.nonzero()[:, 0]
    return torch.zeros(batch.input_ids.shape[0], device=values.device, dtype=values.dtype).index_add_(0, rows, values)


class Likelihood(NamedTuple):
    """log p(response | prompt) in nats, and how many of the response's tokens are the likeliest at their place."""

    logprob: float
    likeliest: int


def sum_logprobs(
    model: Any, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, batch_size: int
) -> list[float]:
    """log p(response | prompt) in nats for each pair, in order."""
    return [found.logprob for found in likelihoods(model, prompts, responses, pad_id, batch_size)]


@torch.inference_mode()
def likelihoods(
    model: Any, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, batch_size: int
) -> list[Likelihood]:
    """How likely each response is to its prompt, in order."""
    found: dict[int, Likelihood] = {}
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in by_length(lengths, batch_size):
        batch = pack([prompts[row] for row in rows], [responses[row] for row in rows], pad_id, model.device)
        hidden, tokens = response_hidden(model, batch), response_tokens(batch)
        logprobs, likeliest = [], []
        for few, chosen in zip(torch.split(hidden, HEAD_ROWS), torch.split(tokens, HEAD_ROWS), strict=True):
            logits = apply_head(model, few)
            likeliest.append(logits.argmax(-1) == chosen)
            logprobs.append(chosen_logprobs(logits, chosen))
        sums = per_row(torch.cat(logprobs), batch).tolist()
        hits = per_row(torch.cat(likeliest).float(), batch).tolist()
        found.update((row, Likelihood(*each)) for row, *each in zip(rows, sums, map(int, hits), strict=True))
    return [found[row] for row in range(len(lengths))]
