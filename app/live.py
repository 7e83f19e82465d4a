"""The live display of a run: what each asset is doing, read from the run's events and the stages' progress logs.

It sees only files, so that it works the same whether stages run in this process or in others.
"""

import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH_S = 0.25
_RATE_WINDOW = 20  # log lines that tokens/s and the time left are computed over


@dataclass
class _Tail:
    """Reads whole new lines of a file that grows."""

    path: Path
    offset: int = 0

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@dataclass
class _AssetState:
    """What the display knows of one asset."""

    status: str = "waiting"
    detail: str = ""
    tail: _Tail | None = None
    started: float = 0.0
    seconds: float = 0.0
    step: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    recent: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW))

    def take(self, line: dict[str, Any]) -> None:
        """Take in a line of the stage's progress log."""
        if line["kind"] == "note":
            self.detail = line["text"]
            return
        self.detail = ""
        if line["step"] < self.step:
            self.recent.clear()  # another phase
        self.step, self.total = line["step"], line["total"]
        self.metrics |= line["metrics"]
        self.recent.append((line["time"], self.step, self.metrics.get("train/tokens", 0.0)))

    def pace(self) -> str:
        """`tokens/s · time left`, over the last lines."""
        if len(self.recent) < 2:
            return ""
        (begin, first, tokens_before), (end, last, tokens_now) = self.recent[0], self.recent[-1]
        elapsed = end - begin
        parts = []
        if elapsed > 0 and tokens_now > tokens_before:
            parts.append(f"{(tokens_now - tokens_before) / elapsed:,.0f} tokens/s")
        if elapsed > 0 and last > first:
            parts.append(f"{_clock((self.total - last) * elapsed / (last - first))} left")
        return " · ".join(parts)


class LiveRun:
    """Shows a run until left; a plain line per asset where the output is not a terminal."""

    def __init__(self, console: Console, events: Path, assets: list[str]) -> None:
        self._console = console
        self._events = _Tail(events)
        self._assets = {asset: _AssetState() for asset in assets}
        self._live = _live(console) if console.is_terminal else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="live-display", daemon=True)
        self.errors: dict[str, str] = {}

    @property
    def reused(self) -> int:
        """Number of assets that existed already."""
        return sum(state.status == "reused" for state in self._assets.values())

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        if self._live:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def _watch(self) -> None:
        while not self._stop.wait(_REFRESH_S):
            self._poll()
            if self._live:
                self._live.update(self._render())

    def _poll(self) -> None:
        for event in self._events.lines():
            self._take(event)
        for state in self._assets.values():
            if state.tail and state.status == "running":
                for line in state.tail.lines():
                    state.take(line)

    def _take(self, event: dict[str, Any]) -> None:
        asset, kind = event["asset"], event["event"]
        state = self._assets.setdefault(asset, _AssetState())
        if kind == "started":
            state.status, state.started = "running", event["time"]
        elif kind == "computing":
            state.tail = _Tail(Path(event["log"]))
        elif kind == "note":
            state.detail = event["text"]
        elif kind == "finished":
            state.status = "reused" if event["reused"] else "done"
            state.seconds, state.metrics = event["seconds"], event["metrics"]
            because = "; ".join(event["reasons"])
            state.detail = "" if because in ("", "first time") else f"because {because}"
            self._say(asset, state)
        elif kind == "failed":
            state.status, state.seconds = "failed", event["time"] - state.started
            self.errors[asset] = event["error"]
            self._say(asset, state)

    def _say(self, asset: str, state: _AssetState) -> None:
        if not self._live:
            line = f"{asset:<20} {state.status:<7} {_clock(state.seconds):>6}  {_headline(state)} {state.detail}"
            self._console.print(line.rstrip(), highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=False)
        for _ in range(5):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for asset, state in self._assets.items():
            table.add_row(_MARKS[state.status], asset, *_cells(state))
        return Group(table)


def _live(console: Console) -> Live:
    # Standard output and error are files while a run goes on; Rich must not fetch them back to the terminal.
    return Live(console=console, refresh_per_second=1 / _REFRESH_S, redirect_stdout=False, redirect_stderr=False)


_MARKS = {
    "waiting": Text("·", style="dim"),
    "running": Text("▶", style="bold cyan"),
    "done": Text("✓", style="green"),
    "reused": Text("=", style="green"),
    "failed": Text("✗", style="bold red"),
}


def _cells(state: _AssetState) -> tuple[RenderableType, RenderableType, RenderableType]:
    if state.status == "running":
        clock = Text(_clock(time.time() - state.started), style="cyan")
        if not state.total:
            return clock, Text(state.detail or "starting", style="dim"), Text("")
        bar = ProgressBar(total=state.total, completed=state.step, width=20)
        numbers = [f"{state.step}/{state.total}", _headline(state), state.pace(), state.detail]
        return clock, bar, Text(" · ".join(part for part in numbers if part))
    if state.status == "waiting":
        return Text(""), Text(""), Text("")
    word = "reused" if state.status == "reused" else _clock(state.seconds)
    return Text(word, style="dim"), Text(_headline(state)), Text(state.detail, style="dim")


# The number that says most about a stage, by the first of these names it has.
_HEADLINES = (
    ("objective/score", "score {:.2f}"),
    ("eval/judge_score", "judge {:.3f}"),
    ("sweep/settings", "{:.0f} settings"),
    ("reward/held_out_accuracy", "held-out accuracy {:.1%}"),
    ("classifier/held_out_accuracy", "held-out accuracy {:.1%}"),
    ("dpo/held_out_accuracy", "held-out accuracy {:.1%}"),
    ("train/loss", "loss {:.3f}"),
    ("eval/loss", "held-out loss {:.3f}"),
    ("samples/count", "{:,.0f} samples"),
    ("pairs/count", "{:,.0f} pairs"),
    ("pairs/train", "{:,.0f} training pairs"),
    ("feedback/kept", "{:,.0f} votes"),
    ("data/kept", "{:,.0f} rows kept"),
    ("data/train", "{:,.0f} training rows"),
)


def _headline(state: _AssetState) -> str:
    for name, form in _HEADLINES:
        if name in state.metrics:
            return form.format(state.metrics[name])
    return ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes}:{rest:02d}"
