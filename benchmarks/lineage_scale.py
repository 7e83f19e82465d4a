"""The lineage index at a size that nobody's project has yet: 1,000 artifacts, 2 million rows, 5 million metric values.

A home folder is made up (manifests and tables as the stages write them, no weights), indexed artifact by artifact, and
asked. Two things are measured beside that: whether adding an artifact slows down as the index grows, and what eight
writing and two reading processes do to each other.

    python benchmarks/lineage_scale.py                 # about ten minutes, 2 GB of disk
    python benchmarks/lineage_scale.py --scale 0.05    # a rehearsal
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from alignment_pipeline.identity import write_jsonl
from resources.lineage.index import Lineage
from resources.lineage.questions import diff, impact, why

REPOSITORY = Path(__file__).parent.parent
PIPELINES = 62  # of 17 artifacts each
DATASETS = 20  # instructions artifacts, each read by three pipelines
ROWS = 100_000  # of each dataset
STEPS, METRICS = 1_160, 12  # of each training or sampling stage
PAIRS, ROLLOUTS, PROMPTS = 2_000, 2_048, 300
TRAINERS = ("base_model", "sft_model", "sampled_responses", "reward_model", "dpo_policy", "ppo_policy")
REPEATS = 7

Ref = dict[str, str]


def main() -> None:
    """Make the home, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the rows and steps, for a rehearsal.")
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder if left out.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        home = Path(folder) / "home"
        _measure(home, arguments.scale)
        shutil.rmtree(home)
        _contend(Path(folder) / "shared")


