from pathlib import Path

from alignment_pipeline.progress import ProgressLog
from assets.presentation import markdown_table, sparklines


def cells(table: str, row: int = 0) -> list[str]:
    return table.splitlines()[2 + row].removeprefix("| ").removesuffix(" |").split(" | ")


def test_rows_become_a_table_with_a_head() -> None:
    assert markdown_table([{"prompt": "p", "score": 0.123456, "ended": True, "none": None}]) == (
        "| prompt | score | ended | none |\n|---|---|---|---|\n| p | 0.1235 | true |  |"
    )


def test_what_would_break_the_table_or_the_page_is_escaped() -> None:
    table = markdown_table([{"a": "x | y", "b": "one\r\ntwo\n", "c": "<script>alert(1)</script> & `code`"}])
    assert len(table.splitlines()) == 3
    assert cells(table) == [
        "x &#124; y",
        "one<br>two<br>",
        "&lt;script>alert(1)&lt;/script> &amp; &#96;code&#96;",
    ]


def test_a_long_cell_is_cut_before_it_is_escaped() -> None:
    (cell,) = cells(markdown_table([{"a": "<" * 500}]))
    assert cell == "&lt;" * 159 + "…"
    (whole,) = cells(markdown_table([{"a": "x" * 160}]))
    assert whole == "x" * 160


def test_nested_values_are_json_with_their_characters() -> None:
    assert cells(markdown_table([{"a": {"k": ["é", 1]}}])) == ['{"k": ["é", 1]}']


def test_a_row_with_other_keys_keeps_the_columns_of_the_first() -> None:
    table = markdown_table([{"a": 1, "b": 2}, {"b": 3, "c": 4}])
    assert cells(table, 1) == ["", "3"]


def test_no_rows_are_said() -> None:
    assert markdown_table([]) == "(no rows)"


def test_curves_are_lines_of_blocks_from_the_lowest_to_the_highest_value(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    for step in range(1, 101):
        log.step("train", step, 100, {"train/loss": 100.0 - step, "train/tokens": step})
    log.close()
    shown = sparklines(log.path)
    row = next(line for line in shown.splitlines() if "train/loss" in line)
    assert row.startswith("| train/loss | █") and "▁ | 99 | 0 |" in row
    assert "train/tokens" not in shown
    assert len(shown) < 1000


def test_a_stage_without_a_curve_shows_none(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    log.step("train", 1, 1, {"train/loss": 1.0})
    log.close()
    assert sparklines(log.path) == ""
    assert sparklines(tmp_path / "absent.jsonl") == ""
