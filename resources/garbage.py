"""Garbage: model bytes, work folders and staging folders that nothing needs, and their deletion.

Needed are the artifacts of pinned runs, of releases, of what is current in a recipe and of runs that go on, with
everything they were made from (a LoRA policy is nothing without its trunk). Of the rest the model files go; manifests,
tables and extras stay, so that lineage and its rebuild stay whole. A work folder is needed while its key is computed,
or where a pinned run or a recipe's latest run would resume from it.

Safe beside running processes: what is deleted is under its lease, and is marked as deleted while nothing is recorded.
So a run either has recorded its artifact before, and it is kept; or it finds the mark and computes the artifact anew.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import StoreError
from resources import leases
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.pins import Pins
from resources.releases import Releases
from resources.runs import RUNNING, RunRecords

MODEL, WORK, STAGING = "model", "work", "staging"
FOUND, DELETED, IN_USE, NEEDED_AGAIN = "found", "deleted", "in use", "needed again"

_QUIET_S = 3600.0
"""A run that is recorded as running, holds no lease and has written no event for so long was killed."""
_WORK_NAME = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Garbage:
    """One thing that nothing needs.

    Attributes:
        kind: `model` (the model files of an artifact), `work` or `staging` (a whole folder).
        path: Below the home.
        size: Bytes on disk.
        assets: What it was made as, `recipe/asset`.
        last_used: Date of the last run that has it, or of its making; ISO.
        reason: Why it is not needed.
        state: `found`; after a collection `deleted`, or why not: `in use` or `needed again`.
    """

    kind: str
    path: str
    size: int
    assets: tuple[str, ...]
    last_used: str
    reason: str
    state: str = FOUND


@dataclass(frozen=True)
class _Needed:
    """Artifacts; keys (as work folders are named) that a run would resume, and those that a process computes."""

    artifacts: frozenset[ArtifactRef]
    resumable: frozenset[str]
    computed: frozenset[str]


class GarbageCollector:
    """Finds and deletes the garbage of one home folder."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._store = ArtifactStore(home)
        self._runs = RunRecords(home)
        self._decided: tuple[Any, _Needed] | None = None

    def find(self) -> list[Garbage]:
        """What nothing needs: model files, then work folders, then staging folders.

        Raises:
            StoreError: A record that says what is needed is malformed; nothing can be decided then.
        """
        return [garbage for _, garbage in self._find()]

    def collect(self) -> list[Garbage]:
        """Delete what nothing needs; returns all of it with what became of each.

        Raises:
            StoreError: As `find`.
        """
        return [replace(garbage, state=self._delete(garbage, ref)) for ref, garbage in self._find()]

    def _find(self) -> Iterator[tuple[ArtifactRef | None, Garbage]]:
        needed, past = self._needed(), _Past(self._runs)
        whole: set[str] = set()
        for ref in self._store.all():
            if self._store.is_whole(ref):
                whole.add(ref.key[:20])
            files = self._store.model_files(ref)
            if files and ref not in needed.artifacts:
                yield ref, Garbage(
                    MODEL, f"artifacts/{ref.artifact_id}", sum(file["size"] for file in files), past.assets(ref.key),
                    past.last_used.get(ref) or self._store.manifest(ref)["created_at"],
                    "in no pinned run, release or current asset",
                )  # fmt: skip
        for folder in sorted((self._home / "work").glob("*")):
            if not _WORK_NAME.fullmatch(folder.name) or folder.name in needed.computed:
                continue
            if folder.name in whole:
                yield None, self._folder(WORK, folder, past.assets(folder.name), "its result is published")
            elif folder.name not in needed.resumable:
                yield None, self._folder(WORK, folder, past.assets(folder.name), "no pinned or latest run needs it")
        for folder in self._store.abandoned():
            yield None, self._folder(STAGING, folder, (), f"left by process {folder.name.split('-')[1]}, which is gone")

    def _folder(self, kind: str, folder: Path, assets: tuple[str, ...], reason: str) -> Garbage:
        states = []
        for parent, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # its owner may be at work
                    states.append(os.stat(os.path.join(parent, name)))
        used = max((state.st_mtime for state in states), default=0.0)
        last_used = datetime.fromtimestamp(used, UTC).isoformat(timespec="milliseconds")
        path = folder.relative_to(self._home).as_posix()
        return Garbage(kind, path, sum(state.st_size for state in states), assets, last_used, reason)

    def _delete(self, garbage: Garbage, ref: ArtifactRef | None) -> str:
        folder = self._home / garbage.path
        if ref is not None:
            return self._delete_model(ref)
        if garbage.kind == WORK:
            return self._delete_work(folder)
        return _delete_folder(folder)

    def _delete_model(self, ref: ArtifactRef) -> str:
        with leases.hold_if_free(self._home, ref.lease) as free:
            if not free:
                return IN_USE
            with self._runs.locked():
                if ref in self._needed(own_lease=ref.lease).artifacts:
                    return NEEDED_AGAIN
                self._store.mark_collected(ref)
            self._store.delete_collected(ref)
        return DELETED

    def _delete_work(self, folder: Path) -> str:
        with contextlib.ExitStack() as stack:
            own_lease = ""
            for lock in (self._home / "leases").glob(f"*-{folder.name}.lock"):  # one: a key is of one stage
                own_lease = lock.stem
                if not stack.enter_context(leases.hold_if_free(self._home, own_lease)):
                    return IN_USE
            with self._runs.locked():
                if folder.name in self._needed(own_lease).resumable and not self._is_published(folder.name):
                    return NEEDED_AGAIN
            return _delete_folder(folder)

    def _is_published(self, name: str) -> bool:
        return any(ref.key[:20] == name and self._store.is_whole(ref) for ref in self._store.all())

    def _needed(self, own_lease: str = "") -> _Needed:
        """What must stay now; the lease that the collector itself holds tells of no run.

        Decided anew where a record has changed since: this is asked for every artifact, while all runs wait.
        """
        held = frozenset(leases.held(self._home) - {own_lease})
        state = (held, self._stamps())
        if self._decided is None or self._decided[0] != state:
            self._decided = state, self._decide(held)
        return self._decided[1]

    def _stamps(self) -> frozenset[tuple[str, int, int, int]]:
        """The state of every file that says what is needed, without reading it."""
        found = set()
        for folder in ("runs", "current", "pins", "releases"):
            for path in (self._home / folder).glob("*.json*"):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    found.add((f"{folder}/{path.name}", state.st_ino, state.st_size, state.st_mtime_ns))
        return frozenset(found)

    def _decide(self, held: frozenset[str]) -> _Needed:
        held_keys = {name.rpartition("-")[2] for name in held}
        roots = [release.ref for release in Releases(self._home).all()]
        for recipe in self._runs.recipes():
            roots.extend(self._runs.current(recipe).values())
        pinned = Pins(self._home).all()
        records = {record["run_id"]: record for record in self._runs.all()}
        latest = {record["recipe"]: run_id for run_id, record in records.items()}
        if unknown := pinned.keys() - records.keys():
            raise StoreError(
                f"Run {min(unknown)} is pinned and has no record. `align unpin {min(unknown)}` if it is gone."
            )
        resumable: set[str] = set()
        for run_id, record in records.items():
            computing = _computing(self._runs, run_id)
            goes_on = not held_keys.isdisjoint(computing) or self._may_run(record, held)
            if goes_on or run_id in pinned:
                roots.extend(self._runs.of_run(run_id).values())
                roots.extend(ArtifactRef(**entry) for event in computing.values() for entry in event.get("inputs", []))
            if goes_on or run_id in pinned or run_id in latest.values():
                resumable.update(computing)
        return _Needed(frozenset(self._store.family(roots)), frozenset(resumable), frozenset(held_keys))

    def _may_run(self, record: Mapping[str, Any], held: frozenset[str]) -> bool:
        """Whether a run goes on, as far as anybody can tell: a killed one stays recorded as running."""
        if record["status"] != RUNNING:
            return False
        events = self._runs.events_path(record["run_id"])
        return bool(held) or not events.exists() or time.time() - events.stat().st_mtime < _QUIET_S


class _Past:
    """What run records and events tell about an artifact: the assets it was made as, and when it was last used."""

    def __init__(self, runs: RunRecords) -> None:
        self.last_used: dict[ArtifactRef, str] = {}
        self._assets: dict[str, set[str]] = {}
        for record in runs.all():
            for name, event in _computing(runs, record["run_id"]).items():
                self._assets.setdefault(name, set()).add(f"{record['recipe']}/{event['asset']}")
            for asset, ref in runs.of_run(record["run_id"]).items():
                self._assets.setdefault(ref.key[:20], set()).add(f"{record['recipe']}/{asset}")
                self.last_used[ref] = record["finished_at"] or record["started_at"]

    def assets(self, key: str) -> tuple[str, ...]:
        """`recipe/asset` of everything that a key was computed or reused as."""
        return tuple(sorted(self._assets.get(key[:20], ())))


def _delete_folder(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):  # its owner was quicker
        shutil.rmtree(folder)
    return DELETED


def _computing(runs: RunRecords, run_id: str) -> dict[str, dict[str, Any]]:
    """Work folder → the event that tells of a run's computing in it."""
    events = [event for event in runs.events(run_id) if event["event"] == "computing"]
    return {os.path.basename(os.path.dirname(event["log"])): event for event in events}
