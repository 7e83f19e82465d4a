from pathlib import Path

from alignment_pipeline.graph import build_graph
from alignment_pipeline.progress import ProgressLog
from app.recipes import find_recipe
from assets.presentation import asset_metadata, made_from, markdown_table, sparklines
from resources.artifact_store import ArtifactStore, short_id
from resources.compute import Outcome
from resources.runs import RunRecords


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


def test_parents_are_links_to_their_pages_with_what_was_read_of_them(smoke_home: Path) -> None:
    current = RunRecords(smoke_home).current("smoke")
    manifest = ArtifactStore(smoke_home).manifest(current["dpo_policy"])
    table = made_from(manifest["inputs"], "smoke", build_graph(find_recipe("smoke"))["dpo_policy"])
    head, _, *rows = table.splitlines()
    assert head == "| input | made from | data version | artifact id |"
    assert {row.split(" | ")[1] for row in rows} == {
        f"[smoke/{parent}](/assets/smoke/{parent})"
        for parent in ("preference_pairs", "reference_logprobs", "sft_model")
    }
    trunk = current["sft_model"]
    ids = f"{trunk.data_version[:8]} | {short_id(trunk.artifact_id)}"
    assert f"| trunk | [smoke/sft_model](/assets/smoke/sft_model) | {ids} |" in rows


def test_every_table_of_parents_is_short_enough_for_the_page(smoke_home: Path) -> None:
    store, nodes = ArtifactStore(smoke_home), build_graph(find_recipe("smoke"))
    for asset, ref in RunRecords(smoke_home).current("smoke").items():
        longest = made_from(store.manifest(ref)["inputs"], "a_recipe_with_a_long_name", nodes[asset])
        assert len(longest) < 1000, asset


def test_a_file_is_named_with_what_it_held(smoke_home: Path) -> None:
    store, ref = ArtifactStore(smoke_home), RunRecords(smoke_home).current("smoke")["human_preferences"]
    table = made_from(store.manifest(ref)["inputs"], "smoke", build_graph(find_recipe("smoke"))["human_preferences"])
    assert "| journal | journal.jsonl | e3b0c442 | (a file) |" in table.splitlines()


def test_an_artifact_is_named_in_full(smoke_home: Path) -> None:
    store, node = ArtifactStore(smoke_home), build_graph(find_recipe("smoke"))["instructions"]
    ref = RunRecords(smoke_home).current("smoke")["instructions"]
    outcome = Outcome(ref, store.path(ref), store.manifest(ref), False, ("data.max_chars 1 → 2",))
    shown = {name: value.value for name, value in asset_metadata(outcome, "smoke", node, (), None).items()}
    assert (shown["artifact id"], shown["data_version"], shown["key"]) == (ref.artifact_id, ref.data_version, ref.key)
    assert shown["computed because"] == "data.max_chars 1 → 2" and "made from" not in shown
