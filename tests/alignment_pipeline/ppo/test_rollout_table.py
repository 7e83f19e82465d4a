"""The table of rollouts: cut to what a checkpoint knows of, whatever a killed process left, and sampled from."""

import itertools
import json
from pathlib import Path

import pytest

from alignment_pipeline.errors import StoreError
from alignment_pipeline.ppo.rollout_table import RolloutTable, tabled_updates


def lines(updates: int, rows: int) -> list[str]:
    return [
        json.dumps({"update": update, "row": row}) + "\n" for update in range(1, updates + 1) for row in range(rows)
    ]


@pytest.mark.parametrize("torn", ["", '{"update": 4, "ro'], ids=["whole", "torn"])
def test_rows_after_a_checkpoint_are_cut_off(tmp_path: Path, torn: str) -> None:
    table = RolloutTable(tmp_path / "work", 5)
    table.cut(0)
    assert table.path.read_text() == ""
    table.path.write_text("".join(lines(3, 5)) + torn)
    table.cut(2)
    assert table.path.read_text() == "".join(lines(2, 5))
    table.cut(2)
    assert table.path.read_text() == "".join(lines(2, 5))
    table.cut(0)
    assert table.path.read_text() == ""


def test_a_table_that_lacks_rows_of_the_checkpoint_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    table = RolloutTable(tmp_path, 5)
    table.path.write_text("".join(lines(2, 5))[:-1])  # the last row has lost its end
    with pytest.raises(StoreError, match=r"rollouts\.jsonl: found 9 rows, expected 5 of each of the 2 updates done\. "):
        table.cut(2)


def test_samples_are_the_first_rows_of_updates_over_the_whole_training(tmp_path: Path) -> None:
    table = RolloutTable(tmp_path, 6)
    table.path.write_text("".join(lines(19, 6)))
    samples = list(table.samples(19))
    assert [row["update"] for row in samples[::4]] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert [row["row"] for row in samples] == [0, 1, 2, 3] * 10


def test_a_rollout_that_is_smaller_than_a_table_is_taken_whole(tmp_path: Path) -> None:
    table = RolloutTable(tmp_path, 2)
    table.path.write_text("".join(lines(2, 2)))
    assert [(row["update"], row["row"]) for row in table.samples(2)] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("updates", [1, 2, 9, 10, 11, 1000])
def test_updates_with_a_table_are_spread_from_the_first_to_the_last(updates: int) -> None:
    tabled = sorted(tabled_updates(updates))
    assert (tabled[0], tabled[-1]) == (0, updates - 1)
    assert len(tabled) == min(10, updates)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tabled)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
