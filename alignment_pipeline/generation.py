"""Responses sampled from a causal language model, a batch of prompts at a time.

Beside the library's `generate` this decoding loop has three properties that training needs:

1. A row's random numbers depend on the seed and the row's number alone, so that its response is the same (up to the
   rounding of matrix products) in whatever batch, order or process it is sampled.
2. Each row has its own longest length, and rows that have ended leave the batch: nobody pays for padding.
3. The language-model head is applied to the last position only.

The distribution is the model's at a temperature, unless it is cut by top-k or top-p, or a penalty of repetition or a
shortest length changes it: those are transformers' processors in the order of its `generate`. Beams are in
`beam_search`; which of the two answers is decided in `decoding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignment_pipeline.errors import DataError
from alignment_pipeline.sequences import apply_head, by_length, causal_lm_of
from alignment_pipeline.tokenization import TokenIds


@dataclass(frozen=True)
class Response:
    """One generated response: its tokens (the end token included when `ended`) and its text without the end token."""

    token_ids: TokenIds
    text: str
    ended: bool


@dataclass(frozen=True)
class Distribution:
    """How the next token's distribution follows from the logits; its fields are `DecodingFields`'."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn. Where the cut is depends on the temperature, which goes before it."""
        return self.top_k is not None or self._top_p < 1

    @property
    def _top_p(self) -> float:
        return 1.0 if self.top_p is None else self.top_p

    def processors(self, prompt_tokens: int, eos_token_id: int | None, device: Any) -> LogitsProcessorList:
        """What changes logits (B, V), given all tokens so far (B, prompt_tokens and new ones).

        Source: the order of transformers' `GenerationMixin._get_logits_processor`.
        """
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.min_new_tokens > 0 and eos_token_id is not None:
            chosen.append(
                MinNewTokensLengthLogitsProcessor(prompt_tokens, self.min_new_tokens, eos_token_id, device=device)
            )
        if self.cuts:
            chosen.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self._top_p < 1:
            chosen.append(TopPLogitsWarper(self._top_p))
        return chosen


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float,
    batch_size: int,
    seed: int,
    row_numbers: Sequence[int] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> list[Response]:
    """Sample one response for each prompt, in the prompts' order.

    Args:
        model: Causal language model, in an adapter's wrapper or not.
        tokenizer: Its `eos_token_id` (None: responses never end early), `pad_token_id` and `decode` are used.
        prompts: Token ids; none may be empty.
        max_new_tokens: Longest response, for all prompts or for each.
        temperature: Divides the logits; 0 is greedy.
        batch_size: Prompts sampled together; batches are of similar length.
        seed: Together with a row's number it decides the row's random numbers.
        row_numbers: Number of each prompt; its position if left out.
        top_k: Draw from so many of the most probable tokens only; None from all. With a temperature above 0.
        top_p: Then draw from the most probable ones with this share together; None from all. Likewise.
        repetition_penalty: Makes tokens of the prompt and of the response so far less probable; 1 does nothing.
        min_new_tokens: The end token cannot be drawn before.

    Raises:
        DataError: A prompt and its longest response are longer than the model reads.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    require_room(model, prompts, limits)
    distribution = Distribution(temperature, top_k, top_p, repetition_penalty, min_new_tokens)
    numbers = range(len(prompts)) if row_numbers is None else row_numbers
    responses: dict[int, Response] = {}
    for rows in by_length([len(prompt) for prompt in prompts], batch_size):
        noise = [uniforms(seed, numbers[row], limits[row]) for row in rows]
        sampled = _decode(
            model, [prompts[row] for row in rows], [limits[row] for row in rows], noise, distribution, tokenizer
        )
        responses.update(zip(rows, (response_of(token_ids, tokenizer) for token_ids in sampled), strict=True))
    return [responses[row] for row in range(len(prompts))]


def require_room(model: Any, prompts: Sequence[TokenIds], limits: Sequence[int]) -> None:
    """Check that each prompt and its longest response together are no longer than the model reads.

    Raises:
        DataError: One is longer.
    """
    positions = getattr(causal_lm_of(model).config, "max_position_embeddings", None)
    for prompt, limit in zip(prompts, limits, strict=True):
        if positions is not None and len(prompt) + limit > positions:
            raise DataError(
                f"Found a prompt of {len(prompt)} tokens to be followed by up to {limit}, expected at most {positions} "
                "together, which the model reads. Lower max_new_tokens or formatting.max_prompt_tokens."
            )


def uniforms(seed: int, row: int, count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Random numbers (count,) in [0, 1) of one row, by a counter-based generator: Philox, keyed by seed and row."""
    return np.random.Generator(np.random.Philox(key=[seed, row])).random(count)


