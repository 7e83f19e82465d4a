"""Our training stages beside the scripts that a person would write from TRL's documentation, on the same rows.

    ALIGNMENT_DATA_DIR=../shared/data .venv/bin/python benchmarks/training_vs_trl.py --json r.json --markdown r.md

CodeAlpaca-20k and `python_code_dpo`, OPT of 4 layers × 256 and 8,000 tokens, all weights trained, batches of 8, float32
on a CPU. Each measurement is a process of its own; the sides alternate. Four parts:

1. The same batches (`batching: shuffled` draws rows as TRL does): the loss of every step, side by side.
2. Speed: real tokens a second from the second step on, ours as it comes (`batching: by_length`) and with the same
   batches, and the held-out loss that was reached, also after a quarter more steps by length: other batches of as many
   rows give another loss, and the question is how long ours takes to plain's. All models are measured by the same code.
3. The whole: one `align run` of a recipe with sft, reward_model, ppo and dpo against the four scripts one after
   another, from process start to process end. TRL has had no PPO since 1.13; RLOO, its on-policy trainer, stands in,
   with as many responses, of the same greatest length, and as many optimizer steps.
4. What the machine can do: the rate of a large matrix product, and where our time goes by operator.

The files beside this one: `_workload` (what both sides start from), `_plain` and `_ours` (one side's process), `_whole`
(part 3), `_report` (the tables).
"""
# ruff: noqa: TID253  # torch is what is measured here

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ppo_vs_trl import QUIET, machine
from ppo_vs_trl_limits import Rates
from rich.console import Console
from training_vs_trl_report import LONGER, SIDES, report
from training_vs_trl_whole import run_plain_scripts, run_recipe
from training_vs_trl_workload import Workload, held_out_loss, make_workload

from alignment_pipeline.models import MODEL_FOLDER, load_causal_lm
from resources.home import REPOSITORY

STAGES = ("sft", "reward", "dpo")
BATCH_SIZE, SEED = 8, 42
Json = dict[str, Any]
_console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run all parts and write the report."""
    arguments = _arguments()
    os.environ.update(QUIET | {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(REPOSITORY)})
    torch.set_num_threads(arguments.threads)
    started, load_before = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="training_vs_trl_") as temporary:
        folder = Path(temporary)
        os.environ["HF_HOME"] = str(folder / "hub")  # or TRL's side would find its rows mapped by an earlier run
        _console.print("Building the base model and the rows.")
        workload = make_workload(folder / "workload", arguments.data, BATCH_SIZE * arguments.steps, SEED)
        runs = [
            measure(stage, side, repeat, folder, workload, arguments)
            for stage in STAGES
            for repeat in range(arguments.repeats)
            for side in (SIDES if repeat % 2 == 0 else SIDES[::-1])
        ]
        profiles = {stage: profiled(stage, folder, workload, arguments) for stage in STAGES}
        wholes: list[Json] = []
        for repeat in range(arguments.repeats):
            for run in (run_plain_scripts, run_recipe)[:: 1 if repeat % 2 == 0 else -1]:
                wholes.append(run(folder / f"whole_{repeat}", workload, arguments.steps, BATCH_SIZE, SEED))
                _console.print(f"{wholes[-1]['side']}: {wholes[-1]['total_s']:.0f} s {wholes[-1]['parts_s']}")
        base = workload.base_model / MODEL_FOLDER
        model, sft_loss = load_causal_lm(base), held_out_loss("sft", base, workload)
        head = model.get_output_embeddings().weight.numel()
        layers = sum(each.numel() for name, each in model.named_parameters() if "embed" not in name)
    result = {
        "settings": {"steps": arguments.steps, "threads": arguments.threads, "batch_size": BATCH_SIZE},
        "machine": machine() | {"load_before": load_before},
        "versions": {"torch": torch.__version__, "trl": _version("trl"), "transformers": _version("transformers")},
        "parameters": model.num_parameters(),
        "multiplied": {"sft": layers + head, "reward": layers, "dpo": layers + head},
        "losses_before": {"sft": sft_loss, "reward": math.log(2), "dpo": math.log(2)},
        "runs": runs,
        "wholes": wholes,
        "profiles": profiles,
        "peak_gigaflops": Rates().peak / 1e9,
        "took_s": time.monotonic() - started,
    }
    text = report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure(
    stage: str, side: str, repeat: int, folder: Path, workload: Workload, arguments: argparse.Namespace
) -> Json:
    """One process of a side: its steps, the seconds of everything, and the held-out loss of what it trained."""
    output = folder / f"{stage}_{side.replace(' ', '_')}_{repeat}"
    settings = _settings(stage, output, workload, arguments)
    settings["batching"] = "shuffled" if side == "same batches" else "by_length"
    settings["steps"] = arguments.steps * 5 // 4 if side == LONGER else arguments.steps
    started = time.perf_counter()
    found = run_side("plain" if side == "plain" else "ours", stage, settings)
    seconds = time.perf_counter() - started
    loss = held_out_loss(stage, Path(found["model"]), workload)
    first, last = found["steps"][0], found["steps"][-1]
    tokens_per_s = (last["tokens"] - first["tokens"]) / (last["s"] - first["s"])
    _console.print(f"{stage}, {side}, {repeat}: {tokens_per_s:.0f} tokens/s, held-out loss {loss:.4f}, {seconds:.0f} s")
    return {
        "stage": stage, "side": side, "repeat": repeat, "tokens_per_s": tokens_per_s, "held_out_loss": loss,
        "tokens_per_cpu_s": (last["tokens"] - first["tokens"]) / (last["cpu_s"] - first["cpu_s"]),
        "steps_s": last["s"] - first["s"], "process_s": seconds, "reference_s": found.get("reference_s", 0.0),
        "losses": [step["loss"] for step in found["steps"]],
    }  # fmt: skip


def profiled(stage: str, folder: Path, workload: Workload, arguments: argparse.Namespace) -> list[Json]:
    """The heaviest operators of our side, in a short process that nothing else is read from."""
    settings = _settings(stage, folder / f"{stage}_profile", workload, arguments)
    table = folder / f"{stage}_profile.operators.json"
    run_side("ours", stage, settings | {"batching": "by_length", "steps": 10, "profile": str(table)})
    found: list[Json] = json.loads(table.read_text(encoding="utf-8"))
    return found


def run_side(side: str, stage: str, settings: Json) -> Json:
    """Train in a process of its own, and read what it reports."""
    report_file = Path(settings["report"])
    job = report_file.with_suffix(".settings.json")
    job.write_text(json.dumps(settings), encoding="utf-8")
    script = Path(__file__).with_name(f"training_vs_trl_{side}.py")
    done = subprocess.run([sys.executable, script, stage, job], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} {stage} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: Json = json.loads(report_file.read_text(encoding="utf-8"))
    return found


def _settings(stage: str, output: Path, workload: Workload, arguments: argparse.Namespace) -> Json:
    return {
        "output": str(output),
        "report": str(output.with_suffix(".report.json")),
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "seed": SEED,
        "model": str(workload.base_model / MODEL_FOLDER),
        "data": str(workload.plain_sft if stage == "sft" else workload.plain_pairs),
        "base_model": str(workload.base_model),
        "dataset": str(workload.dataset),
        "pairs": str(workload.pairs),
    }


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ALIGNMENT_DATA_DIR"), help="folder of the data")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each stage; a multiple of 8")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side and stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("found no --data and no ALIGNMENT_DATA_DIR, expected the folder of CodeAlpaca and python_code_dpo")
    return arguments


if __name__ == "__main__":
    main()
