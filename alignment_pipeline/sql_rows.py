"""Rows by a query: a SELECT over the records of a source, which it knows as the table `source`.

Belongs here: DuckDB as an engine for `data.sql`, and nothing else of it; this is the one module of the library that
imports DuckDB. What the rows must hold is decided after the query, as without one.

The records are read by the project's own readers and laid out in a file, each with the column types that all of them
agree on. So no text is taken for a date or a number:

- a column of texts (or dates, as text) is VARCHAR, of truth values BOOLEAN, of whole numbers BIGINT, of numbers DOUBLE;
- any other (lists, objects, a mixture) is JSON, which comes out as the values it was made from.

The query sees nothing but that table: no files, no network, no extensions, no variables of Python. It runs on one
thread, which keeps the rows in the order of the source where it asks for no other, and random() starts from the
recipe's seed, so that the same query gives the same rows.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import duckdb

from alignment_pipeline.errors import DataError
from alignment_pipeline.rows import CHUNK_VALUES, Chunk, Found, RawRow, Values, shown, value_chunks

_SETTINGS = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "threads": "1",
}
_spelled = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode
_LEAST_OBJECT_BYTES = 16 << 20
_TYPES = {str: "VARCHAR", bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}
_BIGINT_BITS = 63


class _Columns:
    """Names of the columns in the order they came, and the types that hold all their values."""

    def __init__(self) -> None:
        self._types: dict[str, str | None] = {}

    def take_in(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            known = self._types.get(name)
            if value is None:
                self._types.setdefault(name, None)
            elif known != "JSON":
                self._types[name] = _wider(known, _type_of(value))

    def types(self) -> dict[str, str]:
        """Column → DuckDB's type; one without a value is text."""
        return {name: known or "VARCHAR" for name, known in self._types.items()}


def query_chunks(chunks: Iterable[Chunk], sql: str, seed: int, work_dir: Path) -> Iterator[Chunk]:
    """The rows of a query's result, from 1 on, and before them the source's records that cannot stand in a table.

    Args:
        chunks: The source; all of it is read before the first row of the result.
        sql: One SELECT over the table `source`.
        seed: What random() starts from.
        work_dir: Folder for the table and whatever else does not fit into memory; nothing stays there.

    Raises:
        DataError: The text is not one SELECT, DuckDB refuses it, or the source has no record or has columns that differ
            in case only.
    """
    _require_select(sql)
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        table, columns, longest = Path(folder) / "source.jsonl", _Columns(), 0
        with table.open("wb") as file:
            for chunk in chunks:
                refused, bytes_of_longest = _lay_out(chunk, columns, file)
                longest = max(longest, bytes_of_longest)
                if refused:
                    yield Found(refused)
        types = columns.types()
        _require_table(types)
        with duckdb.connect(str(Path(folder) / "source.duckdb"), config=_SETTINGS) as connection:
            try:
                connection.execute(
                    "CREATE TABLE source AS SELECT * FROM read_json(?, format = 'newline_delimited', "
                    "hive_partitioning = false, columns = ?, maximum_object_size = ?)",
                    [str(table), types, max(_LEAST_OBJECT_BYTES, 2 * longest)],
                )
                connection.execute("SELECT setseed(?)", [seed / 2**31])
                connection.execute("SET enable_external_access = false")
                connection.execute("SET lock_configuration = true")
                yield from _result(connection, sql)
            except duckdb.Error as error:
                raise _sql_error(str(error).splitlines()[0], f"source has the columns {', '.join(types)}") from error


def _require_select(sql: str) -> None:
    with duckdb.connect(config=_SETTINGS) as connection:
        try:
            kinds = [statement.type for statement in connection.extract_statements(sql)]
        except duckdb.Error as error:
            raise _sql_error(str(error).splitlines()[0]) from error
    if kinds != [duckdb.StatementType.SELECT]:
        raise _sql_error(f"found {' and '.join(kind.name for kind in kinds) or 'no statement'}")


def _lay_out(chunk: Chunk, columns: _Columns, file: BinaryIO) -> tuple[list[RawRow], int]:
    """Write a chunk's records as lines of JSON; returns those that cannot be, and the bytes of the longest line."""
    refused, longest = [], 0
    for row in chunk.rows():
        if row.problem:
            refused.append(row)
            continue
        if not isinstance(row.value, dict):
            refused.append(row._replace(value=None, problem="wrong_type", detail=shown(row.value)))
            continue
        try:
            line = _spelled({name: _storable(value) for name, value in row.value.items()}).encode() + b"\n"
        except ValueError as error:  # a lone surrogate, or NaN within a list
            problem = "invalid_utf8" if isinstance(error, UnicodeEncodeError) else "wrong_type"
            refused.append(row._replace(value=None, problem=problem, detail=shown(row.value)))
            continue
        columns.take_in(row.value)
        longest = max(longest, len(line))
        file.write(line)
    return refused, longest


def _result(connection: duckdb.DuckDBPyConnection, sql: str) -> Iterator[Values]:
    answer = connection.execute(sql)
    names = [column[0] for column in answer.description]
    for name in names:
        if names.count(name) > 1:
            raise _sql_error(f"found the column {name} twice in the result", "SELECT * EXCLUDE (NAME) leaves one out")
    parsed = {name for name, kind, *_ in answer.description if str(kind) == "JSON"}
    batches = iter(lambda: answer.fetchmany(CHUNK_VALUES), [])
    records = (dict(zip(names, row, strict=True)) for row in chain.from_iterable(batches))
    return value_chunks(
        {name: json.loads(v) if name in parsed and v is not None else v for name, v in record.items()}
        for record in records
    )


def _require_table(types: dict[str, str]) -> None:
    if not types:
        raise DataError("data.sql: found no record in the source that can stand in a table, expected JSON objects.")
    seen: dict[str, str] = {}
    for name in types:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                f"data.sql: found the columns {other} and {name}, which SQL takes for one; expected names that differ "
                "in more than case. Rename one in the file."
            )


def _storable(value: Any) -> Any:
    """SQL has NULL for what is not a number."""
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _type_of(value: Any) -> str:
    kind = "JSON" if isinstance(value, list | dict) else _TYPES.get(type(value), "VARCHAR")
    return "JSON" if kind == "BIGINT" and value.bit_length() > _BIGINT_BITS else kind


def _wider(known: str | None, other: str) -> str:
    if known in (None, other):
        return other
    return "DOUBLE" if {known, other} == {"BIGINT", "DOUBLE"} else "JSON"


def _sql_error(found: str, more: str = "") -> DataError:
    hint = f" ({more})" if more else ""
    return DataError(f"data.sql: {found.rstrip('.!')}; expected one SELECT over the table source{hint}.")
