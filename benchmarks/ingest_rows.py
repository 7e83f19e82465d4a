"""Instruction rows formatted, hashed and split: the stage `instructions` beside `datasets.map` row by row.

    .venv/bin/python benchmarks/ingest_rows.py                  (a million rows, about 10 minutes)
    .venv/bin/python benchmarks/ingest_rows.py --rows 20000 --repeats 1

Both read the same JSON lines (about 300 bytes each; 1% duplicates, 0.5% rows that belong in quarantine, all of them
such as the loader of `datasets` can read) and write the kept rows and the quarantine as JSON lines. The other side is
what one would write with `datasets`: one `map` whose function takes a row, then filters, with this project's own
functions for problems, identities, the prompt and its split. The stage also reads what it wrote and checks it, the
other side does not. Kept rows, ids and splits have to be equal.

Each side runs in a process of its own, in alternating order, caches off; seconds are those of the whole process,
imports included. Memory is the highest of the process and its children together, sampled every 0.1 s from
/proc/*/smaps_rollup (Linux): a page that several share is counted once, and `own` leaves out mapped files.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = {"ours": 0, "datasets.map": 1, "datasets.map, num_proc=2": 2}
"""Side → processes that `datasets` may use; 0 is ours."""

KEPT_COLUMNS = ("id", "prompt_id", "instruction", "input", "output", "split", "source_line")
SAMPLE_S = 0.1
MIB = 1024  # KiB
Row = dict[str, Any]


@dataclass
class Measured:
    """One run of one side: wall seconds, and MiB of memory with and without mapped files."""

    seconds: float
    memory: float
    own: float


def generated(count: int) -> Iterator[Row]:
    """Varied rows of some 300 bytes, with duplicates and bad rows, the same for the same count."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    words += ["naïve", "“quoted”", '"x"', "ключ", "\n", "\t", "C:\\dir"]
    recent: list[Row] = []
    for _ in range(count):
        row = {
            "instruction": " ".join(rng.choices(words, k=rng.randint(6, 16))).capitalize() + ".",
            "input": " ".join(rng.choices(words, k=rng.randint(3, 8))) if rng.random() < 0.4 else "",
            "output": " ".join(rng.choices(words, k=rng.randint(15, 35))),
        }
        chance = rng.random()
        if chance < 0.01 and recent:
            row = rng.choice(recent)
        elif chance < 0.015:
            row["output"] = rng.choice(["", " \n", row["output"] + "\x00", "too long " * 1000])
        else:
            recent = [*recent[-99:], row]
        yield row


def ingest(source: Path, folder: Path) -> None:
    """Our side: the stage itself."""
    from alignment_pipeline.configs import DataConfig
    from alignment_pipeline.progress import ProgressLog
    from alignment_pipeline.stage import StageSpec
    from alignment_pipeline.stages.instructions import ingest_instructions

    spec = StageSpec(DataConfig(path=str(source)), {}, folder, folder / "work", seed=0)
    result = ingest_instructions(spec, ProgressLog(folder / "progress.jsonl"))
    if not all(check.passed for check in result.checks):
        raise SystemExit(f"a check failed: {result.checks}")


def map_rows(source: Path, folder: Path, processes: int) -> None:
    """The other side: `datasets`, a row at a time."""
    import datasets

    from alignment_pipeline.configs import DataConfig
    from alignment_pipeline.prompts import format_prompt, prompt_id, row_id, split_position
    from alignment_pipeline.stages.instructions import _problem

    datasets.disable_caching()
    datasets.disable_progress_bars()
    config = DataConfig(path=str(source))
    several = processes if processes > 1 else None

    def prepare(row: Row, position: int) -> Row:
        problem = _problem(dict(row), config)
        prepared: Row = dict.fromkeys(("id", "prompt_id", "split", "reason", "detail")) | {"source_line": position + 1}
        if problem is not None:
            return prepared | dict(zip(("reason", "detail"), problem, strict=True))
        instruction, input, output = row["instruction"], row["input"], row["output"]
        place = split_position(0, "instructions", format_prompt(instruction, input))
        held_out = config.test_fraction + config.validation_fraction
        split = "test" if place < config.test_fraction else "validation" if place < held_out else "train"
        identities = {"id": row_id(instruction, input, output), "prompt_id": prompt_id(instruction, input)}
        return prepared | identities | {"split": split}

    seen: set[str] = set()

    def is_first(row: Row) -> bool:
        known = len(seen)
        seen.add(row["id"])
        return len(seen) > known

    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(prepare, with_indices=True, num_proc=several)
    bad = rows.filter(lambda row: row["reason"] is not None, num_proc=several)
    good = rows.filter(lambda row: row["reason"] is None, num_proc=several)
    kept = good.filter(is_first)  # knows what came before, so in one process
    kept.select_columns(list(KEPT_COLUMNS)).to_json(folder / "rows.jsonl", force_ascii=False, num_proc=several)
    bad.select_columns(["reason", "detail", "source_line"]).to_json(folder / "quarantine.jsonl")


