"""Run records, their events and what is current.

    runs/<id>.json            who started it, what it made      runs/<id>.events.jsonl   what happens, as it happens
    current/<recipe>.json     asset → artifact

Every run is recorded, whoever started it. The events file is what the live display reads, from any process.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import MissingArtifactError, StoreError
from resources.artifact_store import ArtifactRef

RUNNING, SUCCESS, FAILED, INTERRUPTED = "running", "success", "failed", "interrupted"


class RunRecords:
    """Reads and writes run records below one home folder; safe with several processes."""

    def __init__(self, home: Path) -> None:
        self._runs = home / "runs"
        self._current = home / "current"

    def start(
        self, run_id: str, recipe: str, started_by: str, planned: Sequence[str], overrides: Sequence[str] = ()
    ) -> None:
        """Record that a run has started and which assets it will make; a second call for it changes nothing."""
        with self.locked():
            if not self._path(run_id).exists():
                record: dict[str, Any] = {
                    "run_id": run_id, "recipe": recipe, "overrides": list(overrides), "started_by": started_by,
                    "started_at": _now(), "finished_at": None, "status": RUNNING,
                    "planned": sorted(planned), "assets": {},
                }  # fmt: skip
                atomic.write_json(self._path(run_id), record)

    def finish(self, run_id: str, status: str) -> None:
        """Record how a run ended."""
        with self.locked():
            record = self.read(run_id)
            atomic.write_json(self._path(run_id), record | {"finished_at": _now(), "status": status})

    def record_asset(
        self, run_id: str, recipe: str, asset: str, ref: ArtifactRef, *, reused: bool, usable: bool = True
    ) -> bool:
        """Record what an asset is in this run, and make it the recipe's current one if it is `usable`.

        What failed a blocking check is not: no later run may read it, and this one has failed. The last planned asset
        ends the run.

        Returns:
            Whether this ended the run.
        """
        with self.locked():
            record = self.read(run_id)
            record["assets"][asset] = {**ref.as_dict(), "reused": reused}
            ended = not usable or record["assets"].keys() >= set(record["planned"])
            if ended:
                record |= {"finished_at": _now(), "status": SUCCESS if usable else FAILED}
            atomic.write_json(self._path(run_id), record)
            if not usable:
                return ended
            current = self.current(recipe)
            current[asset] = ref
            atomic.write_json(
                self._current / f"{recipe}.json", {name: value.as_dict() for name, value in current.items()}
            )
            return ended

    def read(self, run_id: str) -> dict[str, Any]:
        """A run's record.

        Raises:
            StoreError: There is no such run.
        """
        try:
            return _read(self._path(run_id))
        except FileNotFoundError:
            raise StoreError(f"There is no run {run_id!r} in {self._runs}.") from None

    def all(self) -> list[dict[str, Any]]:
        """All run records, oldest first."""
        records = [_read(path) for path in self._runs.glob("*.json")]
        return sorted(records, key=lambda record: str(record["started_at"]))

    def matching(self, prefix: str) -> str:
        """The id of the one run whose id begins so.

        Raises:
            StoreError: No run's does, or several runs' do; names them.
        """
        return only_match(prefix, sorted(record["run_id"] for record in self.all()), "run")

    def recipes(self) -> list[str]:
        """Names of the recipes that have current artifacts."""
        return sorted(path.stem for path in self._current.glob("*.json"))

    def current(self, recipe: str) -> dict[str, ArtifactRef]:
        """Asset → artifact that is current in a recipe."""
        path = self._current / f"{recipe}.json"
        if not path.exists():
            return {}
        return {asset: ArtifactRef(**value) for asset, value in _read(path).items()}

    def of_run(self, run_id: str) -> dict[str, ArtifactRef]:
        """Asset → artifact of one run."""
        assets: Mapping[str, Any] = self.read(run_id)["assets"]
        return {
            asset: ArtifactRef(value["stage"], value["key"], value["data_version"]) for asset, value in assets.items()
        }

    def resolve(self, run_id: str, recipe: str, assets: Sequence[str]) -> dict[str, ArtifactRef]:
        """What a stage reads: this run's artifact if it made one, else the current one.

        Raises:
            MissingArtifactError: An asset has never been made; says how to make it.
        """
        return pick(self.current(recipe) | self.of_run(run_id), recipe, assets)

    def event(self, run_id: str, kind: str, **fields: Any) -> None:
        """Append an event for the live display, one line, at once."""
        line = json.dumps({"event": kind, "time": time.time(), **fields})
        with self.locked(), self.events_path(run_id).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """A run's events so far, oldest first; a line that is not whole (a crash, a full disk) is left out."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.events_path(run_id).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def events_path(self, run_id: str) -> Path:
        """Where a run's events are appended."""
        return self._runs / f"{run_id}.events.jsonl"

    def _path(self, run_id: str) -> Path:
        return self._runs / f"{run_id}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every record, event and `current` file as it is: whoever writes one waits."""
        self._runs.mkdir(parents=True, exist_ok=True)
        with (self._runs / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(
            f"{path} is not JSON ({error}), expected what a run has written. Mend it, or move it away: what it names "
            "is then neither shown nor kept, and is computed anew where a run needs it."
        ) from error
    return value


def only_match(prefix: str, ids: Sequence[str], what: str) -> str:
    """The one id that begins so; an id that is the prefix itself comes before longer ones.

    Raises:
        StoreError: There is none, or there are several; names them.
    """
    found = [prefix] if prefix in ids else [each for each in ids if each.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise StoreError(f"{len(found)} {what}s begin with {prefix!r}: {shown}. Give more of the id.")
    shown = f"Expected the beginning of one of: {', '.join(ids[-5:])}." if ids else f"There is no {what} at all."
    raise StoreError(f"There is no {what} {prefix!r}. {shown}")


def pick(known: Mapping[str, ArtifactRef], recipe: str, assets: Sequence[str]) -> dict[str, ArtifactRef]:
    """The artifacts of some assets.

    Raises:
        MissingArtifactError: An asset has never been made; says how to make it.
    """
    missing = [asset for asset in assets if asset not in known]
    if missing:
        raise MissingArtifactError(
            f"{', '.join(missing)} of recipe {recipe} has not been made yet. "
            f"Run `align run {recipe}`, or name it too: `align run {recipe} "
            + " ".join(f"--select {asset}" for asset in missing)
            + " …`."
        )
    return {asset: known[asset] for asset in assets}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
