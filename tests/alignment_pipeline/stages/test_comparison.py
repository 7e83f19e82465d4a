import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from alignment_pipeline.decoding_configs import EvaluationConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.comparison import compare_policies
from alignment_pipeline.statistics import wilson_interval

EXACT = 1e-12  # means of a few numbers in double precision


def examples(scores: list[float], prefix: str = "p", **values: Any) -> list[dict[str, Any]]:
    return [
        {"prompt_id": f"{prefix}{number}", "prompt": f"prompt {number}", "reference": "def f(x): return x",
         "response": f"response {number}", "judge": "gold_rule", "judge_score": score, "learned_score": None,
         "kl_nats": 1.0, "tokens": 3, "ended": True, "temperature": 1.0, "decoding": "temperature 1"} | values
        for number, score in enumerate(scores)
    ]  # fmt: skip


def compare(folder: Path, **policies: list[dict[str, Any]]) -> tuple[StageResult, Path]:
    for policy, rows in policies.items():
        write_jsonl(folder / policy / "examples.jsonl", rows)
    output_dir = folder / "output"
    output_dir.mkdir()
    inputs = {policy: folder / policy for policy in policies}
    spec = StageSpec(EvaluationConfig(judge="gold_rule"), inputs, output_dir, folder / "work", seed=0)
    return compare_policies(spec, ProgressLog(folder / "progress.jsonl")), output_dir


def table_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in read_jsonl(output / "table.jsonl")}


def test_a_win_rate_is_over_paired_prompts_with_ties_counted_half(tmp_path: Path) -> None:
    # Paired: win, tie, loss, win. Sorted or unpaired the two lists would tie throughout.
    sft, ppo = [0.1, 0.5, 0.9, 0.2], [0.2, 0.5, 0.1, 0.9]
    _, output = compare(
        tmp_path, base_model=examples([0.0] * 4), sft_model=examples(sft), ppo_policy=examples(ppo, kl_nats=2.0)
    )
    table = table_of(output)
    assert list(table) == ["base_model", "sft_model", "ppo_policy"]
    assert {row["opponent"] for row in table.values()} == {"sft_model"}
    assert [table[policy]["win_rate"] for policy in table] == [0.0, 0.5, 0.625]
    low, high = wilson_interval(0.625, 4)
    assert (table["ppo_policy"]["win_rate_low"], table["ppo_policy"]["win_rate_high"]) == (low, high)
    assert table["ppo_policy"]["judge_score"] == pytest.approx(sum(ppo) / 4, abs=EXACT)
    assert table["ppo_policy"]["kl_nats"] == 2.0
    assert table["ppo_policy"]["prompts"] == 4
    assert {row["judge"] for row in table.values()} == {"gold_rule"}


def test_a_policys_scores_are_compared_with_those_of_the_model_before_it_prompt_by_prompt(tmp_path: Path) -> None:
    base, sft, ppo = [0.0, 0.1, 0.0], [0.5, 0.5, 0.2], [0.9, 0.9, 0.6]
    right, wrong = "def f(x): return x", "x"
    _, output = compare(
        tmp_path, base_model=examples(base, response=wrong, learned_score=1.0),
        sft_model=examples(sft, response=right, learned_score=3.0),
        ppo_policy=examples(ppo, response=right, learned_score=2.0),
    )  # fmt: skip
    table = table_of(output)
    assert [row["changed_from"] for row in table.values()] == [None, "base_model", "sft_model"]
    names = [f"{name}_change{bound}" for name in ("bleu", "judge", "learned") for bound in ("", "_low", "_high")]
    assert {table["base_model"][name] for name in names} == {None}
    gained = table["ppo_policy"]
    # Every prompt gained 0.4 by the judge: the scores vary, their differences do not.
    assert [gained[f"judge_change{bound}"] for bound in ("", "_low", "_high")] == pytest.approx([0.4] * 3, abs=EXACT)
    assert [gained[f"learned_change{bound}"] for bound in ("", "_low", "_high")] == [-1.0] * 3
    assert [gained[f"bleu_change{bound}"] for bound in ("", "_low", "_high")] == [0.0] * 3
    assert table["sft_model"]["bleu_change"] == pytest.approx(
        table["sft_model"]["bleu"] - table["base_model"]["bleu"], abs=EXACT
    )
    assert table["sft_model"]["judge_change"] == pytest.approx(1.1 / 3, abs=EXACT)
    assert table["sft_model"]["judge_change_low"] == pytest.approx(
        1.1 / 3 - 1.96 * stdev([0.5, 0.4, 0.2]) / 3**0.5, abs=1e-4
    )


