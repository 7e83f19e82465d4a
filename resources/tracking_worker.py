"""The process that shows progress logs in Weights & Biases: `python -m resources.tracking_worker --home DIR ...`.

Belongs here: everything that touches wandb. It is a process of its own so that training never waits for it and a dead
network cannot stop it; `resources.tracking` starts it and talks to it. The progress logs are the truth: W&B is a view
over them, and a run that was cut short is shown whole when its stage goes on.

Commands are JSON lines on standard input, a Unix socket: {"follow": {...}} comes with the log's open file where it
exists already, {"finish": {...}}. The end of the input, or of the parent process, ends the worker: what is still
followed is read to its end and marked as failed.

Every history row carries `global_step`, the step within its phase, and every metric is drawn over it. W&B's own step
counts rows and goes on counting when a stage is run again, so nothing relies on it.
"""

import argparse
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from resources.tracking import URL_FILE

STEP_METRIC = "global_step"

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20
_MAX_FILES_A_MESSAGE = 16
_FINISH_TIMEOUT_S = 600.0  # of an upload; what is left then stays on disk for `wandb sync`

_log = logging.getLogger("tracking_worker")

Command = tuple[str, dict[str, Any], BinaryIO | None]
"""What to do, its fields, and the log's open file."""


@dataclass
class Followed:
    """A run that is shown: its command's fields, the unread rest of its log, and wandb's run once it is open."""

    fields: dict[str, Any]
    file: BinaryIO | None
    run: Any = None
    unread: bytes = b""
    known_metrics: set[str] = field(default_factory=set)
    finish: dict[str, Any] | None = None


class Follower:
    """Opens, feeds and finishes runs.

    Args:
        home: Folder `ALIGNMENT_HOME`; wandb makes its run folders in `wandb/` below it.
        project: W&B project.
        mode: `offline` or `online`; after a first failure to reach the server everything is offline.
        init_timeout_s: How long to wait for the server when a run is opened.
    """

    def __init__(self, home: Path, project: str, mode: str, init_timeout_s: float) -> None:
        self._home = home
        self._project = project
        self._mode: Literal["offline", "online"] = "online" if mode == "online" else "offline"
        self._init_timeout_s = init_timeout_s
        self._restart_needed = False
        self._followed: dict[str, Followed] = {}
        if self._mode == "online" and not os.environ.get("WANDB_API_KEY"):
            _log.warning("WANDB_MODE is online and WANDB_API_KEY is not set: runs are kept offline.")
            self._mode = "offline"

    def follow(self, fields: dict[str, Any], file: BinaryIO | None) -> None:
        """Show a log from its beginning. A run that is still followed under the same id is finished first."""
        if fields["run_id"] in self._followed:
            self.finish({"run_id": fields["run_id"], "exit_code": 1})
        self._followed[fields["run_id"]] = Followed(fields, file)

    def finish(self, fields: dict[str, Any]) -> None:
        """Finish a run as soon as its log has been read to its end."""
        followed = self._followed.get(fields["run_id"])
        if followed is None:
            _log.warning("%s cannot be finished: it is not followed.", fields["run_id"])
            return
        followed.finish = fields
        self.advance()

    def finish_all(self) -> None:
        """Finish what nobody has finished, as failed."""
        for followed in self._followed.values():
            followed.finish = followed.finish or {"run_id": followed.fields["run_id"], "exit_code": 1}
        while self._followed:
            self.advance()

    def advance(self) -> None:
        """Feed every run with what its log has grown by, and end those that are to be finished."""
        for run_id, followed in list(self._followed.items()):
            try:
                self._advance_one(followed)
            except Exception:  # wandb's errors share no base class, and one run's must not end the others
                _log.exception("%s is not shown any further; its progress log is complete.", run_id)
                self._forget(run_id)

    def _advance_one(self, followed: Followed) -> None:
        if followed.run is None:
            self._open(followed)
        if followed.run is None:
            return  # its log stays open, and it is shown when the others have ended
        if followed.file is None:
            followed.file = _open_log(followed)
        if followed.file is not None:
            _feed(followed, followed.file)
        if followed.finish is not None:
            followed.run.summary.update(followed.finish.get("summary") or {})
            followed.run.finish(exit_code=followed.finish["exit_code"])
            _log.info("%s finished, exit code %s.", followed.fields["run_id"], followed.finish["exit_code"])
            self._forget(followed.fields["run_id"])

    def _forget(self, run_id: str) -> None:
        followed = self._followed.pop(run_id)
        if followed.file is not None:
            followed.file.close()

    def _open(self, followed: Followed) -> None:
        """Open a run, or leave it for later if wandb's service has to be started anew and others are using it."""
        import wandb

        if self._mode == "online":
            try:
                followed.run = self._init(followed.fields)
            except Exception as error:  # a refused key, a dead network and a broken server have no class in common
                self._mode = "offline"
                self._restart_needed = True  # wandb's service holds on to the id of a run that failed to open
                reason = " ".join(str(error).split())
                _log.warning("W&B cannot be reached (%s). Runs are kept offline from here on.", reason)
        if followed.run is None:
            if self._restart_needed:
                if any(other.run is not None for other in self._followed.values()):
                    return
                wandb.teardown()
                self._restart_needed = False
            followed.run = self._init(followed.fields)
        folder = followed.run.settings.sync_dir
        if followed.run.url:
            (Path(folder) / URL_FILE).write_text(followed.run.url, encoding="utf-8")
        if self._mode == "offline":
            _log.info("%s is kept in %s. To upload it: wandb sync '%s'", followed.fields["run_id"], folder, folder)
        followed.run.define_metric(STEP_METRIC, hidden=True)

    def _init(self, fields: dict[str, Any]) -> Any:
        import wandb

        return wandb.init(
            id=fields["run_id"],
            name=fields["name"],
            group=fields["group"],
            job_type=fields["job_type"],
            tags=fields["tags"],
            config=fields["config"],
            project=self._project,
            mode=self._mode,
            dir=str(self._home),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                disable_job_creation=True,
                init_timeout=self._init_timeout_s,
                finish_timeout=_FINISH_TIMEOUT_S,
                x_disable_stats=True,
                x_disable_meta=True,  # the manifest records code, packages and hardware; host paths stay here
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )


