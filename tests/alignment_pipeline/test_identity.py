import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import artifact_key, canonical_json, data_version, digest, read_jsonl, write_jsonl

WEIGHTS = {"b.weight": torch.arange(6, dtype=torch.float32).view(2, 3), "a.weight": torch.ones(4)}
CONFIG = {"model_type": "opt", "hidden_size": 8, "nested": {"x": 1, "y": [1, 2]}}
ROWS = [{"id": "1", "text": "ä"}, {"id": "2", "text": "b"}]


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], order: list[str], metadata: dict[str, str]) -> None:
    """A safetensors file with its tensors laid out in `order`, written by hand: the library's writer has its own."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name in order:
        raw = tensors[name].numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "model").mkdir(parents=True)
    save_file(WEIGHTS, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def test_canonical_json_has_one_spelling_for_a_value() -> None:
    assert canonical_json({"b": [1, 1.5, None, True], "a": "ä\n"}) == '{"a":"ä\\n","b":[1,1.5,null,true]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert canonical_json(1) != canonical_json("1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_canonical_json_refuses_numbers_that_json_lacks(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_a_digest_is_the_sha256_of_the_canonical_text() -> None:
    # printf '{"a":1}' | sha256sum
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_tables_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"text": "line\u2028separator\x85 ä\n"}, {"text": ""}]
    assert write_jsonl(tmp_path / "new" / "rows.jsonl", rows) == 2
    assert read_jsonl(tmp_path / "new" / "rows.jsonl") == rows


def _reorder_tensors(folder: Path) -> None:
    write_safetensors(folder / "model" / "model.safetensors", WEIGHTS, ["b.weight", "a.weight"], {})


def _reverse_tensors_with_metadata(folder: Path) -> None:
    write_safetensors(folder / "model" / "model.safetensors", WEIGHTS, ["a.weight", "b.weight"], {"format": "pt"})


def _reorder_json_keys(folder: Path) -> None:
    reordered = {"nested": {"y": [1, 2], "x": 1}, "hidden_size": 8, "model_type": "opt"}
    (folder / "model" / "config.json").write_text(json.dumps(reordered, indent=4))


def _add_incidental_config_keys(folder: Path) -> None:
    incidental = {
        "_name_or_path": "/tmp/x",
        "transformers_version": "9",
        "nested": CONFIG["nested"] | {"revision": "r"},
    }
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | incidental))


def _add_extras_and_manifest(folder: Path) -> None:
    (folder / "extras").mkdir()
    (folder / "extras" / "plot.pt").write_bytes(b"anything")
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    "change",
    [
        _reorder_tensors,
        _reverse_tensors_with_metadata,
        _reorder_json_keys,
        _add_incidental_config_keys,
        _add_extras_and_manifest,
    ],
)
def test_what_does_not_change_the_meaning_does_not_change_the_version(
    artifact: Path, change: Callable[[Path], None]
) -> None:
    before = data_version(artifact)
    change(artifact)
    assert data_version(artifact) == before


def _save_weights(folder: Path, **changes: torch.Tensor) -> None:
    changed = {name.replace("_", "."): tensor for name, tensor in changes.items()}
    save_file(WEIGHTS | changed, folder / "model" / "model.safetensors")


def _change_one_weight(folder: Path) -> None:
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    _save_weights(folder, a_weight=torch.cat([torch.ones(3), last[None]]))


def _change_dtype(folder: Path) -> None:
    _save_weights(folder, a_weight=torch.ones(4).view(torch.int32))  # the same bytes


def _change_shape(folder: Path) -> None:
    _save_weights(folder, a_weight=torch.ones(2, 2))


def _rename_tensor(folder: Path) -> None:
    renamed = {"c.weight": WEIGHTS["a.weight"], "b.weight": WEIGHTS["b.weight"]}
    save_file(renamed, folder / "model" / "model.safetensors")


def _swap_tensors_bytes(folder: Path) -> None:
    both = torch.cat([torch.ones(4), torch.arange(6, dtype=torch.float32)])
    _save_weights(folder, b_weight=both[:6].view(2, 3), a_weight=both[6:])


def _change_config_value(folder: Path) -> None:
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 16}))


def _change_row(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", [ROWS[0], ROWS[1] | {"text": "c"}])


def _change_row_order(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", ROWS[::-1])


def _rename_file(folder: Path) -> None:
    (folder / "rows.jsonl").rename(folder / "lines.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        _change_one_weight,
        _change_dtype,
        _change_shape,
        _rename_tensor,
        _swap_tensors_bytes,
        _change_config_value,
        _change_row,
        _change_row_order,
        _rename_file,
    ],
)
def test_what_changes_the_meaning_changes_the_version(artifact: Path, change: Callable[[Path], None]) -> None:
    before = data_version(artifact)
    change(artifact)
    assert data_version(artifact) != before


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy"])
def test_files_that_can_carry_code_have_no_version(artifact: Path, suffix: str) -> None:
    (artifact / "model" / f"weights{suffix}").write_bytes(b"")
    with pytest.raises(StoreError, match="can carry code"):
        data_version(artifact)


@pytest.mark.parametrize("kept", [0, 5, 40, -1], ids=["empty", "no length", "half a header", "last byte missing"])
def test_a_truncated_safetensors_file_is_named(artifact: Path, kept: int) -> None:
    path = artifact / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StoreError, match=r"model\.safetensors is truncated"):
        data_version(artifact)


def test_an_artifact_without_payload_has_no_version(tmp_path: Path) -> None:
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "plot.png").write_bytes(b"x")
    with pytest.raises(StoreError, match="holds no payload"):
        data_version(tmp_path)


KEY = {"stage": "sft_model", "code_version": "c1", "config": {"a": 1, "b": {"x": 1, "y": 2}},
       "inputs": {"dataset": "d", "base_model": "m"}, "seed": 0}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "dpo_policy"},
        {"code_version": "c2"},
        {"config": {"a": 2, "b": {"x": 1, "y": 2}}},
        {"config": {"a": 1, "b": {"x": 1, "y": 2}, "c": None}},
        {"inputs": {"dataset": "d", "base_model": "n"}},
        {"inputs": {"dataset": "m", "base_model": "d"}},
        {"inputs": {"dataset": "d"}},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_part_of_a_computation_changes_its_key(change: dict[str, Any]) -> None:
    assert artifact_key(**(KEY | change)) != artifact_key(**KEY)


def test_the_order_of_a_mapping_does_not_change_the_key() -> None:
    reordered = {"config": {"b": {"y": 2, "x": 1}, "a": 1}, "inputs": {"base_model": "m", "dataset": "d"}}
    assert artifact_key(**(KEY | reordered)) == artifact_key(**KEY)
