"""The command line on a home in which `smoke` was run: reuse, results, chat, W&B, interruption, a process a step."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.recipes import all_recipes
from app.results import load_results, print_results
from resources.lineage.index import Lineage

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TRACKED = {
    "base_model", "sft_model", "reward_model", "dpo_policy", "ppo_policy",
    "base_evaluation", "sft_evaluation", "dpo_evaluation", "ppo_evaluation", "decoding_sweep",
}  # fmt: skip


def records(home: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (home / "runs").glob("*.json")]
    return sorted(found, key=lambda record: str(record["started_at"]))


def versions(record: dict[str, Any]) -> dict[str, str]:
    return {asset: made["data_version"] for asset, made in record["assets"].items()}


def test_a_second_run_reuses_everything_and_shows_the_same_results(
    copy_of_home: Path, align: Run, half_written: Callable[[Path], list[Path]]
) -> None:
    (first,) = records(copy_of_home)
    done = align(copy_of_home, "run", "smoke")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "18 of 18 assets reused" in done.stdout and "smoke: 24 test prompts" in done.stdout
    second = records(copy_of_home)[-1]
    assert versions(second) == versions(first) and len(versions(second)) == 18
    assert (second["status"], second["started_by"]) == ("success", "align")
    assert half_written(copy_of_home) == []


def test_results_as_json_and_as_a_table(smoke_home: Path, align: Run) -> None:
    done = align(smoke_home, "results", "--json")
    (found,) = json.loads(done.stdout)
    assert (found["recipe"], found["judge"], found["opponent"]) == ("smoke", "gold_rule", "sft_model")
    assert [row["policy"] for row in found["policies"]] == ["base_model", "sft_model", "ppo_policy", "dpo_policy"]
    (record,) = records(smoke_home)
    by_run = json.loads(align(smoke_home, "results", "--run", record["run_id"], "--json").stdout)
    assert by_run[0]["artifact"] == found["artifact"]
    shown = align(smoke_home, "results", "smoke").stdout
    assert all(policy in shown for policy in ("base_model", "ppo_policy", "gold score"))


def test_results_tell_what_each_policy_changed_and_what_decoding_does(smoke_home: Path, align: Run) -> None:
    shown = align(smoke_home, "results", "smoke", env={"COLUMNS": "80"}).stdout
    (found,) = json.loads(align(smoke_home, "results", "smoke", "--json").stdout)
    before, after = found["policies"][:2]
    change = f"{after['bleu_change']:+.1f} [{after['bleu_change_low']:+.1f}, {after['bleu_change_high']:+.1f}]"
    line = next(line for line in shown.splitlines() if line.startswith("  sft_model from base_model"))
    assert line.split("base_model")[1].split() == [
        "BLEU", f"{before['bleu']:.1f}", f"{after['bleu']:.1f}", *change.split()
    ]  # fmt: skip
    assert "ppo_policy from sft_model" in shown and "base_model from" not in shown
    assert "Decoding of sft_model, 6 test prompts, score: gold score" in shown
    assert [row["setting"] for row in found["decoding"]["table"]] == [
        "greedy", "temperature 1", "temperature 1, top-p 0.9", "beams 2"
    ]  # fmt: skip
    assert all(f"  {row['setting']} " in shown for row in found["decoding"]["table"])
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_a_comparison_that_counted_no_changes_and_has_no_sweep_is_shown_all_the_same(
    copy_of_home: Path, align: Run
) -> None:
    results = load_results(copy_of_home, "smoke")
    older = [{name: cell for name, cell in row.items() if "change" not in name} for row in results["policies"]]
    console = Console(record=True, width=110)
    print_results(console, results | {"policies": older, "decoding": None})
    shown = console.export_text()
    assert "win rate" in shown and "Changes" not in shown and "decoding of" not in shown


def test_recipes_are_listed_with_their_size(tmp_path: Path, align: Run) -> None:
    shown = align(tmp_path / "home", "recipes").stdout
    for recipe in all_recipes():
        assert recipe.name in shown
    (row,) = [line for line in shown.splitlines() if " smoke " in line]
    assert "18" in row
    assert not (tmp_path / "home").exists(), "looking creates nothing"


def test_chat_decodes_as_it_is_told(smoke_home: Path, align: Run) -> None:
    def answers(*options: str) -> str:
        done = align(smoke_home, "chat", "smoke", "sft_model", "--max-new-tokens", "8", *options, input="Reverse x.\n")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    sampled = answers("--temperature", "1", "--top-k", "40", "--top-p", "0.9", "--min-new-tokens", "4")
    beams = answers("--num-beams", "3", "--repetition-penalty", "1.5")
    assert len({answers(), sampled, beams}) == 3


def test_chat_answers_each_line_and_the_same_way_each_time(smoke_home: Path, align: Run) -> None:
    asked = "Write a function that doubles x.\nReverse a list.\n\nnever read\n"
    first, again = (
        align(smoke_home, "chat", "smoke", "ppo_policy", "--max-new-tokens", "8", input=asked) for _ in range(2)
    )
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert first.stdout == again.stdout
    assert "ppo_policy of smoke (sft_model is its trunk)" in first.stdout
    assert first.stdout.count("(cut after 8 tokens)") <= 2 and len(first.stdout.splitlines()) >= 3


def test_every_training_and_evaluation_stage_has_a_wandb_run_in_the_group_of_its_dagster_run(
    smoke_home: Path, read_wandb_run: Callable[[Path], Any]
) -> None:
    (record,) = records(smoke_home)
    shown = {}
    for folder in (smoke_home / "wandb").glob("offline-run-*"):
        run = read_wandb_run(folder)
        shown[run.run.display_name.removeprefix("smoke/")] = run
    assert shown.keys() == TRACKED
    for asset, run in shown.items():
        assert run.run.run_group == run.config["dagster_run_id"] == record["run_id"]
        assert run.run.run_id == f"{asset}-{record['assets'][asset]['key'][:16]}"
        assert run.exit_code == 0
    assert [row["train/loss"] for row in shown["sft_model"].history if "train/loss" in row]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_result(
    smoke_home: Path, copy_of_home: Path, tmp_path: Path, align: Run, environment: Callable[..., dict[str, str]],
    half_written: Callable[[Path], list[Path]],
) -> None:  # fmt: skip
    home, whole_home = copy_of_home, tmp_path / "whole"
    shutil.copytree(smoke_home, whole_home, ignore=shutil.ignore_patterns("dagster", "wandb"))
    command = ["run", "smoke", "--select", "sft_model", "--set", "sft.epochs=50", "--set", "sft.max_steps=60"]
    every = ["--set", "sft.checkpoint_every_s=0.05"]  # changes no key
    align_program = align(home, "--help").args[0]
    process = subprocess.Popen(
        [align_program, *command, *every], env=environment(ALIGNMENT_HOME=str(home), WANDB_MODE="disabled"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: bool(list((home / "work").glob("*/checkpoint-*/sealed.json"))), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert "Stopped. Run the same command again" in output and "Traceback" not in output + errors
    assert records(home)[-1]["status"] == "interrupted"
    assert half_written(home) == []
    assert records(home)[-1]["assets"] == {}

    resumed = align(home, *command, env={"WANDB_MODE": "disabled"})
    assert resumed.returncode == 0, resumed.stdout
    made = records(home)[-1]["assets"]["sft_model"]
    folder = home / "artifacts" / "sft_model" / made["key"][:20] / made["data_version"][:20]
    log = [json.loads(line) for line in (folder / "extras" / "progress.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "note" and line["text"].startswith("Resuming from checkpoint-") for line in log)
    assert list((home / "work").iterdir()) == []

    whole = align(whole_home, *command, env={"WANDB_MODE": "disabled"})
    assert whole.returncode == 0, whole.stdout
    assert records(whole_home)[-1]["assets"]["sft_model"] == made


def test_a_process_a_step_gives_the_same_results_under_the_same_run(
    smoke_home: Path, tmp_path: Path, align: Run
) -> None:
    home = tmp_path / "home"
    assets = ["instructions", "base_model", "formatted_dataset", "human_preferences"]
    selection = [word for asset in assets for word in ("--select", asset)]
    done = align(home, "run", "smoke", *selection, env={"ALIGNMENT_EXECUTOR": "multiprocess"})
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records(home)
    assert (record["status"], record["started_by"]) == ("success", "align")
    (in_process,) = records(smoke_home)
    assert versions(record) == {asset: versions(in_process)[asset] for asset in assets}
    assert [line.split()[0] for line in done.stdout.splitlines() if " done " in line] == assets
    log = (home / "runs" / f"{record['run_id']}.log").read_text()
    assert log.count("STEP_WORKER_STARTED") == log.count("STEP_SUCCESS") == len(assets)


@pytest.mark.parametrize("executor", ["in_process", "multiprocess"])
def test_a_failing_step_is_named_whatever_the_executor(tmp_path: Path, align: Run, executor: str) -> None:
    done = align(
        tmp_path / "home", "run", "smoke", "--select", "formatted_dataset", env={"ALIGNMENT_EXECUTOR": executor}
    )
    assert done.returncode == 1
    assert "Error in formatted_dataset: instructions, base_model of recipe smoke has not been made" in done.stdout
    assert [record["status"] for record in records(tmp_path / "home")] == ["failed"]


def test_after_a_run_the_index_knows_its_end_all_its_assets_and_its_comparison(copy_of_home: Path) -> None:
    lineage = Lineage(copy_of_home)
    (run,) = lineage.query(
        "SELECT status, (SELECT count(*) FROM run_assets a WHERE a.run_id = r.run_id) AS n FROM runs r"
    )
    assert run == {"status": "success", "n": 18}
    rows = lineage.query("SELECT DISTINCT policy FROM latest_comparison WHERE recipe = 'smoke'")
    assert {row["policy"] for row in rows} == {"base_model", "sft_model", "ppo_policy", "dpo_policy"}