def _open_log(followed: Followed) -> BinaryIO | None:
    """Open a log that did not exist when it was announced, at its place or where the stage says that it went."""
    for path in (followed.fields["log"], (followed.finish or {}).get("log")):
        if path is not None and os.path.exists(path):
            return open(path, "rb")  # stays open until its run ends
    return None


def _feed(followed: Followed, file: BinaryIO) -> None:
    """Log every whole line that the file has grown by; a torn one waits for its rest."""
    while chunk := file.read(_CHUNK_BYTES):
        *lines, followed.unread = (followed.unread + chunk).split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                _log.warning("%s: a line of its log is not JSON: %r", followed.fields["run_id"], line[:200])
                continue
            if entry["kind"] == "step":
                _log_step(followed, entry)


def _log_step(followed: Followed, entry: dict[str, Any]) -> None:
    phase_step = f"{entry['phase']}/step"
    for name in (phase_step, *entry["metrics"]):
        if name not in followed.known_metrics:
            followed.known_metrics.add(name)
            followed.run.define_metric(name, step_metric=STEP_METRIC)
    followed.run.log({**entry["metrics"], phase_step: entry["step"], STEP_METRIC: entry["step"]})


def receive(source: socket.socket, commands: "queue.Queue[Command | None]") -> None:
    """Read commands and the files that come with them until the other end closes; runs in a thread of its own.

    A log's file is taken out of the message at once, before wandb is even imported: its stage may be done by then and
    its folder moved or deleted.
    """
    unread, files = b"", []
    while True:
        data, descriptors, _, _ = socket.recv_fds(source, _CHUNK_BYTES, _MAX_FILES_A_MESSAGE)
        files += descriptors
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            for kind, fields in json.loads(line).items():
                file = os.fdopen(files.pop(0), "rb") if fields.pop("has_file", False) else None
                commands.put((kind, fields, file))
        if not data:
            commands.put(None)
            return


def work(follower: Follower, commands: "queue.Queue[Command | None]", parent: int) -> None:
    """Obey commands and feed runs until the input ends or the parent process is gone.

    A process that the parent forked may hold the socket's other end open after the parent was killed: hence both.
    """
    while True:
        is_orphan = os.getppid() != parent
        try:
            command = commands.get(timeout=_POLL_S)
        except queue.Empty:
            if is_orphan:
                break
            follower.advance()
            continue
        if command is None:
            break
        kind, fields, file = command
        if kind == "follow":
            follower.follow(fields, file)
        else:
            follower.finish(fields)
    follower.finish_all()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--mode", choices=["offline", "online"], required=True)
    parser.add_argument("--init-timeout-s", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process whose end ends this one")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
    commands: queue.Queue[Command | None] = queue.Queue()
    source = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    threading.Thread(target=receive, args=(source, commands), daemon=True).start()
    started = time.monotonic()
    follower = Follower(arguments.home, arguments.project, arguments.mode, arguments.init_timeout_s)
    work(follower, commands, arguments.parent)
    _log.info("done after %.1f s.", time.monotonic() - started)


if __name__ == "__main__":
    main()
