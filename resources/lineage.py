"""The lineage index: a DuckDB file over the store's manifests, tables and run records, for questions in SQL.

Belongs here: opening that file safely, and bringing it up to date. Tables and views are in `lineage.sql`; the truth is
the artifact store, and the index can be deleted and rebuilt to the same content.

DuckDB lets one process write a file and then nobody else even read it, and its own retry loses writes when several
processes want it. So every connection is short and taken under a lock file: exclusive to write, shared to read. Our own
class and not `dagster_duckdb.DuckDBResource`, which leaves the file locked after an exception.
"""

import contextlib
import fcntl
import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from alignment_pipeline.errors import AlignmentError, StoreError
from alignment_pipeline.identity import EXTRAS, MANIFEST, canonical_json, read_jsonl
from alignment_pipeline.progress import metric_series
from resources.artifact_store import ArtifactRef

PROGRESS_FILE = f"{EXTRAS}/progress.jsonl"

_SCHEMA = (Path(__file__).parent / "lineage.sql").read_text(encoding="utf-8")
_SCHEMA_SHA256 = hashlib.sha256(_SCHEMA.encode()).hexdigest()

# Extensions are never fetched: an index must not need a network. A reader's SQL may touch nothing but the index.
_WRITER_SETTINGS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_READER_SETTINGS = {**_WRITER_SETTINGS, "enable_external_access": "false"}

_PAIRS = """
    INSERT INTO preference_pairs
    SELECT ?, ?, id, prompt_id, prompt, chosen, rejected, source, labeller
    FROM read_json(?, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', prompt_id: 'VARCHAR', prompt: 'VARCHAR', chosen: 'VARCHAR', rejected: 'VARCHAR',
        source: 'VARCHAR', labeller: 'VARCHAR'})
"""
_QUARANTINE = """
    INSERT INTO quarantined_rows
    SELECT ?, reason, source_line, detail
    FROM read_json(?, format = 'newline_delimited', hive_partitioning = false, columns = {
        reason: 'VARCHAR', source_line: 'BIGINT', detail: 'VARCHAR'})
"""
_TABLES: Mapping[str, tuple[tuple[str, str, tuple[str | None, ...]], ...]] = {
    "instructions": (
        (
            "rows.jsonl",
            """
            INSERT INTO dataset_rows
            SELECT ?, id, prompt_id, split, source_line, instruction, input, output
            FROM read_json(?, format = 'newline_delimited', hive_partitioning = false, columns = {
                id: 'VARCHAR', prompt_id: 'VARCHAR', split: 'VARCHAR', source_line: 'BIGINT', instruction: 'VARCHAR',
                input: 'VARCHAR', output: 'VARCHAR'})
            """,
            (),
        ),
        ("quarantine.jsonl", _QUARANTINE, ()),
    ),
    "human_preferences": (("pairs.jsonl", _PAIRS, (None,)), ("quarantine.jsonl", _QUARANTINE, ())),
    "preference_pairs": (("train.jsonl", _PAIRS, ("train",)), ("validation.jsonl", _PAIRS, ("validation",))),
    "evaluation": (
        (
            "examples.jsonl",
            """
            INSERT INTO evaluation_examples
            SELECT ?, prompt_id, prompt, reference, response, judge_score, learned_score, kl_nats, tokens, ended, judge,
                   temperature
            FROM read_json(?, format = 'newline_delimited', hive_partitioning = false, columns = {
                prompt_id: 'VARCHAR', prompt: 'VARCHAR', reference: 'VARCHAR', response: 'VARCHAR',
                judge_score: 'DOUBLE', learned_score: 'DOUBLE', kl_nats: 'DOUBLE', tokens: 'BIGINT', ended: 'BOOLEAN',
                judge: 'VARCHAR', temperature: 'DOUBLE'})
            """,
            (),
        ),
    ),
}
"""Stage → its tables: file, statement (artifact id, more values, path), those values. Types are given, so that an empty
file is an empty table."""

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
)
"""What one malformed artifact or record raises while it is indexed. The others are indexed all the same."""


