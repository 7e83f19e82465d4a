import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment_pipeline import rows as rows_module
from alignment_pipeline.errors import DataError
from alignment_pipeline.prompts import is_utf8_text
from alignment_pipeline.row_files import read_chunks, read_rows
from alignment_pipeline.rows import CHUNK_BYTES, Lines, parse_jsonl, shown

RECORDS = [{"instruction": "Say ü.", "output": "ü"}, {"instruction": "Say \u2028.", "output": "two"}]
HUB_NAME = "sahil2801/CodeAlpaca-20k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


ARRAY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(RECORDS)),
        ("rows.json", ARRAY),
        ("rows.jsonl", b"\n \n" + ARRAY),
        ("rows.json", jsonl(RECORDS)),
        ("rows.jsonl", jsonl(RECORDS).replace(b"\n", b"\r\n")),
        ("rows.jsonl", jsonl(RECORDS).rstrip(b"\n")),
        ("rows.jsonl", b"\xef\xbb\xbf" + jsonl(RECORDS)),
        ("rows.json", b"\xef\xbb\xbf" + ARRAY),
        ("rows.jsonl.gz", gzip.compress(jsonl(RECORDS))),
        ("rows.json.gz", gzip.compress(ARRAY)),
        ("rows.json", gzip.compress(b"\xef\xbb\xbf" + ARRAY)),
    ],
)
def test_the_same_records_are_read_from_every_format_whatever_the_suffix(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == RECORDS
    assert all(row.problem is None for row in rows)


def test_a_bad_line_is_a_bad_row_with_its_line_and_reading_goes_on() -> None:
    rows = parse_jsonl(b'{"a": 1}\n\n{"a": \n{"a": "\xff\xfe"}\n[[1]\n' + b"[" * 100_000 + b'\n{"a": 2}')
    assert [(row.source_line, row.problem) for row in rows] == [
        (1, None), (3, "invalid_json"), (4, "invalid_utf8"), (5, "invalid_json"), (6, "invalid_json"), (7, None),
    ]  # fmt: skip
    assert [row.value for row in rows if row.problem is None] == [{"a": 1}, {"a": 2}]
    assert "\\xff" in rows[2].detail
    assert all(len(row.detail) <= 200 for row in rows)


def test_a_byte_that_is_not_utf8_spoils_one_row_of_an_array_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xff"}, {"a": "good"}]')
    bad, good = read_rows(path)
    assert good.value == {"a": "good"}
    assert bad.value != {"a": ""} and not is_utf8_text(bad.value["a"])


def test_a_bad_first_line_that_looks_like_an_array_does_not_end_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for first in (b"[1, 2]\n", b"[oops\n"):
        path.write_bytes(first + jsonl(RECORDS))
        assert [row.value for row in read_rows(path)][1:] == RECORDS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[\n  {"a": 1},\n  {"a": }\n]', r"line 3 column 9"),
        (b'[\n  {"a": 1},\n  {"a": 2', r"line 3"),
        (b"", "empty file"),
        (b" \n\t\n", "empty file"),
        (gzip.compress(b""), "empty file"),
        (gzip.compress(jsonl(RECORDS) * 50)[:-20], "truncated gzip"),
        (gzip.compress(jsonl(RECORDS))[:-8] + b"\0" * 8, "broken or truncated gzip"),
        (b"\x1f\x8b\x08\x00broken", "broken or truncated gzip"),
        (json.dumps(RECORDS).encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_an_error_that_names_it(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_a_wrong_suffix_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file.*--set data\.path=FILE"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"a folder, expected a file"):
        list(read_rows(tmp_path))
    (tmp_path / "plain.gz").write_bytes(jsonl(RECORDS))
    with pytest.raises(DataError, match=r"no gzip data.*suffix \.gz"):
        list(read_rows(tmp_path / "plain.gz"))


CHUNKED = {
    "lines": jsonl(RECORDS * 9),
    "carriage returns": jsonl(RECORDS * 9).replace(b"\n", b"\r\n"),
    "blank lines first": b"\n" * 100 + b" \t\n" + jsonl(RECORDS * 9),
    "a mark and blank lines first": b"\xef\xbb\xbf" + b"\n" * 100 + jsonl(RECORDS * 9),
    "no end of line": jsonl(RECORDS * 9).rstrip(b"\n"),
    "a long line": jsonl([{"instruction": "x" * 1000, "output": "y"}]) + jsonl(RECORDS),
    "a bad line": jsonl(RECORDS) + b"\xff\n{" + jsonl(RECORDS * 3),
    "compressed in two parts": gzip.compress(jsonl(RECORDS * 5)) + gzip.compress(jsonl(RECORDS)),
    "a bad first line like an array": b"[oops\n" + jsonl(RECORDS * 9),
    "an array": json.dumps(RECORDS * 9, indent=1).encode(),
}


@pytest.mark.parametrize("content", CHUNKED.values(), ids=CHUNKED)
def test_the_size_of_chunks_changes_no_row_and_no_line_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    expected = list(read_rows(path))
    assert len(expected) > 2
    monkeypatch.setattr(rows_module, "CHUNK_VALUES", 4)
    for size in (1, 7, 100):
        monkeypatch.setattr(rows_module, "CHUNK_BYTES", size)
        assert list(read_rows(path)) == expected


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_lines_are_read_without_holding_the_file(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    content = jsonl(RECORDS) * 300_000
    path = tmp_path / "rows"
    path.write_bytes(compress(content))
    tracemalloc.start()
    try:
        count = sum(chunk.data.count(b"\n") for chunk in read_chunks(path) if isinstance(chunk, Lines))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 600_000
    assert len(content) > 20 * CHUNK_BYTES
    assert peak < 8 * CHUNK_BYTES  # two chunks, what they are put together from, and gzip's buffers


def test_what_is_shown_is_printable_and_short() -> None:
    assert shown("a\x00\ud800\u202eb") == r"'a\x00\ud800\u202eb'"
    assert len(shown("x" * 10_000)) == 120


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """A hub cache that holds one small dataset, laid out as huggingface_hub does."""
    repository = tmp_path / "home" / "hub" / f"datasets--{HUB_NAME.replace('/', '--')}"
    for folder in ("refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "code_alpaca_20k.json").write_bytes(ARRAY)
    return tmp_path / "home"


def load_in_subprocess(home: Path, *arguments: str | None) -> "subprocess.CompletedProcess[str]":
    # The hub libraries read their environment when they are imported, hence another process.
    code = (
        "import json, sys\n"
        "from alignment_pipeline.errors import DataError\n"
        "from alignment_pipeline.hub_rows import read_hub_chunks\n"
        "try:\n"
        "    chunks, commit = read_hub_chunks(*json.loads(sys.argv[1]))\n"
        "    print(json.dumps([commit, [row for chunk in chunks for row in chunk.rows()]]))\n"
        "except DataError as error:\n"
        "    sys.exit(f'DataError: {error}')\n"
    )
    unset = {"HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=home,
    )  # fmt: skip


def test_a_hub_dataset_is_read_from_the_local_cache_without_a_network(hub_home: Path) -> None:
    for revision in (None, "main", COMMIT):
        done = load_in_subprocess(hub_home, HUB_NAME, revision, "train")
        assert done.returncode == 0, done.stderr
        commit, rows = json.loads(done.stdout)
        assert commit == COMMIT
        assert [row[:2] for row in rows] == [[1, RECORDS[0]], [2, RECORDS[1]]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sahil2801/absent", None, "train"),
        (HUB_NAME, "v2", "train"),
        (HUB_NAME, "f" * 40, "train"),
        (HUB_NAME, None, "no"),
    ],
)
def test_a_hub_dataset_that_cannot_be_loaded_says_what_to_do_without_a_network(
    hub_home: Path, arguments: tuple[str | None, ...]
) -> None:
    if arguments[1] is not None:  # a prepared copy of another revision must not stand in for the one asked for
        assert load_in_subprocess(hub_home, HUB_NAME, None, "train").returncode == 0
    done = load_in_subprocess(hub_home, *arguments)
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("DataError: ") :]
    assert str(arguments[0]) in message
    assert "--set data.path=FILE" in message
