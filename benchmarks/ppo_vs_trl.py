"""Our PPO beside TRL's last PPOTrainer (1.12.0): seconds an update, peak memory, and the score reached at equal KL.

    .venv/bin/python benchmarks/ppo_vs_trl.py --json result.json --markdown result.md      (about 10 minutes)
    .venv/bin/python benchmarks/ppo_vs_trl.py --quick                                      (a smoke check)

Each side trains in processes of its own on the same base model, reward model and prompts, with the same number of
optimizer steps, learning rate, KL coefficient, clipping and temperature, and as many threads. TRL lives in an
environment of its own, made at the first run. Two parts:

1. Score at equal KL: many updates of a small model over several seeds, one thread a process, as many processes at once
   as there are cores. Nothing is timed here. It also brings both sides' libraries into the page cache.
2. Time and memory: a larger model, one process at a time with all cores, ours and TRL's in alternating order.

The files beside this one: `_workload` (what both start from), `_side` (one side's process), `_limits` (what the machine
could do at best), `_report` (the tables). Linux only: memory is read from /proc.
"""
# ruff: noqa: TID253  # torch is what is measured here; no part of the product imports benchmarks

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ppo_vs_trl_limits import Rates, limits
from ppo_vs_trl_report import report
from ppo_vs_trl_workload import Workload, write_workload
from rich.console import Console

from resources.home import REPOSITORY, alignment_home

TRL_VERSION = "1.12.0"
SIDE = Path(__file__).with_name("ppo_vs_trl_side.py")
SMALL = Workload(
    num_layers=2, hidden_size=128, ffn_size=512, vocab_size=1024, max_positions=64,
    min_prompt_tokens=8, max_prompt_tokens=16, response_tokens=24,
)  # fmt: skip
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
Json = dict[str, Any]
_console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run both parts and write the report."""
    arguments = _arguments()
    interpreters = {"ours": Path(sys.executable), "trl": trl_environment(arguments.environment)}
    os.environ.update(QUIET)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ppo_vs_trl_") as folder:
        small, large = (Path(folder) / name for name in ("small", "large"))
        sizes = {"small": SMALL, "large": SMALL if arguments.quick else Workload()}
        for name in sizes:
            write_workload(Path(folder) / name, sizes[name], seed=0)
        curves = curve_jobs(arguments, small, sizes["small"])
        timed = timed_jobs(arguments, large, sizes["large"])
        runs = run_jobs(curves, interpreters, at_once=min(arguments.threads, len(curves)))
        runs += run_jobs(timed, interpreters, at_once=1)
    torch.set_num_threads(arguments.threads)
    rates = Rates()
    result = {
        "settings": {"threads": arguments.threads, "quick": arguments.quick, "ours": arguments.ours,
                     "trl_value_model": arguments.trl_value_model},
        "workloads": {name: asdict(workload) for name, workload in sizes.items()},
        "machine": machine(),
        "versions": {"torch": torch.__version__, "trl": TRL_VERSION},
        "runs": runs,
        "limits": {
            method: {
                side: {phase: asdict(limit) for phase, limit in limits(sizes["large"], side, method, rates).items()}
                for side in interpreters
            }
            for method in arguments.methods
        },
        "peak_gigaflops": rates.peak / 1e9,
        "gigaflops_by_shape": rates.measured(),
        "took_s": time.monotonic() - started,
    }  # fmt: skip
    text = report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def curve_jobs(arguments: argparse.Namespace, folder: Path, workload: Workload) -> list[Json]:
    """Both sides, every method and seed, one thread each; the slower side first."""
    return [
        _job(arguments, "curve", side, method, seed, folder, workload, updates=arguments.curve_updates, threads=1)
        for side in ("trl", "ours")
        for method in arguments.methods
        for seed in range(arguments.seeds)
    ]


def timed_jobs(arguments: argparse.Namespace, folder: Path, workload: Workload) -> list[Json]:
    """Ours, TRL's, TRL's, ours, …: a slow change of the machine's speed meets both alike."""
    return [
        _job(arguments, "timed", side, method, repeat, folder, workload,
             updates=arguments.timed_updates + 1, threads=arguments.threads)
        for method in arguments.methods
        for repeat in range(arguments.repeats)
        for side in (("ours", "trl") if repeat % 2 == 0 else ("trl", "ours"))
    ]  # fmt: skip


