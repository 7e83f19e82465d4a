from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.preferences import make_pair, pair_id, read_pairs

PAIR = make_pair(prompt_id="0", prompt="p", chosen="good", rejected="bad", source="sampled", labeller="gold_rule",
                 chosen_score=1.0, rejected_score=0.0)  # fmt: skip


def test_opposite_votes_and_other_prompts_are_other_pairs() -> None:
    identities = {pair_id("p", "a", "b"), pair_id("p", "b", "a"), pair_id("q", "a", "b"), pair_id("pa", "", "b")}
    assert len(identities) == 4
    assert all(len(identity) == 16 for identity in identities)


def test_pairs_come_back_as_they_were_written(tmp_path: Path) -> None:
    human = make_pair(prompt_id="0", prompt="p", chosen="a", rejected="b", source="human", labeller="ada")
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR, human])
    assert read_pairs(tmp_path / "pairs.jsonl") == [PAIR, human]
    assert human["chosen_score"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 1},
        {"source": "robot"},
        {"chosen": "other"},
        {"chosen_score": "1"},
        {"labeller": None},
        {"id": "0" * 16},
    ],
)
def test_a_line_that_breaks_the_contract_is_an_error_with_its_line(tmp_path: Path, change: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, **change}])
    with pytest.raises(DataError, match="line 2: found keys"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_a_missing_file_of_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "pairs.jsonl")
