"""Reading a file of records: JSON lines, a JSON array, CSV or Parquet, and gzip of each.

Belongs here: from a path to chunks of rows. What is in a chunk is in `rows`.

A bad line or CSV record is a bad row and reading goes on. A file that cannot be read as a whole is a `DataError`, and
so is a quote in CSV that nobody closed: every record after it would be part of its field.

JSON lines, CSV and Parquet, plain or gzip, are never in memory as a whole; a JSON array is, since it cannot be parsed
in parts. Every CSV field is text, an empty one the empty text.
"""

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import BinaryIO, cast

from alignment_pipeline import rows as raw
from alignment_pipeline.errors import DataError
from alignment_pipeline.rows import Chunk, Found, Lines, RawRow, Values, line_chunks, shown, value_chunks

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_REMEDY = (
    "Point data.path (--set data.path=FILE) at a JSON array, a JSONL or CSV file in UTF-8 or a Parquet file, "
    "plain or .gz."
)
_MOST_FIELD_CHARS = 1 << 24
"""A CSV field that is longer and goes over lines is a quote that nobody closed; on one line it is a bad row."""

_WHOLE_FIELDS = re.compile(r'(?:(?:"[^"]*+(?:""[^"]*+)*+"|[^",][^,]*+)?+,)*+')


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every record of a file, see `read_chunks`."""
    return chain.from_iterable(chunk.rows() for chunk in read_chunks(path))


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Read every record of a file, in chunks; its content decides the format, and the suffix .csv only.

    Raises:
        DataError: The file is missing, a folder, empty, not UTF-8 as a whole, a broken gzip, a broken JSON array or
            Parquet file, CSV without a line of column names, or CSV with a quote that is never closed.
    """
    if path.is_dir():
        raise DataError(f"{path}: found a folder, expected a file. {_REMEDY}")
    try:
        with path.open("rb") as file:
            is_gzip = file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            if path.suffix == ".gz" and not is_gzip and file.peek(1):
                raise DataError(f"{path}: found no gzip data, expected it from the suffix .gz. Rename the file.")
            yield from _chunks(path, gzip.GzipFile(fileobj=file) if is_gzip else file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: found no such file. {_REMEDY}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: found broken or truncated gzip data ({error}), expected a whole file. Copy or download it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {_REMEDY}") from error


def _chunks(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[Chunk]:
    start = file.peek(len(_PARQUET_MAGIC))
    if start.startswith(_PARQUET_MAGIC):
        return _parquet_chunks(path, file)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: found UTF-16 text, expected UTF-8. Save the file as UTF-8.")
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        return _csv_chunks(path, file)
    return _json_chunks(path, cast(BinaryIO, file))


def _json_chunks(path: Path, file: BinaryIO) -> Iterator[Lines] | Iterator[Values]:
    data = raw.read_lines(file).removeprefix(codecs.BOM_UTF8)
    while not data.strip():
        more = raw.read_lines(file)
        if not more:
            raise _empty(path)
        data += more
    return _array_chunks(path, data + file.read()) if data.lstrip().startswith(b"[") else line_chunks(file, data)


def _array_chunks(path: Path, data: bytes) -> Iterator[Lines] | Iterator[Values]:
    try:
        # A byte that is not UTF-8 becomes a lone surrogate, and its row goes to quarantine.
        values = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if _is_jsonl_after_all(data):
            return line_chunks(io.BytesIO(data))
        raise DataError(f"{path}: {_where(data, error)}; expected a whole JSON array. {_REMEDY}") from error
    return value_chunks(values)


def _is_jsonl_after_all(data: bytes) -> bool:
    """Whether the leading [ is a bad first row of a JSONL file: the next line is a whole object without a comma."""
    lines = [line for line in data.split(b"\n", 1000) if line.strip()][:2]
    return len(lines) == 2 and lines[0].strip() != b"[" and isinstance(raw.parse_line(2, lines[1]).value, dict)


def _where(data: bytes, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"found {error.msg} at line {error.lineno} column {error.colno} (char {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        line = data.count(b"\n", 0, error.start) + 1
        return f"found byte {data[error.start]:#04x} that is not UTF-8 at line {line} (byte {error.start})"
    return f"found JSON that cannot be parsed ({error})"


def _csv_chunks(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[Found]:
    records = _csv_records(path, io.TextIOWrapper(cast(BinaryIO, file), "utf-8-sig", "surrogateescape", newline=""))
    header = next(records, None)
    if header is None:
        raise _empty(path)
    line, names, problem = header
    doubtful = problem or ("" if all(name.strip() for name in names) else "a column without a name")
    if doubtful or len(set(names)) < len(names):
        raise DataError(
            f"{path}: found {doubtful or 'a column name twice'} in line {line} ({shown(names)}), expected the names of "
            "the columns in the first line of a CSV file. Add or mend that line."
        )
    waiting = (_csv_row(names, *record) for record in records)
    while chunk := list(islice(waiting, raw.CHUNK_VALUES)):
        yield Found(chunk)


def _csv_records(path: Path, file: io.TextIOWrapper) -> Iterator[tuple[int, list[str], str]]:
    """First line, fields and problem of each record (RFC 4180); blank lines are no records."""
    csv.field_size_limit(_MOST_FIELD_CHARS)
    lines: list[str] = []  # of the record that is being read
    reader = csv.reader(_noted(file, lines), strict=True)
    while True:
        first = reader.line_num + 1
        lines.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader knows two ends of an open quote, and has no class of error for either.
            if "end of data" in str(error) or ("field limit" in str(error) and len(lines) > 1):
                raise _unclosed(path, first, lines) from error
            yield first, [], f"{error} (lines {first} to {reader.line_num})"
            continue
        if fields:
            yield first, fields, ""


def _noted(file: io.TextIOWrapper, lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _unclosed(path: Path, first: int, lines: list[str]) -> DataError:
    fields = _WHOLE_FIELDS.match("".join(lines))
    opened = first + bisect_right(list(accumulate(map(len, lines))), fields.end() if fields else 0)
    return DataError(
        f'{path}: found a quote (") that is opened in line {opened} and not closed by line {first + len(lines) - 1}, '
        'expected its field to end. Close it, or write a quote that is part of a quoted field as "".'
    )


def _csv_row(names: list[str], line: int, fields: list[str], problem: str) -> RawRow:
    if not problem and len(fields) != len(names):
        problem = f"{len(fields)} fields, {len(names)} expected: {shown(fields)}"
    return (
        RawRow(line, None, "invalid_csv", problem) if problem else RawRow(line, dict(zip(names, fields, strict=True)))
    )


def _parquet_chunks(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[Values]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if isinstance(file, gzip.GzipFile):  # Parquet is read from its end
            shutil.copyfileobj(file, unpacked)
        whole = unpacked if isinstance(file, gzip.GzipFile) else file
        try:
            batches = pyarrow.parquet.ParquetFile(whole).iter_batches(batch_size=raw.CHUNK_VALUES)
            yield from value_chunks(chain.from_iterable(batch.to_pylist() for batch in batches))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: found text that is not UTF-8 in a Parquet file, expected UTF-8.") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: found broken or truncated Parquet data ({str(error).splitlines()[0]}), expected a whole "
                "file. Copy or download it again."
            ) from error


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: found an empty file, expected records. {_REMEDY}")
