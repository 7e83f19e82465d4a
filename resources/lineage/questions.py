"""The questions people ask of the index: why a number is what it is, what a row touched, how two runs differ.

Answers are plain values that can be printed as JSON. The same is there for plain SQL in the views `numbers`,
`provenance`, `training_rows`, `paired_examples`, `learned_from` and `run_differences`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import duckdb

from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.identity import file_sha256
from alignment_pipeline.statistics import wilson_interval
from resources.lineage.index import Lineage, rows

Answer = dict[str, Any]
Connection: TypeAlias = duckdb.DuckDBPyConnection

SHOWN_IDS = 3
Z_95 = 1.96
CURRENT = "current"
_JSON_COLUMNS = ("code", "config", "packages")
_FROM_EXAMPLES = {
    "eval/judge_score": "judge_score",
    "eval/learned_score": "learned_score",
    "eval/kl_nats": "kl_nats",
    "eval/mean_tokens": "tokens",
    "eval/eos_rate": "ended::DOUBLE",
}
"""Metrics that are means over an evaluation's examples, and what is averaged."""
_FROM_PAIRS = {
    "reward/held_out_accuracy": "(sign(margin) + 1) / 2",
    "reward/held_out_margin": "margin",
    "reward/shuffled_prompt_accuracy": "(sign(shuffled_chosen_score - shuffled_rejected_score) + 1) / 2",
}
"""Metrics that are means over a reward model's held-out pairs, and what is averaged; ties count half."""
_RATES = frozenset({"eval/eos_rate", "reward/held_out_accuracy", "reward/shuffled_prompt_accuracy"})


def why(
    lineage: Lineage, recipe: str, metric: str, policy: str | None = None, run: str | None = None, all_ids: bool = False
) -> Answer:
    """A number with everything behind it.

    Args:
        lineage: The index.
        recipe: Name of the recipe.
        metric: `group/name` (`eval/win_rate`), or the name alone.
        policy: What the number is about; may be left out where only one thing has such a metric.
        run: Id of a run; what is current if left out.
        all_ids: List every training row's id, not the first few.

    Returns:
        `metric`, `policy`, `value`, `interval` (95%, or None), `artifact`, `examples` (the rows the number was computed
        from, counted and averaged again in SQL; None where they are rows of no table), and `artifacts`: id →
        asset, settings, code, environment, inputs, and the rows it was trained on.

    Raises:
        AlignmentError: There is no such number, or it is known of several things.
        StoreError: The index cannot be read.
    """
    with lineage.reading() as connection:
        run_id = run or CURRENT
        number = _number(connection, recipe, metric, policy, run_id)
        examples = _examples(connection, number)
        artifacts = _family(connection, number, examples)
        _add_names(connection, artifacts, recipe, run_id)
        _add_inputs(connection, artifacts)
        _add_rows(connection, artifacts, all_ids)
        return {
            "recipe": recipe,
            "run": run_id,
            "metric": number["metric"],
            "policy": number["policy"],
            "value": number["value"],
            "interval": _interval(connection, number, examples),
            "artifact": number["artifact_id"],
            "examples": examples,
            "artifacts": artifacts,
        }


