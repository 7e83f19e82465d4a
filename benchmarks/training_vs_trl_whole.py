"""The whole of `training_vs_trl.py`: four plain scripts one after another, and the same stages in one `align run`.

The plain reward, DPO and RLOO scripts start from what the SFT script saved, as the recipe's stages do. The recipe does
more: it keeps, hashes and records every artifact, quarantines and splits the rows, and measures held-out pairs.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from training_vs_trl_ours import LEARNING_RATES
from training_vs_trl_workload import (
    BASE_MODEL,
    FORMATTING,
    HELD_OUT_PAIRS,
    INSTRUCTIONS,
    MAX_NEW_TOKENS,
    Workload,
)

from alignment_pipeline.models import MODEL_FOLDER

RECIPE = "whole"
ROLLOUT = 64  # responses a PPO round; RLOO samples a step's 8 at a time, its default
RLOO_LEARNING_RATE = 1e-6  # its default
ASSETS = (
    "instructions", "base_model", "formatted_dataset", "sft_model", "human_preferences", "preference_pairs",
    "reward_model", "reference_logprobs", "dpo_policy", "ppo_policy",
)  # fmt: skip
"""Without the evaluations, which the scripts have not."""

Json = dict[str, Any]


def run_plain_scripts(folder: Path, workload: Workload, steps: int, batch_size: int, seed: int) -> Json:
    """Seconds of each script and of all."""
    script, trained = Path(__file__).with_name("training_vs_trl_plain.py"), folder / "plain"
    trained.mkdir(parents=True)
    inputs = {
        "sft": (workload.base_model / MODEL_FOLDER, workload.plain_sft),
        "reward": (trained / "sft", workload.plain_pairs),
        "dpo": (trained / "sft", workload.plain_pairs),
        "rloo": (trained / "sft", workload.plain_prompts),
    }
    parts: dict[str, float] = {}
    for stage, (model, data) in inputs.items():
        settings = {
            "model": str(model), "data": str(data), "output": str(trained / stage), "steps": steps, "seed": seed,
            "batch_size": batch_size, "report": str(trained / f"{stage}.json"),
            "reward_model": str(trained / "reward"), "max_new_tokens": MAX_NEW_TOKENS,
        }  # fmt: skip
        job = trained / f"{stage}.settings.json"
        job.write_text(json.dumps(settings), encoding="utf-8")
        parts[stage] = _timed([sys.executable, str(script), stage, str(job)], os.environ | {})
    return {"side": "plain", "parts_s": parts, "total_s": sum(parts.values())}


def run_recipe(folder: Path, workload: Workload, steps: int, batch_size: int, seed: int) -> Json:
    """Seconds of the run, and of each asset by its manifest."""
    home, recipes = folder / "home", folder / "recipes"
    inbox = home / "feedback" / RECIPE / "inbox"
    inbox.mkdir(parents=True)
    (inbox / "votes.jsonl").write_bytes(workload.votes.read_bytes())
    recipes.mkdir()
    (recipes / f"{RECIPE}.yaml").write_text(
        yaml.safe_dump(_recipe(workload, steps, batch_size, seed)), encoding="utf-8"
    )
    command = [sys.executable, "-c", "from app.cli import main; main()", "run", RECIPE]
    for asset in ASSETS:
        command += ["--select", asset]
    environment = {"ALIGNMENT_HOME": str(home), "ALIGNMENT_RECIPES": str(recipes), "WANDB_MODE": "disabled"}
    total = _timed(command, os.environ | environment)
    parts: dict[str, float] = {}
    for path in home.glob("artifacts/*/*/*/manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        parts[path.parts[-4]] = round(manifest["timings"]["wall_s"], 1)
    return {"side": "ours", "parts_s": parts, "total_s": total}


def _recipe(workload: Workload, steps: int, batch_size: int, seed: int) -> Json:
    def trained(stage: str) -> Json:
        return {"method": "full", "batch_size": batch_size, "max_steps": steps, "warmup_fraction": 0.0,
                "learning_rate": LEARNING_RATES[stage]}  # fmt: skip

    pairs = steps * batch_size
    return {
        "name": RECIPE,
        "description": "The four trained stages, as the plain scripts have them.",
        "seed": seed,
        "data": INSTRUCTIONS | {"path": str(workload.instructions)},
        "base_model": {"path": str(workload.base_model / MODEL_FOLDER)},
        "formatting": FORMATTING.model_dump(exclude_defaults=True),
        "sft": trained("sft"),
        "feedback": {},
        "pairs": {"validation_fraction": HELD_OUT_PAIRS / (pairs + HELD_OUT_PAIRS)},
        "reward_model": trained("reward"),
        "dpo": trained("dpo"),
        "ppo": {
            "method": "full",
            "updates": pairs // ROLLOUT,
            "rollout_batch_size": ROLLOUT,
            "minibatch_size": batch_size,
            "ppo_epochs": 1,
            "max_new_tokens": MAX_NEW_TOKENS,
            "learning_rate": RLOO_LEARNING_RATE,
        },
        "evaluation": {"judge": "reference_chrf", "max_new_tokens": BASE_MODEL.max_positions // 8},
    }


def _timed(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - started
