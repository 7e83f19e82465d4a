"""The stage `instructions`: raw rows in, clean rows with identities and splits out, bad rows to quarantine.

`rows.jsonl`: {id, prompt_id, instruction, input, output, split, source_line}, the texts as `record_forms` says.
With `data.text_field` a row is a plain text: instruction and input are empty and the output is the text, which the
split and prompt_id go by until its beginning is cut off as the prompt (`stages.formatted_dataset`).
A row of preference data also has `rejected`; its output is the chosen response. A row whose prompt is more than one
user message also has `messages`, [{role, content}], and its instruction is their transcript.
`quarantine.jsonl`: {reason, source_line, detail}. `summary.json`: {source, rows_in, kept, quarantined, by_reason,
splits}.

The summary names the kind of source and not the file, since an artifact's data version counts what was read and not
where it lay: file, hash and commit are in `extras/source.json`. With `data.sql` a source_line is the number of a row of
the query's result; only that of a record which never came into the query is its line in the source.

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
from alignment_pipeline.hub_rows import note_content, read_hub_chunks
from alignment_pipeline.identity import canonical_json, file_sha256
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import (
    identity_of,
    leak_check,
    normalised,
    split_position,
    split_text,
)
from alignment_pipeline.record_forms import Example, Refused, read_example
from alignment_pipeline.row_files import read_chunks
from alignment_pipeline.rows import Chunk, Lines, line_chunks, shown, value_chunks
from alignment_pipeline.sql_rows import query_chunks
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.workers import Workers
from alignment_pipeline.world.generate import generate_rows

SPLITS = ("train", "validation", "test")

_SPLIT_BITS = 2
_SAME = {
    "instructions": "instruction, input and output",
    "preferences": "prompt, chosen and rejected",
    "conversations": "prompt and output",
}
"""Form of the records → what two rows that are duplicates have in common."""

_MOST_COLUMNS = 1000
"""Names of columns that are remembered for an error; data with names made up for each row has no end of them."""


class Sifted(NamedTuple):
    """What became of a chunk's rows; which of the good ones are duplicates is not known yet.

    Attributes:
        rows_in: Rows of the chunk.
        quarantined: Source line, reason and detail of each bad row.
        rows: Lines of `rows.jsonl`, one for each good row; the other three are by good row too.
        ids: Row ids.
        source_lines: Source lines.
        splits: Splits.
        columns: Names of the columns of all rows, where columns are mapped; else of those that lacked one.
    """

    rows_in: int
    quarantined: list[tuple[int, str, str]]
    rows: bytes
    ids: Hashes
    source_lines: Numbers
    splits: list[str]
    columns: set[str]


class Written(NamedTuple):
    """Counts of what was written."""

    rows_in: int
    splits: dict[str, int]
    by_reason: dict[str, int]
    columns: set[str]

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
    if config.sql:
        chunks = query_chunks(chunks, config.sql, spec.seed, spec.work_dir)
    with Workers() as workers:
        written = _write(output_dir, workers.map(partial(_sift, config=config, seed=spec.seed), chunks), config)
        _require_mapped_columns(config, written.columns)
        if not written.kept:
            columns = f"; the columns are {_listed(written.columns)}" if written.columns else ""
            raise DataError(
                f"{source['source']}: found {written.rows_in} rows and none of them usable (by reason: "
                f"{written.by_reason}{columns}); expected records with {_expected(config)}."
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
        chunks, commit = read_hub_chunks(
            config.hub_name, config.hub_revision, config.hub_split, config.hub_config, config.hub_data_dir
        )
        named = {"config": config.hub_config, "data_dir": config.hub_data_dir}
        source = {"source": f"hub {config.hub_name}", "commit": commit, "split": config.hub_split}
        source |= {name: value for name, value in named.items() if value}
        return note_content(chunks, source), source
    raise DataError("data: found no source, expected one of world_rows, path or hub_name.")


def _expected(config: DataConfig) -> str:
    if config.text_field:
        return f"a text of {config.min_chars} to {config.max_chars} characters in {config.text_field} (data.text_field)"
    if config.form == "preferences":
        return "prompt, chosen and rejected, or a dialogue with the prompt in it as chosen and as rejected (data.form)"
    if config.form == "conversations":
        return "messages, or prompt and completion (data.form)"
    return "the texts instruction, output and, if there is one, input"


def _require_mapped_columns(config: DataConfig, found: set[str]) -> None:
    missing = [name for name in (config.columns or {}).values() if name is not None and name not in found]
    if missing and found:
        raise DataError(
            f"data.columns: found no column {' and no '.join(missing)} in any row, expected some of: {_listed(found)}."
        )


def _listed(columns: set[str]) -> str:
    return ", ".join(shown(name) for name in sorted(columns)[:20]) + (", …" if len(columns) > 20 else "")


def _sift(chunk: Chunk, config: DataConfig, seed: int) -> Sifted:
    """Part a chunk's rows into good and bad, both in the source's order, and make the good ones' lines."""
    quarantined: list[tuple[int, str, str]] = []
    lines: list[str] = []
    ids: list[int] = []
    source_lines: list[int] = []
    splits: list[str] = []
    columns: set[str] = set()
    rows_in = 0
    for row in chunk.rows():
        rows_in += 1
        read = Refused(row.problem, row.detail) if row.problem else read_example(row.value, config)
        if config.columns or (isinstance(read, Refused) and read.reason == "missing_key"):
            columns |= set(row.value) if isinstance(row.value, dict) and len(columns) < _MOST_COLUMNS else set()
        if isinstance(read, Refused):
            quarantined.append((row.source_line, *read))
            continue
        split = _split(read, config, seed)
        line, identity = _line(read, row.source_line, split)
        lines.append(line)
        ids.append(int(identity, 16))
        source_lines.append(row.source_line)
        splits.append(split)
    hashes, numbers = np.array(ids, np.uint64), np.array(source_lines, np.int64)
    return Sifted(rows_in, quarantined, "".join(lines).encode(), hashes, numbers, splits, columns)


def _line(example: Example, source_line: int, split: str) -> tuple[str, str]:
    """A row's line of `rows.jsonl` and its id. Each text is quoted once, for the line, canonical JSON, and the ids."""
    instruction, input, output = map(canonical_json, example[:3])
    rejected = () if example.rejected is None else (canonical_json(example.rejected),)
    identity = identity_of(instruction, input, output, *rejected)
    prompt = identity_of(instruction if example.instruction else output, input)
    messages = f'"messages":{canonical_json(example.messages)},' if example.messages else ""
    other = f'"rejected":{rejected[0]},' if rejected else ""
    line = (
        f'{{"id":"{identity}","input":{input},"instruction":{instruction},{messages}"output":{output},'
        f'"prompt_id":"{prompt}",{other}"source_line":{source_line},"split":"{split}"}}\n'
    )
    return line, identity


def _write(output_dir: Path, parts: Iterator[Sifted], config: DataConfig) -> Written:
    """Write both tables, where a row that came before goes to quarantine as a duplicate."""
    same = "text" if config.text_field else _SAME[config.form]
    first_seen = FirstSeen()
    rows_in = 0
    splits = dict.fromkeys(SPLITS, 0)
    by_reason: Counter[str] = Counter()
    columns: set[str] = set()
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
            columns |= part.columns if len(columns) < _MOST_COLUMNS else set()
            for split in compress(part.splits, is_new):
                splits[split] += 1
    return Written(rows_in, splits, dict(sorted(by_reason.items())), columns)


def _split(example: Example, config: DataConfig, seed: int) -> str:
    text = split_text({"instruction": example.instruction, "input": example.input, "output": example.output})
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