def impact(lineage: Lineage, thing: str) -> Answer:
    """What a row, a pair or a prompt touched.

    Args:
        lineage: The index.
        thing: Id of a row, a pair or a prompt, or FILE:LINE of a file that a recipe's data was read from. A file that
            is there is known by its content, wherever it lies; one that is not, by the path that it had.

    Returns:
        `found` (the rows and pairs with their splits), `quarantined` (why a line was refused), `learned` (every model
        that learned from it: how, through which, which assets are it now, its releases), `derived` (what else was made
        from those models), `asked` (evaluations that asked its prompt).

    Raises:
        AlignmentError: Nothing of that name is known.
        StoreError: The index cannot be read.
    """
    with lineage.reading() as connection:
        found, quarantined = _rows_of(connection, thing)
        if not found and not quarantined:
            raise AlignmentError(
                f"Nothing in the lineage is called {thing!r}; expected the id of a row, a pair or a prompt, or "
                "FILE:LINE of a file that a recipe's data was read from. `align why` shows ids."
            )
        row_ids = sorted({row["row_id"] for row in found})
        cut = rows(connection, "SELECT prompt_id FROM formatted_prompts WHERE row_id IN ?", [row_ids])
        prompt_ids = sorted({row["prompt_id"] for row in [*found, *cut]})
        learned = _learners(connection, row_ids)
        asked = rows(
            connection,
            "SELECT artifact_id, policy_artifact_id FROM evaluations WHERE artifact_id IN "
            "(SELECT artifact_id FROM evaluation_examples WHERE prompt_id IN ?) ORDER BY ALL",
            [prompt_ids],
        )
        models = [entry["artifact_id"] for entry in learned]
        derived = rows(
            connection,
            "SELECT DISTINCT artifact_id FROM ancestors WHERE ancestor_id IN $models AND artifact_id NOT IN $models "
            "ORDER BY ALL",
            {"models": models},
        )
        for entry in (*learned, *derived, *asked):
            entry["assets"] = _assets_now(connection, entry["artifact_id"])
        return {"thing": thing, "found": found, "quarantined": quarantined, "learned": learned, "derived": derived,
                "asked": asked}  # fmt: skip


def diff(lineage: Lineage, run_a: str, run_b: str) -> Answer:
    """What differs between two runs, and how their numbers moved.

    Args:
        lineage: The index.
        run_a: A run's id.
        run_b: Another's.

    Returns:
        `runs` (both records), `differences` (kind, name, a, b and the assets concerned; kinds are override, config,
        seed, data, code and environment), `results` (assets that came out differently) and `metrics` (asset or policy,
        metric, a, b).

    Raises:
        AlignmentError: There is no such run.
        StoreError: The index cannot be read.
    """
    with lineage.reading() as connection:
        differences = rows(
            connection,
            "SELECT kind, name, value_a AS a, value_b AS b, list(asset ORDER BY asset) FILTER (asset <> '') AS assets "
            "FROM run_differences WHERE run_a = ? AND run_b = ? AND kind NOT IN ('result', 'metric') "
            "GROUP BY ALL ORDER BY ALL",
            [run_a, run_b],
        )
        results = rows(
            connection,
            "SELECT asset, value_a AS a, value_b AS b FROM run_differences "
            "WHERE run_a = ? AND run_b = ? AND kind = 'result' ORDER BY ALL",
            [run_a, run_b],
        )
        metrics = rows(
            connection,
            "WITH one AS (SELECT DISTINCT policy, metric, value FROM numbers WHERE run_id = $a), "
            "other AS (SELECT DISTINCT policy, metric, value FROM numbers WHERE run_id = $b) "
            "SELECT coalesce(one.policy, other.policy) AS policy, coalesce(one.metric, other.metric) AS metric, "
            "one.value AS a, other.value AS b FROM one FULL JOIN other "
            "ON other.policy = one.policy AND other.metric = one.metric "
            "WHERE one.value IS DISTINCT FROM other.value ORDER BY ALL",
            {"a": run_a, "b": run_b},
        )
        records = [
            record
            for run in (run_a, run_b)
            for record in rows(connection, "SELECT * FROM runs WHERE run_id = ?", [run])
        ]
        if len(records) < 2:
            raise AlignmentError(f"Expected two runs of this home, found {[record['run_id'] for record in records]}.")
        for record in records:
            record["overrides"] = json.loads(record["overrides"])
        return {"runs": records, "differences": differences, "results": results, "metrics": metrics}


