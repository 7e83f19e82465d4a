import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from alignment_pipeline import sql_rows
from alignment_pipeline.errors import DataError
from alignment_pipeline.row_files import read_chunks
from alignment_pipeline.rows import Found, RawRow, parse_jsonl, value_chunks
from alignment_pipeline.sql_rows import query_chunks

TEXTS = ["2020-01-01", "007", "1e5", "true", "null", "", " x ", "a\r\nb", "ü\u2028\U0001f600", "nul \x00 nul",
         '{"a": 1}', "123e4567-e89b-12d3-a456-426614174000", "12:30:00", "NaN"]  # fmt: skip


def query(folder: Path, records: list[Any], sql: str, seed: int = 0) -> list[Any]:
    chunks = query_chunks(value_chunks(records), sql, seed, folder / "work")
    return [row.value for chunk in chunks for row in chunk.rows()]


def test_every_text_comes_out_as_it_went_in_though_it_looks_like_a_date_or_a_number(tmp_path: Path) -> None:
    records = [{"text": text} for text in TEXTS]
    assert query(tmp_path, records, "SELECT * FROM source") == records
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "other"])
    writer.writeheader()
    writer.writerows([{**record, "other": "x"} for record in records])
    path = tmp_path / "rows.csv"
    path.write_bytes(text.getvalue().encode())
    rows = [row for chunk in query_chunks(read_chunks(path), "FROM source", 0, tmp_path) for row in chunk.rows()]
    assert rows == [RawRow(n, {"text": text, "other": "x"}) for n, text in enumerate(TEXTS, start=1)]


def test_values_of_every_kind_and_of_mixed_kinds_come_out_as_they_went_in(tmp_path: Path) -> None:
    records = [
        {"n": 1, "f": 0.1, "b": True, "mixed": "3", "big": 2**70, "chat": [{"role": "user", "content": 'ü "q"'}]},
        {"n": -5, "f": 2, "b": None, "mixed": 3, "big": 1, "chat": [], "new": "x"},
        {"n": None, "f": 1e300, "b": False, "mixed": ["3"], "big": 2, "chat": None},
    ]
    columns = dict.fromkeys(name for record in records for name in record)
    filled = [columns | record for record in records]
    assert query(tmp_path, records, "SELECT * FROM source") == filled
    assert query(tmp_path, records, "SELECT n FROM source WHERE mixed = '\"3\"'") == [{"n": 1}]
    assert query(tmp_path, records, "SELECT (chat -> 0) ->> 'content' AS text FROM source WHERE n = 1") == [
        {"text": 'ü "q"'}
    ]


def test_rows_keep_the_sources_order_and_chance_follows_the_seed(tmp_path: Path) -> None:
    records = [{"n": n} for n in range(20_000)]
    odd = query(tmp_path, records, "SELECT n FROM source WHERE n % 2 = 1")
    assert odd == records[1::2]
    drawn = [
        query(tmp_path, records, f"SELECT n FROM source {how}", seed)
        for how in ("ORDER BY random() LIMIT 50", "USING SAMPLE 50 ROWS")
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] and drawn[3] == drawn[4]
    assert drawn[0] != drawn[2]


def test_records_that_cannot_stand_in_a_table_are_bad_rows_with_the_line_of_the_source(tmp_path: Path) -> None:
    chunk = Found(parse_jsonl(b'{"a": "1"}\noops\n[1]\n{"a": "\\ud800"}\n{"a": [NaN]}\n{"a": "2", "b": NaN}\n'))
    bad, good = query_chunks([chunk], "SELECT * FROM source", 0, tmp_path)
    assert [(row.source_line, row.problem) for row in bad.rows()] == [
        (2, "invalid_json"), (3, "wrong_type"), (4, "invalid_utf8"), (5, "wrong_type"),
    ]  # fmt: skip
    assert list(good.rows()) == [RawRow(1, {"a": "1", "b": None}), RawRow(2, {"a": "2", "b": None})]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELEC * FROM source", "Parser Error: syntax error at or near"),
        ("", "found no statement"),
        ("-- nothing", "found no statement"),
        ("SELECT 1; SELECT 2", "found SELECT and SELECT"),
        ("DROP TABLE source", "found DROP"),
        ("COPY source TO 'stolen.csv'", "found COPY"),
        ("SET threads = 4", "found SET"),
        ("INSTALL httpfs", "found LOAD"),
        ("ATTACH 'x.duckdb'", "found ATTACH"),
        ("SELECT nothing FROM source", r'"nothing" not found.*source has the columns text'),
        ("SELECT * FROM elsewhere", "elsewhere does not exist"),
        ("SELECT text::INT FROM source", "Conversion Error"),
        ("SELECT text, text FROM source", r"column text twice in the result.*EXCLUDE"),
        ("SELECT * FROM read_text('secret.txt')", "file system operations are disabled"),
        ("SELECT * FROM 'secret.txt'", "secret.txt does not exist"),
        ("SELECT * FROM read_json('secret.txt')", "file system operations are disabled"),
        ("SELECT * FROM read_parquet('https://localhost/x')", "disabled|extension"),
        ("SELECT * FROM variable", "variable does not exist"),  # DuckDB would find one of Python that holds a table
    ],
)
def test_what_is_not_one_select_over_the_source_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text('{"a": "secret"}')
    monkeypatch.setattr(sql_rows, "variable", pyarrow.table({"a": ["secret"]}), raising=False)
    with pytest.raises(DataError, match=expected) as caught:
        query(tmp_path, [{"text": "x"}], sql)
    message = str(caught.value)
    assert message.startswith("data.sql: ") and "expected one SELECT over the table source" in message
    assert "\n" not in message
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["secret.txt"]


def test_names_that_sql_cannot_tell_apart_and_a_source_without_records_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"columns Text and text, which SQL takes for one"):
        query(tmp_path, [{"Text": "a", "text": "b"}], "SELECT * FROM source")
    with pytest.raises(DataError, match=r"no record in the source"):
        query(tmp_path, [[1], 2], "SELECT * FROM source")


def test_names_of_columns_are_names_and_no_part_of_a_query(tmp_path: Path) -> None:
    record = {'it\'s "q"; DROP': "a", "ü": "b", "order": "c"}
    assert query(tmp_path, [record], "SELECT * FROM source") == [record]
    assert query(tmp_path, [record], 'SELECT "it\'s ""q""; DROP" AS x FROM source') == [{"x": "a"}]


def test_a_record_longer_than_duckdb_takes_by_itself_is_read(tmp_path: Path) -> None:
    records = [{"a": "x" * (40 << 20)}, {"a": "y"}]
    assert query(tmp_path, records, "SELECT length(a) AS n FROM source") == [{"n": 40 << 20}, {"n": 1}]


def test_nothing_stays_in_the_work_folder(tmp_path: Path) -> None:
    assert query(tmp_path, [{"a": json.dumps({"b": 1})}], "SELECT a ->> 'b' AS b FROM source") == [{"b": "1"}]
    assert list((tmp_path / "work").iterdir()) == []
