"""Reading raw records: a JSON array, JSON lines, gzip of either, or a dataset of the Hugging Face hub.

Belongs here: bytes to parsed values, and which of them cannot be parsed. What a record must hold is decided by the
stage that reads it (`stages.instructions`, `stages.human_preferences`).

A bad line of a JSONL file is a bad row and reading goes on. A file that cannot be read as a whole is a `DataError`.

Sources are read a chunk at a time and parsed where the chunk is used, which may be another process. JSON lines, plain
or gzip, and hub datasets are never in memory as a whole; a JSON array is, since it cannot be parsed in parts.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from alignment_pipeline.errors import DataError
from alignment_pipeline.prompts import control_character, is_utf8_text

SHOWN_CHARS = 120
UNDECODABLE_KEY = "undecodable"
"""Key under which the feedback inbox keeps the repr of a line that is not UTF-8, so that no vote is lost."""

CHUNK_BYTES = 1 << 20
"""Bytes of JSON lines in a chunk, to which the rest of the last line is added."""

_CHUNK_VALUES = 4096
_GZIP_MAGIC = b"\x1f\x8b"
_REMEDY = "Point data.path (--set data.path=FILE) at a JSON array or JSONL file, plain or .gz, in UTF-8."


class RawRow(NamedTuple):
    """One record as it was found.

    Attributes:
        source_line: Line of a JSONL file, or position in a JSON array or hub split; both count from 1.
        value: The parsed value; None where there is a problem.
        problem: `invalid_utf8` or `invalid_json`; None for a parsed record.
        detail: What was found, escaped, in at most 200 characters.
    """

    source_line: int
    value: Any
    problem: str | None = None
    detail: str = ""


def shown(value: object) -> str:
    """A value's repr, short and safe to print: control characters and lone surrogates come out escaped."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


class Lines(NamedTuple):
    """Whole lines of a JSONL file, from line `first` on."""

    first: int
    data: bytes

    def rows(self) -> Iterator[RawRow]:
        """Parse each line by itself; blank lines are no rows."""
        lines = enumerate(self.data.split(b"\n"), start=self.first)
        return (_parse_line(number, line) for number, line in lines if line.strip())


class Values(NamedTuple):
    """Parsed values of a JSON array or a hub split, from position `first` on."""

    first: int
    values: list[Any]

    def rows(self) -> Iterator[RawRow]:
        """Each value with its position."""
        return (RawRow(position, value) for position, value in enumerate(self.values, start=self.first))