def _number(connection: Connection, recipe: str, metric: str, policy: str | None, run_id: str) -> Answer:
    known = rows(
        connection,
        "SELECT * FROM numbers WHERE recipe = ? AND run_id = ? ORDER BY asset = 'comparison', policy, metric",
        [recipe, run_id],
    )
    if not known:
        recipes = [entry["recipe"] for entry in rows(connection, "SELECT DISTINCT recipe FROM numbers ORDER BY ALL")]
        where = "is current" if run_id == CURRENT else f"is in run {run_id}"
        raise AlignmentError(
            f"No number of {recipe!r} {where}; expected a recipe that has been run: {', '.join(recipes) or 'none has'}."
        )
    named = [number for number in known if metric in (number["metric"], number["metric"].rpartition("/")[2])]
    if not named:
        metrics = ", ".join(sorted({number["metric"] for number in known}))
        raise AlignmentError(f"{recipe} has no metric {metric!r}; expected one of: {metrics}.")
    policies = list(dict.fromkeys(number["policy"] for number in named))
    if policy is None and len(policies) > 1:
        raise AlignmentError(f"{metric} is known of {', '.join(policies)}. Choose one: --policy {policies[-1]}.")
    if policy is not None and policy not in policies:
        raise AlignmentError(f"{metric} is not known of {policy!r}; expected one of: {', '.join(policies)}.")
    return next(number for number in named if policy in (None, number["policy"]))


def _family(connection: Connection, number: Answer, examples: Answer | None) -> dict[str, Answer]:
    """The artifact that a number is in and everything behind it; of a comparison, only the evaluations it is about."""
    about = None
    if number["asset"] == "comparison":
        about = [number["policy"], (examples or {}).get("opponent") or _changed_from(connection, number)]
    family = rows(
        connection,
        "WITH roots AS (SELECT input_artifact_id AS id FROM artifact_inputs "
        "               WHERE artifact_id = $id AND ($about IS NULL OR list_contains($about, name))), "
        "family AS (SELECT $id AS id, 0 AS depth UNION ALL "
        "           SELECT ancestor_id, 1 + min(depth) FROM provenance WHERE artifact_id IN (SELECT id FROM roots) "
        "           GROUP BY ancestor_id) "
        "SELECT artifacts.* FROM family JOIN artifacts ON artifacts.artifact_id = family.id "
        "ORDER BY family.depth, artifacts.artifact_id",
        {"id": number["artifact_id"], "about": about},
    )
    return {made["artifact_id"]: _artifact(made) for made in family}


def _changed_from(connection: Connection, number: Answer) -> str | None:
    """The policy that a change is counted from; None for another number of a comparison."""
    cells = rows(
        connection,
        "SELECT text FROM comparison_rows WHERE artifact_id = ? AND policy = ? AND name = 'changed_from' "
        "AND regexp_matches(?, '_change(_low|_high)?$')",
        [number["artifact_id"], number["policy"], number["metric"]],
    )
    return cells[0]["text"] if cells else None


def _artifact(made: Answer) -> Answer:
    """An artifact's own part of an answer."""
    kept = {name: value for name, value in made.items() if name not in ("artifact_id", "timings", "key")}
    parsed = {name: json.loads(made[name] or "{}") for name in _JSON_COLUMNS}
    return {**kept, **parsed, "asset": made["stage"], "inputs": {}, "files": {}, "rows": []}


def _add_names(connection: Connection, artifacts: dict[str, Answer], recipe: str, run_id: str) -> None:
    named = rows(
        connection,
        "SELECT artifact_id, asset FROM recipe_assets WHERE recipe = ? AND run_id IN (?, 'current') "
        "ORDER BY run_id = 'current', asset",
        [recipe, run_id],
    )
    for entry in reversed(named):  # a run's own names last
        if entry["artifact_id"] in artifacts:
            artifacts[entry["artifact_id"]]["asset"] = entry["asset"]


def _add_inputs(connection: Connection, artifacts: dict[str, Answer]) -> None:
    ids = list(artifacts)
    for edge in rows(connection, "SELECT * FROM artifact_inputs WHERE artifact_id IN ? ORDER BY ALL", [ids]):
        if edge["input_artifact_id"] in artifacts:
            artifacts[edge["artifact_id"]]["inputs"][edge["name"]] = edge["input_artifact_id"]
    for file in rows(connection, "SELECT * FROM input_files WHERE artifact_id IN ? ORDER BY ALL", [ids]):
        artifacts[file["artifact_id"]]["files"][file["name"]] = {"path": file["path"], "sha256": file["sha256"]}


