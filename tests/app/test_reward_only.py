"""A recipe that ends at its reward model, run as a person runs it: its table, and `align score`."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
name: judging
description: A reward model from given preferences, and no policy.
data: {path: pairs.jsonl, form: preferences, validation_fraction: 0.1, test_fraction: 0.1}
base_model:
  {vocab_size: 320, hidden_size: 16, num_layers: 1, num_heads: 2, max_positions: 100, pretrain_steps: 5,
   pretrain_batch_size: 4, pretrain_block_tokens: 32}
formatting: {max_prompt_tokens: 60, max_tokens: 100}
labelling: {method: dataset_pair}
pairs: {validation_fraction: 0.3}
reward_model: {method: full, learning_rate: 1e-2, batch_size: 8, epochs: 20, max_steps: 40, max_tokens: 30}
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "judging.yaml").write_text(RECIPE)
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} yes", "rejected": f"{n} no!"} for n in range(60)]
    long = " ".join("abcdefghijklmnopqrstuvwxy")
    rows += [{"prompt": f"Say {n} at length.", "chosen": f"{n} yes {long}", "rejected": "no"} for n in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def env(recipes: Path) -> dict[str, str]:
    return {"ALIGNMENT_RECIPES": str(recipes)}


@pytest.fixture(scope="module")
def made(recipes: Path, align: Run) -> tuple[Path, str]:
    """The home, and what the run printed."""
    home = recipes.parent / "home"
    done = align(home, "run", "judging", env={"ALIGNMENT_RECIPES": str(recipes)})
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done.stdout


def error_of(done: "subprocess.CompletedProcess[str]") -> str:
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("Error")]
    return line


def test_the_run_ends_with_the_reward_models_table_and_what_to_do_next(made: tuple[Path, str]) -> None:
    _, shown = made
    for expected in ("judging: ", "held-out pairs", "reward model", "length alone", "shuffled prompts", "too long"):
        assert expected in shown
    assert "align score judging FILE" in shown and "Error" not in shown


def test_results_are_the_table_and_as_json_its_numbers(made: tuple[Path, str], env: dict[str, str], align: Run) -> None:
    home, shown = made
    assert align(home, "results", "judging", env=env).stdout.strip() in shown.strip()
    for arguments in (["judging"], []):
        (found,) = json.loads(align(home, "results", *arguments, "--json", env=env).stdout)
        assert (found["recipe"], found["asset"]) == ("judging", "reward_model")
        assert [row["scorer"] for row in found["table"]] == ["reward model", "length alone", "shuffled prompts"]
        assert found["table"][0]["accuracy"] == found["metrics"]["reward/held_out_accuracy"] > 0.9
        assert found["pairs"]["dropped"] > 0
    artifact = home / "artifacts" / found["artifact"]
    assert sum(1 for _ in (artifact / "dropped.jsonl").open()) == found["pairs"]["dropped"]
    assert {path.name for path in (artifact / "extras").glob("*.png")} >= {"calibration.png", "margins.png"}


def test_a_pair_that_was_too_long_is_not_learned_from(made: tuple[Path, str], align: Run) -> None:
    statement = (
        "SELECT count(*) AS learned, count(*) FILTER (pairs.prompt LIKE '%at length%') AS too_long FROM training_rows "
        "JOIN preference_pairs AS pairs ON pairs.pair_id = row_id WHERE kind = 'preference_pair'"
    )
    found = json.loads(align(made[0], "lineage", "sql", statement).stdout)
    assert found["learned"] > 20 and found["too_long"] == 0


def test_a_pattern_that_is_told_apart_too_well_is_a_warning(made: tuple[Path, str]) -> None:
    assert "Warning: reward_model: reward_model_accuracy_is_plausible does not hold. 100.0% of" in made[1]


def test_responses_are_scored_from_a_file_and_from_standard_input(
    made: tuple[Path, str], env: dict[str, str], align: Run, tmp_path: Path
) -> None:
    home, _ = made
    lines = "".join(json.dumps({"prompt": "Say 7.", "response": text}) + "\n\n" for text in ("7 yes", "7 no!"))
    (tmp_path / "rows.jsonl").write_text(lines)
    from_file = align(home, "score", "judging", str(tmp_path / "rows.jsonl"), "--json", env=env)
    assert from_file.returncode == 0 and from_file.stderr == "", from_file.stderr
    better, worse = (json.loads(line)["score"] for line in from_file.stdout.splitlines())
    assert better > worse
    assert align(home, "score", "judging", "--json", env=env, input=lines).stdout == from_file.stdout
    shown = align(home, "score", "judging", env=env, input=lines).stdout
    assert "Scores by reward_model of judging" in shown and f"{better:.3f}" in shown


def test_of_pairs_the_preferred_one_is_named_and_how_often_a_is(
    made: tuple[Path, str], env: dict[str, str], align: Run
) -> None:
    home, _ = made
    pairs = [("7 yes", "7 no!"), ("8 no!", "8 yes"), ("9 yes", "9 no!"), ("same", "same")]
    lines = "".join(json.dumps({"prompt": f"Say {a[0]}.", "response_a": a, "response_b": b}) + "\n" for a, b in pairs)
    *rows, total = map(json.loads, align(home, "score", "judging", "--json", env=env, input=lines).stdout.splitlines())
    assert [row["preferred"] for row in rows] == ["A", "B", "A", None]
    found = total["preference_of_a"]
    assert (found["win_rate"], found["pairs"]) == (0.625, 4) and found["low"] < 0.625 < found["high"]
    assert "A is preferred in 62.5% of 4 pairs" in align(home, "score", "judging", env=env, input=lines).stdout


def test_a_prompt_may_be_a_dialogue_or_messages_as_in_preference_data(
    made: tuple[Path, str], env: dict[str, str], align: Run
) -> None:
    turns = [("user", "Say 7."), ("assistant", "7 yes"), ("user", "Say 8.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    dialogue = "\n\nHuman: Say 7.\n\nAssistant: 7 yes\n\nHuman: Say 8.\n\nAssistant:"
    records: list[dict[str, object]] = [
        {"prompt": messages, "chosen": "8 yes", "rejected": "8 no!", "id": 7},
        {"prompt": dialogue, "chosen": " 8 yes", "rejected": " 8 no!"},
        {"chosen": f"{dialogue} 8 yes", "rejected": f"{dialogue} 8 no!"},
        {"prompt": "Human: Say 7.\n\nAssistant: 7 yes\n\nHuman: Say 8.", "chosen": "8 yes", "rejected": "8 no!"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    done = align(made[0], "score", "judging", "--json", env=env, input=lines)
    assert done.returncode == 0, done.stderr
    *rows, total = map(json.loads, done.stdout.splitlines())
    # The recipe's template has no turns, so that all four are the same transcript; of it the end is read.
    for row in rows:
        assert row["score_a"] == pytest.approx(rows[0]["score_a"], abs=1e-5) and row["preferred"] == "A"
        assert row["score_b"] == pytest.approx(rows[0]["score_b"], abs=1e-5)
    assert total["preference_of_a"]["pairs"] == 4


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "standard input: found no line, expected"),
        ('{"prompt": [{"role": "cook", "content": "a"}], "response": "b"}\n',
         'standard input, line 1: found bad_roles: prompt, message 1: role'),
        ('{"chosen": "a", "rejected": "b"}\n', "standard input, line 1: found missing_key: no prompt, and"),
        ("hello\n", "standard input, line 1: found no JSON"),
        ('{"prompt": "a"}\n', 'standard input, line 1: found {"prompt": "a"}, expected'),
        ('{"prompt": "a", "response": 3}\n', "standard input, line 1: found"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response_a": "b", "response_b": "c"}\n',
         "standard input, line 2: found response_a and response_b after response, expected"),
    ],
    ids=["nothing", "another role", "no prompt", "no JSON", "a key is missing", "a number", "both forms"],
)  # fmt: skip
def test_lines_that_cannot_be_scored_are_one_sentence(
    made: tuple[Path, str], env: dict[str, str], align: Run, lines: str, expected: str
) -> None:
    assert expected in error_of(align(made[0], "score", "judging", env=env, input=lines))


def test_a_template_that_was_changed_in_the_recipe_since_changes_no_score_and_no_answer(
    made: tuple[Path, str], env: dict[str, str], align: Run, tmp_path: Path
) -> None:
    home, _ = made
    changed = RECIPE.replace("formatting: {", "formatting: {template: human_assistant, ")
    (tmp_path / "judging.yaml").write_text(changed)
    since = {"ALIGNMENT_RECIPES": str(tmp_path)}
    for arguments, given in (
        (("score", "judging", "--json"), '{"prompt": "Say 7.", "response": "7 yes"}\n'),
        (("chat", "judging", "base_model", "--max-new-tokens", "16", "--temperature", "1"), "Say 7.\n"),
    ):
        before, after = (align(home, *arguments, env=each, input=given) for each in (env, since))
        assert (before.returncode, after.returncode) == (0, 0), after.stdout + after.stderr
        assert before.stdout == after.stdout and before.stdout


def test_a_file_that_is_not_there_and_a_reward_that_is_not_made(
    made: tuple[Path, str], env: dict[str, str], align: Run, tmp_path: Path
) -> None:
    assert "gone.jsonl cannot be read" in error_of(align(made[0], "score", "judging", "gone.jsonl", env=env))
    message = error_of(align(tmp_path / "home", "score", "judging", env=env, input="{}"))
    assert "reward_model of judging has not been made. Run `align run judging`." in message


def test_an_adapter_scores_on_the_trunk_that_it_was_trained_on(smoke_home: Path, align: Run) -> None:
    done = align(smoke_home, "score", "smoke", "--json", input='{"prompt": "Reverse a list.", "response": "x[::-1]"}\n')
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert abs(json.loads(done.stdout)["score"]) < 10
