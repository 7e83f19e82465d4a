"""What `align gc`, `align pin` and `align unpin` print. What is garbage is decided in `resources.garbage`."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from resources.artifact_store import ArtifactStore, short_id
from resources.garbage import DELETED, FOUND, Garbage, GarbageCollector
from resources.pins import Pins
from resources.runs import RunRecords

_NOUNS = {
    "model": ("model", "models"),
    "work": ("work folder", "work folders"),
    "staging": ("staging folder", "staging folders"),
}


def collect_garbage(console: Console, home: Path, *, dry_run: bool, as_json: bool) -> None:
    """Delete what nothing needs, or only find it, and print each with its size and the totals."""
    collector = GarbageCollector(home)
    found = collector.find() if dry_run else collector.collect()
    deleted = [garbage for garbage in found if garbage.state == DELETED]
    if as_json:
        report = {
            "dry_run": dry_run,
            "bytes": _bytes(found),
            "deleted_bytes": _bytes(deleted),
            "garbage": [asdict(garbage) for garbage in found],
        }
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if not found:
        console.print("No garbage: everything is needed by a current asset, a pinned run, a release or a running run.")
        return
    console.print(_table(found))
    if dry_run:
        summary = f"{_counted(found)} can go: {_size(_bytes(found))}. Nothing was deleted; `align gc` does it."
    else:
        summary = f"Deleted {_counted(deleted)}: {_size(_bytes(deleted))}. Manifests and tables stay."
        if left := len(found) - len(deleted):
            summary += f" {left} stay because they are in use or needed again."
    console.print(summary, highlight=False)


def pin_run(console: Console, home: Path, prefix: str) -> None:
    """Pin a run; says which of its models are gone already."""
    run_id = Pins(home).pin(prefix)
    console.print(f"Run {run_id} is pinned: `align gc` keeps what it made and what that was made from.")
    store = ArtifactStore(home)
    gone = [asset for asset, ref in RunRecords(home).of_run(run_id).items() if not store.is_whole(ref)]
    if gone:
        text = f"Deleted before, and computed anew by a run with the same settings: {', '.join(gone)}."
        console.print(text, style="yellow")


def unpin_run(console: Console, home: Path, prefix: str) -> None:
    """Remove a run's pin."""
    console.print(f"Run {Pins(home).unpin(prefix)} is no longer pinned.")


def list_pins(console: Console, home: Path) -> None:
    """Print the pinned runs."""
    pins = Pins(home).all()
    if not pins:
        console.print("No run is pinned. `align pin RUN` keeps one from `align gc`.")
        return
    records = {record["run_id"]: record for record in RunRecords(home).all()}
    table = Table("run", "recipe", "started", "pinned", box=box.SIMPLE_HEAD)
    for run_id, pinned_at in pins.items():
        record = records.get(run_id, {"recipe": "(no record)", "started_at": ""})
        table.add_row(run_id, record["recipe"], _date(record["started_at"]), _date(pinned_at))
    console.print(table)


def _table(found: list[Garbage]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("what", overflow="fold")
    table.add_column("made as")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("why it is not needed")
    if any(garbage.state != FOUND for garbage in found):
        table.add_column("now", no_wrap=True)
    for garbage in found:
        cells = [
            _short(garbage.path),
            ", ".join(garbage.assets),
            _size(garbage.size),
            _date(garbage.last_used),
            garbage.reason,
        ]
        table.add_row(*cells, *([garbage.state] if garbage.state != FOUND else []))
    return table


def _counted(found: list[Garbage]) -> str:
    counts = Counter(garbage.kind for garbage in found)
    return ", ".join(f"{count} {_NOUNS[kind][count != 1]}" for kind, count in counts.items()) or "nothing"


def _bytes(found: list[Garbage]) -> int:
    return sum(garbage.size for garbage in found)


def _size(number: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


def _date(time: str) -> str:
    return time[:10]


def _short(path: str) -> str:
    """A garbage folder's name, an artifact's without most of its hashes."""
    below, _, artifact_id = path.partition("/")
    return short_id(artifact_id) if below == "artifacts" and artifact_id.count("/") == 2 else path