def _measure(home: Path, scale: float) -> None:
    lineage = Lineage(home, timeout_s=600)
    seconds = []
    for number, paths in enumerate(make_home(home, scale)):
        started = time.perf_counter()
        lineage.sync(only=paths)
        seconds.append((time.perf_counter() - started, len(paths)))
        if number % 10 == 9:
            _say(f"{number + 1} of {PIPELINES} pipelines indexed", to=sys.stderr)
    counts = lineage.query(
        "SELECT (SELECT count(*) FROM artifacts) AS artifacts, (SELECT count(*) FROM dataset_rows) AS rows, "
        "(SELECT count(*) FROM metrics) AS metrics"
    )[0]
    _say(f"\n{counts['artifacts']:,} artifacts, {counts['rows']:,} dataset rows, {counts['metrics']:,} metric values, ")
    _say(f"index of {lineage.path.stat().st_size / 2**20:,.0f} MiB\n")
    # Every third pipeline brings a dataset of its own, which takes longer; the others are alike.
    alike = [wall / files for number, (wall, files) in enumerate(seconds) if number >= DATASETS]
    for title, part in (("first ten", alike[:10]), ("last ten", alike[-10:])):
        _say(f"indexing, ms an artifact, {title} pipelines without a new dataset: {_spread(part, 1000)}")
    _one_more(home, lineage)
    started = time.perf_counter()
    before = lineage.content_sha256()
    _say(f"hashing every row in order: {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    lineage.rebuild()
    _say(f"align lineage rebuild: {time.perf_counter() - started:.1f} s")
    _say(f"same content: {lineage.content_sha256() == before}\n")
    _ask(home, lineage)


def _one_more(home: Path, lineage: Lineage) -> None:
    """The same small artifact added to a small index and to this one, in turn."""
    small = Lineage(home.with_name("small"), timeout_s=600)
    small.sync()
    times: dict[str, list[float]] = {"an empty index": [], "the full one": []}
    for number in range(3 * REPEATS):
        for name, index in (("an empty index", small), ("the full one", lineage)):
            folder = index.path.parent
            reference = _publish(folder, "dpo_policy", f"more {number}", {}, progress=_progress(200, number))
            started = time.perf_counter()
            index.sync(only=[_manifest(reference)])
            times[name].append(time.perf_counter() - started)
    for name, walls in times.items():
        _say(f"one more artifact with {200 * METRICS:,} metric values into {name}, ms: {_spread(walls, 1000)}")


def _ask(home: Path, lineage: Lineage) -> None:
    row = lineage.query("SELECT row_id FROM dataset_rows WHERE split = 'train' ORDER BY row_id LIMIT 1")[0]["row_id"]
    questions: dict[str, tuple[Callable[[], object], list[str]]] = {
        "why": (
            lambda: why(lineage, "recipe3", "eval/win_rate", "dpo_policy"),
            ["why", "recipe3", "eval/win_rate", "--policy", "dpo_policy"],
        ),
        "impact": (lambda: impact(lineage, row), ["impact", row]),
        "diff": (lambda: diff(lineage, "run3", "run43"), ["diff", "run3", "run43"]),
        "results": (lambda: None, ["results", "recipe3"]),
    }
    environment = os.environ | {
        "ALIGNMENT_HOME": str(home), "ALIGNMENT_RECIPES": str(_recipes(home)), "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    _say("| question | in a process, s | as a command, s |\n|---|---|---|")
    for name, (ask, arguments) in questions.items():
        command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
        inside, outside = [], []
        for _ in range(REPEATS):
            started = time.perf_counter()
            ask()
            inside.append(time.perf_counter() - started)
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            outside.append(time.perf_counter() - started)
        _say(f"| {name} | {'–' if name == 'results' else _spread(inside)} | {_spread(outside)} |")


def _contend(home: Path, writers: int = 8, readers: int = 2, operations: int = 40) -> None:
    """Writers publish artifacts with metrics and index them while readers query; every operation is timed."""
    Lineage(home).sync()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        walls = manager.list()
        done = manager.Event()
        writing = [context.Process(target=_write, args=(home, number, operations, walls)) for number in range(writers)]
        reading = [context.Process(target=_read, args=(home, done, walls)) for _ in range(readers)]
        for process in (*writing, *reading):
            process.start()
        for process in writing:
            process.join()
        done.set()
        for process in reading:
            process.join()
        timed = list(walls)
    found = Lineage(home).query("SELECT count(DISTINCT artifact_id) AS artifacts, count(*) AS values FROM metrics")[0]
    _say(f"\n{writers} writers with {operations} artifacts each, {readers} readers:")
    _say(f"found {found['artifacts']} of {writers * operations} artifacts, "
          f"{found['values']:,} of {writers * operations * 20 * METRICS:,} metric values")  # fmt: skip
    _say("\n| operation | count | median, s | 99%, s | longest, s | share under 1 s |\n|---|---|---|---|---|---|")
    for kind in ("publish and index", "query"):
        times = sorted(wall for name, wall in timed if name == kind)
        under = sum(wall < 1 for wall in times) / len(times)
        late = times[min(len(times) - 1, int(0.99 * len(times)))]
        _say(f"| {kind} | {len(times)} | {statistics.median(times):.3f} | {late:.3f} | {times[-1]:.3f} | {under:.1%} |")


def _write(home: Path, writer: int, operations: int, walls: Any) -> None:
    lineage = Lineage(home, timeout_s=60)
    for number in range(operations):
        time.sleep(random.Random(f"{writer} {number}").uniform(0, 0.05))
        started = time.perf_counter()
        reference = _publish(home, "dpo_policy", f"{writer} {number}", {}, progress=_progress(20, number))
        lineage.sync(only=[_manifest(reference)])
        walls.append(("publish and index", time.perf_counter() - started))


def _read(home: Path, done: Any, walls: Any) -> None:
    lineage = Lineage(home, timeout_s=60)
    while not done.is_set():
        started = time.perf_counter()
        lineage.query("SELECT stage, count(*), max(value) FROM artifacts JOIN metrics USING (artifact_id) GROUP BY ALL")
        walls.append(("query", time.perf_counter() - started))
        time.sleep(0.02)


def make_home(home: Path, scale: float) -> Iterator[list[str]]:
    """Write pipeline after pipeline; yields the paths that each has added, for the index."""
    datasets: list[Ref] = []
    for number in range(PIPELINES):
        made: dict[str, Ref] = {}
        if number < DATASETS:
            datasets.append(_dataset(home, number, int(ROWS * scale)))
            made["instructions"] = datasets[-1]
        _pipeline(home, number, datasets[number % DATASETS], int(STEPS * scale), made)
        run = f"runs/run{number}.json"
        assets = {"instructions": datasets[number % DATASETS]} | made
        record = {
            "run_id": f"run{number}", "recipe": f"recipe{number % DATASETS}", "overrides": [], "started_by": "align",
            "started_at": f"2026-11-{1 + number // 24:02}T{number % 24:02}:00:00+00:00", "finished_at": None,
            "status": "success", "planned": sorted(assets),
            "assets": {name: reference | {"reused": False} for name, reference in assets.items()},
        }  # fmt: skip
        _write_json(home / run, record)
        current = f"current/recipe{number % DATASETS}.json"
        _write_json(home / current, assets)
        yield [*(_manifest(reference) for reference in made.values()), run, current]


def _dataset(home: Path, number: int, count: int) -> Ref:
    splits = itertools.cycle(["train"] * 17 + ["validation"] + ["test"] * 2)
    rows = (
        {
            "id": _hash(f"row {number} {row}")[:16], "prompt_id": _hash(f"prompt {number} {row}")[:16],
            "instruction": f"Write a function that adds {row} to the {number}th number of a list of numbers.",
            "input": "", "output": f"def add(numbers):\n    return numbers[{number}] + {row}", "source_line": row + 1,
            "split": next(splits),
        }
        for row in range(count)
    )  # fmt: skip
    files = {"source": {"sha256": _hash(f"file {number}"), "path": f"/data/rows{number}.jsonl"}}
    return _publish(home, "instructions", f"dataset {number}", files, {"rows.jsonl": rows, "quarantine.jsonl": ()})


def _pipeline(home: Path, number: int, data: Ref, steps: int, made: dict[str, Ref]) -> None:
    """All artifacts of one run of a recipe, as the graph of `tiny` has them."""

    def add(asset: str, stage: str = "", tables: Any = None, files: Any = None, **inputs: Ref) -> Ref:
        progress = _progress(steps, number) if asset in TRAINERS else ()
        made[asset] = _publish(home, stage or asset, f"{asset} {number}", inputs, tables, progress, files)
        return made[asset]

    prompts = [_hash(f"prompt {number % DATASETS} {row}")[:16] for row in range(0, 20 * PAIRS, 20)]
    base = add("base_model", instructions=data)
    dataset = add("formatted_dataset", instructions=data, tokenizer=base, tables={"dropped.jsonl": ()})
    sft = add("sft_model", dataset=dataset, base_model=base)
    samples = add("sampled_responses", dataset=dataset, policy=sft)
    labels = add("preference_labels", dataset=dataset, samples=samples)
    human = add("human_preferences", dataset=dataset)
    pairs = add(
        "preference_pairs", labels=labels, human=human, tokenizer=base,
        tables={
            "train.jsonl": (
                {"id": _hash(f"pair {number} {row}")[:16], "prompt_id": prompt, "prompt": "p", "chosen": f"c{row}",
                 "rejected": f"r{row}", "source": "sampled", "labeller": "gold_rule"}
                for row, prompt in enumerate(prompts)
            )
        },
    )  # fmt: skip
    add("reference_logprobs", pairs=pairs, trunk=sft)
    reward = add("reward_model", pairs=pairs, trunk=sft)
    add("dpo_policy", pairs=pairs, reference_logprobs=made["reference_logprobs"], trunk=sft)
    rollouts = (
        {"update": row // 64 + 1, "prompt_id": prompts[row % PAIRS], "prompt": "p", "response": f"r{row}", "score": 1.0,
         "kl_nats": 0.5, "tokens": 20, "ended": True}
        for row in range(ROLLOUTS)
    )  # fmt: skip
    add("ppo_policy", dataset=dataset, trunk=sft, reward_model=reward, tables={"extras/rollouts.jsonl": rollouts})
    for policy in ("base_model", "sft_model", "ppo_policy", "dpo_policy"):
        name = policy.removesuffix("_model").removesuffix("_policy") + "_evaluation"
        examples = (
            {"prompt_id": _hash(f"test {row}")[:16], "prompt": "p", "reference": "r", "response": f"{policy} {row}",
             "judge": "gold_rule", "judge_score": random.Random(f"{number} {policy} {row}").random(),
             "learned_score": 0.5, "kl_nats": 1.0, "tokens": 20, "ended": True, "temperature": 0.7}
            for row in range(PROMPTS)
        )  # fmt: skip
        summary = {"judge": "gold_rule", "prompts": PROMPTS}
        add(name, "evaluation", {"examples.jsonl": examples}, {"summary.json": summary},
            dataset=dataset, policy=made[policy], trunk=sft, reward_model=reward)  # fmt: skip
    evaluations = {
        policy: made[policy.removesuffix("_model").removesuffix("_policy") + "_evaluation"]
        for policy in ("base_model", "sft_model", "ppo_policy", "dpo_policy")
    }
    table = (
        {"policy": policy, "judge": "gold_rule", "opponent": "sft_model", "prompts": PROMPTS, "bleu": 1.0,
         "judge_score": 0.5, "judge_score_se": 0.1, "learned_score": 0.5, "kl_nats": 1.0, "mean_tokens": 20.0,
         "win_rate": 0.5, "win_rate_low": 0.4, "win_rate_high": 0.6}
        for policy in evaluations
    )  # fmt: skip
    summary = {"judge": "gold_rule", "judge_title": "gold score", "opponent": "sft_model"}
    add("comparison", "comparison", {"table.jsonl": table}, {"summary.json": summary}, **evaluations)


def _publish(
    home: Path, stage: str, name: str, inputs: Any, tables: Any = None, progress: Any = (), files: Any = None
) -> Ref:
    """An artifact's folder as the store has it."""
    reference = {"stage": stage, "key": _hash(f"key {stage} {name}"), "data_version": _hash(f"data {stage} {name}")}
    folder = home / Path(_manifest(reference)).parent
    (folder / "extras").mkdir(parents=True)
    for path, rows in (tables or {}).items():
        write_jsonl(folder / path, rows)
    for path, content in (files or {}).items():
        _write_json(folder / path, content)
    (folder / "extras" / "progress.jsonl").write_text("".join(progress), encoding="utf-8")
    written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size,
         "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if stage == "comparison" else "not read here"}
        for path in written
    ]  # fmt: skip
    manifest = {
        "format": 1, **reference, "code_version": _hash(stage)[:16], "code": {f"stages.{stage}": _hash(stage)[:8]},
        "config": {"learning_rate": 1e-4, "batch_size": 32, "epochs": 1.0}, "seed": 0, "inputs": inputs,
        "files": listed, "metrics": {"train/loss": 0.5, "train/steps": 100.0}, "checks": [],
        "created_at": "2026-11-21T04:00:00+00:00", "timings": {"wall_s": 1.0},
        "environment": {"git_commit": "abc", "python": "3.11", "device": "cpu", "packages": {"torch": "2.13.0"}},
    }  # fmt: skip
    beside = folder / "manifest.tmp"
    _write_json(beside, manifest)
    beside.rename(folder / "manifest.json")
    return reference


def _progress(steps: int, seed: int) -> Iterator[str]:
    for step in range(1, steps + 1):
        metrics = {f"group/metric{number}": (seed + step * number) % 997 / 997 for number in range(METRICS)}
        line = {"kind": "step", "time": 1.0, "phase": "train", "step": step, "total": steps, "metrics": metrics}
        yield json.dumps(line) + "\n"


def _recipes(home: Path) -> Path:
    """Recipes by the names that the made-up runs bear."""
    folder = home / "recipes"
    folder.mkdir(exist_ok=True)
    smoke = (REPOSITORY / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
    for number in range(DATASETS):
        text = smoke.replace("name: smoke", f"name: recipe{number}", 1)
        (folder / f"recipe{number}.yaml").write_text(text, encoding="utf-8")
    return folder


def _manifest(reference: Ref) -> str:
    return f"artifacts/{reference['stage']}/{reference['key'][:20]}/{reference['data_version'][:20]}/manifest.json"


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _say(text: str, to: TextIO = sys.stdout) -> None:
    to.write(text + "\n")
    to.flush()


def _spread(values: list[float], unit: float = 1.0) -> str:
    low, middle, high = (value * unit for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    main()
