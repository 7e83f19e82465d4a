import json
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.configs import FeedbackConfig
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.preferences import read_pairs
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import format_prompt, prompt_id
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.human_preferences import collect_human_preferences

EOS = "</s>"
TRAIN, VALIDATION, TEST = ("Add.", "1 2"), ("Sort it.", ""), ("Reverse it.", "abc")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for split, (instruction, input) in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        row = {"id": "0", "prompt_id": prompt_id(instruction, input), "instruction": instruction, "input": input,
               "prompt": format_prompt(instruction, input), "completion": "out" + EOS, "reference": "out"}  # fmt: skip
        write_jsonl(tmp_path / "dataset" / f"{split}.jsonl", [row])
    return tmp_path / "dataset"


def collect(dataset: Path, lines: list[bytes] | None) -> tuple[StageResult, Path]:
    folder = dataset.parent
    inputs = {"dataset": dataset}
    if lines is not None:
        inputs["journal"] = folder / "journal.jsonl"
        inputs["journal"].write_bytes(b"".join(line + b"\n" for line in lines))
    output_dir = folder / "output"
    output_dir.mkdir()
    spec = StageSpec(FeedbackConfig(max_chars=200), inputs, output_dir, folder / "work", seed=0)
    return collect_human_preferences(spec, ProgressLog(folder / "progress.jsonl")), output_dir


def vote(**changes: Any) -> bytes:
    fields = {"instruction": TRAIN[0], "input": TRAIN[1], "chosen": "good", "rejected": "bad", **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def test_votes_become_pairs_in_the_template_whichever_way_the_prompt_is_given(dataset: Path) -> None:
    lines = [
        vote(labeller="ada"),
        vote(instruction=..., input=..., prompt=format_prompt(*TRAIN), chosen="better"),
        vote(instruction="New.", input=..., labeller=None),
        vote(instruction=..., input=..., prompt="New.", chosen="better", labeller=" "),
        vote(instruction=..., input=..., prompt=format_prompt("Newer.", "x")),
    ]
    result, output = collect(dataset, lines)
    pairs = read_pairs(output / "pairs.jsonl")
    new, newer = format_prompt("New.", ""), format_prompt("Newer.", "x")
    assert [(pair["prompt"], pair["chosen"], pair["labeller"]) for pair in pairs] == [
        (format_prompt(*TRAIN), "good", "ada"),
        (format_prompt(*TRAIN), "better", "human"),
        (new, "good", "human"),
        (new, "better", "human"),
        (newer, "good", "human"),
    ]
    assert [pair["prompt_id"] for pair in pairs] == [
        prompt_id(*TRAIN), prompt_id(*TRAIN), prompt_id("New.", ""), prompt_id("New.", ""), prompt_id(newer, ""),
    ]  # fmt: skip
    assert all(pair["source"] == "human" and pair["chosen_score"] is None for pair in pairs)
    assert result.metrics == {"feedback/rows_in": 5, "feedback/kept": 5, "feedback/quarantined": 0}
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["opposed"], summary["by_labeller"]) == (0, {"ada": 1, "human": 4})


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("invalid_json", b'{"instruction": '),
        ("invalid_utf8", b'{"instruction": "\xff"}'),
        ("invalid_utf8", json.dumps({"undecodable": repr(b"\xff")}).encode()),
        ("invalid_utf8", vote(chosen="\ud800")),
        ("missing_key", vote(instruction=...)),
        ("missing_key", vote(chosen=...)),
        ("missing_key", vote(rejected=...)),
        ("wrong_type", b"[]"),
        ("wrong_type", vote(chosen=1)),
        ("wrong_type", vote(input=["x"])),
        ("wrong_type", vote(labeller=7)),
        ("wrong_type", vote(prompt={"text": "x"})),
        ("empty", vote(chosen=" \n")),
        ("empty", vote(instruction="")),
        ("identical", vote(chosen="bad")),
        ("over_long", vote(rejected="x" * 201)),
        ("over_long", vote(instruction="x" * 201)),
        ("control_characters", vote(chosen="a\x00")),
        ("control_characters", vote(labeller="\x1b[2J")),
        ("contains_eos", vote(chosen="good" + EOS)),
        ("duplicate", vote(instruction="First.", input="", labeller="bob")),
        ("held_out_prompt", vote(instruction=VALIDATION[0], input=VALIDATION[1])),
        ("held_out_prompt", vote(instruction=TEST[0], input=TEST[1])),
        ("held_out_prompt", vote(prompt=format_prompt(*TEST))),
        ("held_out_prompt", vote(prompt=format_prompt(*TEST).rstrip())),
        ("held_out_prompt", vote(prompt="sort  IT.")),
        ("held_out_prompt", vote(prompt="Reverse it.\nabc")),
        ("held_out_prompt", vote(instruction="Reverse it.\nabc", input="")),
    ],
)
def test_each_kind_of_bad_vote_goes_to_quarantine_and_the_others_count(dataset: Path, reason: str, line: bytes) -> None:
    first, last = vote(instruction="First.", input=""), vote(instruction="Last.", input="")
    result, output = collect(dataset, [first, line, last])
    (quarantined,) = read_jsonl(output / "quarantine.jsonl")
    assert (quarantined["reason"], quarantined["source_line"]) == (reason, 2)
    assert quarantined["detail"].isprintable() and len(quarantined["detail"]) <= 200
    assert len(read_pairs(output / "pairs.jsonl")) == 2
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows_in"], summary["kept"], summary["by_reason"]) == (3, 2, {reason: 1})
    assert all(check.passed for check in result.checks)


def test_opposite_votes_are_both_kept_and_counted(dataset: Path) -> None:
    _, output = collect(dataset, [vote(labeller="ada"), vote(chosen="bad", rejected="good", labeller="bob")])
    assert [pair["labeller"] for pair in read_pairs(output / "pairs.jsonl")] == ["ada", "bob"]
    assert json.loads((output / "summary.json").read_text())["opposed"] == 2


def test_a_training_prompt_is_welcome_even_if_it_reads_like_a_held_out_prompt_and_its_input(dataset: Path) -> None:
    text = f"{TEST[0]}\n{TEST[1]}"
    (row,) = read_jsonl(dataset / "train.jsonl")
    write_jsonl(dataset / "train.jsonl", [row, {**row, "prompt": format_prompt(text, "")}])
    _, output = collect(dataset, [vote(instruction=text, input="")])
    assert len(read_pairs(output / "pairs.jsonl")) == 1


@pytest.mark.parametrize("lines", [None, [], [b"", b" "]])
def test_no_journal_and_an_empty_journal_mean_no_votes_yet(dataset: Path, lines: list[bytes] | None) -> None:
    result, output = collect(dataset, lines)
    assert read_pairs(output / "pairs.jsonl") == []
    assert result.metrics == {"feedback/rows_in": 0, "feedback/kept": 0, "feedback/quarantined": 0}
    assert all(check.passed for check in result.checks)


def test_a_first_vote_that_is_a_list_does_not_hide_the_others(dataset: Path) -> None:
    _, output = collect(dataset, [b"[", vote()])
    assert len(read_pairs(output / "pairs.jsonl")) == 1
