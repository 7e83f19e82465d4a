"""`align gc`, `align pin` and the leak check on a home in which `smoke` was run."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.preferences import pair_id
from resources.artifact_store import ArtifactRef, ArtifactStore, short_id
from resources.leakage import CHECK, EVALUATING
from resources.lineage.index import Lineage
from resources.runs import RunRecords

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def done_well(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def error_of(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


def artifact_files(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in (home / "artifacts").rglob("*") if path.is_file()}


def exported(home: Path) -> dict[str, list[Any]]:
    """Every table of an index made anew, in order."""
    lineage = Lineage(home)
    lineage.rebuild()
    with duckdb.connect(str(lineage.path), read_only=True) as index:
        names = [name for (name,) in index.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        return {name: index.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in names}


def test_a_changed_policys_old_bytes_go_and_come_back_when_the_change_is_reverted(
    copy_of_home: Path, align: Run
) -> None:
    home, runs, store = copy_of_home, RunRecords(copy_of_home), ArtifactStore(copy_of_home)
    (first,) = (record["run_id"] for record in runs.all())
    old = runs.current("smoke")["dpo_policy"]
    changed = ["run", "smoke", "--set", "dpo.beta=0.2"]
    done_well(align(home, *changed, env={"WANDB_MODE": "disabled"}))
    new = runs.current("smoke")["dpo_policy"]
    assert new != old

    assert "is pinned" in done_well(align(home, "pin", first[:6]))
    assert first in done_well(align(home, "pin"))
    assert "No garbage" in done_well(align(home, "gc"))
    assert "no longer pinned" in done_well(align(home, "unpin", first[:6]))

    before, manifest = artifact_files(home), store.manifest(old)
    report = json.loads(done_well(align(home, "gc", "--dry-run", "--json")))
    (found,) = report["garbage"]
    weights = f"{found['path']}/adapter/adapter_model.safetensors"
    assert found["path"] == f"artifacts/{old.artifact_id}" and found["assets"] == ["smoke/dpo_policy"]
    assert report["bytes"] == found["size"] == (home / weights).stat().st_size and report["deleted_bytes"] == 0
    assert "1 model can go" in done_well(align(home, "gc", "--dry-run")) and artifact_files(home) == before

    index = exported(home)
    shown = done_well(align(home, "gc"))
    assert short_id(old.artifact_id) in shown and "smoke/dpo_policy" in shown and "Deleted 1 model: " in shown
    after = artifact_files(home)
    assert before - after == {weights} and after - before == {f"{found['path']}/collected.json"}
    assert exported(home) == index and all(index[name] for name in ("artifacts", "metrics", "evaluation_examples"))
    assert "Deleted before, and computed anew" in done_well(align(home, "pin", first))

    results = json.loads(done_well(align(home, "results", "smoke", "--json")))
    assert len(results[0]["policies"]) == 4
    assert "18 of 18 assets reused" in done_well(align(home, *changed))

    assert "17 of 18 assets reused" in done_well(align(home, "run", "smoke", env={"WANDB_MODE": "disabled"}))
    assert runs.current("smoke")["dpo_policy"] == old
    assert store.verify(old) and store.manifest(old) == manifest
    assert artifact_files(home) == before


def test_a_wrong_id_is_one_sentence(smoke_home: Path, align: Run, tmp_path: Path) -> None:
    assert error_of(align(smoke_home, "pin", "nope")).startswith("Error: There is no run 'nope'. Expected")
    assert error_of(align(smoke_home, "unpin", "nope")) == (
        "Error: There is no pinned run 'nope'. There is no pinned run at all.\n"
    )
    assert "No run is pinned" in done_well(align(smoke_home, "pin"))
    for arguments in (["gc", "--dry-run"], ["gc"]):
        assert "No garbage" in done_well(align(tmp_path / "nowhere", *arguments))
    assert not (tmp_path / "nowhere").exists(), "looking creates nothing"


def test_evaluations_of_before_the_leak_check_are_reused_and_get_it(copy_of_home: Path, align: Run) -> None:
    store = ArtifactStore(copy_of_home)
    for ref in store.all():
        if ref.stage in EVALUATING:
            manifest = store.manifest(ref)
            manifest["checks"] = [check for check in manifest["checks"] if check["name"] != CHECK]
            (store.path(ref) / "manifest.json").write_text(json.dumps(manifest))
    assert "18 of 18 assets reused" in done_well(align(copy_of_home, "run", "smoke"))
    log = max((copy_of_home / "runs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    assert log.read_text().count(f"Asset check '{CHECK}' on") == 5  # four policies and the sweep


@pytest.fixture
def leaking_pairs(copy_of_home: Path) -> tuple[ArtifactRef, str]:
    """Make current a forged `preference_pairs` with a pair on an evaluated prompt; also that prompt's id."""
    store, runs = ArtifactStore(copy_of_home), RunRecords(copy_of_home)
    current = runs.current("smoke")
    (example, *_) = read_jsonl(store.path(current["sft_evaluation"]) / "examples.jsonl")
    true = current["preference_pairs"]
    staging = store.new_staging()
    shutil.copytree(store.path(true), staging, dirs_exist_ok=True)
    pairs = read_jsonl(staging / "train.jsonl")
    planted = {**pairs[0], "prompt_id": example["prompt_id"], "prompt": example["prompt"]}
    planted["id"] = pair_id(planted["prompt"], planted["chosen"], planted["rejected"])
    write_jsonl(staging / "train.jsonl", [*pairs, planted])
    forged = store.publish(staging, true.stage, "f" * 64, store.manifest(true) | {"key": "f" * 64})
    runs.start("forged", "smoke", "test", ["preference_pairs"])
    runs.record_asset("forged", "smoke", "preference_pairs", forged, reused=False)
    return forged, example["prompt_id"]


def test_a_planted_pair_on_a_test_prompt_is_named_and_nothing_is_compared(
    copy_of_home: Path, leaking_pairs: tuple[ArtifactRef, str], align: Run
) -> None:
    forged, prompt_id = leaking_pairs
    anew = ["reward_model", "reference_logprobs", "dpo_policy", "ppo_policy", "base_evaluation", "sft_evaluation",
            "ppo_evaluation", "dpo_evaluation", "comparison"]  # fmt: skip
    selection = [word for asset in anew for word in ("--select", asset)]
    done = align(copy_of_home, "run", "smoke", *selection, env={"WANDB_MODE": "disabled"})
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    expected = (
        f"Error in dpo_evaluation: {CHECK} does not hold, nothing downstream was made: "
        f"1 of 24 evaluated prompts were trained on: {prompt_id} in {forged.artifact_id}."
    )
    assert expected in done.stdout, done.stdout
    runs = RunRecords(copy_of_home)
    made = runs.all()[-1]
    assert made["status"] == "failed" and made["assets"].keys() >= {"dpo_policy", "dpo_evaluation"}
    assert "comparison" not in made["assets"]
    assert runs.current("smoke")["dpo_evaluation"].as_dict() != made["assets"]["dpo_evaluation"]
