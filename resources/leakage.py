"""Whether an evaluation's prompts were trained on by anything behind it, however far back.

The stages see to it that they are not: splits go by prompt and are checked where they are made. This looks at the
result instead, across every artifact that the policy, the trunk and the reward come from: a table that came in by
another way, or from another split, is found here. Prompts count by `prompt_id`; texts are not read.

Not seen: what a given model was trained on elsewhere, and the labelled texts of a trained classifier, which have no
prompts.
"""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb

from alignment_pipeline.errors import StoreError
from alignment_pipeline.stage import StageCheck
from resources.artifact_store import ArtifactRef, ArtifactStore, parents

CHECK = "evaluated_prompts_were_not_trained_on"

_TRAINED_ON = {
    "instructions": "rows.jsonl",
    "formatted_dataset": "train.jsonl",
    "preference_pairs": "train.jsonl",
}
"""Stage → table of what models learn from; only rows of the split `train` count where the table has splits."""

_PROMPTS = """
    SELECT DISTINCT ?, prompt_id
    FROM read_json(?, format = 'newline_delimited', hive_partitioning = false,
                   columns = {prompt_id: 'VARCHAR', split: 'VARCHAR'})
    WHERE coalesce(split, 'train') = 'train'
"""
_SETTINGS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_SHOWN = 3


def with_leak_check(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    """An artifact's manifest; that of an evaluation made before there was this check gets it now."""
    manifest = store.manifest(ref)
    if ref.stage == "evaluation" and all(check["name"] != CHECK for check in manifest["checks"]):
        check = leak_check(store, parents(manifest), store.path(ref))
        manifest["checks"] = [*manifest["checks"], vars(check)]
    return manifest


def leak_check(store: ArtifactStore, inputs: Mapping[str, ArtifactRef], evaluation: Path) -> StageCheck:
    """Check the examples of an evaluation against what everything it depends on was trained on.

    Args:
        store: Where the ancestors are found, by their manifests.
        inputs: What the evaluation reads. `dataset` is where its prompts come from and teaches it nothing by itself; it
            counts where a model behind the other inputs was trained on it.
        evaluation: Folder with the evaluation's `examples.jsonl`.

    Raises:
        StoreError: The table of an ancestor is gone or malformed, so that nobody can tell.
    """
    tables = _tables(store, (ref for name, ref in inputs.items() if name != "dataset"))
    with duckdb.connect(config=_SETTINGS) as connection:
        connection.execute("CREATE TABLE evaluated (artifact_id VARCHAR, prompt_id VARCHAR)")
        connection.execute("CREATE TABLE trained_on (artifact_id VARCHAR, prompt_id VARCHAR)")
        _read(connection, "evaluated", "", evaluation / "examples.jsonl")
        for artifact_id, path in tables.items():
            _read(connection, "trained_on", artifact_id, path)
        leaks = connection.execute("FROM trained_on SEMI JOIN evaluated USING (prompt_id) ORDER BY ALL").fetchall()
        ((evaluated, compared),) = connection.execute(
            "SELECT (SELECT count(*) FROM evaluated), (SELECT count(DISTINCT prompt_id) FROM trained_on)"
        ).fetchall()
    if not leaks:
        detail = (
            f"{evaluated} evaluated prompts; none is among the {compared} training prompts of {len(tables)} ancestors."
        )
        return StageCheck(CHECK, passed=True, detail=detail, blocking=True)
    prompts = sorted({prompt_id for _, prompt_id in leaks})
    places = sorted({artifact_id for artifact_id, _ in leaks})
    detail = (
        f"{len(prompts)} of {evaluated} evaluated prompts were trained on: {', '.join(prompts[:_SHOWN])}"
        f"{', …' if len(prompts) > _SHOWN else ''} in {', '.join(places)}."
    )
    return StageCheck(CHECK, passed=False, detail=detail, blocking=True)


def _tables(store: ArtifactStore, inputs: Iterable[ArtifactRef]) -> dict[str, Path]:
    """Artifact id → table of each ancestor that holds training rows."""
    found = {}
    for ref, manifest in store.family(inputs).items():
        path = store.path(ref) / _TRAINED_ON.get(ref.stage, "")
        if manifest is None or not path.exists():
            raise StoreError(
                f"{path} is missing, so nobody can tell what was trained on. Delete {store.path(ref)} and run the "
                "whole recipe again: it is computed anew."
            )
        if ref.stage in _TRAINED_ON:
            found[ref.artifact_id] = path
    return found


def _read(connection: duckdb.DuckDBPyConnection, table: str, artifact_id: str, path: Path) -> None:
    pattern = glob.escape(str(path))  # DuckDB takes special characters of a path for a pattern
    try:
        connection.execute(f"INSERT INTO {table} {_PROMPTS}", [artifact_id, pattern])
    except duckdb.Error as error:
        raise StoreError(
            f"{path} cannot be read as a table ({error}), so nobody can tell what was trained on. Delete {path.parent} "
            "and run the whole recipe again: it is computed anew."
        ) from error
