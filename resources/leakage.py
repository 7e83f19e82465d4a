"""Whether an evaluation's prompts were trained on by anything behind it, however far back.

The stages see to it that they are not: splits go by prompt and are checked where they are made. This looks at the
result instead, across every artifact that the policy, the trunk and the reward come from: a table that came in by
another way, or from another split, is found here. Prompts count by `prompt_id`, and by their text in the normal form
that splits go by. A plain text that is trained on whole counts where it is an evaluated prompt with its reference.

Not seen: what a given model was trained on elsewhere; the labelled texts of a trained classifier, which have no
prompts; and plain texts that only begin as an evaluated prompt does. A built base model learns from those too, also
where `formatted_dataset` drops them as `prompt_is_held_out`: a prompt of a few tokens begins many texts.
"""

import glob
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import StoreError
from alignment_pipeline.prompts import is_plain_text, normalised, split_text
from alignment_pipeline.stage import StageCheck
from resources.artifact_store import ArtifactRef, ArtifactStore, parents

CHECK = "evaluated_prompts_were_not_trained_on"

EVALUATING = frozenset({"evaluation", "decoding_sweep"})
"""Stages whose `examples.jsonl` holds the prompts that they asked."""

_TRAINED_ON = {
    "instructions": ("rows.jsonl", ("prompt_id", "instruction", "input", "output")),
    "formatted_dataset": ("train.jsonl", ("prompt_id", "prompt")),
    "preference_pairs": ("train.jsonl", ("prompt_id", "prompt")),
}
"""Stage → table of what models learn from, and its columns that tell the prompts.

Only rows of the split `train` count where the table has splits.
"""
_OWN = "evaluation"
_EVALUATED = ("prompt_id", "prompt", "reference")

_ROWS = """
    SELECT {columns}
    FROM read_json(?, format = 'newline_delimited', hive_partitioning = false,
                   columns = {{prompt_id: 'VARCHAR', prompt: 'VARCHAR', reference: 'VARCHAR', instruction: 'VARCHAR',
                              input: 'VARCHAR', output: 'VARCHAR', split: 'VARCHAR'}})
    WHERE coalesce(split, 'train') = 'train'
"""
_SETTINGS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_SHOWN = 3

_Mark = tuple[str, str]
"""`prompt_id`, `prompt` or `whole` (a plain text), and the id or the text in normal form."""


def with_leak_check(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    """An artifact's manifest; that of an evaluation made before there was this check gets it now."""
    manifest = store.manifest(ref)
    if ref.stage in EVALUATING and all(check["name"] != CHECK for check in manifest["checks"]):
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
    evaluated: set[str] = set()
    evaluated_by: dict[_Mark, set[str]] = {}
    trained_on: set[str] = set()
    leaks: set[tuple[str, str]] = set()
    for artifact_id, row in _rows({_OWN: (evaluation / "examples.jsonl", _EVALUATED), **tables}):
        prompt_id = row["prompt_id"]
        if artifact_id == _OWN:
            evaluated.add(prompt_id)
            for mark in _evaluated(row):
                evaluated_by.setdefault(mark, set()).add(prompt_id)
        else:
            trained_on.add(prompt_id)
            for mark in _learnt(row):
                leaks.update((artifact_id, leaked) for leaked in evaluated_by.get(mark, ()))
    if not leaks:
        detail = (
            f"{len(evaluated)} evaluated prompts; none is among the {len(trained_on)} training prompts of "
            f"{len(tables)} ancestors."
        )
        return StageCheck(CHECK, passed=True, detail=detail, blocking=True)
    prompts = sorted({prompt_id for _, prompt_id in leaks})
    places = sorted({artifact_id for artifact_id, _ in leaks})
    detail = (
        f"{len(prompts)} of {len(evaluated)} evaluated prompts were trained on: {', '.join(prompts[:_SHOWN])}"
        f"{', …' if len(prompts) > _SHOWN else ''} in {', '.join(places)}."
    )
    return StageCheck(CHECK, passed=False, detail=detail, blocking=True)


def _evaluated(row: Mapping[str, str]) -> Iterator[_Mark]:
    """What tells that an evaluated example was learnt."""
    prompt, reference = row["prompt"], row["reference"]
    yield "prompt_id", row["prompt_id"]
    yield "prompt", normalised(prompt)
    for gap in ("", " "):  # where a plain text was cut, the rest may have lost the space that it began with
        yield "whole", normalised(prompt + gap + reference)


def _learnt(row: Mapping[str, str]) -> Iterator[_Mark]:
    """What a training row may share with an evaluated example; a plain text that is not yet cut has no prompt."""
    yield "prompt_id", row["prompt_id"]
    if "prompt" in row:
        yield "prompt", normalised(row["prompt"])
    else:
        yield "whole" if is_plain_text(row) else "prompt", normalised(split_text(row))


def _tables(store: ArtifactStore, inputs: Iterable[ArtifactRef]) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Artifact id → table, and its columns that count, of each ancestor that holds training rows."""
    found = {}
    for ref, manifest in store.family(inputs).items():
        name, columns = _TRAINED_ON.get(ref.stage, ("", ()))
        path = store.path(ref) / name
        if manifest is None or not path.exists():
            raise _unknown(path, store.path(ref), "is missing")
        if columns:
            found[ref.artifact_id] = path, columns
    return found


def _rows(tables: Mapping[str, tuple[Path, tuple[str, ...]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of each table after the other, with the name of the table."""
    import duckdb  # late: most who read a manifest have no check to make

    with duckdb.connect(config=_SETTINGS) as connection:
        for name, (path, columns) in tables.items():
            pattern = glob.escape(str(path))  # DuckDB takes special characters of a path for a pattern
            try:
                rows = connection.execute(_ROWS.format(columns=", ".join(columns)), [pattern]).fetchall()
            except duckdb.Error as error:
                raise _unknown(path, path.parent, f"cannot be read as a table ({error})") from error
            for row in rows:
                if None in row:
                    raise _unknown(path, path.parent, f"has a row without {columns[row.index(None)]}")
                yield name, dict(zip(columns, row, strict=True))


def _unknown(path: Path, artifact: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} {problem}, so nobody can tell what was trained on. Delete {artifact} and run the whole recipe again: "
        "it is computed anew."
    )
