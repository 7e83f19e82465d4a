"""W&B runs written by the real worker and read back from disk; no account and no network."""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.progress import ProgressLog
from resources.tracking import Tracking

REPOSITORY = Path(__file__).parents[2]
ENDS_WITHIN_S = 20.0  # some 1.5 s on a quiet machine


def records_of(path: Path) -> list[Any]:
    """Records of a .wandb file, which is LevelDB's log: 32 KiB blocks of pieces with a 7-byte head (<IHB: CRC, length,
    FULL 1, FIRST 2, MIDDLE 3 or LAST 4), after a 7-byte file header. wandb 0.30 removed its own reader.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, pieces, found = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B"), "not a .wandb file"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too small for another head
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            found.append(record)
            pieces = b""
    return found


class Shown:
    """What a run folder holds."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.step_metrics: dict[str, str] = {}
        self.exit_code: int | None = None
        for record in records_of(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                self.history.append({key: value for key, value in row.items() if not key.startswith("_")})
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
            elif kind == "metric":
                self.step_metrics[record.metric.name] = record.metric.step_metric
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def shown(home: Path, run_id: str) -> Shown:
    folder = Tracking(home, mode="offline").run_directory(run_id)
    assert folder is not None, (home / "wandb" / "worker.log").read_text()
    return Shown(folder)


def follow(tracking: Tracking, log: Path, run_id: str = "sft-0123") -> None:
    tracking.follow(
        run_id=run_id, name="tiny/sft_model", group="dagster-run", job_type="sft_model", tags=["tiny", "x" * 80],
        config={"learning_rate": 2e-5, "stage": "sft_model"}, log=log,
    )  # fmt: skip


def write_steps(log: ProgressLog, count: int, phase: str = "train") -> None:
    for number in range(1, count + 1):
        log.step(phase, number, count, {"train/loss": 1 / number})


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def log(tmp_path: Path) -> ProgressLog:
    return ProgressLog(tmp_path / "work" / "progress.jsonl")


def test_a_run_on_disk_holds_everything_that_was_logged(tmp_path: Path, log: ProgressLog) -> None:
    tracking = Tracking(tmp_path, project="my-project")
    write_steps(log, 3)  # what is there before counts too
    follow(tracking, log.path)
    log.note("a sentence is no row")
    log.step("evaluate", 1, 1, {"eval/bleu": float("nan")})
    tracking.finish("sft-0123", 0, log.path, {"eval/bleu": 12.5})
    assert tracking.close(ENDS_WITHIN_S) is None
    run = shown(tmp_path, "sft-0123")
    assert (run.run.run_id, run.run.project, run.run.display_name) == ("sft-0123", "my-project", "tiny/sft_model")
    assert (run.run.run_group, run.run.job_type) == ("dagster-run", "sft_model")
    assert list(run.run.tags) == ["tiny", "x" * 64]
    assert {name: run.config[name] for name in run.config if name != "_wandb"} == {
        "learning_rate": 2e-5,
        "stage": "sft_model",
    }
    assert run.history[:3] == [
        {"train/loss": 1 / number, "train/step": number, "global_step": number} for number in (1, 2, 3)
    ]
    assert (run.history[3]["evaluate/step"], len(run.history)) == (1, 4)
    assert run.step_metrics["train/loss"] == run.step_metrics["eval/bleu"] == "global_step"
    assert run.summary["eval/bleu"] == 12.5
    assert run.exit_code == 0


def test_a_log_that_moves_grows_and_is_deleted_is_shown_to_its_end(tmp_path: Path, log: ProgressLog) -> None:
    tracking = Tracking(tmp_path)
    follow(tracking, log.path)
    moved = log.path.rename(tmp_path / "published.jsonl")
    write_steps(log, 500)
    moved.unlink()  # long before the worker has imported wandb
    tracking.finish("sft-0123")
    tracking.close(ENDS_WITHIN_S)
    assert len(shown(tmp_path, "sft-0123").history) == 500


def test_a_log_that_comes_later_is_found_at_its_place_or_where_it_went(tmp_path: Path) -> None:
    tracking = Tracking(tmp_path)
    for run_id in ("in-place", "elsewhere"):
        follow(tracking, tmp_path / run_id / "progress.jsonl", run_id)
    for folder in ("in-place", "published"):
        write_steps(ProgressLog(tmp_path / folder / "progress.jsonl"), 5)
    tracking.finish("in-place")
    tracking.finish("elsewhere", log=tmp_path / "published" / "progress.jsonl")
    tracking.close(ENDS_WITHIN_S)
    assert [len(shown(tmp_path, run_id).history) for run_id in ("in-place", "elsewhere")] == [5, 5]


def test_rows_appear_while_the_stage_still_runs(tmp_path: Path, log: ProgressLog) -> None:
    tracking = Tracking(tmp_path)
    follow(tracking, log.path)
    folder = tracking.run_directory("sft-0123", timeout_s=ENDS_WITHIN_S)
    assert folder is not None and folder.parent == tmp_path / "wandb"
    write_steps(log, 2000)  # wandb writes its file a block of 32 KiB at a time
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not Shown(folder).history:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    line = json.dumps({"kind": "step", "phase": "torn", "step": 1, "total": 1, "metrics": {"train/loss": 0.5}}) + "\n"
    for part in (line[:30], line[30:]):
        with log.path.open("a") as file:
            file.write(part)
        time.sleep(0.6)  # three of the worker's rounds
    tracking.close(ENDS_WITHIN_S)
    assert len(Shown(folder).history) == 2001
    assert Shown(folder).history[-1]["torn/step"] == 1


def test_runs_at_once_and_one_after_another_keep_apart(tmp_path: Path, log: ProgressLog) -> None:
    tracking = Tracking(tmp_path)
    other = ProgressLog(tmp_path / "other.jsonl")
    follow(tracking, log.path, "run")
    follow(tracking, other.path, "run-1")  # not the second folder of "run"
    write_steps(log, 2)
    write_steps(other, 3, "ppo")
    tracking.finish("run-1", exit_code=3)
    tracking.finish("run")
    tracking.close(ENDS_WITHIN_S)
    assert [len(shown(tmp_path, run_id).history) for run_id in ("run", "run-1")] == [2, 3]
    assert [shown(tmp_path, run_id).exit_code for run_id in ("run", "run-1")] == [0, 3]
    write_steps(log, 4)
    follow(tracking, log.path, "run")  # the stage goes on: a new worker shows its log whole
    tracking.finish("run")
    tracking.close(ENDS_WITHIN_S)
    assert len(shown(tmp_path, "run").history) == 6


def test_a_run_that_nobody_finished_is_marked_as_failed(tmp_path: Path, log: ProgressLog) -> None:
    tracking = Tracking(tmp_path)
    follow(tracking, log.path)
    write_steps(log, 2)
    assert tracking._channel is not None
    held = os.dup(tracking._channel.fileno())  # by a forked child, such as a data loader's worker
    assert tracking.close(ENDS_WITHIN_S) is None
    os.close(held)
    assert (shown(tmp_path, "sft-0123").exit_code, len(shown(tmp_path, "sft-0123").history)) == (1, 2)


@pytest.mark.parametrize("delay_s", [0.0, 2.5], ids=["while the worker starts", "while it follows"])
def test_a_killed_parent_loses_no_row(tmp_path: Path, delay_s: float) -> None:
    script = f"""
import os, signal, sys, time
from pathlib import Path
from alignment_pipeline.progress import ProgressLog
from resources.tracking import Tracking
home = Path(sys.argv[1])
tracking, log = Tracking(home), ProgressLog(home / "progress.jsonl")
tracking.follow(run_id="killed", name="n", group="g", job_type="j", tags=[], config={{}}, log=log.path)
child = os.fork()
if child == 0:  # such as a data loader's worker: it holds the worker's socket open
    time.sleep(60)
    os._exit(0)
print(tracking._worker.pid, child, flush=True)
time.sleep({delay_s})
for number in range(300):
    log.step("train", number, 300, {{"train/loss": number}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    # A file and not a pipe: the forked child would keep a pipe open, and run() would wait for it.
    output = tmp_path / "pid"
    with output.open("w") as stdout:
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, stdout=stdout, cwd=REPOSITORY, start_new_session=True, check=False)
    assert done.returncode == -signal.SIGKILL
    worker, child = map(int, output.read_text().split())
    deadline = time.monotonic() + ENDS_WITHIN_S
    try:
        while is_alive(worker):
            assert time.monotonic() < deadline, "the worker outlives its parent"
            time.sleep(0.1)
    finally:
        os.kill(child, signal.SIGKILL)
    run = shown(tmp_path, "killed")
    assert [row["train/loss"] for row in run.history] == list(range(300))
    assert run.exit_code == 1


def test_a_dead_network_costs_no_time_and_no_row(
    tmp_path: Path, log: ProgressLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    tracking = Tracking(tmp_path, init_timeout_s=3)
    started = time.monotonic()
    follow(tracking, log.path)
    write_steps(log, 50)
    tracking.finish("sft-0123", summary={"eval/bleu": 1.0})
    follow(tracking, log.path, "second")
    tracking.finish("second")
    assert time.monotonic() - started < 1
    sentence = tracking.close(timeout_s=0.5)
    assert time.monotonic() - started < 2
    assert sentence is not None and "goes on by itself" in sentence
    deadline = started + 3 + ENDS_WITHIN_S
    worker_log = tmp_path / "wandb" / "worker.log"
    while " done after " not in worker_log.read_text():
        assert time.monotonic() < deadline, worker_log.read_text()
        time.sleep(0.1)
    for run_id in ("sft-0123", "second"):
        folder = tracking.run_directory(run_id)
        assert folder is not None and folder.name.startswith("offline-run-")
        assert f"wandb sync '{folder}'" in worker_log.read_text()
        assert len(Shown(folder).history) == 50
    assert shown(tmp_path, "sft-0123").summary["eval/bleu"] == 1.0
    assert worker_log.read_text().count("cannot be reached") == 1  # the second run does not wait again
    assert "0123456789" * 4 not in worker_log.read_text()


def test_online_without_a_key_is_offline(tmp_path: Path, log: ProgressLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracking = Tracking(tmp_path, mode="online")
    write_steps(log, 2)
    follow(tracking, log.path)
    tracking.finish("sft-0123")
    assert tracking.close(ENDS_WITHIN_S) is None
    assert len(shown(tmp_path, "sft-0123").history) == 2
    assert "WANDB_API_KEY is not set" in (tmp_path / "wandb" / "worker.log").read_text()


def test_disabled_starts_nothing(tmp_path: Path, log: ProgressLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking = Tracking(tmp_path / "home")
    follow(tracking, log.path)
    tracking.finish("sft-0123")
    assert tracking.close() is None
    assert not (tmp_path / "home").exists()
    assert tracking.run_directory("sft-0123", timeout_s=ENDS_WITHIN_S) is None


def test_an_unknown_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(AlignmentError, match=r"found 'dryrun', expected one of offline, online, disabled"):
        Tracking(tmp_path)


def test_a_worker_that_died_is_a_warning_and_the_next_run_is_shown(
    tmp_path: Path, log: ProgressLog, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = Tracking(tmp_path)
    follow(tracking, log.path)
    assert tracking._worker is not None
    tracking._worker.kill()
    tracking._worker.wait()
    with caplog.at_level(logging.WARNING):
        tracking.finish("sft-0123")
        tracking.finish("sft-0123")
    assert ["training goes on" in record.message for record in caplog.records] == [True]
    write_steps(log, 2)
    follow(tracking, log.path, "another")
    tracking.finish("another")
    assert tracking.close(ENDS_WITHIN_S) is None
    assert len(shown(tmp_path, "another").history) == 2


def test_a_worker_that_cannot_start_is_a_warning(
    tmp_path: Path, log: ProgressLog, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracking = Tracking(tmp_path)
    follow(tracking, log.path)
    tracking.finish("sft-0123")
    assert caplog.text.count("training goes on") == 1
    assert tracking.close() is None


def test_the_link_of_an_offline_run_is_its_folder_and_of_an_online_one_its_address(tmp_path: Path) -> None:
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-some"
    folder.mkdir(parents=True)
    (folder / "run-some.wandb").touch()
    tracking = Tracking(tmp_path, mode="offline")
    assert tracking.link("other") is None
    assert tracking.link("some") == folder
    (folder / "url.txt").write_text("https://wandb.example/run/some", encoding="utf-8")
    assert tracking.link("some") == "https://wandb.example/run/some"
