import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment_pipeline import row_files
from alignment_pipeline import rows as rows_module
from alignment_pipeline.errors import DataError
from alignment_pipeline.prompts import is_utf8_text
from alignment_pipeline.row_files import read_chunks, read_rows
from alignment_pipeline.rows import CHUNK_BYTES, Lines

RECORDS = [{"instruction": "Say ü.", "output": "ü"}, {"instruction": "Say \u2028.", "output": "two"}]


def jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(records: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), content)
    return content.getvalue()


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
        ("rows.csv", table(RECORDS)),
        ("ROWS.CSV", table(RECORDS).replace(b"\r\n", b"\n")),
        ("rows.csv", b"\xef\xbb\xbf\r\n" + table(RECORDS).rstrip()),
        ("rows.csv.gz", gzip.compress(table(RECORDS))),
        ("rows.parquet", parquet(RECORDS)),
        ("rows.csv", parquet(RECORDS)),
        ("rows.parquet.gz", gzip.compress(parquet(RECORDS))),
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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.csv", b"", "empty file"),
        ("rows.csv", b"\n\r\n", "empty file"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        ("rows.csv", b"a,,b\n1,2,3\n", r"a column without a name in line 1 .*'a', '', 'b'.*first line of a CSV file"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "a column name twice in line 1"),
        ("rows.csv", b'"a"b,c\n1,2\n', "',' expected after"),
        ("rows.csv.gz", gzip.compress(table(RECORDS * 50))[:-20], "truncated gzip"),
        ("rows.parquet", parquet(RECORDS)[:-9], "broken or truncated Parquet"),
        ("rows.parquet", b"PAR1", "broken or truncated Parquet"),
        ("rows.parquet", parquet(RECORDS).replace(b"two", b"t\xffo"), "not UTF-8|broken or truncated Parquet"),
        ("rows.parquet.gz", gzip.compress(parquet(RECORDS))[:-20], "truncated gzip"),
    ],
)
def test_a_table_that_cannot_be_read_as_a_whole_is_an_error_of_one_line(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_csv_record_has_the_line_that_it_begins_in_and_a_bad_one_does_not_end_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\r\n"two\r\nlines, ""so""",x\r\n\r\nonly one\r\n1,2,3\r\n"x"y,z\r\n007,\r\n\xff,ok\r\n')
    *rows, latin = read_rows(path)
    assert [(row.source_line, row.value or row.problem) for row in rows] == [
        (2, {"a": 'two\r\nlines, "so"', "b": "x"}), (5, "invalid_csv"), (6, "invalid_csv"), (7, "invalid_csv"),
        (8, {"a": "007", "b": ""}),
    ]  # fmt: skip
    assert rows[1].detail == "1 fields, 2 expected: ['only one']"
    assert latin.source_line == 9 and not is_utf8_text(latin.value["a"])


@pytest.mark.parametrize("most_chars", [1000, 1 << 24])
def test_a_quote_that_is_never_closed_is_an_error_that_names_its_line_and_loses_no_records_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_chars: int
) -> None:
    monkeypatch.setattr(row_files, "_MOST_FIELD_CHARS", most_chars)
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 10 + b'"two\nlines","never ""closed""\n' + b"1,2\n" * 2000)
    with pytest.raises(
        DataError, match=r'rows\.csv: found a quote \("\) that is opened in line 13 and .* Close'
    ) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)


def test_a_csv_line_with_a_field_beyond_the_limit_is_a_bad_row_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_MOST_FIELD_CHARS", 1000)
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a,b\n" + b"x" * 1001 + b",1\n1,2\n")
    first, second = read_rows(path)
    assert first.problem == "invalid_csv" and "field larger than field limit (1000)" in first.detail
    assert second.value == {"a": "1", "b": "2"}


def test_parquet_keeps_messages_nulls_and_numbers_and_counts_rows_from_one(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"m{n}"}], "n": n, "t": None if n % 2 else ""} for n in range(9)
    ]
    path = tmp_path / "rows"
    path.write_bytes(parquet(records))
    assert [(row.source_line, row.value) for row in read_rows(path)] == list(enumerate(records, start=1))


CHUNKED = {
    "csv": table(RECORDS * 9),
    "parquet": parquet(RECORDS * 9),
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
    path = tmp_path / ("rows.csv" if content == CHUNKED["csv"] else "rows")
    path.write_bytes(content)
    expected = list(read_rows(path))
    assert len(expected) > 2
    monkeypatch.setattr(rows_module, "CHUNK_VALUES", 4)
    for size in (1, 7, 100):
        monkeypatch.setattr(rows_module, "CHUNK_BYTES", size)
        assert list(read_rows(path)) == expected


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_csv_is_read_without_holding_the_file(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    content = table([{"a": "x" * 1000, "b": "y"}] * 30_000)
    path = tmp_path / "rows.csv"
    path.write_bytes(compress(content))
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 30_000
    assert peak < len(content) / 2  # two chunks of 4,096 rows


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
