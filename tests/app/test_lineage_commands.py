"""`align why`, `impact`, `diff` and `lineage` as a person types them; what they answer is tested with the questions."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alignment_pipeline.identity import read_jsonl
from resources.lineage.index import Lineage

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_why_draws_a_tree_and_gives_json(smoke_home: Path, align: Run) -> None:
    asked = ("why", "smoke", "eval/win_rate", "--policy", "ppo_policy")
    shown = align(smoke_home, *asked)
    assert (shown.returncode, shown.stderr) == (0, "")
    for part in ("eval/win_rate of ppo_policy in smoke is", "won,", "counted again", "reward_model", "training rows",
                 "learning_rate", "(above)", "Made with git"):  # fmt: skip
        assert part in shown.stdout, part
    answer = json.loads(align(smoke_home, *asked, "--json").stdout)
    assert answer["policy"] == "ppo_policy" and answer["artifact"] in answer["artifacts"]


def test_impact_lists_models_and_gives_json(smoke_home: Path, align: Run) -> None:
    path = next((smoke_home / "artifacts" / "instructions").glob("*/*/rows.jsonl"))
    row = next(row for row in read_jsonl(path) if row["split"] == "train")
    shown = align(smoke_home, "impact", row["id"])
    assert "trained on the row" in shown.stdout and "smoke/sft_model" in shown.stdout
    assert "None of them is released." in shown.stdout
    assert json.loads(align(smoke_home, "impact", row["id"], "--json").stdout)["found"][0]["row_id"] == row["id"]
    unknown = align(smoke_home, "impact", "nothing")
    assert (
        unknown.returncode == 1 and unknown.stdout == "" and unknown.stderr.startswith("Error: Nothing in the lineage")
    )


def test_a_run_against_itself_differs_in_nothing(smoke_home: Path, align: Run) -> None:
    run = next((smoke_home / "runs").glob("*.json")).stem[:8]
    shown = align(smoke_home, "diff", run, run)
    assert "are the same." in shown.stdout and "No number moved." in shown.stdout
    assert json.loads(align(smoke_home, "diff", run, run, "--json").stdout)["differences"] == []


def test_a_deleted_index_is_announced_and_made_again(copy_of_home: Path, align: Run) -> None:
    lineage = Lineage(copy_of_home)
    lineage.sync()
    whole = lineage.content_sha256()
    lineage.path.unlink()
    shown = align(copy_of_home, "why", "smoke", "eval/win_rate", "--policy", "ppo_policy")
    assert shown.returncode == 0 and "lineage.duckdb is missing; it is made again" in shown.stderr
    assert lineage.content_sha256() == whole


def test_a_damaged_index_offers_a_rebuild_that_gives_the_same_rows(copy_of_home: Path, align: Run) -> None:
    lineage = Lineage(copy_of_home)
    lineage.sync()
    whole = lineage.content_sha256()
    lineage.path.write_bytes(b"damaged" * 1000)
    refused = align(copy_of_home, "why", "smoke", "eval/win_rate", "--policy", "ppo_policy")
    assert refused.returncode == 1 and "`align lineage rebuild` makes it again" in refused.stderr
    assert "Traceback" not in refused.stderr
    rebuilt = align(copy_of_home, "lineage", "rebuild")
    assert rebuilt.returncode == 0 and f"18 artifacts, content {whole[:16]}" in rebuilt.stdout
    assert lineage.content_sha256() == whole


def test_sql_is_answered_in_json_lines_and_cannot_write(smoke_home: Path, align: Run) -> None:
    shown = align(smoke_home, "lineage", "sql", "SELECT stage, count(*) AS n FROM artifacts GROUP BY ALL ORDER BY ALL")
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert rows[0] == {"stage": "base_model", "n": 1} and sum(row["n"] for row in rows) == 18
    refused = align(smoke_home, "lineage", "sql", "DELETE FROM artifacts")
    assert refused.returncode == 1 and "cannot be answered" in refused.stderr


def test_a_program_that_holds_the_index_stops_no_run_and_is_named_by_questions(copy_of_home: Path, align: Run) -> None:
    lineage = Lineage(copy_of_home)
    lineage.sync()
    script = "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('held', flush=True); time.sleep(120)"
    asked = ("why", "smoke", "eval/win_rate", "--policy", "ppo_policy", "--json")
    command = [sys.executable, "-c", script, str(lineage.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            changed = ("--set", "evaluation.kl_budget_nats=29", "--select", "comparison")
            done = align(copy_of_home, "run", "smoke", *changed)
            assert done.returncode == 0 and "0 of 1 assets reused" in done.stdout, done.stdout + done.stderr
            refused = align(copy_of_home, *asked)
            assert refused.returncode == 1 and f"PID {holder.pid}" in refused.stderr, refused.stderr
        finally:
            holder.kill()
    answer = json.loads(align(copy_of_home, *asked).stdout)
    assert answer["artifacts"][answer["artifact"]]["config"]["kl_budget_nats"] == 29  # the index has caught up
