"""A home that was filled once by the true entry point, and the guard that keeps tests out of the checkout's own."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# DuckDB's binding reports objects that outlive the interpreter, after everything of ours was printed.
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))

REPOSITORY = Path(__file__).parents[1]
ALIGN = Path(sys.executable).parent / "align"
_OURS = ("ALIGNMENT_", "WANDB_", "DAGSTER_")
_KEPT = ("ALIGNMENT_DATA_DIR",)

Align = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environment(**values: str) -> dict[str, str]:
    """The environment without anything that a person has set for the product, and `values` on top."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS) or name in _KEPT}
    return inherited | {"WANDB_MODE": "offline", "COLUMNS": "200"} | values


def run_align(
    home: Path, *arguments: str, env: dict[str, str] | None = None, timeout: float = 300, **options: Any
) -> "subprocess.CompletedProcess[str]":
    environment = clean_environment(ALIGNMENT_HOME=str(home), **(env or {}))
    return subprocess.run(
        [str(ALIGN), *arguments], env=environment, capture_output=True, text=True, timeout=timeout,
        **{"stdin": subprocess.DEVNULL} | options if "input" not in options else options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_test_writes_to_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(_OURS) and name not in _KEPT]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALIGNMENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    yield


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which `align run smoke` was run once. Tests read it; to change something they take `copy_of_home`."""
    home = tmp_path_factory.mktemp("smoke") / "home"
    done = run_align(home, "run", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.fixture
def copy_of_home(smoke_home: Path, tmp_path: Path) -> Path:
    """Everything of `smoke_home` but Dagster's and W&B's own files, to be changed at will."""
    copy = tmp_path / "home"
    shutil.copytree(smoke_home, copy, ignore=shutil.ignore_patterns("dagster", "wandb"))
    return copy


@pytest.fixture(scope="session")
def align() -> Align:
    """Runs the command line: `align(home, "run", "smoke", env={...})`."""
    return run_align


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    """Makes the environment of a child process, see `clean_environment`."""
    return clean_environment


@pytest.fixture(scope="session")
def read_wandb_run() -> Callable[[Path], Any]:
    """Reads a W&B run's folder; the reader is the one of the tracking tests."""
    spec = importlib.util.spec_from_file_location(
        "tracking_reader", REPOSITORY / "tests" / "resources" / "test_tracking.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reader: Callable[[Path], Any] = module.Shown
    return reader


@pytest.fixture(scope="session")
def half_written() -> Callable[[Path], list[Path]]:
    """What a failed run must not leave: artifacts without a manifest, staging folders, temporary files."""

    def found(home: Path) -> list[Path]:
        artifacts = home / "artifacts"
        folders = [path for path in artifacts.glob("[!.]*/*/*") if not (path / "manifest.json").is_file()]
        return [*folders, *artifacts.glob(".staging*"), *home.glob("**/.*.tmp")]

    return found
