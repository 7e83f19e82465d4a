"""Processes that map a function over the chunks of something large: in order, in bounded memory, on every core.

Belongs here: starting, feeding and ending them. What is done to a chunk is a function of the stage that wants it.

A worker is a fresh Python process that is fed through a socket. `multiprocessing` would not do: stages run inside
Dagster's processes, where a fork copies locks that other threads hold, a spawned process imports the whole command line
anew, and a pool's workers outlive a parent that was killed. These read the end of their socket then, and end.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from signal import SIG_IGN, SIGINT, signal
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNKS_DONE_HERE = 12
"""Chunks of a map that the calling process does itself: for fewer, starting workers costs more than it saves."""

_MAX_WORKERS = 8  # more would wait for the calling process, which takes their results in one after the other


class Workers:
    """As many processes as there are cores, started when there is work for them, ended with the `with` block."""

    def __init__(self) -> None:
        cores = os.cpu_count() or 1
        self._most = min(cores, _MAX_WORKERS) if cores > 1 else 0
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The function's results in the order of the items, of which no more are held than there are workers.

        Args:
            function: A pure function that is importable by its name, or a `functools.partial` of one.
            items: Chunks of about equal work: workers take turns.

        Raises:
            RuntimeError: A worker ended early, killed or by an error in the function, which it has printed.
        """
        waiting = iter(items)
        yield from map(function, waiting if not self._most else islice(waiting, CHUNKS_DONE_HERE))
        busy: deque[_Worker] = deque()
        for item, worker in zip(islice(waiting, self._most), self._started(), strict=False):
            worker.ask(function, item)
            busy.append(worker)
        while busy:
            worker = busy.popleft()
            result = worker.answer()
            for item in islice(waiting, 1):
                worker.ask(function, item)
                busy.append(worker)
            yield result

    def _started(self) -> "Iterator[_Worker]":
        yield from self._workers
        while True:
            self._workers.append(_Worker())
            yield self._workers[-1]


class _Worker:
    """The calling process's end of a worker."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            # The same import path: the worker has to find the very modules that are running here.
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )

    def ask(self, function: Callable[[Any], Any], item: Any) -> None:
        try:
            self._connection.send((function, item))
        except ConnectionError as error:
            raise self._ended_early() from error

    def answer(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._ended_early() from error

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _ended_early(self) -> RuntimeError:
        code = self._process.wait()
        return RuntimeError(f"a worker process ended with exit code {code} before its work was done (-9: killed)")


def serve(descriptor: int) -> None:
    """What a worker does: answer until the other end of the socket is closed."""
    signal(SIGINT, SIG_IGN)  # Ctrl-C reaches the whole process group; the calling process decides what it means
    connection: Connection[Any, tuple[Callable[[Any], Any], Any]] = Connection(descriptor)
    while True:
        try:
            function, item = connection.recv()
        except (EOFError, ConnectionError):
            return
        result = function(item)
        try:
            connection.send(result)
        except ConnectionError:
            return
