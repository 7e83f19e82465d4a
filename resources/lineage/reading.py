"""From the files of a home folder to rows of the index: which files there are, and what each adds.

A file is named by its path below the home folder, and its first part decides what it is: a manifest with the tables
beside it, a run record, what is current, a release, or a journal of votes.
"""

import contextlib
import fnmatch
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from alignment_pipeline.identity import EXTRAS, MANIFEST, canonical_json, read_jsonl
from alignment_pipeline.progress import metric_series
from resources.artifact_store import ArtifactRef

_PATTERNS = (
    f"artifacts/[!.]*/[!.]*/[!.]*/{MANIFEST}",  # folders with a leading dot are being written
    "runs/[!.]*.json",
    "current/[!.]*.json",
    "releases/[!.]*.json",
    "feedback/[!.]*/journal.jsonl",
)

_PAIRS = """
    INSERT INTO preference_pairs
    SELECT $artifact, $split, id, prompt_id, prompt, chosen, rejected, source, labeller, chosen_score, rejected_score
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', prompt_id: 'VARCHAR', prompt: 'VARCHAR', chosen: 'VARCHAR', rejected: 'VARCHAR',
        source: 'VARCHAR', labeller: 'VARCHAR', chosen_score: 'DOUBLE', rejected_score: 'DOUBLE'})
"""
_QUARANTINE = """
    INSERT INTO quarantined_rows
    SELECT $artifact, reason, source_line, detail
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        reason: 'VARCHAR', source_line: 'BIGINT', detail: 'VARCHAR'})
"""
_ROWS = """
    INSERT INTO dataset_rows
    SELECT $artifact, id, prompt_id, split, $source, source_line, instruction, input, output, rejected
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', prompt_id: 'VARCHAR', split: 'VARCHAR', source_line: 'BIGINT', instruction: 'VARCHAR',
        input: 'VARCHAR', output: 'VARCHAR', rejected: 'VARCHAR'})
"""
_DROPPED = """
    INSERT INTO dropped_rows
    SELECT $artifact, id, reason
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', reason: 'VARCHAR'})
"""
_PROMPTS_OF_TEXTS = """
    INSERT INTO formatted_prompts
    SELECT $artifact, id, prompt_id
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', prompt_id: 'VARCHAR', instruction: 'VARCHAR'})
    WHERE instruction = ''
"""
_EXAMPLES = """
    INSERT INTO evaluation_examples
    SELECT $artifact, prompt_id, prompt, reference, response, judge, judge_score, learned_score, kl_nats, tokens, ended,
           temperature, decoding
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        prompt_id: 'VARCHAR', prompt: 'VARCHAR', reference: 'VARCHAR', response: 'VARCHAR', judge: 'VARCHAR',
        judge_score: 'DOUBLE', learned_score: 'DOUBLE', kl_nats: 'DOUBLE', tokens: 'BIGINT', ended: 'BOOLEAN',
        temperature: 'DOUBLE', decoding: 'VARCHAR'})
"""
_ROLLOUTS = """
    INSERT INTO rollouts
    SELECT $artifact, "update", prompt_id, prompt, response, score, kl_nats, tokens, ended
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        "update": 'BIGINT', prompt_id: 'VARCHAR', prompt: 'VARCHAR', response: 'VARCHAR', score: 'DOUBLE',
        kl_nats: 'DOUBLE', tokens: 'BIGINT', ended: 'BOOLEAN'})
"""
_PAIR_SCORES = """
    INSERT INTO pair_scores
    SELECT $artifact, id, prompt_id, chosen_score, rejected_score, margin, shuffled_chosen_score,
           shuffled_rejected_score
    FROM read_json($path, format = 'newline_delimited', hive_partitioning = false, columns = {
        id: 'VARCHAR', prompt_id: 'VARCHAR', chosen_score: 'DOUBLE', rejected_score: 'DOUBLE', margin: 'DOUBLE',
        shuffled_chosen_score: 'DOUBLE', shuffled_rejected_score: 'DOUBLE'})
"""
_TABLES: Mapping[str, tuple[tuple[str, str, Mapping[str, str | None]], ...]] = {
    "instructions": (("rows.jsonl", _ROWS, {}), ("quarantine.jsonl", _QUARANTINE, {})),
    "formatted_dataset": (
        ("dropped.jsonl", _DROPPED, {}),
        ("train.jsonl", _PROMPTS_OF_TEXTS, {}),
        ("validation.jsonl", _PROMPTS_OF_TEXTS, {}),
        ("test.jsonl", _PROMPTS_OF_TEXTS, {}),
    ),
    "human_preferences": (("pairs.jsonl", _PAIRS, {"split": None}), ("quarantine.jsonl", _QUARANTINE, {})),
    "preference_pairs": (
        ("train.jsonl", _PAIRS, {"split": "train"}),
        ("validation.jsonl", _PAIRS, {"split": "validation"}),
    ),
    "reward_model": (("scores.jsonl", _PAIR_SCORES, {}), ("dropped.jsonl", _DROPPED, {})),
    "ppo_policy": ((f"{EXTRAS}/rollouts.jsonl", _ROLLOUTS, {}),),
    "evaluation": (("examples.jsonl", _EXAMPLES, {}),),
}
"""Stage → its tables: file, statement, and values of it. Types are given, so that an empty file is an empty table."""

