"""The table of results, from the recipe's current comparison (or a run's)."""

import json
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
    """The comparison's table and where it comes from.

    Raises:
        MissingArtifactError: The recipe has no comparison yet.
    """
    runs, store = RunRecords(home), ArtifactStore(home)
    assets = runs.of_run(run_id) if run_id else runs.current(recipe)
    if "comparison" not in assets:
        raise MissingArtifactError(f"{recipe} has no comparison yet. Run `align run {recipe}` first.")
    ref: ArtifactRef = assets["comparison"]
    folder = store.verify(ref)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "recipe": recipe,
        "artifact": ref.artifact_id,
        "created_at": store.manifest(ref)["created_at"],
        **summary,
        "policies": read_jsonl(folder / "table.jsonl"),
        "checks": [
            {"asset": asset, **check} for asset, made in assets.items() for check in store.manifest(made)["checks"]
        ],
    }


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The table for people, its footnotes, and the checks that failed."""
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
    for check in results["checks"]:
        if not check["passed"]:
            line = f"Warning: {check['asset']}: {check['name']} does not hold. {check['detail']}"
            console.print(line, style="yellow", markup=False, highlight=False)
