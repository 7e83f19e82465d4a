import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from alignment_pipeline.workers import CHUNKS_DONE_HERE, Workers

WHO = "echo $PPID"
"""Said by a shell: the process that started it, which is the one that does the item."""


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_order_from_as_many_processes_as_there_are_cores_and_none_is_left() -> None:
    with Workers() as workers:
        assert list(workers.map(abs, range(-100, 0))) == list(range(100, 0, -1))
        done_by = [int(text) for text in workers.map(subprocess.getoutput, [WHO] * 20)]
        assert done_by[:CHUNKS_DONE_HERE] == [os.getpid()] * CHUNKS_DONE_HERE
        others = set(done_by[CHUNKS_DONE_HERE:])
        assert len(others) == 2 and os.getpid() not in others
        assert all(map(is_alive, others))
    assert not any(map(is_alive, others))


def test_little_work_and_a_single_core_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers() as workers:
        done_by = set(workers.map(subprocess.getoutput, [WHO] * CHUNKS_DONE_HERE))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with Workers() as workers:
        done_by |= set(workers.map(subprocess.getoutput, [WHO] * 20))
    assert done_by == {str(os.getpid())}


def test_no_more_items_are_taken_than_are_worked_on() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in count():
            taken.append(item)
            yield item

    with Workers() as workers:
        for done, result in enumerate(workers.map(abs, items()), start=1):
            assert result == done - 1 and len(taken) <= done + 2
            if done == 40:
                break


def test_chunks_larger_than_a_sockets_buffer_go_both_ways() -> None:
    chunks = [bytes([65 + number]) * (4 << 20) for number in range(CHUNKS_DONE_HERE + 6)]
    with Workers() as workers:
        for chunk, result in zip(chunks, workers.map(bytes.lower, chunks), strict=True):
            assert result == chunk.lower()


def test_a_worker_that_is_killed_is_an_error_and_the_others_end() -> None:
    items = ["true"] * CHUNKS_DONE_HERE + ["kill -9 $PPID", "true", "true", "true"]
    with pytest.raises(RuntimeError, match=r"ended with exit code -9 before"), Workers() as workers:
        list(workers.map(subprocess.getoutput, items))
    assert not any(is_alive(worker._process.pid) for worker in workers._workers)


def test_an_error_in_a_worker_is_an_error_here_and_the_worker_prints_it(capfd: pytest.CaptureFixture[str]) -> None:
    items = ["1"] * CHUNKS_DONE_HERE + ["one", "1", "1", "1"]
    with pytest.raises(RuntimeError, match=r"ended with exit code 1 before"), Workers() as workers:
        list(workers.map(int, items))
    assert "ValueError: invalid literal for int() with base 10: 'one'" in capfd.readouterr().err


def test_a_killed_parent_leaves_no_worker() -> None:
    code = (
        "import os, subprocess, time\n"
        "from alignment_pipeline.workers import Workers\n"
        "os.cpu_count = lambda: 2\n"
        "with Workers() as workers:\n"
        f"    print(*workers.map(subprocess.getoutput, ['{WHO}'] * 20), flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    workers = set(map(int, parent.stdout.readline().split())) - {parent.pid}
    assert len(workers) == 2 and all(map(is_alive, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    limit = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))
