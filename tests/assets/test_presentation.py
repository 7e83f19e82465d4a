from assets.presentation import markdown_table


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
