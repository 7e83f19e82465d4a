"""What makes two configurations or two payloads the same: canonical JSON, keys and data versions.

Belongs here: hashing by meaning. Where artifacts lie on disk is in `resources.artifact_store`.

A `key` names a computation (code, config, inputs, seed); a `data_version` names a result. Both are sha256 in hex.
"""

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import StoreError

EXTRAS = "extras"
"""Folder of an artifact that its data version leaves out: plots, progress logs, model cards."""

MANIFEST = "manifest.json"
COLLECTED = "collected.json"
"""Beside a manifest: which of its files `align gc` has deleted. No part of the artifact."""

# Keys that libraries write into model and tokenizer configs and that do not change what the model computes.
_INCIDENTAL_CONFIG_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "name_or_path", "base_model_name_or_path", "peft_version",
     "base_model_class", "parent_library", "revision", "special_tokens_map_file", "torch_dtype", "local_files_only"}
)  # fmt: skip
_UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy"})


canonical_json: Callable[[Any], str] = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode
"""One spelling for each JSON value: sorted keys, no spaces, no NaN, characters unescaped.

Raises:
    ValueError: The value holds a NaN or an infinity, which have no place in a configuration or a table.
"""


def digest(value: Any) -> str:
    """Sha256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_key(stage: str, code_version: str, config: Mapping[str, Any], inputs: Mapping[str, str], seed: int) -> str:
    """The key of a computation: what would be computed, whatever machine does it.

    Args:
        stage: Stage name.
        code_version: Version of the code the stage depends on, see `code_version.stage_code_version`.
        config: Resolved configuration without anything that cannot change the result; input files by content hash.
        inputs: Input name → data version.
        seed: Seed of the stage's random choices.
    """
    return digest(
        {"stage": stage, "code_version": code_version, "config": dict(config), "inputs": dict(inputs), "seed": seed}
    )


def data_version(directory: Path) -> str:
    """Hash of the meaning of an artifact's payload, independent of file formats' incidental details.

    Tensors count by name, type, shape and bytes; JSON by value without incidental keys; tables (JSON lines) by
    their rows in order; anything else by its bytes. `extras/` and the manifest are left out.

    Raises:
        StoreError: The payload is empty or holds a file that can carry code (pickle).
    """
    files = payload_files(directory)
    if not files:
        raise StoreError(f"{directory} holds no payload: a stage must write at least one file outside {EXTRAS}/.")
    return digest({str(path.relative_to(directory).as_posix()): _meaning(path) for path in files})


def payload_files(directory: Path) -> list[Path]:
    """Files of an artifact that count towards its data version, in a fixed order."""
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] not in (EXTRAS, MANIFEST, COLLECTED)
    ]


def all_files(directory: Path) -> list[Path]:
    """Every file of an artifact but its manifest and what `align gc` wrote beside it, in a fixed order."""
    beside = (directory / MANIFEST, directory / COLLECTED)
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and path not in beside]


def read_jsonl(path: Path, first: int | None = None) -> list[dict[str, Any]]:
    """Rows of a table written by `write_jsonl`, or its first few."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, first)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows in canonical form, one a line, and return how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(canonical_json(row) + "\n")
            count += 1
    return count


def _meaning(path: Path) -> str:
    if path.suffix in _UNSAFE_SUFFIXES:
        raise StoreError(f"{path.name} can carry code when it is loaded; artifacts hold safetensors only.")
    if path.suffix == ".safetensors":
        return _tensors_digest(path)
    if path.suffix == ".json":
        return digest(_without_incidentals(json.loads(path.read_text(encoding="utf-8"))))
    return file_sha256(path)


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_incidentals(item) for key, item in value.items() if key not in _INCIDENTAL_CONFIG_KEYS}
    if isinstance(value, list):
        return [_without_incidentals(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _tensors_digest(path: Path) -> str:
    """Hash a safetensors file by its tensors: the header's order and metadata and the layout do not count.

    Source: format at https://github.com/huggingface/safetensors#format (8-byte length, JSON header, data).
    """
    with path.open("rb") as file:
        try:
            (header_length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_length))
        except (struct.error, ValueError) as error:
            raise StoreError(f"{path.name} is truncated: its header cannot be read ({error}).") from error
        start = 8 + header_length
        total = hashlib.sha256()
        for name in sorted(header):
            if name == "__metadata__":
                continue
            entry = header[name]
            begin, end = entry["data_offsets"]
            total.update(canonical_json([name, entry["dtype"], entry["shape"]]).encode())
            file.seek(start + begin)
            remaining = end - begin
            while remaining:
                chunk = file.read(min(remaining, 1 << 22))
                if not chunk:
                    raise StoreError(f"{path.name} is truncated: tensor {name} ends before its {end - begin} bytes.")
                total.update(chunk)
                remaining -= len(chunk)
    return total.hexdigest()
