"""Leases between real processes."""

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from alignment_pipeline import atomic
from alignment_pipeline.errors import LeaseLostError
from resources import leases

fork = multiprocessing.get_context("fork")


def hold_for(home: Path, seconds: float) -> None:
    with leases.hold(home, "sft-1") as lease:
        (home / f"held-{lease.token}").touch()
        time.sleep(seconds)
        (home / f"ended-{lease.token}").touch()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def test_the_second_waits_says_for_whom_and_gets_a_larger_token(tmp_path: Path) -> None:
    holder = fork.Process(target=hold_for, args=(tmp_path, 0.6))
    holder.start()
    wait_for(tmp_path / "held-1")
    said: list[str] = []
    with leases.hold(tmp_path, "sft-1", said.append) as lease:
        assert (tmp_path / "ended-1").exists(), "two held the lease at once"
        assert lease.token == 2
        lease.require()
    holder.join()
    assert said == [f"Waiting for process {holder.pid}, which computes the same."]


def test_leases_of_two_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with leases.hold(tmp_path, "sft-1") as first, leases.hold(tmp_path, "sft-2") as second:
        assert (first.token, second.token) == (1, 1)


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    holder = fork.Process(target=hold_for, args=(tmp_path, 60))
    holder.start()
    wait_for(tmp_path / "held-1")
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    before = time.monotonic()
    with leases.hold(tmp_path, "sft-1") as lease:
        assert lease.token == 2
    assert time.monotonic() - before < 5.0  # a poll is 0.2 s; 60 s would be the sleep that was killed


def test_an_exception_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), leases.hold(tmp_path, "sft-1"):
        raise KeyError
    with leases.hold(tmp_path, "sft-1") as lease:
        assert lease.token == 2


def test_who_does_not_wait_is_told_that_it_is_held_and_takes_nobodys_place(tmp_path: Path) -> None:
    holder = fork.Process(target=hold_for, args=(tmp_path, 60))
    holder.start()
    wait_for(tmp_path / "held-1")
    with leases.hold_if_free(tmp_path, "sft-1") as free:
        assert not free
    assert leases.held(tmp_path) == {"sft-1"}
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert leases.held(tmp_path) == set()
    with leases.hold_if_free(tmp_path, "sft-1") as free:
        assert free and leases.held(tmp_path) == {"sft-1"}
    with leases.hold(tmp_path, "sft-1") as lease:
        assert lease.token == 2, "only those who compute count"


def test_who_only_looks_whether_it_is_held_is_not_waited_for_by_name(tmp_path: Path) -> None:
    with leases.hold(tmp_path, "sft-1"):
        pass
    said: list[str] = []
    with (tmp_path / "leases" / "sft-1.lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()  # before the second attempt, at 0.2 s
        with leases.hold(tmp_path, "sft-1", said.append) as lease:
            assert lease.token == 2
    assert said == []


def test_a_stale_token_is_refused(tmp_path: Path) -> None:
    with leases.hold(tmp_path, "sft-1") as lease:
        atomic.write_json(lease.record, {"token": lease.token + 1, "pid": 1})  # a successor on another host
        with pytest.raises(LeaseLostError, match=r"token 2, ours 1.*nothing of ours was published"):
            lease.require()
