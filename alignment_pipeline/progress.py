"""The progress log: append-only JSON lines that the live display, W&B and the metrics table all read.

Lines are `{"kind": "step", "time": s, "phase": name, "step": n, "total": n, "metrics": {...}}` and
`{"kind": "note", "time": s, "text": "..."}`. A resumed stage appends to its log; for a step that was run twice the last
line counts.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class ProgressLog:
    """Writes one stage's progress. Lines reach the operating system at once, so a killed process loses none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, phase: str, step: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Record that `step` of `total` steps of a phase is done, with its metrics."""
        self._write(
            {"kind": "step", "time": time.time(), "phase": phase, "step": step, "total": total,
             "metrics": {name: float(value) for name, value in (metrics or {}).items()}}
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Record a sentence for people."""
        self._write({"kind": "note", "time": time.time(), "text": text})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def _cut_torn_line(path: Path) -> None:
    """Take away a last line that a crash cut short, so that a resumed stage's first line does not continue it."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))


def read_progress(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a progress log; a torn last line (a crash while writing) is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def metric_series(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Metrics by (phase, step) in step order, the last line of a step counting."""
    series: dict[tuple[str, int], dict[str, float]] = {}
    for line in read_progress(path):
        if line["kind"] == "step" and line["metrics"]:
            series[line["phase"], line["step"]] = line["metrics"]
    return dict(sorted(series.items()))
