"""Raw records: what a row of a source is, in chunks that can be parsed in another process.

Belongs here: bytes of JSON lines to parsed values, and what a text that can be used is. Files are read in `row_files`,
datasets of the hub in `hub_rows`, queries over either in `sql_rows`; what a record must hold is decided by the stage
that reads it (`record_forms` for `stages.instructions`, `stages.human_preferences`).

A bad line of a JSONL file is a bad row and reading goes on.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from alignment_pipeline.prompts import control_character, is_utf8_text

SHOWN_CHARS = 120
UNDECODABLE_KEY = "undecodable"
"""Key under which the feedback inbox keeps the repr of a line that is not UTF-8, so that no vote is lost."""

CHUNK_BYTES = 1 << 20
"""Bytes of JSON lines in a chunk, to which the rest of the last line is added."""

CHUNK_VALUES = 4096
"""Parsed values in a chunk."""


class RawRow(NamedTuple):
    """One record as it was found.

    Attributes:
        source_line: Line of a JSONL or CSV file (a CSV record's first), or position in a JSON array, a Parquet file, a
            hub split or a query's result; all count from 1.
        value: The parsed value; None where there is a problem.
        problem: Why it could not be parsed: `invalid_utf8`, `invalid_json`, `invalid_csv`; None for a parsed record.
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
        return (parse_line(number, line) for number, line in lines if line.strip())


class Values(NamedTuple):
    """Parsed values, of a JSON array for example, from position `first` on."""

    first: int
    values: list[Any]

    def rows(self) -> Iterator[RawRow]:
        """Each value with its position."""
        return (RawRow(position, value) for position, value in enumerate(self.values, start=self.first))


class Found(NamedTuple):
    """Records that were parsed where they were read, bad ones among them."""

    found: list[RawRow]

    def rows(self) -> Iterator[RawRow]:
        """The records."""
        return iter(self.found)


Chunk = Lines | Values | Found


def parse_jsonl(data: bytes) -> list[RawRow]:
    """Parse JSON lines, each by itself; blank lines are no rows."""
    return list(Lines(1, data).rows())


def line_chunks(file: BinaryIO, start: bytes = b"") -> Iterator[Lines]:
    """Lines of a JSONL file in chunks; `start` is what was read of it already, whole lines."""
    first, data = 1, start or read_lines(file)
    while data:
        yield Lines(first, data)
        first += data.count(b"\n")
        data = read_lines(file)


def value_chunks(values: Iterable[Any]) -> Iterator[Values]:
    """Parsed values in chunks."""
    waiting, first = iter(values), 1
    while chunk := list(islice(waiting, CHUNK_VALUES)):
        yield Values(first, chunk)
        first += len(chunk)


def read_lines(file: BinaryIO) -> bytes:
    """The next whole lines, about `CHUNK_BYTES` of them; nothing at the end."""
    return file.read(CHUNK_BYTES) + file.readline()


def parse_line(number: int, line: bytes) -> RawRow:
    """Parse one line of JSON lines."""
    try:
        return RawRow(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RawRow(number, None, "invalid_utf8", shown(line[max(0, error.start - 20) : error.end + 20]))
    except (ValueError, RecursionError) as error:
        return RawRow(number, None, "invalid_json", f"{str(error)[:70]}: {shown(line.decode('utf-8'))}")


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
