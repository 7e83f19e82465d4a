import random

import numpy as np
import pytest

from alignment_pipeline.first_seen import FirstSeen


@pytest.mark.parametrize("seed", range(4))
def test_each_hash_is_answered_with_the_number_it_came_with_first_whatever_the_chunks(seed: int) -> None:
    rng = random.Random(seed)
    extremes = [0, 1, 2**63, 2**64 - 1]
    known = [*extremes, *(rng.getrandbits(64) for _ in range(1500))]
    hashes = rng.choices(known, k=6000)
    reference: dict[int, int] = {}
    expected = [reference.setdefault(value, number) for number, value in enumerate(hashes)]

    first_seen, found, start = FirstSeen(), [], 0
    while start < len(hashes):
        end = start + rng.randrange(200)  # an empty chunk too
        numbers = np.arange(start, min(end, len(hashes)))
        found += first_seen.numbers(np.array(hashes[start:end], np.uint64), numbers).tolist()
        start = end
    assert found == expected
    assert sum(len(run) for run, _ in first_seen._runs) == len(reference)
    assert len(first_seen._runs) <= np.log2(len(reference)) + 1
