"""Our side of `training_vs_trl.py`: one stage of the library in a process of its own, as the product calls it.

    python benchmarks/training_vs_trl_ours.py sft|reward|dpo SETTINGS.json

All weights are trained, at the learning rate that is TRL's default for the stage, without warm-up, as the plain scripts
do. Reference log-probabilities of DPO are a stage of their own here and are timed as such.
"""
# ruff: noqa: TID253  # torch is what is measured here

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from training_vs_trl_workload import run_stage

from alignment_pipeline.configs import DpoConfig, ReferenceLogprobsConfig, RewardModelConfig, SftConfig
from alignment_pipeline.progress import ProgressLog

PROFILED_STEPS = 10
LEARNING_RATES = {"sft": 2e-5, "reward": 1e-4, "dpo": 1e-6}
"""TRL's defaults."""

Settings = dict[str, Any]


class Watch(ProgressLog):
    """A progress log that notes the time, the loss and the tokens so far of each step."""

    steps: list[dict[str, float]]

    def step(self, phase: str, step: int, total: int, metrics: Any = None) -> None:
        """As in every log, and noted."""
        super().step(phase, step, total, metrics)
        clocks = {"s": time.perf_counter(), "cpu_s": time.process_time()}
        self.steps.append(clocks | {"loss": metrics["train/loss"], "tokens": metrics["train/tokens"]})


def sft(settings: Settings, log: Watch) -> Path:
    """The stage `sft_model`."""
    config = SftConfig(**_trainer(settings, "sft"))
    inputs = {name: Path(settings[name]) for name in ("base_model", "dataset")}
    return run_stage("sft_model", config, inputs, Path(settings["output"]), settings["seed"], log)


def reward(settings: Settings, log: Watch) -> Path:
    """The stage `reward_model`, on the base model."""
    config = RewardModelConfig(**_trainer(settings, "reward"))
    inputs = {"trunk": Path(settings["base_model"]), "pairs": Path(settings["pairs"])}
    return run_stage("reward_model", config, inputs, Path(settings["output"]), settings["seed"], log)


def dpo(settings: Settings, log: Watch) -> Path:
    """The stages `reference_logprobs` and `dpo_policy`, on the base model."""
    inputs = {"trunk": Path(settings["base_model"]), "pairs": Path(settings["pairs"])}
    folder, started = Path(settings["output"]), time.perf_counter()
    reference = run_stage(
        "reference_logprobs", ReferenceLogprobsConfig(), inputs, folder / "reference", settings["seed"]
    )
    settings["reference_s"] = time.perf_counter() - started
    config = DpoConfig(**_trainer(settings, "dpo"))
    return run_stage("dpo_policy", config, inputs | {"reference_logprobs": reference}, folder, settings["seed"], log)


STAGES = {"sft": sft, "reward": reward, "dpo": dpo}


def main() -> None:
    """Train the stage and write what its progress log says of each step."""
    stage, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    log = Watch(Path(settings["output"]) / "progress.jsonl")
    log.steps = []
    with _profiled(settings.get("profile")):
        output = STAGES[stage](settings, log)
    report = {"steps": log.steps, "model": str(output / "model"), "reference_s": settings.get("reference_s", 0.0)}
    Path(settings["report"]).write_text(json.dumps(report), encoding="utf-8")


def _trainer(settings: Settings, stage: str) -> Settings:
    return {
        "method": "full",
        "batch_size": settings["batch_size"],
        "max_steps": settings["steps"],
        "learning_rate": LEARNING_RATES[stage],
        "warmup_fraction": 0.0,
        "batching": settings["batching"],
        "checkpoint_every_s": 1e9,
    }


@contextlib.contextmanager
def _profiled(table: str | None) -> Iterator[None]:
    """Within, operators are timed, if asked; the heaviest are written to a text file."""
    if table is None:
        yield
        return
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    averages = profiler.key_averages()
    total = sum(average.self_cpu_time_total for average in averages)
    rows = sorted(averages, key=lambda average: -average.self_cpu_time_total)[:12]
    shares = [{"operator": row.key, "share": row.self_cpu_time_total / total, "calls": row.count} for row in rows]
    Path(table).write_text(json.dumps(shares), encoding="utf-8")


if __name__ == "__main__":
    main()
