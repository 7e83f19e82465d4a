"""The stage `instructions`: raw rows in, clean rows with identities and splits out, bad rows to quarantine.

`rows.jsonl`: {id, prompt_id, instruction, input, output, split, source_line}, the three texts byte for byte as found.
With `data.text_field` a row is a plain text: instruction and input are empty and the output is the text, which the
split and prompt_id go by until its beginning is cut off as the prompt (`stages.formatted_dataset`).
`quarantine.jsonl`: {reason, source_line, detail}. `summary.json`: {source, rows_in, kept, quarantined, by_reason,
splits}.

The summary names the kind of source and not the file, since an artifact's data version counts what was read and not
where it lay: file, hash and commit are in `extras/source.json`.

Rows stream through in chunks that are parsed, judged, hashed and split on every core. Of a row that has passed, 24
bytes stay: 16 to know duplicates of it by their id, 8 to check that its prompt is in one split.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignment_pipeline.atomic import write_json
from alignment_pipeline.configs import DataConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.first_seen import FirstSeen, Hashes, Numbers
from alignment_pipeline.identity import canonical_json, file_sha256
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import (
    identity_of,
    leak_check,
    normalised,
    split_position,
    split_text,
)
from alignment_pipeline.rows import (
    Chunk,
    Lines,
    line_chunks,
    read_chunks,
    read_hub_chunks,
    shown,
    text_problem,
    value_chunks,
)
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.workers import Workers
from alignment_pipeline.world.generate import generate_rows

SPLITS = ("train", "validation", "test")

_SPLIT_BITS = 2
_NEEDED = {"instruction": "instruction", "output": "output"}
"""Field of a record that has to hold text → what reasons call it."""

Row = dict[str, Any]
Texts = tuple[str, str, str]
"""Instruction, input and output."""

Problem = tuple[str, str]
"""Reason and detail."""


class Sifted(NamedTuple):
    """What became of a chunk's rows; which of the good ones are duplicates is not known yet.

    Attributes:
        rows_in: Rows of the chunk.
        quarantined: Source line, reason and detail of each bad row.
        rows: Lines of `rows.jsonl`, one for each good row; the other three are by good row too.
        ids: Row ids.
        source_lines: Source lines.
        splits: Splits.
    """

    rows_in: int
    quarantined: list[tuple[int, str, str]]
    rows: bytes
    ids: Hashes
    source_lines: Numbers
    splits: list[str]


class Written(NamedTuple):
    """Counts of what was written."""

    rows_in: int
    splits: dict[str, int]
    by_reason: dict[str, int]

    @property
    def kept(self) -> int:
        """Rows in `rows.jsonl`."""
        return sum(self.splits.values())

    @property
    def quarantined(self) -> int:
        """Rows in `quarantine.jsonl`."""
        return sum(self.by_reason.values())


def ingest_instructions(spec: StageSpec[DataConfig], log: ProgressLog) -> StageResult:
    """Read the rows, quarantine the bad ones and split the rest by prompt.

    Raises:
        DataError: The source cannot be read, no row is usable, or a split would be empty.
    """
    config, output_dir = spec.config, spec.output_dir
    chunks, source = _read_source(config, spec.seed)
    with Workers() as workers:
        written = _write(output_dir, workers.map(partial(_sift, config=config, seed=spec.seed), chunks), config)
        if not written.kept:
            raise DataError(
                f"{source['source']}: found {written.rows_in} rows and none of them usable (by reason: "
                f"{written.by_reason}); expected JSON objects with {_expected(config)}."
            )
        _require_every_split(written.splits)
        checks = _checks(output_dir, written.rows_in, workers)

    if source["source"] == "file":
        source["sha256"] = file_sha256(Path(source["path"]))
    write_json(output_dir / "extras" / "source.json", source)
    counts = {"rows_in": written.rows_in, "kept": written.kept, "quarantined": written.quarantined}
    summary = {"source": source["source"], **counts, "by_reason": written.by_reason, "splits": written.splits}
    write_json(output_dir / "summary.json", summary)
    log.note(
        f"{written.kept} of {written.rows_in} rows kept, {written.quarantined} in quarantine {written.by_reason}; "
        f"splits {written.splits}"
    )
    return StageResult(
        metrics={f"data/{name}": float(value) for name, value in {**counts, **written.splits}.items()}, checks=checks
    )


def _read_source(config: DataConfig, seed: int) -> tuple[Iterator[Chunk], dict[str, Any]]:
    if config.world_rows is not None:
        try:
            values = generate_rows(config.world_rows, seed)
        except ValueError as error:
            raise DataError(f"data.world_rows: {error}") from error
        return value_chunks(values), {"source": "world"}
    if config.path is not None:
        path = Path(config.path)
        return read_chunks(path), {"source": "file", "path": str(path)}
    if config.hub_name is not None:
        chunks, commit = read_hub_chunks(config.hub_name, config.hub_revision, config.hub_split)
        return chunks, {"source": f"hub {config.hub_name}", "commit": commit, "split": config.hub_split}
    raise DataError("data: found no source, expected one of world_rows, path or hub_name.")


def _expected(config: DataConfig) -> str:
    if config.text_field:
        return f"a text of {config.min_chars} to {config.max_chars} characters in {config.text_field} (data.text_field)"
    return "the texts instruction, output and, if there is one, input"


def _sift(chunk: Chunk, config: DataConfig, seed: int) -> Sifted:
    """Part a chunk's rows into good and bad, both in the source's order, and make the good ones' lines."""
    quarantined: list[tuple[int, str, str]] = []
    lines: list[str] = []
    ids: list[int] = []
    source_lines: list[int] = []
    splits: list[str] = []
    rows_in = 0
    for row in chunk.rows():
        rows_in += 1
        problem = (row.problem, row.detail) if row.problem else _problem(row.value, config)
        if problem:
            quarantined.append((row.source_line, *problem))
            continue
        texts = _texts(row.value, config.text_field)
        instruction, input, output = map(canonical_json, texts)
        # Each text is quoted once, for its line, which is canonical JSON, and for both identities.
        identity = identity_of(instruction, input, output)
        prompt = identity_of(instruction if texts[0] else output, input)
        split = _split(texts, config, seed)
        lines.append(
            f'{{"id":"{identity}","input":{input},"instruction":{instruction},"output":{output},'
            f'"prompt_id":"{prompt}","source_line":{row.source_line},"split":"{split}"}}\n'
        )
        ids.append(int(identity, 16))
        source_lines.append(row.source_line)
        splits.append(split)
    hashes, numbers = np.array(ids, np.uint64), np.array(source_lines, np.int64)
    return Sifted(rows_in, quarantined, "".join(lines).encode(), hashes, numbers, splits)


