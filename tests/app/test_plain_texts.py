"""A recipe of plain texts without SFT, its base model and classifier made on the spot, run as a person runs it."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment_pipeline.classifier import ClassifierScorer
from alignment_pipeline.identity import read_jsonl
from resources.lineage.index import Lineage
from resources.lineage.questions import impact

Run = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
name: texts
description: Plain texts, a classifier as the judge, and no SFT.
data: {path: reviews.jsonl, text_field: review, validation_fraction: 0.1, test_fraction: 0.2}
base_model:
  {vocab_size: 320, hidden_size: 16, num_layers: 1, num_heads: 2, max_positions: 80, pretrain_steps: 5,
   pretrain_batch_size: 4, pretrain_block_tokens: 32}
formatting: {prefix_tokens_min: 3, prefix_tokens_max: 6, max_prompt_tokens: 20, max_tokens: 60}
sampling: {prompts: 16, samples_per_prompt: 2, max_new_tokens: 8}
labelling: {method: dataset_answer}
pairs: {validation_fraction: 0.3}
dpo: {max_steps: 2, batch_size: 4, lora_rank: 4}
reward_classifier:
  {train_path: labelled.jsonl, label: GOOD, label_names: [BAD, GOOD], vocab_size: 300, hidden_size: 16, num_heads: 2}
ppo: {updates: 2, rollout_batch_size: 8, minibatch_size: 4, max_new_tokens: 6, missing_eos_penalty: 0, lora_rank: 4}
evaluation: {judge: reward_classifier, prompts: 12, max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "texts.yaml").write_text(RECIPE)
    rng = random.Random(0)
    words = ["film", "story", "plot", "cast", "music", "scene", "actor", "end"]
    texts = [" ".join(rng.choices(words, k=6)) for _ in range(120)]
    rows = [{"review": text, "stars": 3} for text in texts]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [{"text": text, "label": int("film" in text)} for text in texts]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return folder


@pytest.fixture(scope="module")
def home(recipes: Path, align: Run) -> Path:
    home = recipes.parent / "home"
    done = align(home, "run", "texts", env={"ALIGNMENT_RECIPES": str(recipes)})
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_its_results_are_against_the_base_model_by_the_classifier(home: Path, recipes: Path, align: Run) -> None:
    env = {"ALIGNMENT_RECIPES": str(recipes)}
    (results,) = json.loads(align(home, "results", "texts", "--json", env=env).stdout)
    assert (results["judge"], results["judge_title"], results["opponent"]) == (
        "reward_classifier",
        "P(label)",
        "base_model",
    )
    policies = {row["policy"]: row for row in results["policies"]}
    assert list(policies) == ["base_model", "ppo_policy", "dpo_policy"]
    assert all(0 < row["judge_score"] < 1 and row["learned_score"] is not None for row in policies.values())
    checks = {(check["asset"], check["name"]) for check in results["checks"]}
    assert ("reward_classifier", "reward_classifier_beats_majority") in checks
    assert ("comparison", "dpo_policy_beats_base_model") in checks
    shown = align(home, "results", "texts", env=env).stdout
    assert "judge: P(label)" in shown and "against base_model" in shown


def test_ppo_was_rewarded_by_the_classifiers_score_for_its_label(home: Path) -> None:
    (classifier,) = (home / "artifacts" / "reward_classifier").glob("*/*")
    (samples,) = (home / "artifacts" / "ppo_policy").glob("*/*/extras/samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {row["update"] for row in rows} == {1, 2}
    expected = ClassifierScorer.load(classifier, "GOOD").scores([row["prompt"] + row["response"] for row in rows], 4)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-4)  # other batches round otherwise


def test_its_policies_continue_a_text_in_chat(home: Path, recipes: Path, align: Run) -> None:
    env = {"ALIGNMENT_RECIPES": str(recipes)}
    done = align(home, "chat", "texts", "dpo_policy", "--max-new-tokens", "4", env=env, input="film story\n")
    assert done.returncode == 0, done.stderr
    assert "base_model is its trunk" in done.stdout


def test_an_unknown_label_of_a_given_classifier_is_one_message(home: Path, recipes: Path, align: Run) -> None:
    (classifier,) = (home / "artifacts" / "reward_classifier").glob("*/*/model")
    given = ["--set", "reward_classifier.train_path=null", "--set", f"reward_classifier.path={classifier}",
             "--select", "reward_classifier"]  # fmt: skip
    env = {"ALIGNMENT_RECIPES": str(recipes)}
    taken = align(home, "run", "texts", *given, env=env)
    assert taken.returncode == 0, taken.stdout + taken.stderr
    done = align(home, "run", "texts", *given, "--set", "reward_classifier.label=POSITIVE", env=env)
    assert done.returncode == 1
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("Error")]
    assert message.startswith("Error in reward_classifier: reward_classifier.label: found 'POSITIVE', but ")
    assert "has the labels BAD, GOOD" in message


def test_lineage_knows_a_text_by_its_beginning_too(home: Path) -> None:
    lineage = Lineage(home)
    (asked,) = lineage.query("SELECT any_value(prompt_id) AS prompt_id FROM evaluation_examples")
    answer = impact(lineage, asked["prompt_id"])
    assert {row["split"] for row in answer["found"]} == {"test"} and answer["learned"] == []
    assert {name for entry in answer["asked"] for name in entry["assets"]} >= {"texts/ppo_evaluation"}
    (test_row,) = {row["row_id"] for row in answer["found"]}
    assert impact(lineage, test_row)["asked"] == answer["asked"]

    (sampled,) = lineage.query("SELECT min(prompt_id) AS prompt_id FROM rollouts")
    formatted = next((home / "artifacts" / "formatted_dataset").glob("*/*/train.jsonl"))
    row = next(row for row in read_jsonl(formatted) if row["prompt_id"] == sampled["prompt_id"])
    learned = {entry["stage"]: entry["kinds"] for entry in impact(lineage, row["id"])["learned"]}
    assert learned["ppo_policy"] == ["rollout"] and learned["base_model"] == ["pretraining_row"]
    assert lineage.query("SELECT * FROM leaked_prompts") == []