def _add_rows(connection: Connection, artifacts: dict[str, Answer], all_ids: bool) -> None:
    """How many rows of which kind each model was trained on, and their ids (of a rollout, its prompt's)."""
    counted = rows(
        connection,
        "SELECT artifact_id, kind, count(*) AS count, "
        + ("list_sort(list(coalesce(row_id, prompt_id)))" if all_ids else "min(coalesce(row_id, prompt_id), $shown)")
        + " AS ids FROM training_rows WHERE artifact_id IN $ids GROUP BY artifact_id, kind ORDER BY artifact_id, kind",
        {"ids": list(artifacts)} if all_ids else {"ids": list(artifacts), "shown": SHOWN_IDS},
    )
    for entry in counted:
        artifacts[entry.pop("artifact_id")]["rows"].append(entry)


def _examples(connection: Connection, number: Answer) -> Answer | None:
    """The rows a number was computed from, and the number computed again from them."""
    if number["metric"] == "eval/win_rate":
        return rows(
            connection,
            "SELECT count(*) AS count, count(*) FILTER (win = 1) AS won, count(*) FILTER (win = 0.5) AS tied, "
            "count(*) FILTER (win = 0) AS lost, any_value(opponent) AS opponent, avg(win) AS recomputed "
            "FROM paired_examples WHERE artifact_id = ? AND policy = ?",
            [number["artifact_id"], number["policy"]],
        )[0]
    if number["artifact_id"].startswith("evaluation/"):
        return _averaged(connection, number, "evaluation_examples", _FROM_EXAMPLES.get(number["metric"]))
    if number["metric"] in _FROM_PAIRS:
        found = _averaged(connection, number, "pair_scores", _FROM_PAIRS[number["metric"]])
        return found if found["count"] else None
    return None


def _averaged(connection: Connection, number: Answer, table: str, value: str | None) -> Answer:
    """How many rows an artifact has in a table, and the mean of a value of them."""
    mean = value or "NULL::DOUBLE"
    return rows(
        connection,
        f"SELECT count(*) AS count, avg({mean}) AS recomputed, stddev_samp({mean}) / sqrt(count(*)) AS "
        f"standard_error FROM {table} WHERE artifact_id = ?",
        [number["artifact_id"]],
    )[0]


def _interval(connection: Connection, number: Answer, examples: Answer | None) -> list[float] | None:
    """95%: the comparison's own for a win rate, Wilson's for another rate, the normal one for a mean over examples."""
    error = (examples or {}).get("standard_error")
    if examples and number["metric"] in _RATES:
        return list(wilson_interval(number["value"], examples["count"]))
    if error is not None:
        return [number["value"] - Z_95 * error, number["value"] + Z_95 * error]
    name = number["metric"].rpartition("/")[2]
    bounds = rows(
        connection,
        "SELECT value FROM comparison_rows WHERE artifact_id = ? AND policy = ? AND name IN ? ORDER BY value",
        [number["artifact_id"], number["policy"], [f"{name}_low", f"{name}_high"]],
    )
    return [bound["value"] for bound in bounds] or None


def _rows_of(connection: Connection, thing: str) -> tuple[list[Answer], list[Answer]]:
    """The rows and pairs of that name, and the refused lines."""
    file, separator, line = thing.rpartition(":")
    if separator and line.isdigit():
        return _rows_of_line(connection, file, int(line))
    found = rows(
        connection,
        "SELECT 'row' AS kind, row_id, prompt_id, split, source, source_line, instruction AS prompt, output AS text, "
        "artifact_id FROM dataset_rows WHERE row_id = $id OR prompt_id = $id OR row_id IN "
        "(SELECT row_id FROM formatted_prompts WHERE prompt_id = $id) UNION ALL BY NAME "
        "SELECT 'pair' AS kind, pair_id AS row_id, prompt_id, split, source, prompt, chosen AS text, artifact_id "
        "FROM preference_pairs WHERE pair_id = $id ORDER BY kind DESC, artifact_id, row_id, split",
        {"id": thing},
    )
    return found, []


