"""Which of many 64-bit hashes came before, in 16 bytes each: duplicates among more rows than fit into memory."""

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


class FirstSeen:
    """Remembers for each hash the number it came with first.

    Kept as sorted runs that are merged when the last two are of like length: some log2(n) of them, each hash moved
    as often. While the longest are merged, 40 bytes a hash are in use.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Hashes, Numbers]] = []

    def numbers(self, hashes: Hashes, numbers: Numbers) -> Numbers:
        """Take in some hashes with their numbers; returns for each the number that its hash came with first."""
        distinct, at, place = np.unique(hashes, return_index=True, return_inverse=True)
        first = numbers[at]
        is_new = np.ones(len(distinct), dtype=bool)
        for known, known_numbers in self._runs:
            found = np.minimum(np.searchsorted(known, distinct), len(known) - 1)
            is_known = known[found] == distinct
            first[is_known] = known_numbers[found[is_known]]
            is_new &= ~is_known
        if is_new.any():
            self._runs.append((distinct[is_new], first[is_new]))
            self._merge()
        return first[place]

    def _merge(self) -> None:
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            (left, left_numbers), (right, right_numbers) = self._runs[-2:]
            del self._runs[-2:]
            places = np.searchsorted(left, right)
            self._runs.append((np.insert(left, places, right), np.insert(left_numbers, places, right_numbers)))
