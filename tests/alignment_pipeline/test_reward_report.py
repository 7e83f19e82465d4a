import math
from typing import Any

import pytest

from alignment_pipeline.preferences import PreferencePair, make_pair
from alignment_pipeline.reward_report import (
    CalibrationBin,
    calibration,
    calibration_error,
    length_baseline_accuracy,
    report,
    shuffled_prompts,
)
from alignment_pipeline.statistics import wilson_interval


def pairs(*lengths: tuple[int, int]) -> list[PreferencePair]:
    return [
        make_pair(prompt_id="p", prompt=f"{number}", chosen="c" * chosen, rejected="r" * rejected, source="dataset",
                  labeller="test")
        for number, (chosen, rejected) in enumerate(lengths)
    ]  # fmt: skip


def margin_of(confidence: float) -> float:
    return math.log(confidence / (1 - confidence))


def test_the_length_baseline_learns_its_direction_from_the_training_pairs() -> None:
    held_out = pairs((5, 1), (5, 2), (1, 3), (2, 2))
    longer_wins, shorter_wins = pairs((9, 1), (8, 2), (1, 2)), pairs((1, 9))
    assert length_baseline_accuracy(longer_wins, held_out) == 0.625
    assert length_baseline_accuracy(shorter_wins, held_out) == 0.375


def test_held_out_pairs_do_not_choose_the_direction() -> None:
    assert length_baseline_accuracy(pairs((1, 9)), pairs((9, 1), (9, 1))) == 0.0


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_pairs() -> None:
    # By hand. Bin [0.60, 0.65): 0.62 right, 0.64 wrong, so 1/2 of two pairs are right at a confidence of 0.63.
    # Bin [0.90, 0.95): 0.92 right. Bin [0.95, 1]: 0.98 wrong, and 0.5 a tie in the first bin: 1/2 right, gap 0.
    margins = [margin_of(0.62), -margin_of(0.64), margin_of(0.92), -margin_of(0.98), 0.0]
    bins = calibration(margins)
    assert [each.pairs for each in bins] == [1, 2, 1, 1]
    assert [each.accuracy for each in bins] == [0.5, 0.5, 1.0, 0.0]
    assert [each.confidence for each in bins] == pytest.approx([0.5, 0.63, 0.92, 0.98])
    assert calibration_error(bins) == pytest.approx((2 * 0.13 + 0.08 + 0.98) / 5)


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    margins = [margin_of(0.75)] * 3 + [-margin_of(0.75)]
    assert calibration_error(calibration(margins)) == pytest.approx(0.0, abs=1e-12)


def test_a_model_that_is_certain_is_in_the_last_bin() -> None:
    assert calibration([800.0, -800.0]) == [CalibrationBin(confidence=1.0, accuracy=0.5, pairs=2)]


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_keeps_its_prompt_and_each_prompt_is_used_as_often_as_there_are_pairs_of_another(seed: int) -> None:
    prompts = ["a", "b", "a", "c", "d", "b"]
    others = shuffled_prompts(prompts, seed)
    assert others is not None
    assert all(other != prompt for other, prompt in zip(others, prompts, strict=True))
    assert len({(prompt, other) for prompt, other in zip(prompts, others, strict=True)}) == 4
    assert set(others) == set(prompts)
    assert others == shuffled_prompts(prompts, seed)


def test_another_seed_shuffles_otherwise_and_one_prompt_cannot_be_shuffled() -> None:
    prompts = [str(number) for number in range(20)]
    assert shuffled_prompts(prompts, 0) != shuffled_prompts(prompts, 1)
    assert shuffled_prompts(["a", "a"], 0) is None


def test_the_report_has_a_row_for_the_model_for_length_and_for_shuffled_prompts() -> None:
    held_out, train = pairs((5, 1), (1, 5), (3, 1), (2, 2)), pairs((9, 1))
    scored: list[dict[str, Any]] = [
        {"chosen_score": 2.0, "rejected_score": 0.0, "margin": 2.0, "shuffled_chosen_score": 0.0,
         "shuffled_rejected_score": 0.0}
    ] * 3 + [{"chosen_score": 0.0, "rejected_score": 1.0, "margin": -1.0, "shuffled_chosen_score": 0.0,
              "shuffled_rejected_score": 1.0}]  # fmt: skip
    table, metrics = report(scored, train, held_out)
    assert [(row["scorer"], row["accuracy"]) for row in table] == [
        ("reward model", 0.75), ("length alone", 0.625), ("shuffled prompts", 0.375),
    ]  # fmt: skip
    assert (table[0]["accuracy_low"], table[0]["accuracy_high"]) == wilson_interval(0.75, 4)
    assert table[0]["mean_margin"] == 1.25 and table[1]["mean_margin"] is None
    assert metrics["reward/shuffled_prompt_accuracy"] == 0.375
    assert metrics["reward/held_out_margin"] == 1.25


def test_without_a_second_prompt_the_report_says_nothing_of_shuffled_ones() -> None:
    row = {"chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0, "shuffled_chosen_score": None,
           "shuffled_rejected_score": None}  # fmt: skip
    table, metrics = report([row], pairs((2, 1)), pairs((2, 1)))
    assert [row["scorer"] for row in table] == ["reward model", "length alone"]
    assert "reward/shuffled_prompt_accuracy" not in metrics
