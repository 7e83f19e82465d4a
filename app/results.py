"""The table of results: of a recipe's current comparison (or a run's) or, without one, of its reward model."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment_pipeline.errors import MissingArtifactError
from alignment_pipeline.identity import read_jsonl
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.runs import RunRecords


def load_results(home: Path, recipe: str, run_id: str | None = None) -> dict[str, Any]:
    """The table of the comparison, or of the reward model where that is all, and where it comes from.

    Raises:
        MissingArtifactError: The recipe has neither yet.
    """
    runs, store = RunRecords(home), ArtifactStore(home)
    assets = runs.of_run(run_id) if run_id else runs.current(recipe)
    asset = result_asset(assets)
    if asset is None:
        raise MissingArtifactError(f"{recipe} has no comparison yet. Run `align run {recipe}` first.")
    ref: ArtifactRef = assets[asset]
    folder = store.verify(ref)
    if not (folder / "summary.json").is_file():
        raise MissingArtifactError(
            f"{asset} of {recipe} was made before it had a table. Run `align run {recipe}` again."
        )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    table = {"policies": read_jsonl(folder / "table.jsonl")} if asset == "comparison" else {}
    return {
        "recipe": recipe,
        "asset": asset,
        "artifact": ref.artifact_id,
        "created_at": store.manifest(ref)["created_at"],
        **summary,
        **table,
        "checks": [
            {"asset": asset, **check} for asset, made in assets.items() for check in store.manifest(made)["checks"]
        ],
    }


def result_asset(assets: Container[str]) -> str | None:
    """Which of some assets holds the results; None if none does."""
    return next((asset for asset in ("comparison", "reward_model") if asset in assets), None)


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The table for people, its footnotes, and the checks that failed."""
    (_print_policies if results["asset"] == "comparison" else _print_reward_model)(console, results)
    for check in results["checks"]:
        if not check["passed"]:
            line = f"Warning: {check['asset']}: {check['name']} does not hold. {check['detail']}"
            console.print(line, style="yellow", markup=False, highlight=False)


def _print_policies(console: Console, results: dict[str, Any]) -> None:
    judge, opponent = results["judge_title"], results["opponent"]
    prompts = results["policies"][0]["prompts"]
    table = Table(
        title=f"{results['recipe']}: {prompts} test prompts, judge: {judge}", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("policy", no_wrap=True)
    for column in ("BLEU", judge, "learned", "KL, nats", "tokens", "win rate [95%]"):
        table.add_column(column, justify="right")
    for row in results["policies"]:
        learned = row["learned_score"]
        wins = f"{row['win_rate']:.3f} [{row['win_rate_low']:.2f}, {row['win_rate_high']:.2f}]"
        table.add_row(
            row["policy"],
            f"{row['bleu']:.1f}",
            f"{row['judge_score']:.3f} ±{1.96 * row['judge_score_se']:.3f}",
            "–" if learned is None else f"{learned:.2f}",
            f"{row['kl_nats']:.2f}",
            f"{row['mean_tokens']:.1f}",
            "–" if row["policy"] == opponent else wins,
        )
    console.print(table)
    note = f"Win rates and KL (a response) are against {opponent}; ± and [ ] are 95% intervals; ties count half a win."
    console.print(note, style="dim", highlight=False, markup=False)


def _print_reward_model(console: Console, results: dict[str, Any]) -> None:
    pairs, metrics = results["pairs"], results["metrics"]
    table = Table(
        title=f"{results['recipe']}: {pairs['validation']} held-out pairs", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("preferred by", no_wrap=True)
    for column in ("accuracy [95%]", "margin", "ECE"):
        table.add_column(column, justify="right")
    for row in results["table"]:
        margin, error = row["mean_margin"], row["calibration_error"]
        table.add_row(
            row["scorer"],
            f"{row['accuracy']:.3f} [{row['accuracy_low']:.2f}, {row['accuracy_high']:.2f}]",
            "–" if margin is None else f"{margin:.3f}",
            "–" if error is None else f"{error:.3f}",
        )
    console.print(table)
    note = (
        f"{pairs['train']} pairs were trained on, {pairs['dropped']} were too long; accuracy on as many of the former "
        f"as are held out: {metrics['reward/train_accuracy']:.3f}. Shuffled prompts: each pair with another prompt. "
        "ECE: expected calibration error. [ ] are 95% intervals."
    )
    console.print(note, style="dim", highlight=False, markup=False)
