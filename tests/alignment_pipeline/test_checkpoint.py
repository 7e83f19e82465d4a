import os
import pickle
from pathlib import Path

import pytest
import torch

from alignment_pipeline.checkpoint import load_state, newest_sealed, save_state, seal


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_state(tmp_path, 9, {"weight": torch.zeros(2), "step": 9})
    saved = {"weight": torch.randn(3, dtype=torch.float64), "step": 10, "history": [[1.5, None]], "note": "ä"}
    save_state(tmp_path, 10, saved)  # 10 follows 9 by number, not by spelling
    loaded = load_state(tmp_path)
    assert torch.equal(loaded.pop("weight"), saved.pop("weight"))
    assert loaded == saved


def test_no_checkpoint_is_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert newest_sealed(tmp_path / "never made") is None


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save_state(tmp_path, step, {"step": step})
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-11"}


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, step, {"weight": torch.ones(100), "step": step})
    flip_bit(tmp_path / "checkpoint-2" / "state.pt")
    assert load_state(tmp_path)["step"] == 1
    assert names(tmp_path) == {"checkpoint-1"}


@pytest.mark.parametrize("damage", ["unsealed", "seal torn", "file missing", "file truncated"])
def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_state(tmp_path, step, {"step": step})
    newest = tmp_path / "checkpoint-2"
    if damage == "unsealed":
        (newest / "sealed.json").unlink()
    elif damage == "seal torn":
        (newest / "sealed.json").write_text('{"state.pt": "')
    elif damage == "file missing":
        (newest / "state.pt").unlink()
    else:
        os.truncate(newest / "state.pt", 10)
    assert newest_sealed(tmp_path) == tmp_path / "checkpoint-1"


def test_a_folder_of_the_trainer_counts_once_it_is_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(b"state")
    seal(folder)
    assert newest_sealed(tmp_path) == folder
    flip_bit(folder / "optimizer.pt")
    assert newest_sealed(tmp_path) is None


def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, {"step": 1})

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    for interrupted in ("torch.save", "pathlib.Path.replace", "alignment_pipeline.atomic.write_json"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(interrupted, interrupt)
            save_state(tmp_path, 2, {"step": 2})
        assert load_state(tmp_path) == {"step": 1}
    save_state(tmp_path, 2, {"step": 2})
    assert load_state(tmp_path) == {"step": 2}


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "runs").mkdir()
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"step": step})
    assert {"checkpoint-old", "runs"} <= names(tmp_path)


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["MARK"],)


def test_reading_a_state_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "code ran"
    monkeypatch.setenv("MARK", str(mark))
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    torch.save({"step": RunsCode()}, folder / "state.pt")
    seal(folder)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        load_state(tmp_path)
    assert not mark.exists()
