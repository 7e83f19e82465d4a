"""Responses by a recipe's decoding settings, and those settings in words."""

from collections.abc import Sequence
from typing import Any

from alignment_pipeline.beam_search import beam_search
from alignment_pipeline.decoding_configs import DecodingFields
from alignment_pipeline.generation import Response, generate
from alignment_pipeline.tokenization import TokenIds


def respond(
    model: Any, tokenizer: Any, prompts: Sequence[TokenIds], settings: DecodingFields, *, batch_size: int, seed: int
) -> list[Response]:
    """One response for each prompt, in the prompts' order; see `generation.generate` and `beam_search.beam_search`.

    Raises:
        DataError: A prompt and its longest response are longer than the model reads.
    """
    if settings.num_beams > 1:
        return beam_search(
            model, tokenizer, prompts,
            num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens, batch_size=batch_size,
            repetition_penalty=settings.repetition_penalty, min_new_tokens=settings.min_new_tokens,
        )  # fmt: skip
    return generate(
        model, tokenizer, prompts,
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, batch_size=batch_size, seed=seed,
        top_k=settings.top_k, top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty, min_new_tokens=settings.min_new_tokens,
    )  # fmt: skip


def in_words(settings: DecodingFields) -> str:
    """The settings, the longest length left out: `greedy`, `beams 5` or `temperature 0.7, top-p 0.9`."""
    if settings.num_beams > 1:
        words = [f"beams {settings.num_beams}"]
    else:
        words = [f"temperature {settings.temperature:g}" if settings.temperature else "greedy"]
    if settings.top_k is not None:
        words.append(f"top-k {settings.top_k}")
    if settings.top_p is not None:
        words.append(f"top-p {settings.top_p:g}")
    if settings.repetition_penalty != 1:
        words.append(f"rep. penalty {settings.repetition_penalty:g}")
    if settings.min_new_tokens:
        words.append(f"min {settings.min_new_tokens} tokens")
    return ", ".join(words)
