import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import load_scorer, load_tokenizer
from alignment_pipeline.preferences import make_pair
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.reward import RewardScorer, score_rows
from alignment_pipeline.reward_report import length_baseline_accuracy
from alignment_pipeline.statistics import win_rate
from alignment_pipeline.tokenization import encode, encode_side


def test_the_published_scorer_has_the_reported_accuracy(smoke: Any) -> None:
    artifact, trunk = smoke.artifact("reward_model"), smoke.artifact("sft_model")
    metrics = smoke.results["reward_model"].metrics
    pairs = {
        split: read_jsonl(smoke.artifact("preference_pairs") / f"{split}.jsonl") for split in ("train", "validation")
    }
    tokenizer, scorer = load_tokenizer(trunk), load_scorer(artifact, trunk)
    held_out = pairs["validation"]
    prompts = encode(tokenizer, [pair["prompt"] for pair in held_out])
    scores = [
        score_rows(
            scorer,
            [[*prompt, *ids] for prompt, ids in zip(prompts, encode_side(tokenizer, held_out, side), strict=True)],
            tokenizer.pad_token_id,
            8,
        )
        for side in ("chosen", "rejected")
    ]
    # A merged adapter rounds otherwise, which may turn a pair whose scores are nearly equal.
    one_pair = 1 / len(held_out)
    assert metrics["reward/held_out_accuracy"] == pytest.approx(win_rate(*scores), abs=one_pair)
    baseline = length_baseline_accuracy(pairs["train"], pairs["validation"])
    assert metrics["reward/length_baseline_accuracy"] == baseline
    check = smoke.results["reward_model"].checks[0]
    assert check.passed == (metrics["reward/held_out_accuracy"] > baseline)


def test_a_preference_that_can_be_seen_is_learned(smoke: Any, tmp_path: Path) -> None:
    prompts = [f"### Instruction:\n{number}\n\n### Response:\n" for number in range(24)]
    pairs = [
        make_pair(prompt_id=str(number), prompt=prompt, chosen=f"x{number} yes", rejected=f"x{number} no!",
                  source="human", labeller="test")
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs" / "train.jsonl", pairs[:16])
    write_jsonl(tmp_path / "pairs" / "validation.jsonl", pairs[16:])
    log = ProgressLog(tmp_path / "progress.jsonl")
    torch.manual_seed(0)
    result = smoke.run(
        "reward_model", tmp_path / "run", log, inputs={"pairs": tmp_path / "pairs"}, learning_rate=1e-2, max_steps=30,
        epochs=20.0,
    )  # fmt: skip
    losses = [metrics["train/loss"] for metrics in metric_series(log.path).values()]
    near_zero_scores = 0.1  # the head is new: its scores start within a few hundredths of each other
    assert losses[0] == pytest.approx(math.log(2), abs=near_zero_scores)
    assert losses[-1] < 0.3
    assert result.metrics["reward/held_out_accuracy"] == 1.0
    assert result.metrics["reward/length_baseline_accuracy"] == 0.5  # both responses are equally long


LONG = "return " * 100


def test_a_model_that_was_trained_on_short_texts_scores_no_longer_ones(smoke: Any, tmp_path: Path) -> None:
    smoke.run("reward_model", tmp_path / "run", max_tokens=80, max_steps=1)
    trunk = smoke.artifact("sft_model")
    scorer = RewardScorer.load(tmp_path / "run" / "output", trunk)
    tokenizer = load_tokenizer(trunk)
    prompt, response = encode(tokenizer, ["Say it.", LONG])
    cut = (prompt + response)[-80:]
    wanted = score_rows(scorer.model, [cut], tokenizer.pad_token_id, 1)
    assert scorer.score(["Say it."], [LONG], [False]) == wanted
    assert scorer.score_sampled(tokenizer, ["Say it."], [prompt], [response], 1) == wanted
    assert score_rows(scorer.model, [prompt + response], tokenizer.pad_token_id, 1) != wanted
