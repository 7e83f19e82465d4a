"""Weights & Biases as a view over progress logs, fed by a process of its own.

Belongs here: starting that process and telling it what to show. What it does is in `resources.tracking_worker`. Nothing
here raises because of W&B, waits for a network or imports wandb: a problem is a warning and training goes on.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import AlignmentError

MODES = ("offline", "online", "disabled")
URL_FILE = "url.txt"
"""Holds the address of an online run, in its local folder."""
DEFAULT_PROJECT = "alignment-pipeline"

_SEND_TIMEOUT_S = 1.0
_MAX_TAG_CHARS = 64  # wandb refuses longer ones
_REPOSITORY = Path(__file__).parent.parent

# What a person or an outer run has set for its own W&B run must not rename, merge or redirect ours.
_NOT_INHERITED = frozenset(
    {"WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE",
     "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_SERVICE", "WANDB_SWEEP_ID", "WANDB_DISABLED"}
)  # fmt: skip
_WORKER_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "DO_NOT_TRACK": "1",
    "NETRC": os.devnull,  # the key comes from WANDB_API_KEY and from nowhere else
    "CUDA_VISIBLE_DEVICES": "",
}

_log = logging.getLogger(__name__)


class Tracking:
    """Shows stages in W&B. The worker starts with the first run; it costs nothing before, and in mode `disabled`.

    Args:
        home: Folder `ALIGNMENT_HOME`; run folders and `worker.log` go to `wandb/` below it.
        mode: `offline`, `online` or `disabled`; by default WANDB_MODE, else `offline`.
        project: W&B project; by default WANDB_PROJECT, else `alignment-pipeline`.
        init_timeout_s: Online, how long the worker waits for the server before it keeps runs offline.

    Raises:
        AlignmentError: The mode is none of the three.
    """

    def __init__(
        self, home: Path, mode: str | None = None, project: str | None = None, init_timeout_s: float = 20.0
    ) -> None:
        self.mode = mode or os.environ.get("WANDB_MODE") or "offline"
        if self.mode not in MODES:
            raise AlignmentError(
                f"WANDB_MODE: found {self.mode!r}, expected one of {', '.join(MODES)}. Unset it to keep runs offline."
            )
        self.project = project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
        self._home = home.absolute()
        self._init_timeout_s = init_timeout_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def follow(
        self,
        *,
        run_id: str,
        name: str,
        group: str,
        job_type: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        log: Path,
    ) -> None:
        """Show a progress log as a run, from its beginning and as it grows. Returns at once and never raises for W&B.

        Args:
            run_id: Stable id, at most 64 characters; the same id continues a run.
            name: What people read.
            group: Runs that belong together, such as those of one Dagster run.
            job_type: Stage name.
            tags: Words to filter by.
            config: Settings that made the result; no secrets and no host paths.
            log: The progress log. It may be moved or deleted at any time after this call if it exists now.
        """
        fields = {
            "run_id": run_id, "name": name, "group": group, "job_type": job_type,
            "tags": [tag[:_MAX_TAG_CHARS] for tag in tags], "config": dict(config), "log": str(log.absolute()),
        }  # fmt: skip
        if self.mode == "disabled":
            return
        with self._lock:
            try:
                if self._channel is None:
                    self._start()
                self._send("follow", fields, log)
            except OSError as error:
                self._give_up(run_id, error)

    def finish(
        self, run_id: str, exit_code: int = 0, log: Path | None = None, summary: Mapping[str, float] | None = None
    ) -> None:
        """End a run once its log has been shown to its end. Returns at once and never raises for W&B.

        Args:
            run_id: Id of a followed run.
            exit_code: 0 for success.
            log: Where the log is by now, for one that did not exist when it was announced.
            summary: Final metrics.
        """
        path = str(log.absolute()) if log is not None else None
        fields = {"run_id": run_id, "exit_code": exit_code, "log": path, "summary": dict(summary or {})}
        with self._lock:
            if self._channel is None:
                return
            try:
                self._send("finish", fields)
            except OSError as error:
                self._give_up(run_id, error)

    def run_directory(self, run_id: str, timeout_s: float = 0.0) -> Path | None:
        """The newest local folder of a run, or None if there is none (yet).

        Args:
            run_id: Id of a run, of this or an earlier process.
            timeout_s: How long to wait for the folder while the worker lives. It opens a run within about a second.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = self._run_directories(run_id)
            worker = self._worker
            if found or worker is None or worker.poll() is not None or time.monotonic() >= deadline:
                return max(found)[1] if found else None
            time.sleep(0.05)

    def link(self, run_id: str, timeout_s: float = 0.0) -> str | Path | None:
        """Where people find a run: its address if it went online, else its local folder; see `run_directory`."""
        folder = self.run_directory(run_id, timeout_s)
        if folder is not None and (folder / URL_FILE).exists():
            return (folder / URL_FILE).read_text(encoding="utf-8")
        return folder

    def close(self, timeout_s: float = 10.0) -> str | None:
        """Let the worker finish, and wait for it within bounds. Runs that nobody finished are marked as failed.

        Returns:
            A sentence for people if the worker is still busy (an upload); it goes on by itself.
        """
        with self._lock:
            channel, worker = self._channel, self._worker
            self._channel = self._worker = None
        if channel is not None:
            _hang_up(channel)
        if worker is None:
            return None
        try:
            worker.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return (
                f"W&B is still being written after {timeout_s:g} s; process {worker.pid} goes on by itself, and "
                f"{self._log_path} says how it ends."
            )
        return None

    @property
    def _log_path(self) -> Path:
        return self._home / "wandb" / "worker.log"

    def _run_directories(self, run_id: str) -> list[tuple[float, Path]]:
        """Folders of a run with the time of their last write. The file's name tells ids that begin alike apart."""
        found = []
        for folder in (self._home / "wandb").glob("*run-*"):
            data = folder / f"run-{run_id}.wandb"
            if data.exists() and not folder.is_symlink():
                found.append((data.stat().st_mtime, folder))
        return found

    def _start(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        import_path = os.pathsep.join(filter(None, [str(_REPOSITORY), inherited.get("PYTHONPATH")]))
        command = [
            sys.executable, "-P", "-m", "resources.tracking_worker",
            "--home", str(self._home), "--project", self.project, "--mode", self.mode,
            "--init-timeout-s", str(self._init_timeout_s), "--parent", str(os.getpid()),
        ]  # fmt: skip
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._log_path.open("ab") as output:
                self._worker = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=output, stderr=output, cwd=self._home,
                    env={**inherited, **_WORKER_ENVIRONMENT, "PYTHONPATH": import_path},
                    start_new_session=True,  # Ctrl-C ends the training and not the record of it
                )  # fmt: skip
        except OSError:
            ours.close()
            raise
        ours.settimeout(_SEND_TIMEOUT_S)
        self._channel = ours

    def _send(self, kind: str, fields: dict[str, Any], log: Path | None = None) -> None:
        """Send a command, and with it the log's open file: the log may be gone before the worker has got to it."""
        assert self._channel is not None
        if log is None or not log.exists():
            self._channel.sendall(_line(kind, fields))
            return
        with log.open("rb") as file:
            line = _line(kind, {**fields, "has_file": True})
            sent = socket.send_fds(self._channel, [line], [file.fileno()])
        self._channel.sendall(line[sent:])

    def _give_up(self, run_id: str, error: OSError) -> None:
        """Let go of a worker that cannot be reached; the next run to follow starts another."""
        if self._channel is not None:
            _hang_up(self._channel)
            self._channel = None
        _log.warning(
            "W&B does not show all of %s and training goes on: its worker cannot be started or reached (%s). See %s.",
            run_id, error, self._log_path,
        )  # fmt: skip


def _line(kind: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({kind: fields}, default=str).encode() + b"\n"


def _hang_up(channel: socket.socket) -> None:
    """Close for every holder: a child that was forked from this process may have the socket open too."""
    with channel:
        try:
            channel.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("the worker had ended before it was told to: %s", error)
