"""The recipe that newcomers run, once, whole: its numbers, their rows, its reuse. Takes some three minutes."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from resources.lineage.index import Lineage
from resources.lineage.questions import why

Run = Callable[..., "subprocess.CompletedProcess[str]"]
POLICIES = ("base_model", "sft_model", "ppo_policy", "dpo_policy")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, align: Run) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "home"
    done = align(folder, "run", "tiny", timeout=580)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return folder


def test_training_pays_by_the_recipes_own_judge(home: Path, align: Run) -> None:
    (results,) = json.loads(align(home, "results", "--json").stdout)
    score = {row["policy"]: row["judge_score"] for row in results["policies"]}
    assert score["base_model"] < 0.05 < 0.4 < score["sft_model"] < min(score["ppo_policy"], score["dpo_policy"])
    assert [check["name"] for check in results["checks"] if not check["passed"]] == []
    assert all(row["eos_rate"] > 0.9 for row in results["policies"])  # they have learned to stop


def test_every_number_of_the_table_is_counted_again_from_its_rows(home: Path, align: Run) -> None:
    (results,) = json.loads(align(home, "results", "--json").stdout)
    for row in results["policies"]:
        for metric in ("win_rate", "judge_score", "learned_score", "kl_nats", "mean_tokens", "eos_rate"):
            answer = why(Lineage(home), "tiny", metric, row["policy"])
            assert answer["value"] == pytest.approx(row[metric])
            assert answer["examples"]["recomputed"] == pytest.approx(row[metric])
            assert answer["examples"]["count"] == row["prompts"] == 300


def test_no_model_saw_the_prompts_it_is_judged_on(home: Path) -> None:
    """In SQL over the tables alone: what the evaluation depends on, and the prompts of every row trained on."""
    lineage = Lineage(home)
    asked = lineage.query("SELECT artifact_id, prompt_id FROM evaluation_examples ORDER BY ALL")
    drawn = random.Random(1).sample(asked, 60)
    trained = lineage.query(
        """
        WITH RECURSIVE family (evaluation, id) AS (
            SELECT artifact_id, artifact_id FROM evaluations
            UNION
            SELECT evaluation, input_artifact_id FROM artifact_inputs JOIN family ON artifact_id = id
        )
        SELECT evaluation, prompt_id FROM dataset_rows JOIN family ON artifact_id = id WHERE split = 'train'
        UNION
        SELECT evaluation, prompt_id FROM preference_pairs JOIN family ON artifact_id = id WHERE split = 'train'
        UNION
        SELECT evaluation, prompt_id FROM rollouts JOIN family ON artifact_id = id
        """
    )
    pairs = {(row["evaluation"], row["prompt_id"]) for row in trained}
    assert len(pairs) > 4 * 5_000
    assert [row for row in drawn if (row["artifact_id"], row["prompt_id"]) in pairs] == []


def test_a_second_run_reuses_everything_and_another_rate_of_dpo_nothing_but_dpo(home: Path, align: Run) -> None:
    assert "17 of 17 assets reused" in align(home, "run", "tiny").stdout
    shown = align(home, "run", "tiny", "--set", "dpo.learning_rate=1e-4", "--dry-run").stdout
    verdicts = dict(line.split()[:2] for line in shown.splitlines()[1:-1])
    assert {asset for asset, verdict in verdicts.items() if verdict != "reuse"} == {
        "dpo_policy", "dpo_evaluation", "comparison",
    }  # fmt: skip
    assert "dpo.learning_rate 0.0003 → 0.0001" in shown