def _write(output_dir: Path, parts: Iterator[Sifted], config: DataConfig) -> Written:
    """Write both tables, where a row that came before goes to quarantine as a duplicate."""
    same = "text" if config.text_field else "instruction, input and output"
    first_seen = FirstSeen()
    rows_in = 0
    splits = dict.fromkeys(SPLITS, 0)
    by_reason: Counter[str] = Counter()
    with (output_dir / "rows.jsonl").open("wb") as rows, (output_dir / "quarantine.jsonl").open("wb") as quarantine:
        for part in parts:
            first = first_seen.numbers(part.ids, part.source_lines)
            is_new = first == part.source_lines
            rows.write(part.rows if is_new.all() else b"".join(compress(part.rows.splitlines(True), is_new)))
            duplicates = zip(part.source_lines[~is_new].tolist(), first[~is_new].tolist(), strict=True)
            bad = part.quarantined + [(line, "duplicate", f"same {same} as row {seen}") for line, seen in duplicates]
            for line, reason, detail in sorted(bad):
                record = {"reason": reason, "source_line": line, "detail": detail}
                quarantine.write(f"{canonical_json(record)}\n".encode())
                by_reason[reason] += 1
            rows_in += part.rows_in
            for split in compress(part.splits, is_new):
                splits[split] += 1
    return Written(rows_in, splits, dict(sorted(by_reason.items())))


