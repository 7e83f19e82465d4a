"""The plain side of `training_vs_trl.py`: what a person would write from TRL's documentation, one stage a process.

    python benchmarks/training_vs_trl_plain.py sft|reward|dpo|rloo SETTINGS.json

Every setting is TRL's default, but for these: bf16 is off, since True raises without a GPU and is the default with one;
the seed, batch size and number of steps are the benchmark's; each step is logged, as ours does; nothing is sent. TRL
has had no PPO since 1.13: RLOO is the on-policy trainer that its documentation offers, and stands in for it.

Nothing of the product is imported here. The only addition to the scripts is a callback that notes when steps end.
"""
# ruff: noqa: TID253  # TRL is what is measured here

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import TrainerCallback


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Notes the time, the loss and the tokens so far of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """A step has ended; the last log is a summary without a loss."""
        if "loss" in logs:
            tokens = float(logs.get("num_tokens", 0.0))
            clocks = {"s": time.perf_counter(), "cpu_s": time.process_time()}
            self.steps.append(clocks | {"loss": float(logs["loss"]), "tokens": tokens})


def common(settings: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """What all four scripts set."""
    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["batch_size"],
        "max_steps": settings["steps"],
        "seed": settings["seed"],
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def sft(settings: dict[str, Any], watch: Watch) -> Any:
    """Supervised fine-tuning on prompt and completion."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=settings["model"],
        args=SFTConfig(**common(settings, watch)),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        callbacks=[watch],
    )


def reward(settings: dict[str, Any], watch: Watch) -> Any:
    """A reward model on prompt, chosen and rejected."""
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=settings["model"],
        args=RewardConfig(**common(settings, watch)),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        callbacks=[watch],
    )


def dpo(settings: dict[str, Any], watch: Watch) -> Any:
    """Direct preference optimization on prompt, chosen and rejected."""
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=settings["model"],
        args=DPOConfig(**common(settings, watch)),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        callbacks=[watch],
    )


def rloo(settings: dict[str, Any], watch: Watch) -> Any:
    """REINFORCE leave-one-out on prompts, rewarded by the reward model's folder."""
    from trl import RLOOConfig, RLOOTrainer

    arguments = common(settings, watch) | {"max_completion_length": settings["max_new_tokens"]}
    return RLOOTrainer(
        model=settings["model"],
        reward_funcs=settings["reward_model"],
        args=RLOOConfig(**arguments),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        callbacks=[watch],
    )


STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "rloo": rloo}


def main() -> None:
    """Train the stage, save the model, write what was noted."""
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    watch = Watch()
    trainer = STAGES[sys.argv[1]](settings, watch)
    trainer.train()
    trainer.save_model(settings["output"])
    Path(settings["report"]).write_text(
        json.dumps({"steps": watch.steps, "model": settings["output"]}), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