def choose(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution: the first token whose cumulative share is above u.

    Args:
        logits: (B, V) in float32.
        noise: (B,) u in [0, 1), float64. Unused when greedy.
        temperature: Divides the logits; 0 takes the most probable token.

    Returns:
        (B,) token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    # Scaled by the last sum, which rounding keeps from being 1, so that no u falls behind the last token.
    tokens = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    # Behind it falls what is compared with a NaN; such a row has to live until its log-probabilities are looked at.
    return tokens.clamp(max=logits.shape[-1] - 1)


def _decode(
    model: Any,
    prompts: Sequence[TokenIds],
    limits: Sequence[int],
    noise: Sequence["np.ndarray[Any, np.dtype[np.float64]]"],
    distribution: Distribution,
    tokenizer: Any,
) -> list[TokenIds]:
    """Token ids of each response: left-padded prompts, explicit positions, one cache; ended rows leave the batch."""
    causal_lm, device = causal_lm_of(model), model.device
    longest, widest = max(limits), max(map(len, prompts))
    input_ids, mask = left_padded(prompts, device)
    uniform = torch.zeros((len(prompts), longest), dtype=torch.float64)
    for row, limit in enumerate(limits):
        uniform[row, :limit] = torch.from_numpy(noise[row])
    uniform, longest_of = uniform.to(device), torch.tensor(limits, device=device)
    padded = bool((mask == 0).any())
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    cache = DynamicCache(config=causal_lm.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    live = torch.arange(len(prompts), device=device)
    tokens = torch.full((len(prompts), longest), tokenizer.pad_token_id, device=device)
    counts = longest_of.clone()
    processors = distribution.processors(widest, tokenizer.eos_token_id, device)
    temperature = 1.0 if distribution.cuts else distribution.temperature
    so_far = input_ids
    for step in range(longest):
        hidden = causal_lm.base_model(
            input_ids=input_ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = processors(so_far, apply_head(causal_lm, hidden))
        chosen = choose(logits, uniform[live, step], temperature)
        tokens[live, step] = chosen
        ended = chosen == eos
        counts[live[ended]] = step + 1
        stays = (~ended & (step + 1 < longest_of[live])).nonzero().squeeze(-1)
        if len(stays) == 0:
            break
        if len(stays) < len(live):
            cache.batch_select_indices(stays)
            live, chosen, mask, so_far = live[stays], chosen[stays], mask[stays], so_far[stays]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        input_ids, positions = chosen[:, None], mask.sum(1, keepdim=True) - 1
        so_far = torch.cat((so_far, input_ids), dim=1)
    return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


def left_padded(prompts: Sequence[TokenIds], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as input ids and attention mask, both (B, P).

    Padding is the prompt's own first token: attention does not see it, and a penalty of repetition, which does, finds
    no token that the prompt has not.
    """
    widest = max(map(len, prompts))
    input_ids = torch.tensor([[prompt[0]] * (widest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return input_ids, mask


def response_of(token_ids: TokenIds, tokenizer: Any) -> Response:
    """A response of its tokens, which do not go beyond the first end token."""
    ended = bool(token_ids) and token_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    return Response(token_ids, str(text), ended)