def measure(side: str, source: Path, folder: Path) -> Measured:
    """Run a side in a session of its own and watch the memory of all its processes."""
    folder.mkdir()
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--folder", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "TMPDIR": str(folder)}
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        memory = own = 0.0
        while process.poll() is None:
            now, own_now = session_memory(process.pid)
            memory, own = max(memory, now), max(own, own_now)
            time.sleep(SAMPLE_S)
        seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{side}: ended with exit code {process.returncode}")
    return Measured(seconds, memory, own)


def session_memory(session: int) -> tuple[float, float]:
    """MiB that the processes of a session have resident, and of these what is no mapped file."""
    total = own = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) != session:
                continue
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        except (OSError, ProcessLookupError):  # it has ended meanwhile
            continue
        sizes = {name: float(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        total += sizes.get("Pss", 0.0) / MIB
        own += sizes.get("Pss_Anon", 0.0) / MIB
    return total, own


def kept_rows(folder: Path) -> set[tuple[Any, ...]]:
    """What both sides have to agree on."""
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        rows = map(json.loads, file)
        return {(row["id"], row["prompt_id"], row["split"], row["source_line"]) for row in rows}


def compare(rows: int, repeats: int, work: Path) -> str:
    """Measure all sides and put the tables together."""
    whole, quarter = work / "rows.jsonl", work / "quarter.jsonl"
    with whole.open("w", encoding="utf-8") as file, quarter.open("w", encoding="utf-8") as part:
        for number, row in enumerate(generated(rows)):
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line)
            if number < rows // 4:
                part.write(line)
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    reference: set[tuple[Any, ...]] | None = None
    for repeat in range(repeats):
        for side in list(SIDES)[:: -1 if repeat % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                runs[side].append(measure(side, whole, Path(folder) / "output"))
                found = kept_rows(Path(folder) / "output")
            reference = found if reference is None else reference
            if found != reference:
                raise SystemExit(f"{side}: found other rows than the side before: {len(found ^ reference)} differ")
            del found
            sys.stderr.write(f"{side}: {runs[side][-1]}\n")
    assert reference is not None
    heading = f"{rows:,} rows, {whole.stat().st_size / MIB / MIB:.0f} MiB of JSON lines, {len(reference):,} kept.\n"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        small = {side: measure(side, quarter, Path(folder) / str(number)) for number, side in enumerate(SIDES)}
    return heading + report(rows, runs, small)


def report(rows: int, runs: dict[str, list[Measured]], small: dict[str, Measured]) -> str:
    """The table."""
    lines = [
        "",
        "| side | s: median | min | max | rows / s | side ÷ ours | peak memory, MiB | own "
        f"| own at {rows // 4:,} rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = statistics.median(run.seconds for run in runs["ours"])
    for side, measured in runs.items():
        seconds = [run.seconds for run in measured]
        median = statistics.median(seconds)
        memory, own = max(run.memory for run in measured), max(run.own for run in measured)
        lines.append(
            f"| {side} | {median:.1f} | {min(seconds):.1f} | {max(seconds):.1f} | {rows / median:,.0f} "
            f"| {median / ours:.2f} | {memory:.0f} | {own:.0f} | {small[side].own:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the comparison, or with --side one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "ours":
        ingest(arguments.source, arguments.folder)
    elif arguments.side:
        map_rows(arguments.source, arguments.folder, SIDES[arguments.side])
    else:
        with tempfile.TemporaryDirectory() as work:
            sys.stdout.write(compare(arguments.rows, arguments.repeats, Path(work)))


if __name__ == "__main__":
    main()
