"""Does `tiny` do over several seeds what it should? Runs it once a seed and writes docs/tiny_study.md.

    .venv/bin/python benchmarks/tiny_study.py --seeds 0 1 2

Each claim is decided a seed at a time: SFT above base on BLEU and gold score; PPO and DPO above SFT with the win rate's
95% interval above one half; the reward model above the length-only baseline on held-out pairs. A claim that fails is
written down as failed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
ALIGN = Path(sys.executable).parent / "align"
RECIPE = "tiny"
POLICIES = ("base_model", "sft_model", "ppo_policy", "dpo_policy")


def run_seed(seed: int) -> dict[str, Any]:
    """Run the recipe with a seed and return its results, its reward model's metrics and how long it took."""
    started = time.monotonic()
    subprocess.run([ALIGN, "run", RECIPE, "--set", f"seed={seed}"], check=True)
    seconds = time.monotonic() - started
    printed = subprocess.run([ALIGN, "results", RECIPE, "--json"], check=True, capture_output=True, text=True).stdout
    results: dict[str, Any] = json.loads(printed)[0]
    home = Path(os.environ.get("ALIGNMENT_HOME", REPOSITORY / ".alignment"))
    reference = json.loads((home / "current" / f"{RECIPE}.json").read_text())["reward_model"]
    folder = home / "artifacts" / "reward_model" / reference["key"][:20] / reference["data_version"][:20]
    reward = json.loads((folder / "manifest.json").read_text())["metrics"]
    return {
        "seed": seed,
        "seconds": seconds,
        "reward": reward,
        "rows": {row["policy"]: row for row in results["policies"]},
    }


def claims(run: dict[str, Any]) -> dict[str, bool]:
    """What should hold in every seed."""
    rows, reward = run["rows"], run["reward"]
    sft, base = rows["sft_model"], rows["base_model"]
    return {
        "SFT beats base on BLEU": sft["bleu"] > base["bleu"],
        "SFT beats base on gold score": sft["judge_score"] > base["judge_score"],
        "PPO beats SFT (interval above 0.5)": rows["ppo_policy"]["win_rate_low"] > 0.5,
        "DPO beats SFT (interval above 0.5)": rows["dpo_policy"]["win_rate_low"] > 0.5,
        "Reward model beats length alone": reward["reward/held_out_accuracy"]
        > reward["reward/length_baseline_accuracy"],
    }


def report(runs: list[dict[str, Any]]) -> str:
    """The study as Markdown."""
    seeds = [run["seed"] for run in runs]
    prompts = runs[0]["rows"]["sft_model"]["prompts"]
    lines = [
        "# `tiny` over seeds",
        "",
        f"Written by `benchmarks/tiny_study.py --seeds {' '.join(map(str, seeds))}`: everything (data, model, "
        f"training, sampling) is drawn anew for each seed. {prompts} test prompts a seed, judge: the gold rule. "
        "Win rates are against the SFT model of the same seed, with 95% Wilson intervals.",
        "",
        "| seed | policy | BLEU | gold score | learned score | KL (nats) | tokens | win rate [95%] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for policy in POLICIES:
            row = run["rows"][policy]
            wins = f"{row['win_rate']:.3f} [{row['win_rate_low']:.3f}, {row['win_rate_high']:.3f}]"
            lines.append(
                f"| {run['seed']} | {policy} | {row['bleu']:.1f} | {row['judge_score']:.3f} "
                f"| {row['learned_score']:.2f} | {row['kl_nats']:.2f} | {row['mean_tokens']:.1f} "
                f"| {'–' if policy == 'sft_model' else wins} |"
            )
    lines += ["", f"Mean ± standard deviation over {len(runs)} seeds:", "", "| policy | BLEU | gold score | win rate |"]
    lines.append("|---|---|---|---|")
    for policy in POLICIES:
        cells = [_spread([run["rows"][policy][name] for run in runs]) for name in ("bleu", "judge_score", "win_rate")]
        lines.append(f"| {policy} | {cells[0]} | {cells[1]} | {'–' if policy == 'sft_model' else cells[2]} |")
    lines += [
        "",
        "| reward model, held-out pairs | accuracy | by length alone | pairs | run, s |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        reward = run["reward"]
        lines.append(
            f"| seed {run['seed']} | {reward['reward/held_out_accuracy']:.3f} "
            f"| {reward['reward/length_baseline_accuracy']:.3f} | {reward['reward/held_out_pairs']:.0f} "
            f"| {run['seconds']:.0f} |"
        )
    lines += ["", "| claim | holds in |", "|---|---|"]
    decided = [claims(run) for run in runs]
    lines += [f"| {claim} | {sum(each[claim] for each in decided)} of {len(runs)} seeds |" for claim in decided[0]]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "tiny_study.md")
    arguments = parser.parse_args()
    text = report([run_seed(seed) for seed in arguments.seeds])
    arguments.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
