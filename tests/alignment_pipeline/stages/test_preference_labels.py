import json
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.configs import LabellingConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.preferences import PreferencePair, read_pairs
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import format_prompt, prompt_id
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.preference_labels import label_preferences
from alignment_pipeline.world.generate import generate_rows
from alignment_pipeline.world.gold import judge_response

WORLD = generate_rows(20, 0)
GOLD = WORLD[0]["output"]
REFERENCE = "abcdefgh"
ANSWER = f" {REFERENCE}"
"""The dataset's answer as a completion begins, in a template that puts a space before it."""

CUT = "…"
"""Marks a sample that did not come to its end."""


def label(
    folder: Path, method: str, *prompts: list[str], pairs_per_prompt: int = 10
) -> tuple[StageResult, list[PreferencePair], dict[str, Any]]:
    """Label the samples of some prompts; with gold_rule they answer the built-in world's tasks."""
    rows, samples = [], []
    for number, responses in enumerate(prompts):
        world = WORLD[number]
        identity = prompt_id(world["instruction"], world["input"])
        rows.append(
            {"prompt_id": identity, "prompt": format_prompt(world["instruction"], world["input"]),
             "instruction": world["instruction"], "input": world["input"],
             "reference": world["output"] if method == "gold_rule" else REFERENCE,
             "completion": f" {REFERENCE}</s>", "rejected": f" not {number}"}
        )  # fmt: skip
        samples += [
            {"prompt_id": identity, "sample": n, "response": text.removesuffix(CUT), "ended": not text.endswith(CUT)}
            for n, text in enumerate(responses)
        ]
    write_jsonl(folder / "dataset" / "train.jsonl", rows)
    write_jsonl(folder / "samples" / "samples.jsonl", samples)
    output = folder / "output"
    output.mkdir()
    config = LabellingConfig(method=method, pairs_per_prompt=pairs_per_prompt)
    inputs = {"dataset": folder / "dataset", "samples": folder / "samples"}
    result = label_preferences(
        StageSpec(config, inputs, output, folder / "work", seed=0), ProgressLog(folder / "progress.jsonl")
    )
    return result, read_pairs(output / "pairs.jsonl"), json.loads((output / "summary.json").read_text())


def texts(pairs: list[PreferencePair]) -> list[tuple[str, str]]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_the_gold_rule_prefers_the_sample_with_more_points(tmp_path: Path) -> None:
    style_only = "def wrong(x: int) -> int:\n    return x\n"
    _, pairs, _ = label(tmp_path, "gold_rule", ["nonsense", GOLD, style_only])
    instruction, input = WORLD[0]["instruction"], WORLD[0]["input"]
    scores = {text: judge_response(instruction, input, text).score for text in (GOLD, style_only, "nonsense")}
    assert scores[GOLD] > scores[style_only] > scores["nonsense"] == 0
    assert texts(pairs)[0] == (GOLD, "nonsense")  # furthest apart first
    assert set(texts(pairs)) == {(GOLD, "nonsense"), (GOLD, style_only), (style_only, "nonsense")}
    for pair in pairs:
        assert (pair["chosen_score"], pair["rejected_score"]) == (scores[pair["chosen"]], scores[pair["rejected"]])
        assert (pair["source"], pair["labeller"]) == ("sampled", "gold_rule")


def test_ties_identical_and_empty_pairs_of_the_gold_rule_are_dropped_and_counted(tmp_path: Path) -> None:
    # Pairs of [gold, gold, "x", "y", ""]: gold-gold identical; x-y tie; four with the empty one; four are left.
    result, pairs, summary = label(tmp_path, "gold_rule", [GOLD, GOLD, "x", "y", " \n"])
    assert sorted(texts(pairs)) == sorted([(GOLD, "x"), (GOLD, "y")] * 2)
    assert summary == {
        "pairs": 4,
        "labeller": "gold_rule",
        "dropped": {"identical": 1, "tie": 1, "empty": 4},
    }
    assert result.metrics["pairs/count"] == 4
    assert (result.metrics["pairs/ties"], result.metrics["pairs/identical"], result.metrics["pairs/empty"]) == (1, 1, 4)
    assert result.metrics["pairs/chosen_longer_share"] == 1.0


