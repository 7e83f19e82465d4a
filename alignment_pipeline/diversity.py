"""How varied responses are, by their tokens: over all of them together, and within each."""

from collections.abc import Iterator, Sequence

_REPEATED = 4


def distinct(responses: Sequence[Sequence[int]], order: int) -> float:
    """Number of different n-grams in all responses, over the number of all tokens; 0 without tokens.

    The more responses, the lower: compare only what answers the same prompts.

    Source: Li et al. 2016, arXiv 1510.03055, section 5.2, distinct-1 and distinct-2.
    """
    tokens = sum(len(response) for response in responses)
    different = {gram for response in responses for gram in _grams(response, order)}
    return len(different) / tokens if tokens else 0.0


def repetition(response: Sequence[int]) -> float:
    """Share of a response's 4-grams that stood in it before; 0 where it is shorter than that."""
    grams = list(_grams(response, _REPEATED))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[int], order: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)