_OF_ARTIFACTS = (
    "artifact_inputs", "input_files", "artifact_files", "metrics", "results", "checks", "dataset_rows", "dropped_rows",
    "formatted_prompts", "quarantined_rows", "preference_pairs", "pair_scores", "rollouts",
    "evaluations", "evaluation_examples", "comparison_rows",
)  # fmt: skip
_FROM_MANIFEST = (
    "code_version", "code", "config", "seed", "created_at", "wall_s", "git_commit", "device", "python", "packages",
    "timings",
)  # fmt: skip
"""Columns of `artifacts` that are unknown once the manifest is gone."""
_OF_OTHERS = {
    "runs": ("run_assets", "run_id"),  # the run's own row stays until nothing refers to it
    "current": ("current_assets", "recipe"),
    "releases": ("releases", "release_id"),
    "feedback": ("feedback", "recipe"),
}
"""First part of a path → table that its rows are in, and the column that names the file."""


def sources(home: Path) -> dict[str, str]:
    """Path below the home folder → stamp of every file that the index is made of, artifacts first.

    A stamp is taken before its file is read: a change in between is read again the next time.
    """
    prefix = len(str(home)) + 1
    found = {}
    for pattern in _PATTERNS:
        for path in sorted(_matching(str(home), pattern.split("/"))):
            if (stamp := stamp_of(path)) is not None:
                found[path[prefix:]] = stamp
    return found