def _rows_of_line(connection: Connection, file: str, line: int) -> tuple[list[Answer], list[Answer]]:
    artifacts = _artifacts_of_file(connection, file)
    found = rows(
        connection,
        "SELECT 'row' AS kind, row_id, prompt_id, split, source, source_line, instruction AS prompt, output AS text, "
        "artifact_id FROM dataset_rows WHERE source_line = ? AND artifact_id IN ? ORDER BY artifact_id",
        [line, artifacts],
    )
    quarantined = rows(
        connection,
        "SELECT artifact_id, reason, detail FROM quarantined_rows WHERE source_line = ? AND artifact_id IN ? "
        "ORDER BY ALL",
        [line, artifacts],
    )
    return found, quarantined


def _artifacts_of_file(connection: Connection, file: str) -> list[str]:
    """What was read from a data file: by its content, or by the path that it lay at if it is not there.

    Raises:
        AlignmentError: The file holds something else now, was never read, or was read by queries only, whose rows are
            numbered by their result.
    """
    read = rows(
        connection,
        "SELECT artifact_id, sha256, path, (config ->> 'sql') IS NOT NULL AS is_query FROM input_files "
        "JOIN artifacts USING (artifact_id) WHERE name = 'source' ORDER BY ALL",
    )
    path = Path(file)
    if path.is_file():
        sha256 = file_sha256(path)
        same = [entry["artifact_id"] for entry in read if entry["sha256"] == sha256]
        if not same and any(Path(entry["path"]).resolve() == path.resolve() for entry in read):
            raise AlignmentError(
                f"{file} was changed since a recipe has read it, so that its lines are others. Ask by a row's id."
            )
    else:
        same = [entry["artifact_id"] for entry in read if entry["path"] == file]
    if not same:
        files = ", ".join(sorted({entry["path"] for entry in read})) or "none"
        raise AlignmentError(f"No recipe has read its data from {file}; expected one of: {files}.")
    queried = {entry["artifact_id"] for entry in read if entry["is_query"]}
    if queried.issuperset(same):
        raise AlignmentError(
            f"{file} was read through data.sql, whose rows are those of a query and not lines of the file. Ask by a "
            "row's id: lineage has them in dataset_rows, with their texts."
        )
    return [artifact for artifact in same if artifact not in queried]


def _learners(connection: Connection, row_ids: Sequence[str]) -> list[Answer]:
    """Models that learned from rows, the directest way first, with their releases."""
    learned = rows(
        connection,
        "SELECT artifact_id, stage, min(depth) AS depth, "
        "list(DISTINCT kind ORDER BY kind) FILTER (depth = 0) AS kinds, "
        "list(DISTINCT through_artifact_id ORDER BY through_artifact_id) FILTER (depth > 0) AS through "
        "FROM learned_from WHERE row_id IN ? GROUP BY artifact_id, stage ORDER BY depth, stage, artifact_id",
        [list(row_ids)],
    )
    for entry in learned:
        entry["kinds"], entry["through"] = entry["kinds"] or [], entry["through"] or []
        entry["releases"] = [
            release["release_id"]
            for release in rows(
                connection,
                "SELECT release_id FROM releases WHERE artifact_id = ? ORDER BY released_at",
                [entry["artifact_id"]],
            )
        ]
    return learned


def _assets_now(connection: Connection, artifact_id: str) -> list[str]:
    """`recipe/asset` of everything that an artifact is at present."""
    found = rows(
        connection,
        "SELECT recipe || '/' || asset AS name FROM current_assets WHERE artifact_id = ? ORDER BY ALL",
        [artifact_id],
    )
    return [entry["name"] for entry in found]
