"""The stage `instructions`: raw rows in, clean rows with identities and splits out, bad rows to quarantine.

`rows.jsonl`: {id, prompt_id, instruction, input, output, split, source_line}, the three texts byte for byte as found.
With `data.text_field` a row is a plain text: instruction and input are empty and the output is the text, which the
split and prompt_id go by until its beginning is cut off as the prompt (`stages.formatted_dataset`).
`quarantine.jsonl`: {reason, source_line, detail}. `summary.json`: {source, rows_in, kept, quarantined, by_reason,
splits}.

The summary names the kind of source and not the file, since an artifact's data version counts what was read and not
where it lay: file, hash and commit are in `extras/source.json`.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignment_pipeline.atomic import write_json
from alignment_pipeline.configs import DataConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import file_sha256, read_jsonl, write_jsonl
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import (
    prompt_id,
    row_id,
    split_position,
    split_text,
    splits_share_no_prompt,
)
from alignment_pipeline.rows import RawRow, load_hub_rows, read_rows, shown, text_problem
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.world.generate import generate_rows

SPLITS = ("train", "validation", "test")

Row = dict[str, Any]
Problem = tuple[str, str]
"""Reason and detail."""


def ingest_instructions(spec: StageSpec[DataConfig], log: ProgressLog) -> StageResult:
    """Read the rows, quarantine the bad ones and split the rest by prompt.

    Raises:
        DataError: The source cannot be read, no row is usable, or a split would be empty.
    """
    config, output_dir = spec.config, spec.output_dir
    raw, source = _read_source(config, spec.seed)
    kept, quarantined = _sift(raw, config)
    by_reason = dict(sorted(Counter(row["reason"] for row in quarantined).items()))
    if not kept:
        raise DataError(
            f"{source['source']}: found {len(raw)} rows and none of them usable (by reason: {by_reason}); expected "
            f"JSON objects with {_expected(config)}."
        )
    for row in kept:
        row["split"] = _split(row, config, spec.seed)
    splits = {split: sum(row["split"] == split for row in kept) for split in SPLITS}
    _require_every_split(splits)

    write_jsonl(output_dir / "rows.jsonl", kept)
    write_jsonl(output_dir / "quarantine.jsonl", quarantined)
    write_json(output_dir / "extras" / "source.json", source)
    summary = {
        "source": source["source"],
        "rows_in": len(raw),
        "kept": len(kept),
        "quarantined": len(quarantined),
        "by_reason": by_reason,
        "splits": splits,
    }
    write_json(output_dir / "summary.json", summary)
    log.note(f"{len(kept)} of {len(raw)} rows kept, {len(quarantined)} in quarantine {by_reason}; splits {splits}")
    metrics = {"rows_in": len(raw), "kept": len(kept), "quarantined": len(quarantined), **splits}
    return StageResult(
        metrics={f"data/{name}": float(value) for name, value in metrics.items()},
        checks=_checks(output_dir, len(raw)),
    )


def _read_source(config: DataConfig, seed: int) -> tuple[list[RawRow], dict[str, Any]]:
    if config.world_rows is not None:
        try:
            values = generate_rows(config.world_rows, seed)
        except ValueError as error:
            raise DataError(f"data.world_rows: {error}") from error
        return [RawRow(position, value) for position, value in enumerate(values, start=1)], {"source": "world"}
    if config.path is not None:
        path = Path(config.path)
        rows = read_rows(path)
        return rows, {"source": "file", "path": str(path), "sha256": file_sha256(path)}
    if config.hub_name is not None:
        rows, commit = load_hub_rows(config.hub_name, config.hub_revision, config.hub_split)
        return rows, {"source": f"hub {config.hub_name}", "commit": commit, "split": config.hub_split}
    raise DataError("data: found no source, expected one of world_rows, path or hub_name.")


def _expected(config: DataConfig) -> str:
    if config.text_field:
        return f"a text of {config.min_chars} to {config.max_chars} characters in {config.text_field} (data.text_field)"
    return "the texts instruction, output and, if there is one, input"


def _sift(raw: Iterable[RawRow], config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Part the rows into kept and quarantined, both in the source's order."""
    kept: list[Row] = []
    quarantined: list[Row] = []
    line_of: dict[str, int] = {}
    for row in raw:
        problem = (row.problem, row.detail) if row.problem else _problem(row.value, config)
        if problem is None:
            instruction, input, output = texts = _texts(row.value, config.text_field)
            identity = row_id(*texts)
            first = line_of.setdefault(identity, row.source_line)
            if first == row.source_line:
                kept.append(
                    {"id": identity, "prompt_id": prompt_id(instruction or output, input), "instruction": instruction,
                     "input": input, "output": output, "source_line": row.source_line}
                )  # fmt: skip
                continue
            same = "text" if config.text_field else "instruction, input and output"
            problem = ("duplicate", f"same {same} as row {first}")
        reason, detail = problem
        quarantined.append({"reason": reason, "source_line": row.source_line, "detail": detail})
    return kept, quarantined


def _texts(value: Row, text_field: str | None) -> tuple[str, str, str]:
    if text_field:
        return "", "", value[text_field]
    empty_if_absent = value.get("input")
    return value["instruction"], "" if empty_if_absent is None else empty_if_absent, value["output"]


def _problem(value: Any, config: DataConfig) -> Problem | None:
    """The first reason why a parsed record cannot be used, or None."""
    if not isinstance(value, dict):
        return "wrong_type", shown(value)
    # Field of the record → what reasons call it; these have to hold text, an input may be empty.
    needed = {config.text_field: "text"} if config.text_field else {"instruction": "instruction", "output": "output"}
    missing = [name for name in needed if name not in value]
    if missing:
        return "missing_key", f"no {' and no '.join(missing)} among {shown(sorted(value))}"
    texts = _texts(value, config.text_field)
    names = ("", "", config.text_field) if config.text_field else ("instruction", "input", "output")
    for name, text in zip(names, texts, strict=True):
        if problem := text_problem(str(name), text):
            return problem
    for name, called in needed.items():
        if not value[name].strip():
            return f"empty_{called}", shown(value[name])
    chars = sum(map(len, texts))
    if chars > config.max_chars:
        return "over_long", f"{chars} characters, {config.max_chars} allowed"
    return ("too_short", f"{chars} characters, {config.min_chars} needed") if chars < config.min_chars else None


def _split(row: Row, config: DataConfig, seed: int) -> str:
    position = split_position(seed, "instructions", split_text(row))
    if position < config.test_fraction:
        return "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


def _require_every_split(splits: dict[str, int]) -> None:
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise DataError(
            f"data: found too few rows to split by prompt, {' and '.join(empty)} would be empty ({splits}); expected "
            "at least one prompt in each. Give more rows, or raise data.validation_fraction and data.test_fraction."
        )


def _checks(output_dir: Path, rows_in: int) -> tuple[StageCheck, ...]:
    """Checks over the files as written."""
    prompts: dict[str, list[str]] = {split: [] for split in SPLITS}
    rows = read_jsonl(output_dir / "rows.jsonl")
    for row in rows:
        prompts[row["split"]].append(split_text(row))
    quarantined = len(read_jsonl(output_dir / "quarantine.jsonl"))
    reconcile = StageCheck(
        "counts_reconcile",
        passed=rows_in == len(rows) + quarantined,
        detail=f"{rows_in} rows in, {len(rows)} kept + {quarantined} quarantined",
        blocking=True,
    )
    return splits_share_no_prompt(prompts), reconcile
