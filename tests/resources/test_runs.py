"""Run records: what is kept, what a stage reads, and eight processes at once."""

import json
import multiprocessing
from pathlib import Path

import pytest

from alignment_pipeline.errors import MissingArtifactError, StoreError
from resources.artifact_store import ArtifactRef
from resources.runs import FAILED, INTERRUPTED, RunRecords

ROWS = ArtifactRef("instructions", "a" * 64, "1" * 64)
OTHER_ROWS = ArtifactRef("instructions", "b" * 64, "2" * 64)
MODEL = ArtifactRef("base_model", "c" * 64, "3" * 64)


@pytest.fixture
def runs(tmp_path: Path) -> RunRecords:
    return RunRecords(tmp_path)


def test_a_run_succeeds_with_its_last_planned_asset(runs: RunRecords) -> None:
    runs.start("r1", "smoke", "align", ["instructions", "base_model"], ["sft.epochs=2"])
    runs.record_asset("r1", "smoke", "instructions", ROWS, reused=True)
    record = runs.read("r1")
    assert (record["status"], record["finished_at"]) == ("running", None)
    assert record["overrides"] == ["sft.epochs=2"] and record["started_by"] == "align"
    runs.record_asset("r1", "smoke", "base_model", MODEL, reused=False)
    record = runs.read("r1")
    assert record["status"] == "success" and record["finished_at"] >= record["started_at"]
    assert record["assets"]["instructions"] == {**ROWS.as_dict(), "reused": True}
    assert runs.of_run("r1") == {"instructions": ROWS, "base_model": MODEL}


@pytest.mark.parametrize("status", [FAILED, INTERRUPTED])
def test_a_run_that_ends_early_says_so_and_keeps_what_it_made(runs: RunRecords, status: str) -> None:
    runs.start("r1", "smoke", "align", ["instructions", "base_model"])
    runs.record_asset("r1", "smoke", "instructions", ROWS, reused=False)
    runs.finish("r1", status)
    assert runs.read("r1")["status"] == status
    assert runs.of_run("r1") == {"instructions": ROWS}


def test_starting_twice_changes_nothing(runs: RunRecords) -> None:
    runs.start("r1", "smoke", "align", ["instructions"], ["seed=1"])
    before = runs.read("r1")
    runs.start("r1", "smoke", "dagster", ["base_model"])
    assert runs.read("r1") == before


def test_a_stage_reads_what_its_own_run_made_before_what_is_current(runs: RunRecords) -> None:
    for run_id, rows in (("mine", ROWS), ("later", OTHER_ROWS)):
        runs.start(run_id, "smoke", "align", ["instructions"])
        runs.record_asset(run_id, "smoke", "instructions", rows, reused=False)
    runs.start("new", "smoke", "align", ["base_model"])
    assert runs.resolve("mine", "smoke", ["instructions"]) == {"instructions": ROWS}
    assert runs.resolve("new", "smoke", ["instructions"]) == {"instructions": OTHER_ROWS}
    assert runs.current("other") == {}, "recipes do not read each other's current artifacts"


def test_an_asset_that_was_never_made_is_named_with_the_command_that_makes_it(runs: RunRecords) -> None:
    runs.start("r1", "smoke", "align", ["sft_model"])
    with pytest.raises(
        MissingArtifactError, match=r"base_model of recipe smoke has not .* `align run smoke --select base_model …`"
    ):
        runs.resolve("r1", "smoke", ["base_model"])


def test_an_unknown_run_is_an_error_with_its_id(runs: RunRecords) -> None:
    with pytest.raises(StoreError, match="There is no run 'nope'"):
        runs.read("nope")


def test_all_runs_come_oldest_first(runs: RunRecords, tmp_path: Path) -> None:
    for run_id in ("b", "a"):
        runs.start(run_id, "smoke", "align", [])
        record = runs.read(run_id) | {"started_at": f"2026-01-0{'ba'.index(run_id) + 1}"}
        (tmp_path / "runs" / f"{run_id}.json").write_text(json.dumps(record))
    assert [record["run_id"] for record in runs.all()] == ["b", "a"]


def record_many(home: Path, process: int) -> None:
    runs = RunRecords(home)
    runs.start("shared", "smoke", f"process {process}", ["never"])
    for number in range(5):
        name = f"asset{process}_{number}"
        runs.event("shared", "started", asset=name, padding="x" * 3000)
        runs.record_asset("shared", "smoke", name, ROWS, reused=False)


def test_eight_processes_lose_nothing(runs: RunRecords, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record_many, args=(tmp_path, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    expected = {f"asset{process}_{number}" for process in range(8) for number in range(5)}
    assert runs.of_run("shared").keys() == runs.current("smoke").keys() == expected
    events = [json.loads(line) for line in runs.events_path("shared").read_text().splitlines()]
    assert {event["asset"] for event in events} == expected


def test_what_failed_a_blocking_check_is_in_the_run_but_not_current(tmp_path: Path) -> None:
    runs = RunRecords(tmp_path)
    runs.start("r1", "smoke", "align", ["instructions"])
    runs.record_asset("r1", "smoke", "instructions", ROWS, reused=False)
    runs.start("r2", "smoke", "align", ["instructions"])
    runs.record_asset("r2", "smoke", "instructions", MODEL, reused=False, usable=False)
    assert runs.of_run("r2")["instructions"] == MODEL
    assert runs.current("smoke")["instructions"] == ROWS
