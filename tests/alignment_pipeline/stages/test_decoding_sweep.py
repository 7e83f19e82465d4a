import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.decoding import respond
from alignment_pipeline.decoding_configs import DecodingSweepConfig
from alignment_pipeline.diversity import distinct
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.progress import ProgressLog, read_progress
from alignment_pipeline.stages.decoding_sweep import settings_of, sweep_decoding
from alignment_pipeline.stages.evaluation import evaluate_policy, summarize
from alignment_pipeline.tokenization import encode

SMOKE = ["greedy", "temperature 1", "temperature 1, top-p 0.9", "beams 2"]
EXACT = 1e-12  # means of a few numbers in double precision


def test_one_knob_is_varied_at_a_time_and_each_setting_stands_once() -> None:
    config = DecodingSweepConfig(
        judge="gold_rule", temperatures=[0, 0.5, 1, 0.5], top_ks=[20], top_ps=[0.9, 1.0], num_beams=[5],
        repetition_penalties=[1.0, 1.2], min_new_tokens=[16], max_new_tokens=32, max_lengths=[8, 32],
    )  # fmt: skip
    settings = settings_of(config)
    assert list(settings) == [
        "greedy", "temperature 0.5", "temperature 1", "temperature 1, top-k 20", "temperature 1, top-p 0.9",
        "temperature 1, top-p 1", "beams 5", "greedy, rep. penalty 1.2", "greedy, min 16 tokens",
        "greedy, max 8 tokens",
    ]  # fmt: skip
    assert [setting.max_new_tokens for setting in settings.values()] == [32] * 9 + [8]


def test_a_sweep_has_a_row_for_each_setting_and_an_example_for_each_prompt_and_setting(smoke: Any) -> None:
    folder = smoke.artifact("decoding_sweep")
    table, examples = read_jsonl(folder / "table.jsonl"), read_jsonl(folder / "examples.jsonl")
    assert [row["setting"] for row in table] == SMOKE
    assert [row["setting"] for row in examples] == SMOKE * 6  # the same prompt's responses stand together
    assert len({row["prompt_id"] for row in examples[:4]}) == 1 and len({row["prompt_id"] for row in examples}) == 6
    tokenizer = load_tokenizer(smoke.artifact("sft_model"))
    for row in table:
        rows = [example for example in examples if example["setting"] == row["setting"]]
        metrics = summarize([{**example, "kl_nats": 0.0} for example in rows])
        for name in ("bleu", "judge_score", "learned_score", "mean_tokens", "eos_rate"):
            assert row[name] == pytest.approx(metrics[f"eval/{name}"], abs=EXACT), name
        if not any(example["ended"] for example in rows):
            tokens = encode(tokenizer, [example["response"] for example in rows])
            assert row["distinct_1"] == pytest.approx(distinct(tokens, 1), abs=0.05)  # a text has other encodings
        assert 0 <= row["repetition"] < 1 and 0 < row["distinct_2"] <= 1
    assert [row["num_beams"] for row in table] == [1, 1, 1, 2]
    assert [row["top_p"] for row in table] == [None, None, 0.9, None]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {"judge": "gold_rule", "judge_title": "gold score", "prompts": 6, "settings": 4}
    assert (folder / "extras" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_responses_are_those_of_the_named_policy_and_its_scores_those_of_an_evaluation(
    smoke: Any, tmp_path: Path
) -> None:
    spec = smoke.spec("decoding_sweep", tmp_path / "sweep", {"policy": smoke.artifact("ppo_policy")})
    sweep_decoding(spec, ProgressLog(tmp_path / "progress.jsonl"))
    examples = read_jsonl(spec.output_dir / "examples.jsonl")
    policy, tokenizer = load_policy(spec.inputs["policy"], spec.inputs["trunk"]), load_tokenizer(spec.inputs["trunk"])
    for number, setting in enumerate(settings_of(spec.config).values()):
        rows = examples[number::4]
        prompts = encode(tokenizer, [row["prompt"] for row in rows])
        expected = respond(policy, tokenizer, prompts, setting, batch_size=128, seed=0)
        assert [row["response"] for row in rows] == [response.text for response in expected]
    evaluation = smoke.spec("ppo_evaluation", tmp_path / "evaluation", prompts=6, max_new_tokens=16)
    evaluate_policy(evaluation, ProgressLog(tmp_path / "progress.jsonl"))
    rounding = 1e-4  # float32 in batches of another shape
    for ours, theirs in zip(examples[1::4], read_jsonl(evaluation.output_dir / "examples.jsonl"), strict=True):
        assert {name: ours[name] for name in ("prompt_id", "response", "judge_score", "ended")} == {
            name: theirs[name] for name in ("prompt_id", "response", "judge_score", "ended")
        }
        assert ours["learned_score"] == pytest.approx(theirs["learned_score"], abs=rounding)


def test_without_a_reward_there_is_no_learned_score(smoke: Any, tmp_path: Path) -> None:
    spec = smoke.spec("decoding_sweep", tmp_path, prompts=2, num_beams=[], top_ps=[], max_new_tokens=4)
    spec = dataclasses.replace(spec, inputs={name: spec.inputs[name] for name in ("dataset", "policy", "trunk")})
    sweep_decoding(spec, ProgressLog(tmp_path / "progress.jsonl"))
    assert {row["learned_score"] for row in read_jsonl(spec.output_dir / "table.jsonl")} == {None}


class Stopped(Exception):
    """Stands for a killed process."""


class StopsAfterTwoSettings(ProgressLog):
    def step(self, phase: str, step: int, *rest: Any) -> None:
        if (phase, step) == ("decode", 2):
            raise Stopped
        super().step(phase, step, *rest)


def test_a_resumed_sweep_keeps_the_settings_that_were_done_and_ends_the_same(smoke: Any, tmp_path: Path) -> None:
    whole = smoke.artifact("decoding_sweep")
    spec = smoke.spec("decoding_sweep", tmp_path)
    with pytest.raises(Stopped):
        sweep_decoding(spec, StopsAfterTwoSettings(tmp_path / "first.jsonl"))
    done = {path.name: path.stat().st_mtime_ns for path in spec.work_dir.iterdir()}
    assert len(done) == 2
    sweep_decoding(spec, ProgressLog(tmp_path / "second.jsonl"))
    assert {name: (spec.work_dir / name).stat().st_mtime_ns for name in done} == done
    for name in ("table.jsonl", "examples.jsonl", "summary.json"):
        assert (spec.output_dir / name).read_bytes() == (whole / name).read_bytes()
    phases = [line["phase"] for line in read_progress(tmp_path / "second.jsonl")]
    assert phases == ["decode"] * 4 + ["sweep"] * 4


def test_a_resumed_sweep_makes_responses_anew_of_which_not_all_are_there(smoke: Any, tmp_path: Path) -> None:
    spec = smoke.spec("decoding_sweep", tmp_path)
    with pytest.raises(Stopped):
        sweep_decoding(spec, StopsAfterTwoSettings(tmp_path / "first.jsonl"))
    cut, short = sorted(spec.work_dir.iterdir())
    whole = {path: path.read_bytes() for path in (cut, short)}
    cut.write_bytes(whole[cut][:-20])
    short.write_bytes(b"".join(whole[short].splitlines(keepends=True)[:-1]))
    sweep_decoding(spec, ProgressLog(tmp_path / "second.jsonl"))
    assert {path: path.read_bytes() for path in (cut, short)} == whole
    table = spec.output_dir / "table.jsonl"
    assert table.read_bytes() == (smoke.artifact("decoding_sweep") / "table.jsonl").read_bytes()
