"""`comparison`: all policies of a recipe side by side, with win rates against the model they were trained from.

Each policy's BLEU and scores are also compared with those of the model before it (`changed_from`), over the same
prompts: the trunk, and for the trunk of a recipe with `sft` the base model.
"""

from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.bleu import bleu_change
from alignment_pipeline.decoding_configs import EvaluationConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.judges import JUDGE_TITLES
from alignment_pipeline.plots import bars
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.stages.evaluation import summarize
from alignment_pipeline.statistics import paired_difference, standard_error, wilson_interval, win_rate

_EXAMPLES = 8


def compare_policies(spec: StageSpec[EvaluationConfig], log: ProgressLog) -> StageResult:
    """Write `table.jsonl` (one row a policy) and `examples.jsonl` (the same prompts answered by each).

    Inputs are evaluations by policy name. The opponent of every win rate is `sft_model`, or `base_model` in a recipe
    without it; a policy's win rate is over paired prompts, by the recipe's judge, ties counted half.
    """
    examples = {policy: read_jsonl(folder / "examples.jsonl") for policy, folder in spec.inputs.items()}
    opponent = "sft_model" if "sft_model" in examples else "base_model"
    table = []
    for policy, rows in examples.items():
        _require_alike(policy, rows, opponent, examples[opponent])
        before = None if policy == "base_model" else "base_model" if policy == opponent else opponent
        changes = _changes(rows, examples[before] if before else None, spec.seed)
        table.append(_row(policy, rows, opponent, examples[opponent]) | {"changed_from": before} | changes)
    write_jsonl(spec.output_dir / "table.jsonl", table)
    write_jsonl(spec.output_dir / "examples.jsonl", _side_by_side(examples))
    title = JUDGE_TITLES[spec.config.judge]
    atomic.write_json(
        spec.output_dir / "summary.json", {"judge": spec.config.judge, "judge_title": title, "opponent": opponent}
    )
    bars(
        spec.output_dir / "extras" / "judge_score.png",
        {row["policy"]: (row["judge_score"], 1.96 * row["judge_score_se"]) for row in table},
        title=f"{title.capitalize()} on {table[0]['prompts']} test prompts (mean, 95% interval)",
        ylabel=title,
    )
    metrics = {
        f"{row['policy']}/{name}": float(row[name])
        for row in table
        for name in ("judge_score", "win_rate", "bleu", "kl_nats")
    }
    log.step("compare", 1, 1, metrics)
    return StageResult(metrics, _checks(table, opponent, spec.config.kl_budget_nats))


def _require_alike(policy: str, rows: list[dict[str, Any]], opponent: str, theirs: list[dict[str, Any]]) -> None:
    for name in ("prompt_id", "judge", "decoding"):
        if [row[name] for row in rows] != [row[name] for row in theirs]:
            raise DataError(
                f"{policy} and {opponent} have different {name} values, expected the same for every policy. "
                "Evaluate all of them anew with the recipe's settings."
            )


def _changes(rows: list[dict[str, Any]], before: list[dict[str, Any]] | None, seed: int) -> dict[str, float | None]:
    """What became of BLEU and the scores, each with its 95% interval; None where there is nothing to compare with."""
    changes: dict[str, tuple[float | None, float | None, float | None]] = dict.fromkeys(
        ("bleu", "judge", "learned"), (None, None, None)
    )
    if before is not None:
        changes["bleu"] = bleu_change(
            [row["response"] for row in rows], [row["response"] for row in before],
            [row["reference"] for row in rows], seed,
        )  # fmt: skip
        for name in ("judge", "learned"):
            now, then = ([row[f"{name}_score"] for row in each] for each in (rows, before))
            if None not in (*now, *then):
                changes[name] = paired_difference(now, then)
    suffixes = ("change", "change_low", "change_high")
    return {
        f"{name}_{suffix}": value
        for name, values in changes.items()
        for suffix, value in zip(suffixes, values, strict=True)
    }


def _row(policy: str, rows: list[dict[str, Any]], opponent: str, theirs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["judge_score"] for row in rows]
    metrics = summarize(rows)
    rate = win_rate(scores, [row["judge_score"] for row in theirs])
    low, high = wilson_interval(rate, len(rows))
    return {
        "policy": policy,
        "judge": rows[0]["judge"],
        "opponent": opponent,
        "prompts": len(rows),
        "bleu": metrics["eval/bleu"],
        "judge_score": metrics["eval/judge_score"],
        "judge_score_se": standard_error(scores),
        "learned_score": metrics.get("eval/learned_score"),
        "kl_nats": metrics["eval/kl_nats"],
        "mean_tokens": metrics["eval/mean_tokens"],
        "eos_rate": metrics["eval/eos_rate"],
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
    }


def _side_by_side(examples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    first = next(iter(examples.values()))
    return [
        {
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],
            "reference": row["reference"],
            "responses": {
                policy: {"response": rows[number]["response"], "judge_score": rows[number]["judge_score"]}
                for policy, rows in examples.items()
            },
        }
        for number, row in enumerate(first[:_EXAMPLES])
    ]


def _checks(table: list[dict[str, Any]], opponent: str, kl_budget_nats: float) -> tuple[StageCheck, ...]:
    by_policy = {row["policy"]: row for row in table}
    checks = []
    if opponent == "sft_model":
        sft, base = by_policy["sft_model"], by_policy["base_model"]
        checks.append(
            StageCheck(
                "sft_beats_base",
                sft["bleu"] > base["bleu"] and sft["judge_score"] > base["judge_score"],
                f"BLEU {base['bleu']:.1f} → {sft['bleu']:.1f}, "
                f"judge score {base['judge_score']:.3f} → {sft['judge_score']:.3f}.",
            )
        )
    for policy, row in by_policy.items():
        if policy in ("base_model", opponent):
            continue
        wins = f"Win rate {row['win_rate']:.3f}, 95% interval {row['win_rate_low']:.3f} to {row['win_rate_high']:.3f}."
        distance = f"{row['kl_nats']:.2f} nats a response from {opponent}; the recipe's budget is {kl_budget_nats:g}."
        checks += [
            StageCheck(f"{policy}_beats_{opponent}", row["win_rate_low"] > 0.5, wins),
            StageCheck(f"{policy}_kl_within_budget", row["kl_nats"] <= kl_budget_nats, distance),
        ]
    return tuple(checks)