def run_jobs(jobs: list[Json], interpreters: dict[str, Path], at_once: int) -> list[Json]:
    """Run each job in a process of its own; results in the jobs' order."""
    with _console.status("") as status, ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda job: _run(job, interpreters[job["side"]], status), jobs))


def trl_environment(folder: Path) -> Path:
    """The Python of an environment with TRL's last PPO; it is made where it is missing.

    Raises:
        SystemExit: The environment has another TRL.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _console.print(f"Making an environment with trl {TRL_VERSION} in {folder} (once, some minutes).")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if _installed(python) is None:
        constraints = folder / "constraints.txt"
        lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints.write_text("\n".join(line for line in lines if not line.startswith("trl==")), encoding="utf-8")
        torch_pin = next(line for line in lines if line.startswith("torch=="))
        for packages in ([torch_pin], [f"trl=={TRL_VERSION}", "peft"]):
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--constraint", str(constraints), *packages], check=True)
    if (found := _installed(python)) != TRL_VERSION:
        raise SystemExit(f"{folder}: found trl {found}, expected {TRL_VERSION}. Give another --environment.")
    return python


def machine() -> Json:
    """What the measurements were made on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else "unknown",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def _job(
    arguments: argparse.Namespace, part: str, side: str, method: str, seed: int, folder: Path, workload: Workload,
    *, updates: int, threads: int,
) -> Json:  # fmt: skip
    return {
        "part": part, "side": side, "method": method, "seed": seed, "updates": updates, "threads": threads,
        "workload_folder": str(folder), "workload": asdict(workload),
        "output": str(folder / f"{part}_{side}_{method}_{seed}.json"),
        "ours": arguments.ours, "trl_value_model": arguments.trl_value_model,
    }  # fmt: skip


def _run(job: Json, python: Path, status: Any) -> Json:
    name = f"{job['part']} {job['method']} {job['side']} {job['seed']}"
    output = Path(job["output"])
    job_file, errors = output.with_suffix(".job.json"), output.with_suffix(".errors")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "PYTHONPATH": str(REPOSITORY) if job["side"] == "ours" else "",
    }
    started = time.monotonic()
    with errors.open("w") as stderr, subprocess.Popen(
        [python, SIDE, job_file], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            status.update(f"{name}: {line.strip()}")
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{errors.read_text()[-4000:]}")
    result: Json = json.loads(output.read_text(encoding="utf-8"))
    _console.print(
        f"{name}: {job['updates']} updates in {time.monotonic() - started:.0f} s, "
        f"the last {result['seconds'][-1]:.2f} s, score {result['scores'][-1]:.2f}, KL {result['kls'][-1]:.2f}"
    )
    return {key: job[key] for key in ("part", "side", "method", "seed")} | result


def _installed(python: Path) -> str | None:
    asked = "import importlib.metadata as m; print(m.version('trl'))"
    answer = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--timed-updates", type=int, default=8, help="updates timed in each process, after the first")
    parser.add_argument("--repeats", type=int, default=2, help="processes timed for each side and method")
    parser.add_argument("--curve-updates", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--environment", type=Path, default=alignment_home() / "benchmarks" / f"trl-{TRL_VERSION}")
    parser.add_argument("--trl-value-model", choices=("reward", "base"), default="reward", help="what it starts as")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="keys of our PPO's config")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--quick", action="store_true", help="few updates of the small model only: does it run?")
    arguments = parser.parse_args()
    arguments.ours = dict(pair.split("=", 1) for pair in arguments.ours)
    if arguments.quick:
        arguments.timed_updates, arguments.repeats, arguments.curve_updates, arguments.seeds = 2, 1, 6, 1
    return arguments


if __name__ == "__main__":
    main()
