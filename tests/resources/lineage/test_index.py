"""The index over a small store made by hand, with real processes and a real DuckDB file."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

from alignment_pipeline.errors import AlignmentError, StoreError
from alignment_pipeline.identity import write_jsonl
from resources.lineage.index import Lineage

# Two hard to store: characters outside the first plane, a line separator, a NUL, quotes, both newlines.
UNICODE = "naïve 🦆 \u2028 a\x00b 'quoted' \"twice\" \r\n 中文"

REPOSITORY = Path(__file__).parents[3]


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def artifact_id(stage: str, name: str) -> str:
    return f"{stage}/{hash_of(name)[:20]}/{hash_of(name + ' result')[:20]}"


def reference(stage: str, name: str) -> dict[str, str]:
    return {"stage": stage, "key": hash_of(name), "data_version": hash_of(name + " result")}


def add_artifact(
    home: Path,
    stage: str,
    name: str,
    inputs: dict[str, dict[str, str]] | None = None,
    tables: dict[str, list[dict[str, Any]]] | None = None,
    **manifest: Any,
) -> str:
    """Write an artifact the way the store does: complete beside its place, then renamed in."""
    folder = home / "artifacts" / artifact_id(stage, name)
    staging = home / "artifacts" / f".staging-{name}"
    staging.mkdir(parents=True)
    for path, rows in (tables or {}).items():
        write_jsonl(staging / path, rows)
    content = {
        "format": 1, **reference(stage, name), "code_version": "c0de", "config": {"learning_rate": 2e-5}, "seed": 7,
        "inputs": inputs or {}, "files": [{"path": path, "size": 1, "sha256": "f"} for path in tables or {}],
        "metrics": {}, "checks": [], "created_at": "2026-11-21T04:00:00+01:00", "timings": {"wall_s": 1.5},
        "environment": {"git_commit": "abc", "python": "3.11.7", "device": "cpu", "packages": {"torch": "2.13.0"}},
    } | manifest  # fmt: skip
    (staging / "manifest.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    folder.parent.mkdir(parents=True)
    staging.rename(folder)
    return artifact_id(stage, name)


def add_run(home: Path, run_id: str, assets: dict[str, dict[str, Any]], **record: Any) -> None:
    (home / "runs").mkdir(parents=True, exist_ok=True)
    content = {
        "run_id": run_id, "recipe": "tiny", "overrides": ["sft.epochs=2"], "started_by": "align",
        "started_at": "2026-11-21T03:00:00+00:00", "finished_at": None, "status": "running", "assets": assets,
    } | record  # fmt: skip
    beside = home / "runs" / f".{run_id}.tmp"
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.rename(home / "runs" / f"{run_id}.json")


def add_record(home: Path, path: str, content: dict[str, Any]) -> None:
    (home / path).parent.mkdir(parents=True, exist_ok=True)
    (home / path).write_text(json.dumps(content), encoding="utf-8")


def step(phase: str, number: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "step", "time": 1.0, "phase": phase, "step": number, "total": 3, "metrics": metrics}


def add_pipeline(home: Path) -> dict[str, str]:
    """A store with one of everything that is indexed."""
    preference = {"prompt_id": "p2", "rejected": "y", "messages": []}
    row = {"prompt_id": "p1", "instruction": UNICODE, "input": "", "output": "x", "source_line": 1}
    pair = {"prompt_id": "p1", "prompt": "p", "chosen": "c", "rejected": UNICODE, "labeller": "rule"}
    scores = {"judge_score": 0.5, "learned_score": None, "kl_nats": 1.5, "tokens": 4, "ended": True}
    ids = {}
    ids["instructions"] = add_artifact(
        home, "instructions", "rows", {"source": {"sha256": "5ha", "path": "/data/rows.jsonl"}},
        {"rows.jsonl": [{"id": "r1", "split": "train"} | row, {"id": "r2", "split": "test"} | row | preference,
                        {"id": "r3", "split": "train"} | row | {"prompt_id": "p3"}],
         "quarantine.jsonl": [{"reason": "empty", "source_line": 3, "detail": UNICODE}]},
        checks=[{"name": "no_leakage", "passed": True, "detail": "0 shared", "blocking": True}],
    )  # fmt: skip
    ids["formatted"] = add_artifact(
        home, "formatted_dataset", "formatted", {"instructions": reference("instructions", "rows")},
        {"dropped.jsonl": [{"id": "r3", "reason": "too_long", "prompt_tokens": 9, "completion_tokens": 9}],
         "train.jsonl": [{"id": "r1", "prompt_id": "p1", "instruction": "i"},
                         {"id": "t1", "prompt_id": "beginning", "instruction": ""}]},
    )  # fmt: skip
    progress = [step("train", 2, loss=1.0), step("train", 1, loss=3.0), {"kind": "note", "time": 1.0, "text": "hello"},
                step("train", 2, loss=2.0), step("evaluate", 1), step("evaluate", 2, nats=float("nan"))]  # fmt: skip
    ids["sft"] = add_artifact(
        home, "sft_model", "sft", {"dataset": reference("formatted_dataset", "formatted")},
        metrics={"train/loss": 2.0, "n": 1},
    )  # fmt: skip
    extras = home / "artifacts" / ids["sft"] / "extras"
    extras.mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in progress)
    (extras / "progress.jsonl").write_text(lines + '{"kind": "st', encoding="utf-8")
    ids["human"] = add_artifact(
        home, "human_preferences", "votes", {"dataset": reference("instructions", "rows")},
        {"pairs.jsonl": [{"id": "h1", "source": "human"} | pair], "quarantine.jsonl": []},
    )  # fmt: skip
    ids["pairs"] = add_artifact(
        home, "preference_pairs", "pairs",
        {"human": reference("human_preferences", "votes"), "policy": reference("sft_model", "sft")},
        {"train.jsonl": [{"id": "h1", "source": "human"} | pair], "validation.jsonl": []},
    )  # fmt: skip
    ids["dpo"] = add_artifact(
        home, "dpo_policy", "dpo",
        {"pairs": reference("preference_pairs", "pairs"), "trunk": reference("sft_model", "sft")}, seed=11,
    )  # fmt: skip
    ids["reward"] = add_artifact(
        home, "reward_model", "reward", {},
        {"scores.jsonl": [{"id": "h2", "prompt_id": "p1", "chosen_score": 1.5, "rejected_score": 1, "margin": 0.5,
                           "shuffled_chosen_score": None, "shuffled_rejected_score": None}]},
    )  # fmt: skip
    rollout = {"prompt": "p", "response": UNICODE, "score": 0.5, "kl_nats": 0.1, "tokens": 3, "ended": True}
    ids["ppo"] = add_artifact(
        home, "ppo_policy", "ppo", {"trunk": reference("sft_model", "sft")},
        {"extras/rollouts.jsonl": [{"update": 1, "prompt_id": "p1"} | rollout]},
    )  # fmt: skip
    ids["evaluation"] = add_artifact(
        home, "evaluation", "evaluation", {"policy": reference("dpo_policy", "dpo")},
        {"examples.jsonl": [{"prompt_id": "p2", "prompt": "p", "reference": "r", "response": UNICODE, "judge": "gold",
                             "temperature": 0} | scores]},
    )  # fmt: skip
    summary = {"judge": "gold", "prompts": 1, "metrics": {"eval/bleu": 9.0}}
    (home / "artifacts" / ids["evaluation"] / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    cells = {"policy": "dpo_policy", "judge": "gold", "win_rate": 0.75, "prompts": 4, "opponent": "sft", "none": None}
    ids["comparison"] = add_artifact(
        home,
        "comparison",
        "comparison",
        {"dpo_policy": reference("evaluation", "evaluation")},
        {"table.jsonl": [cells]},
    )
    assets = {"comparison": reference("comparison", "comparison") | {"reused": False}}
    add_run(home, "run1", assets, status="success", finished_at="2026-11-21T03:05:00+00:00")
    add_record(home, "current/tiny.json", {"comparison": reference("comparison", "comparison")})
    add_record(home, "releases/v1.json", reference("dpo_policy", "dpo") | {
        "release_id": "v1", "recipe": "tiny", "asset": "dpo_policy", "released_at": "2026-11-21T05:00:00+00:00",
        "released_by": "ana", "note": "first",
    })  # fmt: skip
    votes = ['{"instruction": "i", "chosen": "c", "rejected": 7, "labeller": "ana"}', "", "not JSON"]
    (home / "feedback" / "tiny").mkdir(parents=True)
    (home / "feedback" / "tiny" / "journal.jsonl").write_text("\n".join(votes) + "\n", encoding="utf-8")
    return ids


def content_of(path: Path) -> str:
    """Hash of every row of every table, whatever order they were added in."""
    with duckdb.connect(str(path), read_only=True) as connection:
        tables = sorted(row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall())
        assert len(tables) == 24
        rows = {name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in tables}
    assert all(rows.values()), "a table that is empty here would hide what is not indexed"
    return hashlib.sha256(repr(rows).encode("utf-8")).hexdigest()


def publish_and_sync(home: Path, names: list[str]) -> None:
    for name in names:
        lines = [step("train", number, loss=float(number)) for number in range(10)]
        path = add_artifact(home, "sft_model", name, tables={"extras/progress.jsonl": lines})
        Lineage(home, timeout_s=60).sync(only=[f"artifacts/{path}/manifest.json"])


def count_until(home: Path, done: Any, counts: Any) -> None:
    """Counts artifacts with all their metrics until told to stop, and once after that."""
    found, last = [], False
    while not last:
        last = done.is_set()
        whole = "SELECT count(*) AS n FROM (SELECT artifact_id FROM metrics GROUP BY 1 HAVING count(*) = 10)"
        found.append(Lineage(home, timeout_s=60).query(whole)[0]["n"])
    counts.put(found)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "split=x[1] *'"  # a glob, a quote and a hive partition to careless readers of paths
    folder.mkdir()
    return folder


@pytest.fixture
def pipeline(home: Path) -> dict[str, str]:
    return add_pipeline(home)


def test_each_part_of_an_artifact_is_found_in_its_table(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    assert lineage.sync() == len(pipeline)
    artifact = lineage.query(
        "SELECT *, (config->>'learning_rate')::DOUBLE AS rate, epoch(created_at) AS epoch FROM artifacts "
        "WHERE artifact_id = ?",
        [pipeline["sft"]],
    )[0]
    assert (artifact["seed"], artifact["device"], artifact["wall_s"], artifact["rate"]) == (7, "cpu", 1.5, 2e-5)
    assert artifact["epoch"] == 1795230000  # 2026-11-21T03:00:00Z: the manifest's offset has been taken out
    assert lineage.query("SELECT row_id, split, instruction FROM dataset_rows ORDER BY row_id") == [
        {"row_id": "r1", "split": "train", "instruction": UNICODE},
        {"row_id": "r2", "split": "test", "instruction": UNICODE},
        {"row_id": "r3", "split": "train", "instruction": UNICODE},
    ]
    assert lineage.query("SELECT row_id, rejected FROM dataset_rows WHERE rejected IS NOT NULL") == [
        {"row_id": "r2", "rejected": "y"}
    ]
    assert lineage.query("SELECT reason, source_line, detail FROM quarantined_rows") == [
        {"reason": "empty", "source_line": 3, "detail": UNICODE}
    ]
    assert lineage.query("SELECT split, pair_id, rejected, source FROM preference_pairs ORDER BY split NULLS LAST") == [
        {"split": "train", "pair_id": "h1", "rejected": UNICODE, "source": "human"},
        {"split": None, "pair_id": "h1", "rejected": UNICODE, "source": "human"},
    ]
    assert lineage.query("SELECT policy_artifact_id, response, learned_score, ended FROM judged_responses") == [
        {"policy_artifact_id": pipeline["dpo"], "response": UNICODE, "learned_score": None, "ended": True}
    ]
    assert lineage.query("SELECT name, sha256, path FROM input_files") == [
        {"name": "source", "sha256": "5ha", "path": "/data/rows.jsonl"}
    ]
    assert lineage.query("SELECT name, value FROM results ORDER BY name") == [
        {"name": "n", "value": 1.0},
        {"name": "train/loss", "value": 2.0},
    ]
    assert lineage.query("SELECT passed, blocking FROM checks") == [{"passed": True, "blocking": True}]
    assert lineage.query("SELECT update_number, prompt_id, response, score FROM rollouts") == [
        {"update_number": 1, "prompt_id": "p1", "response": UNICODE, "score": 0.5}
    ]
    assert lineage.query("SELECT pair_id, margin, shuffled_chosen_score FROM pair_scores") == [
        {"pair_id": "h2", "margin": 0.5, "shuffled_chosen_score": None}
    ]
    assert lineage.query("SELECT row_id, prompt_id FROM formatted_prompts") == [
        {"row_id": "t1", "prompt_id": "beginning"}
    ]  # fmt: skip
    assert lineage.query("SELECT row_id, reason FROM dropped_rows") == [{"row_id": "r3", "reason": "too_long"}]
    assert lineage.query("SELECT release_id, artifact_id, released_by FROM releases") == [
        {"release_id": "v1", "artifact_id": pipeline["dpo"], "released_by": "ana"}
    ]
    assert lineage.query("SELECT recipe, asset, artifact_id FROM current_assets") == [
        {"recipe": "tiny", "asset": "comparison", "artifact_id": pipeline["comparison"]}
    ]
    assert lineage.query("SELECT line, prompt, chosen, rejected, labeller, vote FROM feedback ORDER BY line") == [
        {"line": 1, "prompt": "i", "chosen": "c", "rejected": None, "labeller": "ana",
         "vote": '{"instruction": "i", "chosen": "c", "rejected": 7, "labeller": "ana"}'},
        {"line": 3, "prompt": None, "chosen": None, "rejected": None, "labeller": None, "vote": "not JSON"},
    ]  # fmt: skip


def test_the_last_line_of_a_step_counts_and_a_torn_one_does_not(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    rows = lineage.query("SELECT phase, step, name, value FROM metrics ORDER BY phase, step")
    assert [tuple(row.values())[:3] for row in rows] == [
        ("evaluate", 2, "nats"),
        ("train", 1, "loss"),
        ("train", 2, "loss"),
    ]
    assert [row["value"] for row in rows[1:]] == [3.0, 2.0]
    assert rows[0]["value"] != rows[0]["value"]  # NaN stays NaN


def test_from_a_comparison_back_to_rows_seeds_and_settings(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    found = lineage.query(
        "SELECT ancestor_id, depth FROM ancestors WHERE artifact_id = ? ORDER BY depth, ancestor_id",
        [pipeline["comparison"]],
    )
    assert [(row["ancestor_id"], row["depth"]) for row in found] == [
        (pipeline["evaluation"], 1),
        (pipeline["dpo"], 2),
        (pipeline["pairs"], 3),
        (pipeline["sft"], 3),
        (pipeline["formatted"], 4),
        (pipeline["human"], 4),
        (pipeline["instructions"], 5),
    ]
    seeds = lineage.query(
        "SELECT stage, seed FROM provenance WHERE artifact_id = $id AND depth <= 2 ORDER BY depth",
        {"id": pipeline["comparison"]},
    )
    assert [tuple(row.values()) for row in seeds] == [("comparison", 7), ("evaluation", 7), ("dpo_policy", 11)]


def test_from_a_row_forward_to_every_policy_that_learned_from_it(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    learned = "SELECT stage, kind, depth FROM learned_from WHERE row_id = ? ORDER BY ALL"

    def learners(row_id: str) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for row in lineage.query(learned, [row_id])]

    assert learners("r1") == [
        ("dpo_policy", "preference_pair", 0),  # a pair on its prompt
        ("dpo_policy", "training_row", 1),  # through sft_model
        ("ppo_policy", "rollout", 0),
        ("ppo_policy", "training_row", 1),
        ("sft_model", "training_row", 0),
    ]
    assert learners("r2") == []  # a test row
    assert learners("r3") == []  # dropped before training
    assert learners("h1") == [("dpo_policy", "preference_pair", 0)]


def test_the_latest_runs_comparison_is_shown_for_each_recipe(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    newer = add_artifact(
        home, "comparison", "newer", tables={"table.jsonl": [{"policy": "ppo", "judge": "gold", "win_rate": 1}]}
    )
    assets = {"comparison": reference("comparison", "newer") | {"reused": False}}
    shown = "SELECT recipe, run_id, artifact_id, policy, name, value, text FROM latest_comparison ORDER BY ALL"
    assert [tuple(row.values())[3:] for row in lineage.query(shown)] == [
        ("dpo_policy", "none", None, None),
        ("dpo_policy", "opponent", None, "sft"),
        ("dpo_policy", "prompts", 4.0, None),
        ("dpo_policy", "win_rate", 0.75, None),
    ]
    add_run(home, "run0", assets, started_at="2026-11-21T04:00:00+00:00")  # the query catches the index up
    assert [tuple(row.values()) for row in lineage.query(shown)] == [
        ("tiny", "run0", newer, "ppo", "win_rate", 1.0, None)
    ]


def test_a_run_record_is_written_anew_when_it_has_changed(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    add_run(home, "run2", {})
    lineage.sync()
    assets = {"sft_model": reference("sft_model", "sft") | {"reused": True}}
    for number in range(2):  # replacing a replaced row, too
        add_run(home, "run2", assets, status="success", finished_at=f"2026-11-21T03:09:0{number}+00:00")
        assert lineage.sync() == 0
    assert lineage.query(
        "SELECT status, hour(finished_at) AS hour, artifact_id, reused FROM runs JOIN run_assets USING (run_id) "
        "WHERE run_id = 'run2'"
    ) == [{"status": "success", "hour": 3, "artifact_id": pipeline["sft"], "reused": True}]


@pytest.mark.usefixtures("pipeline")
def test_a_second_sync_changes_nothing_and_needs_no_writer(home: Path) -> None:
    lineage = Lineage(home, timeout_s=0.0)
    lineage.sync()
    before = content_of(lineage.path)
    with duckdb.connect(str(lineage.path), read_only=True):  # blocks a writer of another configuration
        script = (
            "import sys; from pathlib import Path; from resources.lineage.index import Lineage; "
            "print(Lineage(Path(sys.argv[1]), 0.0).sync())"
        )
        command = [sys.executable, "-c", script, str(home)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "0\n"
    assert content_of(lineage.path) == before


def test_a_rebuilt_index_equals_the_one_that_grew(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    add_artifact(home, "sft_model", "later", {"dataset": reference("instructions", "rows")})
    add_run(home, "run3", {"sft_model": reference("sft_model", "later") | {"reused": False}})
    lineage.sync()
    grown = content_of(lineage.path)
    assert lineage.rebuild() == len(pipeline) + 1
    assert content_of(lineage.path) == grown
    lineage.path.unlink()
    assert lineage.sync() == len(pipeline) + 1
    assert content_of(lineage.path) == grown
    assert not list(home.glob("*.new*")) and not list(home.glob("*.wal"))


def test_what_is_gone_from_the_store_is_gone_from_the_index(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    shutil.rmtree(home / "artifacts" / pipeline["human"])
    (home / "runs" / "run1.json").unlink()
    lineage.sync()
    assert lineage.query("SELECT in_store, count(*) AS n FROM artifacts GROUP BY ALL ORDER BY ALL") == [
        {"in_store": False, "n": 1},  # the pairs were made from it, so that its name is kept
        {"in_store": True, "n": len(pipeline) - 1},
    ]
    assert lineage.query("SELECT config FROM artifacts WHERE NOT in_store") == [{"config": None}]
    assert lineage.query("SELECT pair_id FROM preference_pairs") == [{"pair_id": "h1"}]
    assert lineage.query("SELECT * FROM run_assets") == lineage.query("SELECT * FROM runs") == []
    shutil.rmtree(home / "artifacts" / pipeline["pairs"])
    shutil.rmtree(home / "artifacts" / pipeline["comparison"])
    (home / "current" / "tiny.json").unlink()
    lineage.sync()
    gone = lineage.query("SELECT artifact_id FROM artifacts WHERE NOT in_store")
    assert gone == [{"artifact_id": pipeline["pairs"]}]  # nothing names the others any more
    grown = lineage.content_sha256()
    lineage.rebuild()
    assert lineage.content_sha256() == grown


def test_a_manifest_that_was_replaced_is_read_again(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    path = home / "artifacts" / pipeline["sft"] / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 7', '"seed": 8'), encoding="utf-8")
    assert lineage.sync() == 1
    assert lineage.query("SELECT seed FROM artifacts WHERE stage = 'sft_model'") == [{"seed": 8}]
    grown = lineage.content_sha256()
    lineage.rebuild()
    assert lineage.content_sha256() == grown


def test_only_the_named_files_are_looked_at(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    first, second = (add_artifact(home, "sft_model", name) for name in ("first", "second"))
    assert lineage.sync(only=[f"artifacts/{first}/manifest.json", "runs/none.json"]) == 1
    with duckdb.connect(str(lineage.path), read_only=True) as connection:
        known = {row[0] for row in connection.execute("SELECT artifact_id FROM artifacts").fetchall()}
    assert first in known and second not in known
    assert lineage.sync() == 1


def test_foreign_keys_hold(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    lineage.sync()
    with duckdb.connect(str(lineage.path)) as connection:
        for table in ("artifact_inputs", "metrics", "dataset_rows", "preference_pairs", "run_assets", "releases"):
            with pytest.raises(duckdb.ConstraintException, match="foreign key"):
                connection.execute(f"UPDATE {table} SET artifact_id = 'stage/nobody/knows'")
        with pytest.raises(duckdb.ConstraintException, match="still referenced"):
            connection.execute("DELETE FROM artifacts")


def test_an_index_from_before_migrations_is_rebuilt(home: Path, pipeline: dict[str, str]) -> None:
    lineage = Lineage(home)
    with duckdb.connect(str(lineage.path)) as connection:
        connection.execute("CREATE TABLE artifacts (old INTEGER)")
    assert lineage.sync() == len(pipeline)


@pytest.mark.usefixtures("pipeline")
def test_a_query_makes_a_missing_index_and_can_only_read(home: Path, tmp_path: Path) -> None:
    lineage = Lineage(home)
    assert lineage.query("SELECT count(*) AS n FROM runs") == [{"n": 1}]
    for wrong in ("DELETE FROM runs", "SELEC 1", "SELECT nope FROM runs", f"COPY runs TO '{tmp_path}/stolen.csv'"):
        with pytest.raises(AlignmentError, match="cannot be answered") as raised:
            lineage.query(wrong)
        assert not isinstance(raised.value, StoreError)  # the index is not to blame
    assert lineage.query("SELECT count(*) AS n FROM runs") == [{"n": 1}]  # the failures left nothing locked


@pytest.mark.usefixtures("pipeline")
def test_a_foreign_holder_costs_a_warning_that_names_it_and_is_caught_up_with(home: Path) -> None:
    lineage = Lineage(home, timeout_s=0.3)
    lineage.sync()
    add_artifact(home, "sft_model", "meanwhile")
    script = "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(lineage.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            started = time.monotonic()
            warning = lineage.try_sync()
            assert 0.3 <= time.monotonic() - started < 3
            assert warning is not None and str(holder.pid) in warning and "training goes on" in warning
            assert "\n" not in warning
            with pytest.raises(StoreError, match=str(holder.pid)):
                lineage.query("SELECT 1")
            with pytest.raises(StoreError, match=str(holder.pid)):
                lineage.rebuild()  # a file that is in use is not pulled away
        finally:
            holder.kill()
    assert lineage.try_sync() is None
    assert lineage.query("SELECT count(*) AS n FROM artifacts WHERE key = ?", [hash_of("meanwhile")]) == [{"n": 1}]


@pytest.mark.usefixtures("pipeline")
def test_our_own_lock_is_waited_for_within_bounds(home: Path) -> None:
    lineage = Lineage(home, timeout_s=0.2)
    lineage.sync()
    with (home / "lineage.duckdb.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        warning = lineage.try_sync()
        assert warning is not None and "lineage.duckdb.lock" in warning
        assert f"process {os.getpid()}" in warning  # who wrote last
    assert lineage.try_sync() is None


def test_eight_writers_and_two_readers_at_once_lose_nothing(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    names = [[f"{process}-{number}" for number in range(5)] for process in range(8)]
    Lineage(home).sync()
    done = context.Event()
    counts = context.Queue()
    writers = [context.Process(target=publish_and_sync, args=(home, part)) for part in names]
    readers = [context.Process(target=count_until, args=(home, done, counts)) for _ in range(2)]
    for process in (*writers, *readers):
        process.start()
    for process in writers:
        process.join(120)
    done.set()
    seen = [counts.get(timeout=60) for _ in readers]
    for process in readers:
        process.join(60)
    assert [process.exitcode for process in (*writers, *readers)] == [0] * 10
    assert all(found == sorted(found) and found[-1] == 40 for found in seen)  # never less than before
    lineage = Lineage(home)
    keys = {row["key"] for row in lineage.query("SELECT key FROM artifacts")}
    assert keys == {hash_of(name) for part in names for name in part}
    assert lineage.query("SELECT count(*) AS n, sum(value) AS total FROM metrics") == [{"n": 400, "total": 1800.0}]
    grown = lineage.content_sha256()
    lineage.rebuild()
    assert lineage.content_sha256() == grown


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize("broken", [b"", b"garbage" * 1000, None], ids=["empty", "garbage", "flipped bits"])
def test_a_corrupt_file_says_how_to_get_the_index_back(home: Path, broken: bytes | None) -> None:
    lineage = Lineage(home)
    lineage.sync()
    whole = content_of(lineage.path)
    if broken is None:
        content = lineage.path.read_bytes()
        broken = content[:12288] + bytes(byte ^ 0x55 for byte in content[12288:])  # the file's headers stay good
    lineage.path.write_bytes(broken)
    with pytest.raises(StoreError, match=r"`align lineage rebuild` makes it again"):
        lineage.query("SELECT * FROM artifacts")
    warning = lineage.try_sync()
    assert warning is not None and "training goes on" in warning
    lineage.rebuild()
    assert content_of(lineage.path) == whole


def test_one_malformed_artifact_does_not_keep_the_others_out(home: Path, pipeline: dict[str, str]) -> None:
    bad = home / "artifacts" / add_artifact(home, "instructions", "bad", tables={"rows.jsonl": []})
    (bad / "rows.jsonl").write_text('{"id": "half', encoding="utf-8")
    listed = home / "artifacts" / add_artifact(home, "sft_model", "list")
    (listed / "manifest.json").write_text("[]", encoding="utf-8")
    add_artifact(home, "sft_model", "check without a name", checks=[{"passed": True}])
    lineage = Lineage(home)
    with pytest.raises(StoreError, match="3 malformed files"):
        lineage.sync()
    assert lineage.query("SELECT count(*) AS n FROM artifacts WHERE in_store") == [{"n": len(pipeline)}]


def test_a_sibling_whose_name_matches_the_homes_as_a_pattern_is_not_read(home: Path, pipeline: dict[str, str]) -> None:
    sibling = home.with_name("split=x1 's" + "'")
    shutil.copytree(home, sibling)
    rows = sibling / "artifacts" / pipeline["instructions"] / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    assert Lineage(home).query("SELECT count(*) AS n FROM dataset_rows") == [{"n": 3}]


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, None], ids=["torn", "list", "deep", "folder"])
def test_a_run_record_that_became_malformed_is_left_out_and_nothing_else(
    content: str | None, home: Path, pipeline: dict[str, str]
) -> None:
    lineage = Lineage(home)
    lineage.sync()
    record = home / "runs" / "run1.json"
    record.unlink()
    if content is None:
        record.mkdir()
    else:
        record.write_text(content)
    with pytest.raises(StoreError, match="1 malformed files"):
        lineage.sync()
    assert lineage.query("SELECT * FROM runs") == []
    assert len(lineage.query("SELECT * FROM artifacts")) == len(pipeline)
    assert lineage.sync() == 0  # it is not tried again until it changes
    grown = lineage.content_sha256()
    with pytest.raises(StoreError, match="1 malformed files"):
        lineage.rebuild()
    assert lineage.content_sha256() == grown


@pytest.mark.usefixtures("pipeline")
def test_what_a_failed_sync_was_to_add_is_added_by_the_next_question(home: Path) -> None:
    lineage = Lineage(home, timeout_s=0.2)
    lineage.sync()
    added = add_artifact(home, "sft_model", "late")
    with (home / "lineage.duckdb.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lineage.try_sync(only=[f"artifacts/{added}/manifest.json"]) is not None
    found = "SELECT in_store FROM artifacts WHERE artifact_id = ?"
    assert lineage.query(found, [added]) == [{"in_store": True}]


@pytest.mark.usefixtures("pipeline")
def test_what_a_killed_process_was_to_add_is_not_waited_for(home: Path) -> None:
    lineage = Lineage(home)
    lineage.sync()
    added = add_artifact(home, "sft_model", "orphan")
    request = home / "lineage.requests" / "of a process that was killed"
    request.parent.mkdir(exist_ok=True)
    request.write_text(f"artifacts/{added}/manifest.json")
    found = "SELECT in_store FROM artifacts WHERE artifact_id = ?"
    assert lineage.query(found, [added]) == []  # somebody may be about to add it
    os.utime(request, (time.time() - 60, time.time() - 60))
    assert lineage.query(found, [added]) == [{"in_store": True}]
    assert not request.exists()


def test_a_store_without_anything_has_an_empty_index(home: Path) -> None:
    lineage = Lineage(home)
    assert lineage.sync() == 0
    assert lineage.query("SELECT * FROM latest_comparison") == []


@pytest.mark.usefixtures("pipeline")
def test_finding_nothing_new_is_quick(home: Path) -> None:
    lineage = Lineage(home)
    lineage.sync()
    started = time.perf_counter()
    lineage.sync()
    assert time.perf_counter() - started < 0.5  # some 15 ms; the rest is room for a busy machine
