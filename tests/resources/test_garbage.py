"""What is garbage, its deletion, and both beside processes that use the store."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import load_recipe
from alignment_pipeline.stage import StageResult, StageSpec
from resources import compute as compute_module
from resources import leases
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.compute import Compute, Outcome, Request
from resources.garbage import DELETED, IN_USE, NEEDED_AGAIN, Garbage, GarbageCollector
from resources.home import REPOSITORY, prepare_home
from resources.pins import Pins
from resources.releases import Release, Releases
from resources.runs import INTERRUPTED, RunRecords
from resources.tracking import Tracking

fork = multiprocessing.get_context("fork")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return prepare_home(tmp_path / "home")


@pytest.fixture
def store(home: Path) -> ArtifactStore:
    return ArtifactStore(home)


@pytest.fixture
def runs(home: Path) -> RunRecords:
    return RunRecords(home)


def publish(store: ArtifactStore, stage: str, letter: str, **inputs: ArtifactRef) -> ArtifactRef:
    """A model of one tensor with a table beside it."""
    staging = store.new_staging()
    (staging / "model").mkdir()
    save_file({"weight": np.full(8, ord(letter), dtype=np.float32)}, staging / "model" / "model.safetensors")
    (staging / "rows.jsonl").write_text('{"n":1}\n')
    manifest = {"inputs": {name: ref.as_dict() for name, ref in inputs.items()}, "metrics": {}, "checks": []}
    return store.publish(staging, stage, letter * 64, manifest | {"created_at": "2026-01-01T00:00:00+00:00"})


def record(runs: RunRecords, run_id: str, recipe: str, *, goes_on: bool = False, **assets: ArtifactRef) -> None:
    """A run that made the assets, in that order of time in which it is called."""
    runs.start(run_id, recipe, "test", [*assets, *(["more"] if goes_on else [])])
    for asset, ref in assets.items():
        runs.record_asset(run_id, recipe, asset, ref, reused=False)


def models(found: list[Garbage]) -> list[str]:
    return [garbage.path.removeprefix("artifacts/") for garbage in found if garbage.kind == "model"]


def test_a_current_policy_keeps_its_trunk_and_what_nothing_names_is_found_with_its_story(
    home: Path, store: ArtifactStore, runs: RunRecords
) -> None:
    trunk = publish(store, "sft_model", "a")
    old, new = (publish(store, "dpo_policy", letter, trunk=trunk) for letter in "bc")
    record(runs, "first", "smoke", dpo_policy=old)
    record(runs, "second", "smoke", dpo_policy=new)
    (found,) = GarbageCollector(home).find()
    assert found.path == f"artifacts/{old.artifact_id}"
    assert found.size == (store.path(old) / "model" / "model.safetensors").stat().st_size
    assert found.assets == ("smoke/dpo_policy",)
    assert found.last_used == runs.read("first")["finished_at"]
    assert found.reason == "in no pinned run, release or current asset"


def test_a_pinned_run_and_a_release_keep_what_they_name(home: Path, store: ArtifactStore, runs: RunRecords) -> None:
    trunk = publish(store, "sft_model", "a")
    pinned, released, stray = (publish(store, "dpo_policy", letter, trunk=trunk) for letter in "bcd")
    for run_id, ref in (("one", pinned), ("two", released), ("three", stray)):
        record(runs, run_id, "smoke", dpo_policy=ref)
    runs.start("last", "smoke", "test", ["dpo_policy"])
    runs.record_asset("last", "smoke", "dpo_policy", publish(store, "dpo_policy", "e"), reused=False)
    collector = GarbageCollector(home)
    assert len(models(collector.find())) == 4  # the trunk too: the current policy has none
    Pins(home).pin("one")
    assert sorted(models(collector.find())) == [released.artifact_id, stray.artifact_id]
    Releases(home).write(
        Release("r1", "smoke", "dpo_policy", **released.as_dict(), released_at="2026", released_by="me", note="")
    )
    assert models(collector.find()) == [stray.artifact_id]
    Pins(home).unpin("on")
    assert models(collector.find()) == [pinned.artifact_id, stray.artifact_id]


def test_only_model_files_go_and_the_mark_names_them(home: Path, store: ArtifactStore) -> None:
    ref = publish(store, "dpo_policy", "a")
    before = {path.relative_to(home) for path in store.path(ref).rglob("*") if path.is_file()}
    (deleted,) = GarbageCollector(home).collect()
    assert deleted.state == DELETED
    folder = store.path(ref)
    after = {path.relative_to(home) for path in folder.rglob("*") if path.is_file()}
    mark = (folder / "collected.json").relative_to(home)
    assert after - before == {mark}
    assert before - after == {(folder / "model" / "model.safetensors").relative_to(home)}
    noted = json.loads((home / mark).read_text())
    assert noted["files"] == [{"path": "model/model.safetensors", "size": deleted.size}]
    assert store.find("dpo_policy", ref.key) is None
    with pytest.raises(StoreError, match=r"was deleted by `align gc` on 20.*Run again: it is computed anew"):
        store.verify(ref)
    assert GarbageCollector(home).collect() == []


def test_a_deletion_that_was_cut_short_is_finished_and_keeps_its_date(home: Path, store: ArtifactStore) -> None:
    ref = publish(store, "dpo_policy", "a")
    store.mark_collected(ref)
    mark = (store.path(ref) / "collected.json").read_bytes()
    assert store.find("dpo_policy", ref.key) is None, "what is marked may lose its bytes at any time"
    assert models(GarbageCollector(home).collect()) == [ref.artifact_id]
    assert store.model_files(ref) == []
    assert (store.path(ref) / "collected.json").read_bytes() == mark


def hold(home: Path, name: str, until: Path) -> None:
    with leases.hold(home, name):
        wait_for(until.exists)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_what_another_process_holds_is_left_alone_and_said(home: Path, store: ArtifactStore, tmp_path: Path) -> None:
    held, free = (publish(store, "dpo_policy", letter) for letter in "ab")
    holder = fork.Process(target=hold, args=(home, held.lease, tmp_path / "stop"))
    holder.start()
    wait_for(lambda: held.lease in leases.held(home))
    states = {garbage.path: garbage.state for garbage in GarbageCollector(home).collect()}
    (tmp_path / "stop").touch()
    holder.join()
    assert states == {f"artifacts/{held.artifact_id}": IN_USE, f"artifacts/{free.artifact_id}": DELETED}
    assert store.is_whole(held) and leases.held(home) == set()


def test_a_run_that_goes_on_keeps_what_it_made_and_what_it_reads(
    home: Path, store: ArtifactStore, runs: RunRecords
) -> None:
    made, read, current = (publish(store, "sft_model", letter) for letter in "abc")
    record(runs, "mine", "smoke", goes_on=True, sft_model=made)
    runs.event("mine", "computing", asset="dpo_policy", log=str(home / "work" / ("d" * 20) / "progress.jsonl"),
               inputs=[read.as_dict()])  # fmt: skip
    record(runs, "later", "smoke", sft_model=current)
    collector = GarbageCollector(home)
    assert collector.find() == []
    long_ago = time.time() - 7200
    os.utime(runs.events_path("mine"), (long_ago, long_ago))
    assert models(collector.find()) == [made.artifact_id, read.artifact_id], "it was killed: nothing for two hours"
    with leases.hold(home, f"dpo_policy-{'d' * 20}"):
        assert collector.find() == [], "a lease that is held tells that it goes on"
        runs.finish("mine", "failed")
        assert collector.find() == [], "another step of a failed run may go on"
    assert len(collector.find()) == 2


def work_folder(home: Path, name: str) -> Path:
    folder = home / "work" / name
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "state.bin").write_bytes(b"x" * 1000)
    return folder


def interrupted(runs: RunRecords, home: Path, run_id: str, letter: str) -> Path:
    folder = work_folder(home, letter * 20)
    runs.start(run_id, "smoke", "align", ["sft_model"])
    runs.event(run_id, "computing", asset="sft_model", log=str(folder / "progress.jsonl"))
    runs.finish(run_id, INTERRUPTED)
    return folder


def test_a_checkpoint_is_kept_for_the_latest_and_the_pinned_run_only(
    home: Path, store: ArtifactStore, runs: RunRecords
) -> None:
    superseded, pinned, latest = (interrupted(runs, home, letter, letter) for letter in "abc")
    published = publish(store, "sft_model", "d")
    leftover = work_folder(home, "d" * 20)
    record(runs, "other", "other", sft_model=published)
    not_ours = home / "work" / "notes"
    not_ours.mkdir()
    Pins(home).pin("b")
    found = {garbage.path: garbage for garbage in GarbageCollector(home).collect()}
    assert found.keys() == {f"work/{'a' * 20}", f"work/{'d' * 20}"}
    first, second = found.values()
    assert (first.size, first.assets, first.reason) == (1000, ("smoke/sft_model",), "no pinned or latest run needs it")
    assert second.reason == "its result is published"
    assert not superseded.exists() and not leftover.exists()
    assert pinned.exists() and latest.exists() and not_ours.exists()


def test_a_work_folder_stays_while_its_key_is_computed(home: Path) -> None:
    folder = work_folder(home, "a" * 20)
    with leases.hold(home, f"sft_model-{'a' * 20}"):
        assert GarbageCollector(home).collect() == []
    assert [garbage.path for garbage in GarbageCollector(home).collect()] == [f"work/{'a' * 20}"]
    assert not folder.exists()


def test_staging_folders_of_dead_processes_are_garbage(home: Path, store: ArtifactStore) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        folder = store.root / f".staging-{pid}-aaaaaaaa"
        folder.mkdir()
        (folder / "half").write_bytes(b"x" * 10)
    (found,) = GarbageCollector(home).collect()
    assert (found.kind, found.size, found.state) == ("staging", 10, DELETED)
    assert [path.name for path in store.root.glob(".staging*")] == [f".staging-{os.getpid()}-aaaaaaaa"]


def test_what_nobody_can_read_stops_the_collection_before_it_deletes(
    home: Path, store: ArtifactStore, runs: RunRecords
) -> None:
    ref = publish(store, "dpo_policy", "a")
    for name, content, message in (
        ("releases/r1.json", '{"release_id": "r1"}', "r1.json is not a release record .*Mend it"),
        ("pins/gone.json", "[]", "gone.json is not a pin .*Delete it"),
        ("pins/gone.json", '{"run_id": "gone", "pinned_at": "2026"}', "Run gone is pinned and has no record"),
        ("current/smoke.json", "{", "smoke.json is not JSON"),
        ("runs/r1.json", "{", "r1.json is not JSON"),
    ):
        atomic.write_text(home / name, content)
        with pytest.raises(StoreError, match=message):
            GarbageCollector(home).collect()
        (home / name).unlink()
    assert store.is_whole(ref)


def collect_and_note(home: Path, go: Path) -> None:
    wait_for(go.exists)
    states = [garbage.state for garbage in GarbageCollector(home).collect()]
    (home / "states.json").write_text(json.dumps(states))


def test_what_becomes_current_after_it_was_found_is_not_deleted(
    home: Path, store: ArtifactStore, runs: RunRecords
) -> None:
    ref = publish(store, "dpo_policy", "a")
    collector = fork.Process(target=collect_and_note, args=(home, home / "go"))
    collector.start()
    with runs.locked():  # taken after the fork, or the child would hold it too
        (home / "go").touch()
        wait_for(lambda: ref.lease in leases.held(home))  # it has decided, and waits for the records
        atomic.write_json(home / "current" / "smoke.json", {"dpo_policy": ref.as_dict()})
    collector.join(20)
    assert json.loads((home / "states.json").read_text()) == [NEEDED_AGAIN]
    assert store.is_whole(ref)


def test_a_checkpoint_whose_run_is_pinned_after_it_was_found_is_not_deleted(home: Path, runs: RunRecords) -> None:
    folder, _ = (interrupted(runs, home, letter, letter) for letter in "ab")
    lease = f"sft_model-{folder.name}"
    with leases.hold(home, lease):
        pass
    collector = fork.Process(target=collect_and_note, args=(home, home / "go"))
    collector.start()
    with runs.locked():
        (home / "go").touch()
        wait_for(lambda: lease in leases.held(home))
        atomic.write_json(home / "pins" / "a.json", {"run_id": "a", "pinned_at": "2026"})
    collector.join(20)
    assert json.loads((home / "states.json").read_text()) == [NEEDED_AGAIN]
    assert folder.exists()


def engine_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> Compute:
    """Compute whose `instructions` also leave a model, so that there is something to collect."""
    real = compute_module.stage_function

    def with_model(stage: str) -> Callable[..., StageResult]:
        def run(spec: StageSpec[Any], log: Any) -> StageResult:
            save_file({"weight": np.ones(4, dtype=np.float32)}, spec.output_dir / "model.safetensors")
            return real(stage)(spec, log)

        return run

    monkeypatch.setattr(compute_module, "stage_function", with_model)
    return Compute(home, Tracking(home, mode="disabled"))


def instructions(engine: Compute, run_id: str, max_chars: int) -> Outcome:
    overrides = ["data.world_rows=40", "data.validation_fraction=0.2", "data.test_fraction=0.2"]
    recipe = load_recipe(REPOSITORY / "recipes" / "smoke.yaml", [*overrides, f"data.max_chars={max_chars}"])
    engine.runs.start(run_id, "smoke", "test", ["instructions"])
    node = build_graph(recipe)["instructions"]
    return engine.materialize(Request(run_id, "smoke", node, node.config, 0, {}))


def test_what_is_collected_between_its_finding_and_its_recording_is_computed_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(home, monkeypatch)
    first = instructions(engine, "one", 2000)
    instructions(engine, "two", 1500)
    record_asset, collected = engine.runs.record_asset, []

    def collect_first(*arguments: Any, **options: Any) -> bool:
        if not collected:
            collected.extend(GarbageCollector(home).collect())
        return record_asset(*arguments, **options)

    monkeypatch.setattr(engine.runs, "record_asset", collect_first)
    again = instructions(engine, "three", 2000)
    assert models(collected) == [first.ref.artifact_id]
    assert again.ref == first.ref and not again.reused
    assert engine.store.verify(again.ref)
    assert engine.runs.read("three")["assets"]["instructions"]["reused"] is False


def collect_until(home: Path, stop: Path) -> None:
    deleted = 0
    while not stop.exists():
        deleted += sum(garbage.state == DELETED for garbage in GarbageCollector(home).collect())
    (home / "deleted").write_text(str(deleted))


def test_a_collector_that_never_rests_takes_nothing_from_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(home, monkeypatch)
    collector = fork.Process(target=collect_until, args=(home, home / "stop"))
    collector.start()
    try:
        for number in range(12):
            outcome = instructions(engine, f"run-{number}", 2000 - number % 2)
            assert engine.store.verify(outcome.ref)
    finally:
        (home / "stop").touch()
        collector.join(20)
    assert collector.exitcode == 0
    assert int((home / "deleted").read_text()) >= 3, "it was never in the way"