def _texts(value: Row, text_field: str | None) -> Texts:
    if text_field:
        return "", "", value[text_field]
    empty_if_absent = value.get("input")
    return value["instruction"], "" if empty_if_absent is None else empty_if_absent, value["output"]


def _problem(value: Any, config: DataConfig) -> Problem | None:
    """The first reason why a parsed record cannot be used, or None."""
    if not isinstance(value, dict):
        return "wrong_type", shown(value)
    needed = {config.text_field: "text"} if config.text_field else _NEEDED
    missing = [name for name in needed if name not in value]
    if missing:
        return "missing_key", f"no {' and no '.join(missing)} among {shown(sorted(value))}"
    texts = _texts(value, config.text_field)
    if not _are_all_usable(*texts):
        names = ("", "", config.text_field) if config.text_field else ("instruction", "input", "output")
        problems = (text_problem(str(name), text) for name, text in zip(names, texts, strict=True))
        return next(problem for problem in problems if problem)
    for name, called in needed.items():
        if not value[name].strip():
            return f"empty_{called}", shown(value[name])
    chars = sum(map(len, texts))
    if chars > config.max_chars:
        return "over_long", f"{chars} characters, {config.max_chars} allowed"
    return ("too_short", f"{chars} characters, {config.min_chars} needed") if chars < config.min_chars else None


def _are_all_usable(instruction: object, input: object, output: object) -> bool:
    """Whether `text_problem` has nothing against any; most rows are good, so that three are looked at as one."""
    are_texts = isinstance(instruction, str) and isinstance(input, str) and isinstance(output, str)
    return are_texts and text_problem("", f"{instruction}{input}{output}") is None


def _split(texts: Texts, config: DataConfig, seed: int) -> str:
    instruction, input, output = texts
    text = split_text({"instruction": instruction, "input": input, "output": output})
    position = split_position(seed, "instructions", text)
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


def _checks(output_dir: Path, rows_in: int, workers: Workers) -> tuple[StageCheck, ...]:
    """Checks over the files as written; prompts are compared by a hash of 62 bits, below which their split stands."""
    hashes = bytearray()
    with (output_dir / "rows.jsonl").open("rb") as file:
        for part in workers.map(_prompt_hashes, line_chunks(file)):
            hashes += part
    values = np.frombuffer(hashes, np.uint64)
    values.sort()
    in_each = _count_distinct(values)
    values >>= np.uint64(_SPLIT_BITS)
    in_all = _count_distinct(values)
    with (output_dir / "quarantine.jsonl").open("rb") as file:
        quarantined = sum(1 for _ in file)
    reconcile = StageCheck(
        "counts_reconcile",
        passed=rows_in == len(values) + quarantined,
        detail=f"{rows_in} rows in, {len(values)} kept + {quarantined} quarantined",
        blocking=True,
    )
    return leak_check(in_all, in_each - in_all, SPLITS), reconcile


def _prompt_hashes(chunk: Lines) -> bytes:
    """Eight bytes a row: a hash of its normalised prompt and, in the last bits, its split."""
    found = []
    for line in chunk.data.splitlines():
        row = json.loads(line)
        digest = hashlib.sha256(normalised(split_text(row)).encode()).digest()
        found.append(int.from_bytes(digest[:8]) >> _SPLIT_BITS << _SPLIT_BITS | SPLITS.index(row["split"]))
    return np.array(found, np.uint64).tobytes()


def _count_distinct(ascending: Hashes) -> int:
    return int(np.count_nonzero(ascending[1:] != ascending[:-1])) + 1
