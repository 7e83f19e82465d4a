"""Which responses are trained on together: epochs → minibatches → microbatches, decided before anything is computed."""

from collections.abc import Sequence

import torch


def minibatches(count: int, minibatch_size: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """Row numbers by epoch and minibatch; each epoch is a fresh seeded permutation of all `count` rows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [rows.tolist() for rows in torch.split(torch.randperm(count, generator=generator), minibatch_size)]
        for _ in range(epochs)
    ]


def microbatches(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[torch.Tensor]:
    """Rows cut into parts of at most `size`, rows of similar length together, so that little is padded.

    Args:
        rows: Row numbers of a minibatch.
        lengths: Tokens of every row of the rollout.
        size: Rows a part.
    """
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    return [torch.tensor(ordered[start : start + size]) for start in range(0, len(ordered), size)]
