"""Making assets: reuse, reasons, sharing, two processes at once, and what is left after a failure."""

import errno
import gzip
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.errors import DataError, LeaseLostError, MissingArtifactError, StoreError
from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import Recipe, load_recipe
from alignment_pipeline.stage import StageResult, StageSpec
from resources import compute as compute_module
from resources.compute import Compute, Outcome, Request
from resources.home import REPOSITORY, prepare_home
from resources.tracking import Tracking

SMOKE = REPOSITORY / "recipes" / "smoke.yaml"
SMALL = ["data.world_rows=40", "data.validation_fraction=0.2", "data.test_fraction=0.2"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return prepare_home(tmp_path / "home")


@pytest.fixture
def engine(home: Path) -> Compute:
    return Compute(home, Tracking(home, mode="disabled"))


def request_for(engine: Compute, recipe: Recipe, asset: str = "instructions", run_id: str = "run") -> Request:
    engine.runs.start(run_id, recipe.name, "test", [asset])
    node = build_graph(recipe)[asset]
    return Request(run_id, recipe.name, node, node.config, recipe.seed, node.config.input_files())


def instructions(engine: Compute, *overrides: str, run_id: str = "run") -> Outcome:
    return engine.materialize(request_for(engine, load_recipe(SMOKE, [*SMALL, *overrides]), run_id=run_id))


def events(engine: Compute, run_id: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in engine.runs.events_path(run_id).read_text().splitlines()]


def test_what_exists_is_reused_and_a_change_is_named(engine: Compute) -> None:
    first = instructions(engine)
    assert (first.reused, first.reasons) == (False, ("first time",))
    again = instructions(engine)
    assert (again.reused, again.reasons, again.ref) == (True, (), first.ref)
    changed = instructions(engine, "data.max_chars=1500", "seed=3")
    assert (changed.reused, changed.reasons) == (False, ("data.max_chars 2000 → 1500", "seed 0 → 3"))
    back = instructions(engine)
    assert back.ref == first.ref and back.reused
    assert engine.runs.current("smoke")["instructions"] == first.ref


def test_the_events_tell_what_happened_and_nothing_is_left_in_work(engine: Compute, home: Path) -> None:
    outcome = instructions(engine)
    assert [event["event"] for event in events(engine)] == ["started", "computing", "finished"]
    instructions(engine)
    last = events(engine)[-1]
    assert (last["event"], last["reused"], last["metrics"]) == ("finished", True, dict(outcome.manifest["metrics"]))
    assert list((home / "work").iterdir()) == []
    assert (outcome.folder / "extras" / "progress.jsonl").read_text()


def test_another_recipe_shares_the_artifact(engine: Compute) -> None:
    first = instructions(engine)
    other = load_recipe(SMOKE, SMALL).model_copy(update={"name": "other"})
    shared = engine.materialize(request_for(engine, other, run_id="other-run"))
    assert shared.reused and shared.folder == first.folder
    assert engine.runs.current("other") == engine.runs.current("smoke")


def write_rows(path: Path, prefix: str = "row") -> Path:
    rows = [{"instruction": f"{prefix} {number}", "input": "", "output": f"answer {number}"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def from_file(engine: Compute, path: Path) -> Outcome:
    return instructions(engine, "data.world_rows=null", f"data.path={path}", "evaluation.judge=reference_chrf")


def test_an_input_file_counts_by_content_and_not_by_its_path(engine: Compute, tmp_path: Path) -> None:
    here, there = write_rows(tmp_path / "here.jsonl"), write_rows(tmp_path / "there.json")
    first = from_file(engine, here)
    moved = from_file(engine, there)
    assert moved.reused and moved.ref == first.ref
    write_rows(here, "line")
    changed = from_file(engine, here)
    assert not changed.reused and changed.ref.data_version != first.ref.data_version
    (reason,) = changed.reasons
    assert reason.startswith("data.path ") and first.manifest["inputs"]["source"]["sha256"][:8] in reason
    packed = tmp_path / "here.jsonl.gz"
    packed.write_bytes(gzip.compress(here.read_bytes()))
    repacked = from_file(engine, packed)
    assert not repacked.reused and repacked.ref.data_version == changed.ref.data_version


def test_a_missing_file_is_named_with_the_remedy_and_recorded(engine: Compute, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl does not exist.*--set data\.path=PATH"):
        from_file(engine, tmp_path / "nope.jsonl")
    assert events(engine)[-1]["event"] == "failed" and "nope.jsonl" in events(engine)[-1]["error"]


def test_a_stage_without_its_inputs_says_what_to_run(engine: Compute) -> None:
    request = request_for(engine, load_recipe(SMOKE), "formatted_dataset")
    with pytest.raises(
        MissingArtifactError, match=r"instructions, base_model of recipe smoke has not .*`align run smoke`"
    ):
        engine.materialize(request)


def test_an_input_that_was_damaged_is_refused_before_anything_is_computed(engine: Compute) -> None:
    made = instructions(engine)
    rows = made.folder / "rows.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b"function", b"Function"))
    with pytest.raises(StoreError, match=r"rows\.jsonl was changed"):
        engine.materialize(request_for(engine, load_recipe(SMOKE, SMALL), "base_model", "second"))
    assert list(engine.store.root.glob(".staging*")) == []


def slowly(function: Callable[..., StageResult], seconds: float) -> Callable[..., StageResult]:
    def stage(spec: StageSpec[Any], log: Any) -> StageResult:
        log.note(f"computing {time.monotonic_ns()}")
        (spec.work_dir.parent.parent / f"computed-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
        return function(spec, log)

    return stage


def run_slowly(home: Path, run_id: str) -> None:
    real = compute_module.stage_function
    compute_module.stage_function = lambda stage: slowly(real(stage), 0.7)
    instructions(Compute(home, Tracking(home, mode="disabled")), run_id=run_id)


def test_of_two_processes_that_want_the_same_one_computes_and_the_other_waits_and_reuses(
    engine: Compute, home: Path
) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=run_slowly, args=(home, run_id)) for run_id in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(home.glob("computed-*"))) == 1
    ends = {run_id: events(engine, run_id)[-1] for run_id in ("one", "two")}
    assert sorted(end["reused"] for end in ends.values()) == [False, True]
    (waiter,) = [run_id for run_id, end in ends.items() if end["reused"]]
    notes = [event["text"] for event in events(engine, waiter) if event["event"] == "note"]
    assert len(notes) == 1 and notes[0].startswith("Waiting for process")


def replace_stage(monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., Callable[..., StageResult]]) -> None:
    real = compute_module.stage_function
    monkeypatch.setattr(compute_module, "stage_function", lambda stage: wrap(real(stage)))


def test_a_late_orphan_publishes_nothing(engine: Compute, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(stage: Callable[..., StageResult]) -> Callable[..., StageResult]:
        def run(spec: StageSpec[Any], log: Any) -> StageResult:
            result = stage(spec, log)
            (record,) = (home / "leases").glob("*.json")
            record.write_text('{"token": 99, "pid": 1}')
            return result

        return run

    replace_stage(monkeypatch, overtaken)
    with pytest.raises(LeaseLostError):
        instructions(engine)
    assert list(engine.store.root.glob("[!.]*/*/*")) == list(engine.store.root.glob(".staging*")) == []
    assert "instructions" not in engine.runs.current("smoke")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_sentence_and_checkpoints_stay(
    engine: Compute, home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(stage: Callable[..., StageResult]) -> Callable[..., StageResult]:
        def run(spec: StageSpec[Any], log: Any) -> StageResult:
            (spec.work_dir / "checkpoint-1").mkdir()
            (spec.output_dir / "rows.jsonl").write_text("half")
            raise error

        return run

    replace_stage(monkeypatch, failing)
    with pytest.raises(StoreError, match="The disk is full"):
        instructions(engine)
    assert list(engine.store.root.glob("[!.]*/*/*")) == list(engine.store.root.glob(".staging*")) == []
    assert len(list((home / "work").glob("*/checkpoint-1"))) == 1


def test_a_defect_keeps_its_own_class(engine: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stage: Callable[..., StageResult]) -> Callable[..., StageResult]:
        def run(spec: StageSpec[Any], log: Any) -> StageResult:
            raise ZeroDivisionError("by\nzero")

        return run

    replace_stage(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        instructions(engine)
    assert events(engine)[-1] | {"time": 0} == {
        "event": "failed", "time": 0, "asset": "instructions", "error": "ZeroDivisionError: by",
    }  # fmt: skip


def test_an_unkeyed_setting_reuses(engine: Compute) -> None:
    """Seconds between checkpoints cannot change a result, and so they change no key."""
    nodes = [
        build_graph(load_recipe(SMOKE, overrides))["sft_model"]
        for overrides in ([], ["sft.checkpoint_every_s=1"], ["sft.learning_rate=1e-3"])
    ]
    same, unkeyed, keyed = (node.config.keyed_values() for node in nodes)
    assert same == unkeyed != keyed
    assert replace(nodes[0], config=nodes[1].config) == nodes[1]


def test_a_missing_file_of_labelled_text_is_named_by_its_own_key(engine: Compute, tmp_path: Path) -> None:
    missing = tmp_path / "labelled.jsonl"
    recipe = load_recipe(
        SMOKE, ["reward_model=null", f"reward_classifier={{label: POSITIVE, train_path: {missing}}}", *SMALL]
    )
    with pytest.raises(DataError, match=r"^reward_classifier\.train_path: .*labelled\.jsonl does not exist"):
        engine.materialize(request_for(engine, recipe, "reward_classifier"))
