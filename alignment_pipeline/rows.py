"""Reading raw records: a JSON array, JSON lines, gzip of either, or a dataset of the Hugging Face hub.

Belongs here: bytes to parsed values, and which of them cannot be parsed. What a record must hold is decided by the
stage that reads it (`stages.instructions`, `stages.human_preferences`).

A bad line of a JSONL file is a bad row and reading goes on. A file that cannot be read as a whole is a `DataError`.
"""

import codecs
import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from alignment_pipeline.errors import DataError
from alignment_pipeline.prompts import control_character, is_utf8_text

SHOWN_CHARS = 120
UNDECODABLE_KEY = "undecodable"
"""Key under which the feedback inbox keeps the repr of a line that is not UTF-8, so that no vote is lost."""

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


def read_rows(path: Path) -> list[RawRow]:
    """Read every record of a file; its content and not its suffix decides the format.

    Raises:
        DataError: The file is missing, a folder, empty, not UTF-8 as a whole, a broken gzip, or a broken JSON array.
    """
    data = _read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: found UTF-16 text, expected UTF-8. Save the file as UTF-8.")
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise DataError(f"{path}: found an empty file, expected records. {_REMEDY}")
    if not data.lstrip().startswith(b"["):
        return parse_jsonl(data)
    try:
        # A byte that is not UTF-8 becomes a lone surrogate, and its row goes to quarantine.
        values = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if _is_jsonl_after_all(data):
            return parse_jsonl(data)
        raise DataError(f"{path}: {_where(data, error)}; expected a whole JSON array. {_REMEDY}") from error
    return [RawRow(position, value) for position, value in enumerate(values, start=1)]


def parse_jsonl(data: bytes) -> list[RawRow]:
    """Parse JSON lines, each by itself; blank lines are no rows."""
    return [_parse_line(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def load_hub_rows(name: str, revision: str | None, split: str) -> tuple[list[RawRow], str]:
    """Read a split of a hub dataset, from the local cache where there is no network.

    The repository's snapshot is fetched first and `datasets` reads that folder. `load_dataset(name, revision=...)`
    alone will not do: without a network it ignores the hub's file cache, and it falls back to whatever revision it
    prepared last, with a warning only.

    Returns:
        The rows, and the commit they come from.

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
        values = datasets.load_dataset(snapshot, split=split).to_list()
    except Exception as error:
        raise DataError(
            f"{wanted}: cannot be loaded ({type(error).__name__}: {error}). Check data.hub_name, data.hub_revision and "
            "data.hub_split; without a network, download the file elsewhere and set --set data.path=FILE."
        ) from error
    return [RawRow(position, value) for position, value in enumerate(values, start=1)], Path(snapshot).name


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path}: found a folder, expected a file. {_REMEDY}")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: found no such file. {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {_REMEDY}") from error
    if not data.startswith(_GZIP_MAGIC):
        if data and path.suffix == ".gz":
            raise DataError(f"{path}: found no gzip data, expected it from the suffix .gz. Rename the file.")
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: found broken or truncated gzip data ({error}), expected a whole file. Copy or download it again."
        ) from error


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
