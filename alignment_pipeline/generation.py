"""Responses sampled from a causal language model, a batch of prompts at a time.

Beside the library's `generate` this decoding loop has three properties that training needs:

1. A row's random numbers depend on the seed and the row's number alone, so that its response is the same (up to the
   rounding of matrix products) in whatever batch, order or process it is sampled.
2. Each row has its own longest length, and rows that have ended leave the batch: nobody pays for padding.
3. The language-model head is applied to the last position only.

Sampling is from the full distribution at a temperature: no top-k, no top-p, no penalties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from alignment_pipeline.errors import DataError
from alignment_pipeline.sequences import apply_head, by_length, causal_lm_of
from alignment_pipeline.tokenization import TokenIds


@dataclass(frozen=True)
class Response:
    """One generated response: its tokens (the end token included when `ended`) and its text without the end token."""

    token_ids: TokenIds
    text: str
    ended: bool


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

    Raises:
        DataError: A prompt and its longest response are longer than the model reads.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _require_room(model, prompts, limits)
    numbers = range(len(prompts)) if row_numbers is None else row_numbers
    responses: dict[int, Response] = {}
    for rows in by_length([len(prompt) for prompt in prompts], batch_size):
        noise = [uniforms(seed, numbers[row], limits[row]) for row in rows]
        sampled = _decode(
            model, [prompts[row] for row in rows], [limits[row] for row in rows], noise, temperature, tokenizer
        )
        responses.update(zip(rows, (_response(token_ids, tokenizer) for token_ids in sampled), strict=True))
    return [responses[row] for row in range(len(prompts))]


def _require_room(model: Any, prompts: Sequence[TokenIds], limits: Sequence[int]) -> None:
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
    temperature: float,
    tokenizer: Any,
) -> list[TokenIds]:
    """Token ids of each response: left-padded prompts, explicit positions, one cache; ended rows leave the batch."""
    causal_lm, device = causal_lm_of(model), model.device
    longest, widest = max(limits), max(map(len, prompts))
    input_ids = torch.full((len(prompts), widest), tokenizer.pad_token_id, device=device)
    mask = torch.zeros((len(prompts), widest), dtype=torch.long, device=device)
    uniform = torch.zeros((len(prompts), longest), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        input_ids[row, widest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, widest - len(prompt) :] = 1
        uniform[row, : limits[row]] = torch.from_numpy(noise[row])
    uniform, limit = uniform.to(device), torch.tensor(limits, device=device)
    padded = bool((mask == 0).any())
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    cache = DynamicCache(config=causal_lm.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    live = torch.arange(len(prompts), device=device)
    tokens = torch.full((len(prompts), longest), tokenizer.pad_token_id, device=device)
    counts = limit.clone()
    for step in range(longest):
        hidden = causal_lm.base_model(
            input_ids=input_ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        chosen = choose(apply_head(causal_lm, hidden), uniform[live, step], temperature)
        tokens[live, step] = chosen
        ended = chosen == eos
        counts[live[ended]] = step + 1
        stays = (~ended & (step + 1 < limit[live])).nonzero().squeeze(-1)
        if len(stays) == 0:
            break
        if len(stays) < len(live):
            cache.batch_select_indices(stays)
            live, chosen, mask = live[stays], chosen[stays], mask[stays]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        input_ids, positions = chosen[:, None], mask.sum(1, keepdim=True) - 1
    return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


def _response(token_ids: TokenIds, tokenizer: Any) -> Response:
    ended = bool(token_ids) and token_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    return Response(token_ids, str(text), ended)
