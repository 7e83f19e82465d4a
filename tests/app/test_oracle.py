"""`align oracle`: the true command, its plots, and what it says when a claim fails or an option is wrong."""

import io
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from app.oracle import run_oracle

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_command_shows_that_ppo_and_dpo_find_the_optimum_and_draws_it(tmp_path: Path, align: Run) -> None:
    home = tmp_path / "home"
    done = align(home, "oracle", "--beta", "4")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "✗" not in done.stdout and done.stdout.count(" ✓ ") >= 7
    for part in ("log Z", "best: bca, bda, cda", "50,272", "extrapolated", "E[r] - β KL", "DPO, 40,000 pairs"):
        assert part in done.stdout
    assert sorted(path.name for path in (home / "oracle").iterdir()) == ["policies.png", "reward_kl.png"]
    for plot in (home / "oracle").iterdir():
        assert str(plot) in done.stdout
        png = plot.read_bytes()
        assert png.startswith(b"\x89PNG") and min(struct.unpack(">II", png[16:24])) > 300


def test_a_claim_that_fails_is_marked_and_the_answer_is_no(tmp_path: Path) -> None:
    written = io.StringIO()
    holds = run_oracle(Console(file=written, width=120), [4.0], seed=0, updates=1, folder=tmp_path)
    assert not holds
    failed = [line for line in written.getvalue().splitlines() if line.startswith(" ✗")]
    assert len(failed) == 1 and failed[0].startswith(" ✗ PPO ends within ε = 0.01 nats of π*: 0."), failed


@pytest.mark.parametrize("beta", ["0", "-1", "nan", "11"])
def test_a_beta_without_a_meaning_is_one_clear_message(tmp_path: Path, align: Run, beta: str) -> None:
    done = align(tmp_path / "home", "oracle", "--beta", "1", "--beta", beta)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Error: --beta: found {beta}, expected a number above 0 and at most 10" in done.stderr
    assert not (tmp_path / "home").exists()