def _matching(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """Paths below a folder, one pattern a level. `Path.glob` takes five times as long, and every query waits for it."""
    first, *rest = pattern
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = [first] if first.isidentifier() or first == MANIFEST else fnmatch.filter(os.listdir(folder), first)
        for name in names:
            path = f"{folder}/{name}"
            if rest:
                yield from _matching(path, rest)
            else:
                yield path


def stamp_of(path: str | Path) -> str | None:
    """What changes when a file is replaced or written to; None where it does not exist."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return f"{state.st_ino}:{state.st_size}:{state.st_mtime_ns}"


def is_manifest(path: str) -> bool:
    """Whether a path names an artifact's manifest."""
    return path.startswith("artifacts/")


def add(connection: duckdb.DuckDBPyConnection, home: Path, path: str, stamp: str) -> None:
    """Add what a file holds; nothing of it is in the index."""
    kind, name = path.split("/", 1)
    if is_manifest(path):
        _add_artifact(connection, name.removesuffix(f"/{MANIFEST}"), (home / path).parent)
    elif kind == "feedback":
        _add_votes(connection, name.split("/")[0], home / path)
    else:
        add_content = {"runs": _add_run, "current": _add_current, "releases": _add_release}[kind]
        add_content(connection, Path(path).stem, json.loads((home / path).read_text(encoding="utf-8")))
    connection.execute("INSERT INTO indexed_files VALUES (?, ?, NULL)", [path, stamp])


def forget(connection: duckdb.DuckDBPyConnection, path: str) -> None:
    """Take out what a file held when it was read. An artifact's name stays, since others may be made from it."""
    kind, name = path.split("/", 1)
    if is_manifest(path):
        artifact_id = name.removesuffix(f"/{MANIFEST}")
        for table in _OF_ARTIFACTS:
            connection.execute(f"DELETE FROM {table} WHERE artifact_id = ?", [artifact_id])
        blank = ", ".join(f"{column} = NULL" for column in _FROM_MANIFEST)
        connection.execute(f"UPDATE artifacts SET in_store = false, {blank} WHERE artifact_id = ?", [artifact_id])
    else:
        table, column = _OF_OTHERS[kind]
        connection.execute(f"DELETE FROM {table} WHERE {column} = ?", [name.split("/")[0].removesuffix(".json")])
    connection.execute("DELETE FROM indexed_files WHERE path = ?", [path])


def sweep(connection: duckdb.DuckDBPyConnection) -> None:
    """Take out the names of runs and artifacts that are gone and that nothing names any more."""
    named = " UNION ALL ".join(
        f"SELECT {column} AS artifact_id FROM {table}"
        for table, column in (
            ("artifact_inputs", "input_artifact_id"), ("run_assets", "artifact_id"), ("current_assets", "artifact_id"),
            ("releases", "artifact_id"), ("evaluations", "policy_artifact_id"),
        )
    )  # fmt: skip
    connection.execute(
        f"DELETE FROM artifacts WHERE NOT in_store AND artifact_id NOT IN "
        f"(SELECT artifact_id FROM ({named}) WHERE artifact_id IS NOT NULL)"
    )
    connection.execute(
        "DELETE FROM runs WHERE run_id NOT IN "
        "(SELECT regexp_extract(path, '^runs/(.*)\\.json$', 1) FROM indexed_files WHERE problem IS NULL)"
    )


def _add_artifact(connection: duckdb.DuckDBPyConnection, artifact_id: str, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    environment, timings = manifest.get("environment", {}), manifest.get("timings", {})
    connection.execute(
        "INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, true, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            artifact_id, manifest["stage"], manifest["key"], manifest["data_version"], manifest.get("code_version"),
            canonical_json(manifest.get("code", {})), canonical_json(manifest.get("config", {})), manifest.get("seed"),
            _utc(manifest.get("created_at")), timings.get("wall_s"), environment.get("git_commit"),
            environment.get("device"), environment.get("python"), canonical_json(environment.get("packages", {})),
            canonical_json(timings),
        ],
    )  # fmt: skip
    inputs = manifest.get("inputs", {})
    edges = {name: _named(connection, entry) for name, entry in inputs.items() if "stage" in entry}
    input_files = [(name, entry["sha256"], entry.get("path")) for name, entry in inputs.items() if "stage" not in entry]
    files = [(entry["path"], entry["size"], entry["sha256"]) for entry in manifest.get("files", [])]
    checks = [(c["name"], c["passed"], c.get("detail"), c.get("blocking", False)) for c in manifest.get("checks", [])]
    _insert(connection, "artifact_inputs", artifact_id, edges.items())
    _insert(connection, "input_files", artifact_id, input_files)
    _insert(connection, "artifact_files", artifact_id, files)
    _insert(connection, "results", artifact_id, manifest.get("metrics", {}).items())
    _insert(connection, "checks", artifact_id, checks)
    _add_tables(connection, artifact_id, folder, manifest["stage"], edges)


def _add_tables(
    connection: duckdb.DuckDBPyConnection, artifact_id: str, folder: Path, stage: str, edges: Mapping[str, str]
) -> None:
    """Index the tables inside an artifact; DuckDB reads the large ones itself."""
    for name, statement, values in _TABLES.get(stage, ()):
        if (folder / name).is_file():
            source = {"source": _source(folder)} if statement is _ROWS else {}
            path = glob.escape(str(folder / name))  # DuckDB takes special characters of a path for a pattern
            connection.execute(statement, {"artifact": artifact_id, "path": path, **values, **source})
    if stage == "evaluation" and (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        evaluation = (edges.get("policy"), summary.get("judge"), summary.get("prompts"))
        _insert(connection, "evaluations", artifact_id, [evaluation])
    if stage == "comparison" and (folder / "table.jsonl").is_file():
        _insert(connection, "comparison_rows", artifact_id, _comparison_cells(folder / "table.jsonl"))
    progress = folder / EXTRAS / "progress.jsonl"
    if progress.is_file():
        series = metric_series(progress)
        steps = [(*at, name, float(value)) for at, metrics in series.items() for name, value in metrics.items()]
        _insert(connection, "metrics", artifact_id, steps)


def _source(folder: Path) -> str | None:
    """Where an `instructions` artifact's rows lay, in words."""
    path = folder / EXTRAS / "source.json"
    if not path.is_file():
        return None
    source: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    commit = f" at {source['commit']}" if "commit" in source else ""
    return ("a query over " if "sql" in source else "") + (source.get("path") or source["source"] + commit)


def _add_run(connection: duckdb.DuckDBPyConnection, run_id: str, record: Mapping[str, Any]) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            run_id, record["recipe"], canonical_json(record.get("overrides", [])), record.get("started_by"),
            _utc(record.get("started_at")), _utc(record.get("finished_at")), record.get("status"),
        ],
    )  # fmt: skip
    assets = record.get("assets", {}).items()
    rows = [(asset, _named(connection, entry), entry.get("reused")) for asset, entry in assets]
    _insert(connection, "run_assets", run_id, rows)


