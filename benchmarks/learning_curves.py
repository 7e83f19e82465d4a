"""How PPO learns over several seeds: runs a recipe once a seed and draws score and KL by update.

    .venv/bin/python benchmarks/learning_curves.py tiny --seeds 0 1 2 3 4
    .venv/bin/python benchmarks/learning_curves.py stories_sentiment --seeds 0 1 2 3 4 \
        --set base_model.path=../shared/data/stories260k

Everything (data, models, training, sampling) is drawn anew for each seed. Writes docs/learning_curves/<recipe>.md and
.png: score and KL of each update's rollout, mean and standard deviation over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from alignment_pipeline.plots import spread_curves
from alignment_pipeline.progress import metric_series

REPOSITORY = Path(__file__).parent.parent
ALIGN = Path(sys.executable).parent / "align"
PANELS = {"objective/score": "score of the rollout", "objective/kl": "KL from the reference, nats a response"}
SHOWN = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the updates that the table has


def run_seed(recipe: str, seed: int, overrides: list[str]) -> dict[str, list[float]]:
    """Run the recipe with a seed, and read the metrics of every update of its PPO."""
    settings = [argument for override in (f"seed={seed}", *overrides) for argument in ("--set", override)]
    subprocess.run([ALIGN, "run", recipe, *settings], check=True)
    home = Path(os.environ.get("ALIGNMENT_HOME", REPOSITORY / ".alignment"))
    reference = json.loads((home / "current" / f"{recipe}.json").read_text())["ppo_policy"]
    folder = home / "artifacts" / "ppo_policy" / reference["key"][:20] / reference["data_version"][:20]
    series = metric_series(folder / "extras" / "progress.jsonl").values()
    return {name: [metrics[name] for metrics in series] for name in PANELS}


def report(recipe: str, seeds: list[int], runs: list[dict[str, list[float]]], command: str) -> str:
    """The curves' numbers as Markdown."""
    updates = len(runs[0]["objective/score"])
    lines = [
        f"# PPO on `{recipe}` over {len(seeds)} seeds",
        "",
        f"Written by `{command}`. Each update's rollout, mean ± standard deviation over the seeds; everything (data, "
        "models, training, sampling) is drawn anew for each seed. Dark line: mean; band: one standard deviation; thin "
        "lines: the seeds.",
        "",
        f"![Score and KL by update]({recipe}.png)",
        "",
        "| update | score | KL, nats a response |",
        "|---|---|---|",
    ]
    for row in sorted({round(share * (updates - 1)) for share in SHOWN}):
        cells = [_spread([run[name][row] for run in runs]) for name in PANELS]
        lines.append(f"| {row + 1} | {cells[0]} | {cells[1]} |")
    lines += ["", "| seed | first score | last score (mean of a tenth) | last KL |", "|---|---|---|---|"]
    tail = max(1, updates // 10)
    for seed, run in zip(seeds, runs, strict=True):
        score, kl = (statistics.mean(run[name][-tail:]) for name in PANELS)
        lines.append(f"| {seed} | {run['objective/score'][0]:.2f} | {score:.2f} | {kl:.2f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def main() -> None:
    """Run the recipe with each seed and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="As for align run; repeatable.")
    arguments = parser.parse_args()
    runs = [run_seed(arguments.recipe, seed, arguments.overrides) for seed in arguments.seeds]
    folder = REPOSITORY / "docs" / "learning_curves"
    spread_curves(
        folder / f"{arguments.recipe}.png", {title: [run[name] for run in runs] for name, title in PANELS.items()}
    )
    command = " ".join(["benchmarks/learning_curves.py", *sys.argv[1:]])
    text = report(arguments.recipe, arguments.seeds, runs, command)
    (folder / f"{arguments.recipe}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
