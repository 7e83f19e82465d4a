import json
from pathlib import Path

import pytest

from alignment_pipeline.progress import ProgressLog, metric_series, read_progress


def test_steps_and_notes_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "work" / "progress.jsonl")
    log.note("Loading\nthe model ä.")
    log.step("train", 1, 2, {"train/loss": 3})
    log.step("train", 2, 2)
    lines = list(read_progress(log.path))
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == [
        {"kind": "note", "text": "Loading\nthe model ä."},
        {"kind": "step", "phase": "train", "step": 1, "total": 2, "metrics": {"train/loss": 3.0}},
        {"kind": "step", "phase": "train", "step": 2, "total": 2, "metrics": {}},
    ]
    assert lines[0]["time"] <= lines[1]["time"] <= lines[2]["time"]


def test_a_line_is_in_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    log.note("first")
    assert len(log.path.read_text().splitlines()) == 1


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    log.step("train", 1, 2, {"train/loss": 3.0})
    with log.path.open("a") as file:
        file.write('{"kind": "step", "pha')
    assert [line["step"] for line in read_progress(log.path)] == [1]


def test_a_resumed_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    ProgressLog(path).step("train", 1, 3, {"train/loss": 3.0})
    with path.open("a") as file:
        file.write('{"kind": "step", "pha')
    ProgressLog(path).step("train", 2, 3, {"train/loss": 2.0})
    assert [line["step"] for line in read_progress(path)] == [1, 2]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_log_that_is_torn_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"kind": "no')
    ProgressLog(path).note("again")
    assert [line["text"] for line in read_progress(path)] == ["again"]


def test_the_last_line_of_a_step_counts_and_series_are_in_step_order(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    log.step("train", 1, 3, {"train/loss": 3.0})
    log.step("train", 2, 3, {"train/loss": 2.0, "train/tokens": 5})
    log.note("Resuming.")
    log.step("train", 2, 3, {"train/loss": 1.5})
    log.step("pretrain", 10, 10, {"train/loss": 9.0})
    log.step("train", 3, 3)
    series = metric_series(log.path)
    assert series == {
        ("pretrain", 10): {"train/loss": 9.0},
        ("train", 1): {"train/loss": 3.0},
        ("train", 2): {"train/loss": 1.5},
    }
    assert list(series) == [("pretrain", 10), ("train", 1), ("train", 2)]


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    with pytest.raises(ValueError, match="could not convert"):
        log.step("train", 1, 1, {"train/loss": "high"})  # type: ignore[dict-item]  # that is what is tested
    assert list(read_progress(log.path)) == []
