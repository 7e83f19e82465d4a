"""Responses by beam search: transformers' own `generate`, a batch of prompts of similar length at a time.

Sampling and greedy decoding are in `generation`, and so is what both share.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from alignment_pipeline.generation import Response, left_padded, require_room, response_of
from alignment_pipeline.sequences import by_length
from alignment_pipeline.tokenization import TokenIds


@torch.inference_mode()
def beam_search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    *,
    num_beams: int,
    max_new_tokens: int,
    batch_size: int,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> list[Response]:
    """The most probable response that a beam search finds for each prompt, in the prompts' order.

    Finished responses are compared by their mean log-probability a token (`length_penalty` 1), and a prompt's search
    ends when no running beam can be better than the worst finished one, as transformers does by default.

    Args:
        model: Causal language model, in an adapter's wrapper or not.
        tokenizer: Its `eos_token_id`, `pad_token_id` and `decode` are used.
        prompts: Token ids; none may be empty.
        num_beams: Beams a prompt, two or more.
        max_new_tokens: Longest response.
        batch_size: Beams decoded together, of at least one prompt.
        repetition_penalty: As in `generation.generate`.
        min_new_tokens: Likewise.

    Raises:
        DataError: A prompt and its longest response are longer than the model reads.
    """
    require_room(model, prompts, [max_new_tokens] * len(prompts))
    settings = GenerationConfig(
        num_beams=num_beams, do_sample=False, length_penalty=1.0, early_stopping=False, max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens, repetition_penalty=repetition_penalty,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    responses: dict[int, Response] = {}
    for rows in by_length([len(prompt) for prompt in prompts], max(1, batch_size // num_beams)):
        input_ids, mask = left_padded([prompts[row] for row in rows], model.device)
        found = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        new_tokens = found[:, input_ids.shape[1] :].tolist()
        responses.update(
            (row, response_of(_cut(tokens, tokenizer.eos_token_id), tokenizer))
            for row, tokens in zip(rows, new_tokens, strict=True)
        )
    return [responses[row] for row in range(len(prompts))]


def _cut(token_ids: TokenIds, eos_token_id: int | None) -> TokenIds:
    """The tokens up to the first end token; behind it `generate` pads."""
    return token_ids[: token_ids.index(eos_token_id) + 1] if eos_token_id in token_ids else token_ids
