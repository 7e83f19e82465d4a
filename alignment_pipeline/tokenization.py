"""Texts as token ids: a prompt, a response, a side of a preference pair; no tensors, no torch.

Prompt and response are encoded apart and their ids concatenated, so that training and sampling see the same boundary.
"""

from collections.abc import Sequence
from typing import Any

TokenIds = list[int]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of texts without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[TokenIds] = encoded["input_ids"]
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[TokenIds]:
    """Token ids of prompts as the model was pretrained to read the start of a text.

    That is with the tokens that its tokenizer puts before every text, such as OPT's `</s>` or Llama's `<s>`, unless the
    prompt, as chat templates make it, begins with them already. GPT-2 and Qwen have none.
    """
    prefix = leading_tokens(tokenizer)
    found = encode(tokenizer, prompts)
    return [ids if ids[: len(prefix)] == prefix else [*prefix, *ids] for ids in found]


def leading_tokens(tokenizer: Any) -> TokenIds:
    """The special tokens that a tokenizer puts before every text."""
    (bare,) = encode(tokenizer, ["a"])
    whole: TokenIds = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(bare)] == bare), 0)]


def encode_responses(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of complete responses, each with the end token."""
    return [[*ids, tokenizer.eos_token_id] for ids in encode(tokenizer, texts)]


def encode_side(tokenizer: Any, pairs: Sequence[Any], side: str) -> list[TokenIds]:
    """Token ids of the `chosen` or `rejected` side of preference pairs; the end token follows what had ended."""
    encoded = encode_responses(tokenizer, [pair[side] for pair in pairs])
    return [ids if pair[f"{side}_ended"] else ids[:-1] for ids, pair in zip(encoded, pairs, strict=True)]
