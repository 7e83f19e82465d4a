"""Checkpoints of a stage's work folder: published atomically, verified when read, at most two kept.

Hugging Face's checkpoints are neither atomic nor verified, so a folder that its Trainer wrote counts only once it has
been sealed here: every file's sha256 in a marker that is written last.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from alignment_pipeline import atomic
from alignment_pipeline.identity import file_sha256

_SEAL = "sealed.json"
_KEPT = 2


def seal(folder: Path) -> None:
    """Declare a checkpoint folder complete, after making its files durable, and drop all but the newest two."""
    atomic.sync_tree(folder)
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    atomic.write_json(folder / _SEAL, files)
    for old in _numbered(folder.parent)[:-_KEPT]:
        shutil.rmtree(old)


def newest_sealed(parent: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was sealed; broken ones are removed."""
    for folder in reversed(_numbered(parent)):
        if _is_intact(folder):
            return folder
        shutil.rmtree(folder)
    return None


def save_state(parent: Path, step: int, state: dict[str, Any]) -> None:
    """Publish a training state (tensors, numbers, text, and containers of these) as `checkpoint-<step>`."""
    beside = parent / f".writing-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (beside / "state.pt").write_bytes(buffer.getvalue())
    folder = parent / f"checkpoint-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    seal(folder)


def load_state(parent: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The newest intact state, or None. Read with `weights_only=True`: it cannot run code."""
    folder = newest_sealed(parent)
    if folder is None:
        return None
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    return state


def _numbered(parent: Path) -> list[Path]:
    folders = [path for path in parent.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_intact(folder: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return all(file_sha256(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError):
        return False
