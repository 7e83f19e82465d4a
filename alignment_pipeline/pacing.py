"""When something that costs time is due again."""

import time


class Pacer:
    """Says at most once every `interval_s` seconds that it is time (never right at the start)."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the interval has passed since the last time this was true."""
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return False
        self._last = now
        return True