Chunk = Lines | Values


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every record of a file, see `read_chunks`."""
    return chain.from_iterable(chunk.rows() for chunk in read_chunks(path))


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Read every record of a file, in chunks; its content and not its suffix decides the format.

    Raises:
        DataError: The file is missing, a folder, empty, not UTF-8 as a whole, a broken gzip, or a broken JSON array.
    """
    if path.is_dir():
        raise DataError(f"{path}: found a folder, expected a file. {_REMEDY}")
    try:
        with path.open("rb") as file:
            is_gzip = file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            if path.suffix == ".gz" and not is_gzip and file.peek(1):
                raise DataError(f"{path}: found no gzip data, expected it from the suffix .gz. Rename the file.")
            yield from _chunks(path, cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzip else file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: found no such file. {_REMEDY}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: found broken or truncated gzip data ({error}), expected a whole file. Copy or download it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {_REMEDY}") from error


def parse_jsonl(data: bytes) -> list[RawRow]:
    """Parse JSON lines, each by itself; blank lines are no rows."""
    return list(Lines(1, data).rows())


def line_chunks(file: BinaryIO, start: bytes = b"") -> Iterator[Lines]:
    """Lines of a JSONL file in chunks; `start` is what was read of it already, whole lines."""
    first, data = 1, start or _read_lines(file)
    while data:
        yield Lines(first, data)
        first += data.count(b"\n")
        data = _read_lines(file)


def value_chunks(values: Iterable[Any]) -> Iterator[Values]:
    """Parsed values in chunks."""
    waiting, first = iter(values), 1
    while chunk := list(islice(waiting, _CHUNK_VALUES)):
        yield Values(first, chunk)
        first += len(chunk)


def read_hub_chunks(name: str, revision: str | None, split: str) -> tuple[Iterator[Chunk], str]:
    """Read a split of a hub dataset, from the local cache where there is no network.

    The repository's snapshot is fetched first and `datasets` reads that folder. `load_dataset(name, revision=...)`
    alone will not do: without a network it ignores the hub's file cache, and it falls back to whatever revision it
    prepared last, with a warning only.

    Returns:
        The rows in chunks, and the commit they come from.

    Raises:
        DataError: The dataset, revision or split does not exist, needs code to load, or cannot be reached and is not
            in the cache.
    """
    import datasets
    import huggingface_hub

    wanted = f"hub dataset {name}, revision {revision or 'main'}, split {split}"
    # Both libraries raise many unrelated classes (OSError, ValueError, httpx's, their own) for one problem here.
    try:
        snapshot = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision)
        dataset = datasets.load_dataset(snapshot, split=split)
    except Exception as error:
        raise DataError(
            f"{wanted}: cannot be loaded ({type(error).__name__}: {error}). Check data.hub_name, data.hub_revision and "
            "data.hub_split; without a network, download the file elsewhere and set --set data.path=FILE."
        ) from error
    starts = range(0, len(dataset), _CHUNK_VALUES)
    parts = (dataset.select(range(start, min(start + _CHUNK_VALUES, len(dataset)))) for start in starts)
    return value_chunks(chain.from_iterable(part.to_list() for part in parts)), Path(snapshot).name


def _chunks(path: Path, file: BinaryIO) -> Iterator[Lines] | Iterator[Values]:
    data = _read_lines(file)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: found UTF-16 text, expected UTF-8. Save the file as UTF-8.")
    data = data.removeprefix(codecs.BOM_UTF8)
    while not data.strip():
        more = _read_lines(file)
        if not more:
            raise DataError(f"{path}: found an empty file, expected records. {_REMEDY}")
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


def _read_lines(file: BinaryIO) -> bytes:
    """The next whole lines, about `CHUNK_BYTES` of them; nothing at the end."""
    return file.read(CHUNK_BYTES) + file.readline()


def _parse_line(number: int, line: bytes) -> RawRow:
    try:
        return RawRow(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RawRow(number, None, "invalid_utf8", shown(line[max(0, error.start - 20) : error.end + 20]))
    except (ValueError, RecursionError) as error:
        return RawRow(number, None, "invalid_json", f"{str(error)[:70]}: {shown(line.decode('utf-8'))}")


def _is_jsonl_after_all(data: bytes) -> bool:
    """Whether the leading [ is a bad first row of a JSONL file: the next line is a whole object without a comma."""
    lines = [line for line in data.split(b"\n", 1000) if line.strip()][:2]
    return len(lines) == 2 and lines[0].strip() != b"[" and isinstance(_parse_line(2, lines[1]).value, dict)


def _where(data: bytes, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"found {error.msg} at line {error.lineno} column {error.colno} (char {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        line = data.count(b"\n", 0, error.start) + 1
        return f"found byte {data[error.start]:#04x} that is not UTF-8 at line {line} (byte {error.start})"
    return f"found JSON that cannot be parsed ({error})"


def text_problem(name: str, value: object) -> tuple[str, str] | None:
    """Why a field cannot be used as text, as (quarantine reason, what was found); None if it can."""
    if not isinstance(value, str):
        return "wrong_type", f"{name}: {shown(value)}"
    if not is_utf8_text(value):
        return "invalid_utf8", f"{name} has a lone surrogate: {shown(value)}"
    found = control_character(value)
    if found is not None:
        return "control_characters", f"{name} has {shown(found)}: {shown(value)}"
    return None
