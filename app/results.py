"""The tables of results, from the current artifacts of a recipe or those of a run.

They are of its comparison and decoding sweep or, where it has no policies, of its reward model.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment_pipeline.errors import MissingArtifactError
from alignment_pipeline.identity import read_jsonl
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.runs import RunRecords

_ON_PAIRS = {"reward_model": "reward", "dpo_policy": "dpo"}
"""Asset → beginning of its metrics' names."""


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
        "held_out": _held_out(store, assets),
        "decoding": _sweep(store, assets["decoding_sweep"]) if "decoding_sweep" in assets else None,
        "checks": [
            {"asset": asset, **check} for asset, made in assets.items() for check in store.manifest(made)["checks"]
        ],
    }


def _held_out(store: ArtifactStore, assets: Mapping[str, ArtifactRef]) -> dict[str, dict[str, float]]:
    """Accuracy and mean margin on held-out preference pairs, of what was trained on pairs."""
    found = {}
    for asset, prefix in _ON_PAIRS.items():
        metrics = store.manifest(assets[asset])["metrics"] if asset in assets else {}
        names = {name: f"{prefix}/held_out_{name}" for name in ("accuracy", "margin")}
        if metrics.keys() >= set(names.values()):
            found[asset] = {name: metrics[metric] for name, metric in names.items()}
    return found


def _sweep(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    folder = store.verify(ref)
    return {
        "artifact": ref.artifact_id,
        "policy": store.manifest(ref)["inputs"]["policy"]["stage"],
        **json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "table": read_jsonl(folder / "table.jsonl"),
    }


def result_asset(assets: Container[str]) -> str | None:
    """Which of some assets holds the results; None if none does."""
    return next((asset for asset in ("comparison", "reward_model") if asset in assets), None)


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The tables for people, their footnotes, and the checks that failed."""
    (_print_policies if results["asset"] == "comparison" else _print_reward_model)(console, results)
    if results["decoding"]:
        _print_sweep(console, results["decoding"])
    for check in results["checks"]:
        if not check["passed"]:
            line = f"Warning: {check['asset']}: {check['name']} does not hold. {check['detail']}"
            console.print(line, style="yellow", markup=False, highlight=False)


def _print_policies(console: Console, results: dict[str, Any]) -> None:
    judge, opponent = results["judge_title"], results["opponent"]
    prompts = results["policies"][0]["prompts"]
    table = _table(f"{results['recipe']}: {prompts} test prompts, judge: {judge}")
    table.add_column("policy", no_wrap=True)
    for column in ("BLEU", "judge", "learned", "KL, nats", "tokens", "win rate [95%]"):
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
    if results["held_out"]:
        told = (
            f"{asset} tells {values['accuracy']:.1%} right, mean margin {values['margin']:.3f}"
            for asset, values in results["held_out"].items()
        )
        console.print(f"Held-out preference pairs: {'; '.join(told)}.", style="dim", highlight=False, markup=False)
    _print_changes(console, results)


def _print_reward_model(console: Console, results: dict[str, Any]) -> None:
    pairs, metrics = results["pairs"], results["metrics"]
    table = _table(f"{results['recipe']}: {pairs['validation']} held-out pairs")
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


def _print_changes(console: Console, results: dict[str, Any]) -> None:
    """What each policy changed, over the same prompts; nothing for a comparison that did not count it."""
    table = _table(f"Changes over the same prompts, score: {results['judge_title']}")
    table.add_column("policy", no_wrap=True)
    table.add_column("measure", no_wrap=True)
    for column in ("before", "after", "change [95%]"):
        table.add_column(column, justify="right", no_wrap=True)
    by_policy = {row["policy"]: row for row in results["policies"]}
    for policy, row in by_policy.items():
        before = by_policy.get(row.get("changed_from"))
        if before is None:
            continue
        name = f"{policy} from {row['changed_from']}"
        for title, column, change, digits in (
            ("BLEU", "bleu", "bleu", 1),
            ("score", "judge_score", "judge", 3),
            ("learned", "learned_score", "learned", 2),
        ):
            if row[f"{change}_change"] is not None:
                bounds = f"[{row[f'{change}_change_low']:+.{digits}f}, {row[f'{change}_change_high']:+.{digits}f}]"
                table.add_row(
                    name, title, f"{before[column]:.{digits}f}", f"{row[column]:.{digits}f}",
                    f"{row[f'{change}_change']:+.{digits}f} {bounds}",
                )  # fmt: skip
                name = ""
    if not table.row_count:
        return
    console.print(table)
    note = "Paired: means by 1.96 standard errors of the differences; BLEU by a bootstrap over the prompts."
    console.print(note, style="dim", highlight=False, markup=False)


def _print_sweep(console: Console, sweep: dict[str, Any]) -> None:
    table = _table(f"Decoding of {sweep['policy']}, {sweep['prompts']} test prompts, score: {sweep['judge_title']}")
    table.add_column("setting", no_wrap=True)
    has_learned = sweep["table"][0]["learned_score"] is not None
    for column in ("BLEU", "score", *(["learned"] if has_learned else []), "dist-2", "rep-4", "tokens", "ended"):
        table.add_column(column, justify="right")
    for row in sweep["table"]:
        learned = [f"{row['learned_score']:.2f}"] if has_learned else []
        table.add_row(
            row["setting"],
            f"{row['bleu']:.1f}",
            f"{row['judge_score']:.3f}",
            *learned,
            f"{row['distinct_2']:.2f}",
            f"{row['repetition']:.0%}",
            f"{row['mean_tokens']:.1f}",
            f"{row['eos_rate']:.0%}",
        )
    console.print(table)
    note = (
        "dist-2: different pairs of tokens, over all tokens. rep-4: 4-grams that stood in the response before. "
        "`align results --json` has intervals and distinct-1."
    )
    console.print(note, style="dim", highlight=False, markup=False)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