def _add_current(connection: duckdb.DuckDBPyConnection, recipe: str, assets: Mapping[str, Any]) -> None:
    rows = [(asset, _named(connection, entry)) for asset, entry in assets.items()]
    _insert(connection, "current_assets", recipe, rows)


def _add_release(connection: duckdb.DuckDBPyConnection, release_id: str, record: Mapping[str, Any]) -> None:
    row = (record["recipe"], record["asset"], _named(connection, record), _utc(record.get("released_at")),
           record.get("released_by"), record.get("note"))  # fmt: skip
    _insert(connection, "releases", release_id, [row])


def _add_votes(connection: duckdb.DuckDBPyConnection, recipe: str, journal: Path) -> None:
    """Index the lines of a journal; what a line lacks is NULL, since bad votes are votes too."""
    rows = []
    for number, line in enumerate(journal.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            vote = _parsed(line)
            prompt = vote.get("prompt") or vote.get("instruction")
            texts = [prompt, *(vote.get(name) for name in ("chosen", "rejected", "labeller"))]
            rows.append((number, *(text if isinstance(text, str) else None for text in texts), line))
    _insert(connection, "feedback", recipe, rows)


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _named(connection: duckdb.DuckDBPyConnection, entry: Mapping[str, str]) -> str:
    """An artifact's id, with a row for it to refer to."""
    artifact_id = ArtifactRef(entry["stage"], entry["key"], entry["data_version"]).artifact_id
    connection.execute(
        "INSERT OR IGNORE INTO artifacts BY NAME SELECT ? AS artifact_id, ? AS stage, ? AS key, ? AS data_version, "
        "false AS in_store",
        [artifact_id, entry["stage"], entry["key"], entry["data_version"]],
    )
    return artifact_id


def _insert(connection: duckdb.DuckDBPyConnection, table: str, owner: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Insert rows that belong to one file, each column as one bound list: far quicker than row by row."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if columns:
        connection.execute(f"INSERT INTO {table} SELECT ?{', unnest(?)' * len(columns)}", [owner, *columns])


def _comparison_cells(path: Path) -> list[tuple[str, str, str, float | None, str | None]]:
    """The cells of a comparison's table: policy, judge, column, and its number or its text."""
    cells = []
    for row in read_jsonl(path):
        for name in sorted(row.keys() - {"policy", "judge"}):
            cell = row[name]
            number = float(cell) if isinstance(cell, int | float) else None
            text = cell if isinstance(cell, str) else canonical_json(cell) if isinstance(cell, list | dict) else None
            cells.append((row["policy"], row["judge"], name, number, text))
    return cells


def _utc(text: str | None) -> datetime | None:
    """An ISO time as DuckDB's TIMESTAMP, which knows no zone."""
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None) if text else None
