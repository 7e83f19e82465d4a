"""Leases: two processes never compute the same key at once, and a late orphan cannot publish over its successor.

A lease is an exclusive lock on a file (released by the operating system when its holder dies) and a token in that file
that grows with every holder. Whoever publishes shows that the token is still its own.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignment_pipeline import atomic
from alignment_pipeline.errors import LeaseLostError

_POLL_S = 0.2


@dataclass(frozen=True)
class Lease:
    """A right to compute one key, good while `token` is the newest."""

    record: Path
    token: int

    def require(self) -> None:
        """Check that nobody took over.

        Raises:
            LeaseLostError: A later holder exists.
        """
        newest = _read(self.record)["token"]
        if newest != self.token:
            raise LeaseLostError(
                f"Another process took over this computation (token {newest}, ours {self.token}). "
                "Its result stands; nothing of ours was published."
            )


@contextlib.contextmanager
def hold(home: Path, name: str, on_wait: Callable[[str], None] = lambda text: None) -> Iterator[Lease]:
    """Hold the lease `name`, waiting for its holder if there is one; `on_wait` is told once who that is."""
    folder = home / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("a") as lock:
        _acquire(lock.fileno(), record, on_wait)
        token = _read(record)["token"] + 1
        atomic.write_json(record, {"token": token, "pid": os.getpid()})
        yield Lease(record, token)


@contextlib.contextmanager
def hold_if_free(home: Path, name: str) -> Iterator[bool]:
    """Keep others from the lease `name` without waiting for it; False if it is held.

    For who deletes and does not publish: the token stays, so that it is no successor of anybody.
    """
    folder = home / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as lock:
        yield _locked(lock.fileno(), fcntl.LOCK_EX)


def held(home: Path) -> set[str]:
    """Names of the leases that living processes hold."""
    names = set()
    for path in (home / "leases").glob("*.lock"):
        with path.open("rb") as lock:
            if not _locked(lock.fileno(), fcntl.LOCK_SH):
                names.add(path.stem)
    return names


def _acquire(descriptor: int, record: Path, on_wait: Callable[[str], None]) -> None:
    failed = 0
    said = False
    while not _locked(descriptor, fcntl.LOCK_EX):
        failed += 1
        # Not at the first look: a holder that has only just come is not named yet, and `held` looks for a moment.
        if failed > 1 and not said and (pid := _read(record)["pid"]):
            on_wait(f"Waiting for process {pid}, which computes the same.")
            said = True
        time.sleep(_POLL_S)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(record: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"token": 0, "pid": 0}
    return found
