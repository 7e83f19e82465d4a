"""The lineage index: a DuckDB file over a home folder's manifests, tables and records, for questions in SQL.

Belongs here: opening that file safely, and bringing it up to date. Tables and views are in `schema.sql`, what is read
from which file in `reading`, the questions people ask in `questions`. The truth is the home folder, and the index can
be deleted and made again to the same content.

DuckDB lets one process write a file and then nobody else even read it, and its own retry loses writes when several
processes want it. So every connection is short and taken under a lock file: exclusive to write, shared to read. Our own
class and not `dagster_duckdb.DuckDBResource`, which leaves the file locked after an exception.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import random
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import duckdb

from alignment_pipeline.errors import AlignmentError, StoreError
from resources.lineage import reading, schema

REBUILD_COMMAND = "align lineage rebuild"
_REQUEST_S = 2.0
"""How long a query leaves files to the process that waits to index them."""

# Extensions are never fetched: an index must not need a network. A reader's SQL may touch nothing but the index.
_WRITER_SETTINGS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_READER_SETTINGS = {**_WRITER_SETTINGS, "enable_external_access": "false"}

_USERS_ERRORS = (duckdb.ProgrammingError, duckdb.DataError, duckdb.PermissionException, duckdb.NotSupportedError)
"""What a wrong statement raises; anything else from a query is the file's fault."""

_MISFITS = (
    duckdb.ProgrammingError,
    duckdb.DataError,
    duckdb.IntegrityError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OSError,
    RecursionError,
)
"""What one malformed artifact or record raises while it is indexed. The others are indexed all the same."""


@dataclass(frozen=True)
class _Lock:
    """A held lock file, and the time until which what follows may wait too (monotonic seconds)."""

    file: IO[str]
    deadline: float

    def share(self) -> None:
        """Let readers in, and no writer."""
        fcntl.flock(self.file, fcntl.LOCK_SH)


@dataclass(frozen=True)
class _Backlog:
    """What the index lacks: new or changed files with their stamps, and files that it must forget first."""

    added: Mapping[str, str]
    gone: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.gone)

    def without(self, paths: Collection[str]) -> "_Backlog":
        """The rest of it."""
        added = {path: stamp for path, stamp in self.added.items() if path not in paths}
        return _Backlog(added, [path for path in self.gone if path not in paths])


