"""What `align run --explain` says of each asset: reused, or why not; with `--dry-run` of a run that is not made.

Imports neither Dagster nor torch: a forecast is an answer at once. How it is decided is in `resources.forecast`.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from rich.console import Console

from alignment_pipeline.recipe import Recipe
from app.recipes import select_assets
from resources.artifact_store import short_id
from resources.forecast import forecast
from resources.runs import RunRecords


def explain_forecast(console: Console, home: Path, recipe: Recipe, select: Collection[str]) -> None:
    """Say what a run would do with each asset; nothing is computed or changed.

    Raises:
        AlignmentError: The run could not be made: see `forecast`.
    """
    assets = select_assets(recipe, select)
    verdicts = forecast(home, recipe, assets)
    console.print(f"What a run of {recipe.name} would do in {home}:", highlight=False, soft_wrap=True)
    for verdict in verdicts:
        because = "; ".join(verdict.reasons)
        if verdict.artifact:
            because = short_id(verdict.artifact.artifact_id) + (f"; not the current one: {because}" if because else "")
        _say(console, verdict.asset, verdict.kind, because)
    counts = Counter(verdict.kind for verdict in verdicts)
    console.print(", ".join(f"{kind} {count}" for kind, count in counts.items()) + ".", highlight=False)


def explain_run(console: Console, home: Path, run_id: str, assets: Iterable[str]) -> None:
    """Say of each asset of a run that was made whether it was reused, or why not."""
    runs = RunRecords(home)
    made = runs.of_run(run_id)
    ends = {event["asset"]: event for event in runs.events(run_id) if event["event"] in ("finished", "failed")}
    for asset in assets:
        end = ends.get(asset)
        if end is None:
            _say(console, asset, "not made", "")
        elif end["event"] == "failed":
            _say(console, asset, "failed", end["error"])
        elif end["reused"]:
            _say(console, asset, "reused", short_id(made[asset].artifact_id))
        else:
            _say(console, asset, "computed", "; ".join(end["reasons"]))


def _say(console: Console, asset: str, what: str, because: str) -> None:
    line = f"{asset:<20} {what:<9}  {because}"
    console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