def test_without_learned_scores_nothing_is_said_of_their_change(tmp_path: Path) -> None:
    _, output = compare(tmp_path, base_model=examples([0.1, 0.2]), dpo_policy=examples([0.5, 0.6]))
    row = table_of(output)["dpo_policy"]
    assert (row["changed_from"], row["learned_change"], row["learned_change_low"]) == ("base_model", None, None)
    assert row["judge_change"] == pytest.approx(0.4, abs=EXACT)


def test_without_an_sft_model_the_base_model_is_the_opponent(tmp_path: Path) -> None:
    result, output = compare(tmp_path, base_model=examples([0.1, 0.2]), dpo_policy=examples([0.5, 0.6]))
    assert {row["opponent"] for row in table_of(output).values()} == {"base_model"}
    assert json.loads((output / "summary.json").read_text())["opponent"] == "base_model"
    assert {check.name for check in result.checks} == {
        "dpo_policy_beats_base_model", "dpo_policy_kl_within_budget"
    }  # fmt: skip
    assert result.metrics["dpo_policy/win_rate"] == 1.0


def test_policies_measured_on_other_prompts_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="base_model and sft_model have different prompt_id values"):
        compare(tmp_path, base_model=examples([0.1, 0.2], prefix="q"), sft_model=examples([0.1, 0.2]))


@pytest.mark.parametrize("other", [{"decoding": "beams 5"}, {"judge": "reference_chrf"}], ids=str)
def test_policies_measured_in_other_ways_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"have different {next(iter(other))} values"):
        compare(tmp_path, sft_model=examples([0.1]), base_model=examples([0.1]), ppo_policy=examples([0.1], **other))


@pytest.mark.parametrize(("kl_nats", "passed"), [(30.5, False), (29.5, True)])
def test_a_policy_that_is_too_far_from_the_trunk_gets_a_warning(tmp_path: Path, kl_nats: float, passed: bool) -> None:
    result, _ = compare(
        tmp_path, base_model=examples([0.1], kl_nats=99.0), sft_model=examples([0.1]),
        ppo_policy=examples([0.5], kl_nats=kl_nats),
    )  # fmt: skip
    checks = {check.name: check for check in result.checks if "kl" in check.name}
    assert {name: (check.passed, check.blocking) for name, check in checks.items()} == {
        "ppo_policy_kl_within_budget": (passed, False)
    }


@pytest.mark.parametrize(("wins", "passed"), [(40, True), (27, False)])
def test_a_policy_beats_its_opponent_when_the_whole_interval_lies_above_one_half(
    tmp_path: Path, wins: int, passed: bool
) -> None:
    ppo = [1.0] * wins + [0.0] * (50 - wins)
    result, _ = compare(
        tmp_path, base_model=examples([0.0] * 50), sft_model=examples([0.5] * 50), ppo_policy=examples(ppo)
    )
    checks = {check.name: check for check in result.checks}
    assert (checks["ppo_policy_beats_sft_model"].passed, checks["ppo_policy_beats_sft_model"].blocking) == (
        passed,
        False,
    )


def test_sft_beats_base_needs_both_measures(tmp_path: Path) -> None:
    better_text = examples([0.1, 0.1], response="def f(x): return x")
    for number, (sft, passed) in enumerate(
        [(better_text, True), (examples([0.1, 0.1]), False), (better_text[:1] + examples([0.1, -0.2])[1:], False)]
    ):
        result, _ = compare(tmp_path / str(number), base_model=examples([0.0, 0.0]), sft_model=sft)
        assert {check.name: check.passed for check in result.checks} == {"sft_beats_base": passed}


def test_examples_stand_side_by_side(tmp_path: Path) -> None:
    base, sft = examples([0.1] * 20, response="b"), examples([0.2] * 20, response="s")
    _, output = compare(tmp_path, base_model=base, sft_model=sft)
    shown = read_jsonl(output / "examples.jsonl")
    assert [row["prompt_id"] for row in shown] == [f"p{number}" for number in range(8)]
    assert shown[0]["responses"] == {
        "base_model": {"response": "b", "judge_score": 0.1},
        "sft_model": {"response": "s", "judge_score": 0.2},
    }


def test_the_plot_is_no_part_of_the_result(tmp_path: Path) -> None:
    _, output = compare(tmp_path, base_model=examples([0.1, 0.2]), sft_model=examples([0.1, 0.2]))
    assert (output / "extras" / "judge_score.png").read_bytes().startswith(b"\x89PNG")
