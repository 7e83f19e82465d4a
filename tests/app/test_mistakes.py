"""What a person can get wrong: one clear message, the right exit code, nothing half-written."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FROM_FILE = ["--set", "data.world_rows=null", "--set", "evaluation.judge=reference_chrf"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def one_message(done: "subprocess.CompletedProcess[str]", exit_code: int = 1) -> str:
    """The only error line of a command that failed as it should."""
    output = done.stdout + done.stderr
    assert done.returncode == exit_code, output
    assert "Traceback" not in output and "defect of ours" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, output
    return errors[0]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_an_unknown_recipe(align: Run, home: Path) -> None:
    message = one_message(align(home, "run", "smok"))
    assert "There is no recipe 'smok'" in message and "smoke, stories_sentiment, tiny" in message
    assert not home.exists()


def test_a_recipe_with_a_typo_is_named_with_file_key_and_suggestion(align: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (REPOSITORY / "recipes" / "smoke.yaml").read_text()
    assert "learning_rate: 5e-3" in text
    (folder / "smoke.yaml").write_text(text.replace("learning_rate: 5e-3", "learning_rte: 5e-3"))
    for command in (["run", "smoke"], ["recipes"]):
        message = one_message(align(home, *command, env={"ALIGNMENT_RECIPES": str(folder)}))
        assert f"{folder}/smoke.yaml: sft.learning_rte: unknown key, did you mean learning_rate?" in message


def test_a_folder_without_recipes(align: Run, home: Path, tmp_path: Path) -> None:
    message = one_message(align(home, "recipes", env={"ALIGNMENT_RECIPES": str(tmp_path)}))
    assert "found no *.yaml" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "dpo.betta=1"], "dpo.betta: unknown key, did you mean beta?"),
        (["--set", "dpo.beta"], "--set dpo.beta: expected key=value"),
        (["--set", "dpo.beta=high"], "dpo.beta: found 'high' (text), expected a valid number"),
        (["--select", "sft"], "--select sft: smoke has no such asset; expected one of: instructions, base_model"),
    ],
)
def test_a_mistyped_option(align: Run, home: Path, arguments: list[str], expected: str) -> None:
    assert expected in one_message(align(home, "run", "smoke", *arguments))
    assert not list(home.glob("artifacts/*")) and not list(home.glob("runs/*.json"))


def test_an_unknown_command_and_a_missing_argument_are_usage_errors(align: Run, home: Path) -> None:
    for arguments, expected in (["runn"], "No such command"), (["run"], "Missing argument"):
        done = align(home, *arguments)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def last_run(home: Path) -> dict[str, Any]:
    latest = max((home / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime)
    record: dict[str, Any] = json.loads(latest.read_text())
    return record


def test_a_missing_data_file(align: Run, home: Path, half_written: Callable[[Path], list[Path]]) -> None:
    message = one_message(align(home, "run", "smoke", *FROM_FILE, "--set", "data.path=nope.jsonl"))
    assert message.startswith("Error in instructions: data.path: ") and "nope.jsonl does not exist" in message
    assert last_run(home)["status"] == "failed"
    assert half_written(home) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\x89PNG\r\n\x1a\n\x00\x00garbage\xff\xfe\n" * 50, "none of them usable"), (b"", "found an empty file")],
    ids=["binary", "empty"],
)
def test_a_garbage_dataset(
    align: Run, home: Path, tmp_path: Path, half_written: Callable[[Path], list[Path]], content: bytes, expected: str
) -> None:
    path = tmp_path / "garbage.jsonl"
    path.write_bytes(content)
    message = one_message(align(home, "run", "smoke", *FROM_FILE, "--set", f"data.path={path}"))
    assert message.startswith("Error in instructions: ") and expected in message
    assert half_written(home) == [] and list(home.glob("artifacts/instructions/*/*")) == []


@pytest.mark.parametrize("command", [["run", "smoke"], ["dev"]])
def test_a_home_that_cannot_be_written_to(align: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    message = one_message(align(tmp_path / "file" / "home", *command))
    assert "file/home cannot be written to (Not a directory)" in message and "ALIGNMENT_HOME" in message


def test_a_taken_port(align: Run, home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = one_message(align(home, "dev", "--port", str(port)))
    assert f"Port {port} on 127.0.0.1 is in use" in message and f"--port {port + 1}" in message


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ALIGNMENT_EXECUTOR", "threads", "found 'threads', expected in_process or multiprocess"),
        ("WANDB_MODE", "onlin", "found 'onlin', expected one of offline, online, disabled"),
    ],
)
def test_a_mistyped_variable(align: Run, home: Path, variable: str, value: str, expected: str) -> None:
    assert f"{variable}: {expected}" in one_message(align(home, "run", "smoke", env={variable: value}))
    assert list((home / "runs").glob("*.json")) == [], "a run that cannot start is not recorded as running"


def test_results_before_any_run(align: Run, home: Path) -> None:
    assert "No recipe has results yet. Run `align run tiny`" in one_message(align(home, "results"))
    assert "smoke has no comparison yet. Run `align run smoke`" in one_message(align(home, "results", "smoke"))
    assert "There is no run 'nope'" in one_message(align(home, "results", "--run", "nope"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--num-beams", "5", "--temperature", "0.7"],
            "num_beams: found 5 with temperature 0.7, expected temperature 0",
        ),
        (["--top-k", "5"], "top_k: found 5 with temperature 0, which is greedy"),
        (["--top-p", "1.5", "--temperature", "1"], "top_p: found 1.5 (a number), expected less than or equal to 1"),
        (["--min-new-tokens", "65"], "min_new_tokens: found 65, expected at most max_new_tokens (64)"),
        (["--repetition-penalty", "nan"], "repetition_penalty: found nan (a number), expected a finite number"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_chat_with_settings_that_cannot_be(align: Run, home: Path, options: list[str], expected: str) -> None:
    assert expected in one_message(align(home, "chat", "smoke", "sft_model", *options))


def test_chat_with_a_policy_that_does_not_exist(align: Run, home: Path) -> None:
    message = one_message(align(home, "chat", "smoke", "gpt4"))
    assert "smoke has no policy 'gpt4', expected one of: base_model, sft_model" in message
    assert "has not been made yet. Run `align run smoke`" in one_message(align(home, "chat", "smoke", "sft_model"))


# One step and a model of some 6 MB: larger than the limits below, which Dagster's own files stay under.
LARGE_MODEL = ["--select", "instructions", "--select", "base_model", "--set", "base_model.hidden_size=256",
               "--set", "base_model.num_heads=4", "--set", "base_model.pretrain_steps=1"]  # fmt: skip


def test_a_file_too_large_for_the_disk(align: Run, home: Path, half_written: Callable[[Path], list[Path]]) -> None:
    limit = 3 << 20
    message = one_message(
        align(
            home, "run", "smoke", *LARGE_MODEL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    )  # fmt: skip
    assert message.startswith("Error in base_model: The disk is full") and "ALIGNMENT_HOME" in message
    assert half_written(home) == []
    assert last_run(home)["assets"].keys() == {"instructions"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_disk_that_fills_up(align: Run, small_disk: Path, half_written: Callable[[Path], list[Path]]) -> None:
    home = small_disk / "home"
    message = one_message(align(home, "run", "smoke", *LARGE_MODEL))
    assert "full" in message or "free some space" in message.lower()
    assert half_written(home) == []


def test_a_leak_is_named_and_nothing_downstream_is_made(
    environment: Callable[..., dict[str, str]], home: Path, tmp_path: Path
) -> None:
    """The true entry point with a defect planted in the split: rows of one prompt land in several splits."""
    path = tmp_path / "leaky.jsonl"
    rows = [{"instruction": f"Task {n // 2}", "input": "", "output": f"answer {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = (
        "import sys, alignment_pipeline.stages.instructions as stage, app.cli\n"
        "names = ('train', 'train', 'validation', 'test')\n"
        "stage._split = lambda texts, *rest: names[int(texts[2].split()[1]) % 4]\n"
        "sys.argv = ['align', *sys.argv[1:]]\n"
        "app.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "smoke", *FROM_FILE, "--set", f"data.path={path}"],
        env=environment(ALIGNMENT_HOME=str(home)), capture_output=True, text=True, timeout=120, cwd=os.curdir,
    )  # fmt: skip
    assert "Error in instructions: splits_share_no_prompt does not hold" in one_message(done)
    assert [path.name for path in (home / "artifacts").iterdir()] == ["instructions"]
    assert last_run(home)["status"] == "failed"


def test_several_processes_are_refused_before_they_wait_for_each_other(align: Run, home: Path) -> None:
    message = one_message(align(home, "run", "smoke", env={"WORLD_SIZE": "2"}))
    assert "Found WORLD_SIZE=2" in message and "train_ppo under torchrun" in message
    assert not (home / "runs").exists()
