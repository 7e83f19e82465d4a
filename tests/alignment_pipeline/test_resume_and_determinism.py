"""Every stage is a function of its spec: computed twice, or killed and resumed, it gives the same data version."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from alignment_pipeline.identity import data_version
from alignment_pipeline.progress import ProgressLog, metric_series, read_progress
from alignment_pipeline.stage import StageSpec, stage_function
from alignment_pipeline.stages import base_model

EVERYTHING_OF_PPO: dict[str, Any] = {
    "updates": 4, "kl_target_nats": 0.5, "kl_horizon": 20, "score_normalization": "running", "value_trunk": "separate",
    "max_new_tokens_min": 2, "value_warmup_updates": 1, "schedule": "cosine", "microbatch_size": 2,
}  # fmt: skip
"""What a resumed PPO has to know of the updates before, all of it in force."""
AT_ONCE = 1e-9  # seconds between checkpoints: one after each step


class KilledLog(ProgressLog):
    """A log whose process is killed right after it has reported a step, before that step's checkpoint."""

    def __init__(self, path: Path, killed_at: int) -> None:
        super().__init__(path)
        self._killed_at = killed_at

    def step(self, phase: str, step: int, total: int, metrics: Any = None) -> None:
        super().step(phase, step, total, metrics)
        if step >= self._killed_at:
            raise KeyboardInterrupt


def disturb_global_generators() -> None:
    random.seed(99)
    numpy.random.seed(99)
    torch.manual_seed(99)


def series_of(log: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Metrics by step, without the times, which no two runs share."""
    return {
        step: {name: value for name, value in metrics.items() if not name.startswith("time/")}
        for step, metrics in metric_series(log).items()
    }


def run(smoke: Any, asset: str, spec: StageSpec[Any], log: ProgressLog) -> Any:
    return stage_function(smoke.graph[asset].stage)(spec, log)


@pytest.mark.parametrize(
    ("asset", "killed_at", "changes"),
    [
        ("base_model", 15, {}),
        ("sft_model", 4, {}),
        ("sft_model", 4, {"lora_dropout": 0.3}),
        ("sft_model", 2, {"method": "full", "gradient_accumulation_steps": 2, "max_steps": 3}),
        ("reward_model", 3, {}),
        ("dpo_policy", 3, {}),
        ("ppo_policy", 2, {}),
        ("ppo_policy", 3, {"method": "full", "updates": 4}),
        ("ppo_policy", 1, EVERYTHING_OF_PPO),  # before the first checkpoint
        ("ppo_policy", 3, EVERYTHING_OF_PPO),
        ("ppo_policy", 4, EVERYTHING_OF_PPO | {"method": "full"}),
        ("ppo_policy", 2, {"value_trunk": "reward_model"}),
    ],
    ids=lambda value: "-".join([*value][:2]) if isinstance(value, dict) else str(value),
)
def test_a_killed_stage_resumes_to_the_same_result_to_the_bit(
    smoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asset: str, killed_at: int, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(base_model, "_CHECKPOINT_EVERY_S", AT_ONCE)
    checkpoints = {} if asset == "base_model" else {"checkpoint_every_s": AT_ONCE}
    whole_log = ProgressLog(tmp_path / "whole.jsonl")
    whole = smoke.run(asset, tmp_path / "whole", whole_log, **changes)

    spec = smoke.spec(asset, tmp_path / "killed", **(changes | checkpoints))
    log_path = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(smoke, asset, spec, KilledLog(log_path, killed_at))
    assert list(spec.output_dir.iterdir()) == []
    assert len(list(spec.work_dir.glob("checkpoint-*/sealed.json"))) == min(2, killed_at - 1)
    disturb_global_generators()
    resumed = run(smoke, asset, spec, ProgressLog(log_path))

    notes = [line["text"] for line in read_progress(log_path) if line["kind"] == "note"]
    assert any(note.startswith("Resuming") for note in notes) == (killed_at > 1)
    assert data_version(spec.output_dir) == data_version(tmp_path / "whole" / "output")
    assert resumed.metrics == whole.metrics
    assert series_of(log_path) == series_of(whole_log.path)
    for table in (tmp_path / "whole" / "output" / "extras").glob("*.jsonl"):  # extras are outside the data version
        assert (spec.output_dir / "extras" / table.name).read_bytes() == table.read_bytes()


def test_a_broken_checkpoint_costs_time_and_not_the_result(smoke: Any, tmp_path: Path) -> None:
    spec = smoke.spec("ppo_policy", tmp_path / "killed", checkpoint_every_s=AT_ONCE)
    with pytest.raises(KeyboardInterrupt):
        run(smoke, "ppo_policy", spec, KilledLog(tmp_path / "progress.jsonl", 3))
    state = spec.work_dir / "checkpoint-2" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    run(smoke, "ppo_policy", spec, ProgressLog(tmp_path / "progress.jsonl"))
    assert data_version(spec.output_dir) == data_version(smoke.artifact("ppo_policy"))


@pytest.mark.parametrize(
    "asset",
    [
        "instructions",
        "formatted_dataset",
        "sft_model",
        "sampled_responses",
        "preference_labels",
        "preference_pairs",
        "reference_logprobs",
        "ppo_policy",
        "ppo_evaluation",
        "comparison",
    ],
)
def test_the_same_spec_gives_the_same_data_version_twice(smoke: Any, tmp_path: Path, asset: str) -> None:
    first = data_version(smoke.artifact(asset))
    disturb_global_generators()
    smoke.run(asset, tmp_path)
    assert data_version(tmp_path / "output") == first


@pytest.mark.parametrize("asset", ["instructions", "sampled_responses", "ppo_policy", "ppo_evaluation"])
def test_another_seed_gives_another_result(smoke: Any, tmp_path: Path, asset: str) -> None:
    spec = dataclasses.replace(smoke.spec(asset, tmp_path), seed=1)
    run(smoke, asset, spec, ProgressLog(tmp_path / "progress.jsonl"))
    assert data_version(spec.output_dir) != data_version(smoke.artifact(asset))


def test_where_an_artifact_lies_is_no_part_of_it(smoke: Any, tmp_path: Path) -> None:
    shutil.copytree(smoke.artifact("sft_model"), tmp_path / "moved")
    smoke.run("dpo_policy", tmp_path / "run", inputs={"trunk": tmp_path / "moved"})
    assert data_version(tmp_path / "run" / "output") == data_version(smoke.artifact("dpo_policy"))
