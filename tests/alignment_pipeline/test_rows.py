from alignment_pipeline.rows import parse_jsonl, shown


def test_a_bad_line_is_a_bad_row_with_its_line_and_reading_goes_on() -> None:
    rows = parse_jsonl(b'{"a": 1}\n\n{"a": \n{"a": "\xff\xfe"}\n[[1]\n' + b"[" * 100_000 + b'\n{"a": 2}')
    assert [(row.source_line, row.problem) for row in rows] == [
        (1, None), (3, "invalid_json"), (4, "invalid_utf8"), (5, "invalid_json"), (6, "invalid_json"), (7, None),
    ]  # fmt: skip
    assert [row.value for row in rows if row.problem is None] == [{"a": 1}, {"a": 2}]
    assert "\\xff" in rows[2].detail
    assert all(len(row.detail) <= 200 for row in rows)


def test_what_is_shown_is_printable_and_short() -> None:
    assert shown("a\x00\ud800\u202eb") == r"'a\x00\ud800\u202eb'"
    assert len(shown("x" * 10_000)) == 120
