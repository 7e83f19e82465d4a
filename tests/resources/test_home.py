from pathlib import Path

import pytest

from alignment_pipeline.errors import StoreError
from resources.home import REPOSITORY, alignment_home, prepare_home, use_dagster_instance


def test_tests_have_a_home_of_their_own(tmp_path: Path) -> None:
    assert alignment_home() == tmp_path / "home"


def test_the_home_is_in_the_checkout_unless_the_variable_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_HOME", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert alignment_home() == tmp_path / "elsewhere"
    monkeypatch.delenv("ALIGNMENT_HOME")
    assert alignment_home() == REPOSITORY / ".alignment"


def test_a_new_home_has_its_folders_and_a_dagster_instance_that_keeps_its_changes(tmp_path: Path) -> None:
    home = prepare_home(tmp_path / "deep" / "home")
    assert {path.name for path in home.iterdir()} == {"artifacts", "work", "runs", "current", "leases", "dagster"}
    installed = home / "dagster" / "dagster.yaml"
    assert installed.read_bytes() == (REPOSITORY / "dagster.yaml").read_bytes()
    installed.write_text("telemetry:\n  enabled: false\n")
    assert prepare_home(home) == home
    assert installed.read_text() == "telemetry:\n  enabled: false\n"


def test_a_home_below_a_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/home cannot be written to \(Not a directory\).*Set ALIGNMENT_HOME"):
        prepare_home(tmp_path / "file" / "home")


def test_a_home_that_cannot_be_written_to_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # /proc refuses new folders to everyone; permission bits would not stop root.
    with pytest.raises(StoreError, match=r"/proc/alignment cannot be written to"):
        prepare_home(Path("/proc/alignment"))


def test_children_use_the_homes_dagster_instance_and_a_persons_choice_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "DAGSTER_DISABLE_TELEMETRY",
                 "HF_HUB_DISABLE_PROGRESS_BARS", "DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM",
                 "TRL_EXPERIMENTAL_SILENCE"):  # fmt: skip
        monkeypatch.setenv(name, "chosen")  # so that pytest puts back what the call adds
        monkeypatch.delenv(name) if name == "DO_NOT_TRACK" else None
    import os

    use_dagster_instance(tmp_path)
    assert os.environ["DAGSTER_HOME"] == str(tmp_path / "dagster")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "chosen"
    assert os.environ["DO_NOT_TRACK"] == "1"