def test_chrf_prefers_the_sample_closer_to_the_reference(tmp_path: Path) -> None:
    _, pairs, summary = label(tmp_path, "reference_chrf", ["zzzz", "abcdxxxx", REFERENCE, "yyyy", REFERENCE, ""])
    chosen = {(REFERENCE, "zzzz"), (REFERENCE, "yyyy"), (REFERENCE, "abcdxxxx"), ("abcdxxxx", "zzzz"),
              ("abcdxxxx", "yyyy")}  # fmt: skip
    assert set(texts(pairs)) == chosen
    assert all(pair["chosen_score"] > pair["rejected_score"] >= 0 for pair in pairs)
    assert {pair["chosen_score"] for pair in pairs if pair["chosen"] == REFERENCE} == {1.0}
    assert {(pair["source"], pair["labeller"]) for pair in pairs} == {("sampled", "reference_chrf")}
    assert summary["dropped"] == {"identical": 1, "tie": 1, "empty": 5}


def test_the_datasets_answer_is_preferred_to_every_sample_and_is_of_the_dataset(tmp_path: Path) -> None:
    _, pairs, summary = label(tmp_path, "dataset_answer", ["zzzz", ANSWER, "", "yyyy"])
    assert texts(pairs) == [(ANSWER, "zzzz"), (ANSWER, "yyyy")]
    assert {(pair["source"], pair["labeller"]) for pair in pairs} == {("dataset", "dataset_answer")}
    assert {(pair["chosen_score"], pair["rejected_score"]) for pair in pairs} == {(None, None)}
    assert summary["dropped"] == {"identical": 1, "empty": 1}


def test_rows_that_are_pairs_need_no_samples_and_all_count(tmp_path: Path) -> None:
    _, pairs, summary = label(tmp_path, "dataset_pair", [], [], pairs_per_prompt=1)
    assert texts(pairs) == [(ANSWER, " not 0"), (ANSWER, " not 1")]
    assert {(pair["source"], pair["labeller"]) for pair in pairs} == {("dataset", "dataset_pair")}
    assert all(pair["chosen_ended"] and pair["rejected_ended"] for pair in pairs)
    assert summary == {"pairs": 2, "labeller": "dataset_pair", "dropped": {}}


def test_a_prompt_makes_so_many_pairs_at_most_the_ones_furthest_apart(tmp_path: Path) -> None:
    samples = ["zzzz", "abcdxxxx", REFERENCE, "abxxxxxx"]
    _, every, _ = label(tmp_path / "all", "reference_chrf", samples, samples)
    _, few, _ = label(tmp_path / "few", "reference_chrf", samples, samples, pairs_per_prompt=2)
    assert len(every) == 12 and len(few) == 4
    assert few == every[:2] + every[6:8]
    gaps = [pair["chosen_score"] - pair["rejected_score"] for pair in every[:6]]
    assert gaps == sorted(gaps, reverse=True)


def test_pairs_stay_with_their_prompt(tmp_path: Path) -> None:
    _, pairs, _ = label(tmp_path, "dataset_answer", ["zzzz"], ["yyyy"])
    prompts = [format_prompt(world["instruction"], world["input"]) for world in WORLD[:2]]
    assert [(pair["prompt"], pair["rejected"]) for pair in pairs] == list(zip(prompts, ["zzzz", "yyyy"], strict=True))


def test_samples_that_leave_no_pair_are_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No pair is left from 3 samples \(dropped: .*'tie': 3.*Raise sampling"):
        label(tmp_path, "gold_rule", ["x", "y", "z"])


def test_a_sample_that_was_cut_is_marked_and_the_datasets_answer_has_ended(tmp_path: Path) -> None:
    _, pairs, _ = label(tmp_path, "dataset_answer", ["abc", "abcd" + CUT])
    assert {(pair["rejected"], pair["rejected_ended"]) for pair in pairs} == {("abc", True), ("abcd", False)}
    assert {pair["chosen_ended"] for pair in pairs} == {True}


def test_a_cut_sample_may_be_preferred_and_stays_marked(tmp_path: Path) -> None:
    _, pairs, _ = label(tmp_path, "reference_chrf", ["abcdefg" + CUT, "xyz"])
    assert [(pair["chosen"], pair["chosen_ended"], pair["rejected_ended"]) for pair in pairs] == [
        ("abcdefg", False, True)
    ]