@dataclass(frozen=True)
class _Backlog:
    """What the index lacks: manifests by artifact id, run records by name with their stamps, and what has gone."""

    manifests: Mapping[str, Path]
    records: Mapping[str, tuple[Path, str]]
    gone: bool = False

    def __bool__(self) -> bool:
        return bool(self.manifests or self.records or self.gone)


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
        self._timeout_s = timeout_s

    def sync(self) -> int:
        """Index what the store has and the index lacks; opens no connection for writing if that is nothing.

        Returns:
            How many artifacts were added.

        Raises:
            StoreError: The file is held by another process or is broken, or something in the store is malformed; in
                the last case everything else has been indexed.
        """
        if self.path.exists():
            with self._reader() as connection:
                if not self._backlog(connection):
                    return 0
        with self._locked(exclusive=True) as deadline:
            if not self.path.exists():
                return self._build(deadline)
            with self._opened(self.path, deadline, read_only=False) as connection:
                backlog = self._backlog(connection)
                if not backlog.gone:
                    return _checked(*_index(connection, backlog))
            return self._build(deadline)  # what belongs to a lost artifact is spread over all tables

    def try_sync(self) -> str | None:
        """`sync` for places that must go on: a problem of the index comes back as a sentence, not as an exception."""
        try:
            self.sync()
        except (StoreError, duckdb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            return f"The lineage index was not updated; training goes on and the next opening catches up. {reason}"
        return None

    def rebuild(self) -> int:
        """Make the index anew from the store, whatever state it is in; a crash meanwhile leaves the old one.

        Returns:
            How many artifacts it holds.

        Raises:
            StoreError: The file is held by another process, or something in the store is malformed.
        """
        with self._locked(exclusive=True) as deadline:
            # A foreign holder would write its journal over the new file, so the old one must be free; it may be broken.
            with contextlib.suppress(_BrokenIndexError), self._opened(self.path, deadline, read_only=False):
                pass
            return self._build(deadline)

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Rows of a statement that only reads; the index is caught up first.

        Args:
            sql: One statement. Values go into `parameters` (`?` or `$name`), never into the text.
            parameters: Values by position or by name.

        Raises:
            AlignmentError: The statement is wrong, or tries to write.
            StoreError: The file is held by another process or is broken; says how to rebuild it.
        """
        if not self.path.exists():
            self.sync()
        else:
            self.try_sync()  # what ran since; where the file is held, the reader below says by whom
        with self._reader() as connection:
            try:
                connection.execute(sql, parameters)
                names = [column[0] for column in connection.description or ()]
                return [dict(zip(names, row, strict=True)) for row in connection.fetchall()]
            except _USERS_ERRORS as error:
                raise AlignmentError(
                    f"The query cannot be answered: {error}\nTables and views are described in resources/lineage.sql."
                ) from error

    def _backlog(self, connection: duckdb.DuckDBPyConnection) -> _Backlog:
        """Compare the store with an index; an index with another schema lacks everything."""
        manifests, records = self._manifests(), self._records()
        try:
            schema = connection.execute("SELECT schema_sha256 FROM index_info").fetchone()
        except duckdb.CatalogException:
            schema = None
        if schema != (_SCHEMA_SHA256,):
            return _Backlog(manifests, records, gone=True)
        indexed = {row[0] for row in connection.execute("SELECT artifact_id FROM artifacts").fetchall()}
        stamps = dict(connection.execute("SELECT run_id, record_stamp FROM runs").fetchall())
        return _Backlog(
            manifests={name: path for name, path in manifests.items() if name not in indexed},
            records={name: entry for name, entry in records.items() if stamps.get(name) != entry[1]},
            gone=not (indexed <= manifests.keys() and stamps.keys() <= records.keys()),
        )

    def _manifests(self) -> dict[str, Path]:
        """Manifests in the store by artifact id; folders with a leading dot are being written."""
        root = self._home / "artifacts"
        found = root.glob(f"[!.]*/[!.]*/[!.]*/{MANIFEST}")
        return {path.parent.relative_to(root).as_posix(): path for path in sorted(found)}

    def _records(self) -> dict[str, tuple[Path, str]]:
        """Run records by run id. The stamp is taken before the record is read: a change in between is read again."""
        found = {}
        for path in sorted((self._home / "runs").glob("[!.]*.json")):
            state = path.stat()
            found[path.stem] = (path, f"{state.st_ino}:{state.st_size}:{state.st_mtime_ns}")
        return found

    def _build(self, deadline: float) -> int:
        """Make the whole index beside its place and rename it in, so that a crash leaves no half-made file."""
        beside = self.path.with_name(f"{self.path.name}.new")
        _delete(beside)
        with self._opened(beside, deadline, read_only=False) as connection:
            connection.execute(_SCHEMA)
            connection.execute("INSERT INTO index_info VALUES (?)", [_SCHEMA_SHA256])
            outcome = _index(connection, _Backlog(self._manifests(), self._records()))
        _delete(self.path)
        beside.replace(self.path)  # closing has moved DuckDB's journal into the file
        return _checked(*outcome)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._locked(exclusive=False) as deadline, self._opened(self.path, deadline, read_only=True) as connection:
            yield connection

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[float]:
        """Hold the lock file, and yield the time until which the rest may wait too (monotonic seconds)."""
        deadline = time.monotonic() + self._timeout_s
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            lock_file = self._lock_path.open("a")
        except OSError as error:
            raise StoreError(
                f"{self._lock_path} cannot be opened ({error.strerror}); expected a writable home."
            ) from error
        with lock_file as lock:  # each holder has a descriptor of its own, so threads exclude each other too
            while True:
                try:
                    fcntl.flock(lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StoreError(
                            f"{self._lock_path} was held by other runs for {self._timeout_s:g} s. Try again when they "
                            f"are done; `fuser {self._lock_path}` names them."
                        ) from None
                    time.sleep(random.uniform(0.002, 0.02))
            yield deadline

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
                f"{path} cannot be read as an index ({error}). Nothing is lost: it is made from the artifact store. "
                "Delete the file, and the next run or query rebuilds it."
            ) from error


class _BrokenIndexError(StoreError):
    """The index is unreadable, and not only held by somebody."""


def _is_held(error: duckdb.Error) -> bool:
    """Whether a connection failed because of another holder; DuckDB has no class of its own for it."""
    text = str(error)
    return "Could not set lock" in text or "different configuration" in text


def _delete(database: Path) -> None:
    database.unlink(missing_ok=True)
    database.with_name(f"{database.name}.wal").unlink(missing_ok=True)


def _index(connection: duckdb.DuckDBPyConnection, backlog: _Backlog) -> tuple[int, list[str]]:
    """Add what is lacking, each artifact and each record in a transaction of its own.

    Returns:
        How many artifacts were added, and which entries are malformed and were left out.
    """
    added, problems = 0, []
    for artifact_id, path in backlog.manifests.items():
        try:
            with _transaction(connection):
                _add_artifact(connection, artifact_id, path.parent)
            added += 1
        except _MISFITS as error:
            problems.append(f"{path.parent}: {type(error).__name__}: {error}")
    for run_id, (path, stamp) in backlog.records.items():
        try:
            with _transaction(connection):
                _add_record(connection, run_id, json.loads(path.read_text(encoding="utf-8")), stamp)
        except _MISFITS as error:
            problems.append(f"{path}: {type(error).__name__}: {error}")
    return added, problems


def _checked(added: int, problems: Sequence[str]) -> int:
    if problems:
        raise StoreError(
            f"{len(problems)} malformed entries of the store are not in the lineage index; everything else is. "
            f"Delete them, and what needs them makes them again. The first: {problems[0]}"
        )
    return added


@contextlib.contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    connection.begin()
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def _add_artifact(connection: duckdb.DuckDBPyConnection, artifact_id: str, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    environment, timings = manifest.get("environment", {}), manifest.get("timings", {})
    connection.execute(
        "INSERT INTO artifacts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            artifact_id, manifest["stage"], manifest["key"], manifest["data_version"], manifest.get("code_version"),
            canonical_json(manifest.get("config", {})), manifest.get("seed"), _utc(manifest.get("created_at")),
            timings.get("wall_s"), environment.get("git_commit"), environment.get("device"), environment.get("python"),
            canonical_json(environment.get("packages", {})), canonical_json(timings),
        ],
    )  # fmt: skip
    inputs = manifest.get("inputs", {})
    edges = {name: _artifact_id(entry) for name, entry in inputs.items() if "stage" in entry}
    input_files = [(name, entry["sha256"], entry.get("path")) for name, entry in inputs.items() if "stage" not in entry]
    files = [(entry["path"], entry["size"], entry["sha256"]) for entry in manifest.get("files", [])]
    checks = [(c["name"], c["passed"], c.get("detail"), c.get("blocking", False)) for c in manifest.get("checks", [])]
    _insert(connection, "artifact_inputs", artifact_id, edges.items())
    _insert(connection, "input_files", artifact_id, input_files)
    _insert(connection, "artifact_files", artifact_id, files)
    _insert(connection, "results", artifact_id, manifest.get("metrics", {}).items())
    _insert(connection, "checks", artifact_id, checks)
    _add_tables(connection, artifact_id, folder, manifest["stage"], edges)


def _add_tables(
    connection: duckdb.DuckDBPyConnection, artifact_id: str, folder: Path, stage: str, edges: Mapping[str, str]
) -> None:
    """Index the tables inside an artifact; DuckDB reads the large ones itself."""
    for name, statement, values in _TABLES.get(stage, ()):
        if (folder / name).is_file():
            connection.execute(statement, [artifact_id, *values, str(folder / name)])
    if stage == "evaluation" and (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        evaluation = (edges.get("policy"), summary.get("judge"), summary.get("prompts"))
        _insert(connection, "evaluations", artifact_id, [evaluation])
    if stage == "comparison" and (folder / "table.jsonl").is_file():
        _insert(connection, "comparison_rows", artifact_id, _comparison_cells(folder / "table.jsonl"))
    if (folder / PROGRESS_FILE).is_file():
        series = metric_series(folder / PROGRESS_FILE)
        steps = [(*at, name, float(value)) for at, metrics in series.items() for name, value in metrics.items()]
        _insert(connection, "metrics", artifact_id, steps)


def _add_record(connection: duckdb.DuckDBPyConnection, run_id: str, record: Mapping[str, Any], stamp: str) -> None:
    """Write a run's record over the one that is indexed, since records change until their run ends."""
    connection.execute(
        "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            run_id, record.get("recipe"), canonical_json(record.get("overrides", [])), record.get("started_by"),
            _utc(record.get("started_at")), _utc(record.get("finished_at")), record.get("status"), stamp,
        ],
    )  # fmt: skip
    connection.execute("DELETE FROM run_assets WHERE run_id = ?", [run_id])
    assets = record.get("assets", {}).items()
    rows = [(asset, entry["stage"], _artifact_id(entry), entry.get("reused")) for asset, entry in assets]
    _insert(connection, "run_assets", run_id, rows)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, owner: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Insert rows that belong to one artifact or run, each column as one bound list: far quicker than row by row."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if columns:
        connection.execute(f"INSERT INTO {table} SELECT ?{', unnest(?)' * len(columns)}", [owner, *columns])


def _comparison_cells(path: Path) -> list[tuple[str, str, str, float | None, str | None]]:
    """The cells of a comparison's table: policy, judge, column, and its number or its text."""
    cells = []
    for row in read_jsonl(path):
        for name in sorted(row.keys() - {"policy", "judge"}):
            cell = row[name]
            number = float(cell) if isinstance(cell, int | float) else None
            text = cell if isinstance(cell, str) else canonical_json(cell) if isinstance(cell, list | dict) else None
            cells.append((row["policy"], row["judge"], name, number, text))
    return cells


def _artifact_id(entry: Mapping[str, str]) -> str:
    return ArtifactRef(entry["stage"], entry["key"], entry["data_version"]).artifact_id


def _utc(text: str | None) -> datetime | None:
    """An ISO time as DuckDB's TIMESTAMP, which knows no zone."""
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None) if text else None