class Lineage:
    """The index of one home folder. Construction opens nothing; every method opens, works and closes.

    Args:
        home: Folder `ALIGNMENT_HOME`.
        timeout_s: How long to wait for a process that holds the file.
    """

    def __init__(self, home: Path, timeout_s: float = 5.0) -> None:
        self.path = home / "lineage.duckdb"
        self._home = home
        self._lock_path = home / "lineage.duckdb.lock"
        self._gate_path = home / "lineage.duckdb.gate"
        self._requests = home / "lineage.requests"
        self._timeout_s = timeout_s

    def sync(self, only: Collection[str] | None = None) -> int:
        """Index what the home has and the index lacks; opens no connection for writing if that is nothing.

        Args:
            only: Paths below the home folder to look at. All of them if left out; a few keep what a run adds as quick
                in a large index as in a small one.

        Returns:
            How many artifacts were added.

        Raises:
            StoreError: The file is held by another process or is broken, or something in the home is malformed; in
                the last case everything else has been indexed, and what is malformed is not looked at again until it
                has changed.
        """
        if only is None:
            with self._locked(exclusive=False) as lock:
                if self.path.exists():
                    with self._opened(self.path, lock.deadline, read_only=True) as connection:
                        if self._is_complete(connection):
                            return 0
        with self._requested_by_us(only or ()) as request, self._locked(exclusive=True) as lock:
            if request is not None and not request.exists():
                return 0  # whoever held the lock meanwhile has indexed these files with its own
            return self._catch_up(lock.deadline, only)

    def try_sync(self, only: Collection[str] | None = None) -> str | None:
        """`sync` for places that must go on: a problem of the index comes back as a sentence, not as an exception."""
        try:
            self.sync(only)
        except (StoreError, duckdb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            return f"The lineage index was not updated; training goes on and the next opening catches up. {reason}"
        return None

    def rebuild(self) -> int:
        """Make the index anew from the home, whatever state it is in; a crash meanwhile leaves the old one.

        Returns:
            How many artifacts it holds.

        Raises:
            StoreError: The file is held by another process, or something in the home is malformed.
        """
        with self._locked(exclusive=True) as lock:
            # A foreign holder would write its journal over the new file, so the old one must be free; it may be broken.
            with contextlib.suppress(_BrokenIndexError), self._opened(self.path, lock.deadline, read_only=False):
                pass
            return self._catch_up(lock.deadline, None, anew=True)

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Rows of a statement that only reads; the index is caught up first.

        Args:
            sql: One statement. Values go into `parameters` (`?` or `$name`), never into the text.
            parameters: Values by position or by name.

        Raises:
            AlignmentError: The statement is wrong, or tries to write.
            StoreError: The file is held by another process or is broken; says how to rebuild it.
        """
        with self.reading() as connection:
            return rows(connection, sql, parameters)

    @contextlib.contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for several statements that belong together (see `rows`); the index is caught up first.

        Files that another process is waiting to index just now are left to it.

        Raises:
            StoreError: As `query`.
        """
        with self._locked(exclusive=False) as lock:
            if self.path.exists():
                with self._opened(self.path, lock.deadline, read_only=True) as connection:
                    if self._is_complete(connection, but_for=self._requested()):
                        yield connection
                        return
        with self._locked(exclusive=True) as lock:
            with contextlib.suppress(_MalformedError):
                self._catch_up(lock.deadline, None)
            lock.share()
            with self._opened(self.path, lock.deadline, read_only=True) as connection:
                yield connection

    def content_sha256(self) -> str:
        """Hash of every row of every table in an order of its own, so that two indexes can be compared.

        Raises:
            StoreError: As `query`.
        """
        total = hashlib.sha256()
        with self.reading() as connection:
            tables = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY ALL").fetchall()
            for (table,) in tables:
                total.update(table.encode())
                cursor = connection.execute(f'SELECT * FROM "{table}" ORDER BY ALL')
                while batch := cursor.fetchmany(10_000):
                    total.update(repr(batch).encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    @contextlib.contextmanager
    def _requested_by_us(self, paths: Collection[str]) -> Iterator[Path | None]:
        """Leave word of files to index, for whoever writes next: opening the index costs more than adding to it."""
        if not paths:
            yield None
            return
        self._requests.mkdir(parents=True, exist_ok=True)
        request = self._requests / uuid.uuid4().hex
        beside = request.with_name(f".{request.name}")
        beside.write_text("\n".join(paths), encoding="utf-8")
        beside.replace(request)
        try:
            yield request
        finally:
            request.unlink(missing_ok=True)

    def _requested(self) -> set[str]:
        """Files that processes are about to index; a query need not wait for what is not finished.

        An older request is of a process that was killed, or that is held up and need not be waited for.
        """
        return set(itertools.chain.from_iterable(self._read_requests(_REQUEST_S).values()))

    def _read_requests(self, age_s: float = float("inf")) -> dict[Path, list[str]]:
        """Requests that are younger than this, and the files that each names."""
        found = {}
        for request in self._requests.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # done or given up since it was listed
                if time.time() - request.stat().st_mtime < age_s:
                    found[request] = request.read_text(encoding="utf-8").split("\n")
        return found

    def _catch_up(self, deadline: float, only: Collection[str] | None, *, anew: bool = False) -> int:
        """Bring the file up to date, or make it; returns how many artifacts were added."""
        requests = self._read_requests()
        if only is not None:
            only = {*only, *itertools.chain.from_iterable(requests.values())}
        added, problems = self._build(deadline) if anew else self._update(deadline, only)
        for path in requests:
            path.unlink(missing_ok=True)
        if problems:
            raise _MalformedError(
                f"{len(problems)} malformed files of the home are not in the lineage index; everything else is. "
                f"Delete them, and what needs them makes them again. The first: {problems[0]}"
            )
        return added

    def _update(self, deadline: float, only: Collection[str] | None) -> tuple[int, list[str]]:
        if self.path.exists():
            with self._opened(self.path, deadline, read_only=False) as connection:
                if schema.is_current(connection) or schema.migrate(connection):
                    return _index(connection, self._home, self._backlog(connection, only))
        return self._build(deadline)

    def _is_complete(self, connection: duckdb.DuckDBPyConnection, but_for: Collection[str] = ()) -> bool:
        return schema.is_current(connection) and not self._backlog(connection, None).without(but_for)

    def _backlog(self, connection: duckdb.DuckDBPyConnection, only: Collection[str] | None) -> _Backlog:
        """Compare the home with the index."""
        if only is None:
            present = reading.sources(self._home)
            indexed = dict(connection.execute("SELECT path, stamp FROM indexed_files").fetchall())
        else:
            stamps = ((path, reading.stamp_of(self._home / path)) for path in only)
            present = {path: stamp for path, stamp in stamps if stamp is not None}
            found = connection.execute("SELECT path, stamp FROM indexed_files WHERE path IN ?", [list(only)])
            indexed = dict(found.fetchall())
        added = {path: stamp for path, stamp in present.items() if indexed.get(path) != stamp}
        return _Backlog(added, [path for path in indexed if path in added or path not in present])

    def _build(self, deadline: float) -> tuple[int, list[str]]:
        """Make the whole index beside its place and rename it in, so that a crash leaves no half-made file."""
        beside = self.path.with_name(f"{self.path.name}.new")
        _delete(beside)
        with self._opened(beside, deadline, read_only=False) as connection:
            schema.create(connection)
            outcome = _index(connection, self._home, _Backlog(reading.sources(self._home), ()))
        _delete(self.path)
        beside.replace(self.path)  # closing has moved DuckDB's journal into the file
        return outcome

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator["_Lock"]:
        """Hold the lock file.

        Everybody passes the gate first. A writer keeps it until the readers are out, so that readers who come and go
        cannot keep it waiting for ever.
        """
        deadline = time.monotonic() + self._timeout_s
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        gate = self._acquire(self._gate_path, kind, deadline)
        try:
            file = self._acquire(self._lock_path, kind, deadline)
        finally:
            gate.close()
        with file:  # each holder has a descriptor of its own, so threads exclude each other too
            if exclusive:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield _Lock(file, deadline)

    def _acquire(self, path: Path, kind: int, deadline: float) -> IO[str]:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise StoreError(f"{path} cannot be opened ({error.strerror}); expected a writable home.") from error
        if not _flock(file, kind, deadline):
            pid = self._lock_path.read_text(encoding="utf-8") if self._lock_path.is_file() else ""
            raise StoreError(
                f"{self._lock_path} was held by other runs for {self._timeout_s:g} s; the last to write was "
                f"process {pid or 'unknown'}. Try again when they are done."
            )
        return file

    @contextlib.contextmanager
    def _opened(self, path: Path, deadline: float, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection, waiting for a process that does not know of our lock (such as somebody's DuckDB shell)."""
        settings = _READER_SETTINGS if read_only else _WRITER_SETTINGS
        try:
            while True:
                try:
                    connection = duckdb.connect(str(path), read_only=read_only, config=settings)
                    break
                except (duckdb.IOException, duckdb.ConnectionException) as error:
                    if not _is_held(error):
                        raise
                    if time.monotonic() >= deadline:
                        raise StoreError(
                            f"{path} is in use by another program and was not free within {self._timeout_s:g} s. "
                            f"Close it there and try again. DuckDB says: {error}"
                        ) from error
                    time.sleep(random.uniform(0.02, 0.1))
            try:
                yield connection
            finally:
                connection.close()
        except duckdb.Error as error:
            raise _BrokenIndexError(
                f"{path} cannot be read as an index ({error}). Nothing is lost: it is made from the home folder. "
                f"`{REBUILD_COMMAND}` makes it again."
            ) from error


def rows(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
) -> list[dict[str, Any]]:
    """Rows of one statement, by column.

    Raises:
        AlignmentError: The statement is wrong, or tries to write.
    """
    try:
        connection.execute(sql, parameters)
        names = [column[0] for column in connection.description or ()]
        return [dict(zip(names, row, strict=True)) for row in connection.fetchall()]
    except _USERS_ERRORS as error:
        raise AlignmentError(
            f"The query cannot be answered: {error}\nTables and views are described in resources/lineage/schema.sql."
        ) from error


class _MalformedError(StoreError):
    """Some files of the home could not be indexed; the others are."""


class _BrokenIndexError(StoreError):
    """The index is unreadable, and not only held by somebody."""


def _flock(file: IO[str], kind: int, deadline: float) -> bool:
    """Lock a file, waiting in the kernel's queue, where nobody is passed over for long; False after the deadline."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        pass
    state = threading.Lock()
    given_up = False
    got = False

    def wait() -> None:
        nonlocal got
        fcntl.flock(file, kind)
        with state:
            got = True
            if given_up:
                file.close()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(max(0.0, deadline - time.monotonic()))
    with state:
        given_up = not got
    return got


def _is_held(error: duckdb.Error) -> bool:
    """Whether a connection failed because of another holder; DuckDB has no class of its own for it."""
    text = str(error)
    return "Could not set lock" in text or "different configuration" in text


def _delete(database: Path) -> None:
    database.unlink(missing_ok=True)
    database.with_name(f"{database.name}.wal").unlink(missing_ok=True)


def _index(connection: duckdb.DuckDBPyConnection, home: Path, backlog: _Backlog) -> tuple[int, list[str]]:
    """Forget and add files, each in a transaction of its own: DuckDB checks keys within one too eagerly.

    Returns:
        How many artifacts were added, and which files are malformed and were left out.
    """
    added, problems = 0, []
    for path in backlog.gone:
        with _transaction(connection):
            reading.forget(connection, path)
    for path, stamp in backlog.added.items():
        try:
            with _transaction(connection):
                reading.add(connection, home, path, stamp)
            added += reading.is_manifest(path)
        except FileNotFoundError:
            continue  # it went since it was listed
        except (*_MISFITS, duckdb.IOException) as error:
            if isinstance(error, duckdb.IOException) and str(home / "artifacts") not in str(error):
                raise  # the index's own file, not a table that it reads
            problem = f"{type(error).__name__}: {error}"
            problems.append(f"{home / path}: {problem}")
            with _transaction(connection):
                connection.execute("INSERT INTO indexed_files VALUES (?, ?, ?)", [path, stamp, problem])
    if backlog.gone:
        with _transaction(connection):
            reading.sweep(connection)
    return added, problems


@contextlib.contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    connection.begin()
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
