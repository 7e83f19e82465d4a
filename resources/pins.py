"""Pins: runs whose artifacts and checkpoints a person wants kept.

pins/<run id>.json    run_id, pinned_at
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from resources.runs import RunRecords, only_match


class Pins:
    """Reads and writes the pins below one home folder."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "pins"
        self._runs = RunRecords(home)

    def pin(self, prefix: str) -> str:
        """Pin the run whose id begins so; pinning it again changes nothing.

        Returns:
            The run's id.

        Raises:
            StoreError: There is no such run, or there are several.
        """
        run_id = self._runs.matching(prefix)
        path = self._folder / f"{run_id}.json"
        with self._runs.locked():
            if not path.exists():
                pinned_at = datetime.now(UTC).isoformat(timespec="milliseconds")
                atomic.write_json(path, {"run_id": run_id, "pinned_at": pinned_at})
        return run_id

    def unpin(self, prefix: str) -> str:
        """Remove the pin of the run whose id begins so; returns that id.

        Raises:
            StoreError: There is no such pin, or there are several.
        """
        run_id = only_match(prefix, sorted(self.all()), "pinned run")
        (self._folder / f"{run_id}.json").unlink(missing_ok=True)
        return run_id

    def all(self) -> dict[str, str]:
        """Pinned run → when it was pinned, oldest pin first.

        Raises:
            StoreError: A pin is malformed; names it and says what to do.
        """
        found = {}
        for path in self._folder.glob("*.json"):
            try:
                pin: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                found[str(pin["run_id"])] = str(pin["pinned_at"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path} is not a pin ({type(error).__name__}: {error}). Delete it, and pin the run again: "
                    f"`align pin {path.stem}`."
                ) from error
        return dict(sorted(found.items(), key=lambda pin: pin[1]))
