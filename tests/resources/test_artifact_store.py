"""The store with real files and a real kill."""

import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import all_files, data_version
from resources.artifact_store import ArtifactRef, ArtifactStore

KEY = "a" * 64
REPORT = {"inputs": {}, "config": {"learning_rate": 0.1}, "seed": 0, "metrics": {}, "checks": []}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def staged(store: ArtifactStore, text: str = '{"n":1}\n') -> Path:
    staging = store.new_staging()
    (staging / "rows.jsonl").write_text(text)
    (staging / "extras").mkdir()
    (staging / "extras" / "progress.jsonl").write_text(f"{time.time()}\n")
    return staging


def publish(store: ArtifactStore, text: str = '{"n":1}\n', **manifest: Any) -> ArtifactRef:
    return store.publish(staged(store, text), "instructions", KEY, {**REPORT, "created_at": "2026-01-01", **manifest})


def test_what_was_published_is_found_verified_and_described(store: ArtifactStore) -> None:
    ref = publish(store)
    assert store.find("instructions", KEY) == ref
    folder = store.verify(ref)
    assert folder == store.root / "instructions" / KEY[:20] / ref.data_version[:20]
    assert (folder / "rows.jsonl").read_text() == '{"n":1}\n'
    manifest = store.manifest(ref)
    assert {name: manifest[name] for name in ("stage", "key", "data_version", "seed")} == {**ref.as_dict(), "seed": 0}
    assert [entry["path"] for entry in manifest["files"]] == ["extras/progress.jsonl", "rows.jsonl"]
    assert list(store.root.glob(".staging*")) == []


def test_another_key_that_shares_the_folder_name_is_not_found(store: ArtifactStore) -> None:
    publish(store)
    assert store.find("instructions", KEY[:20] + "b" * 44) is None
    assert store.find("base_model", KEY) is None


def test_publishing_the_same_content_again_keeps_what_is_there(store: ArtifactStore) -> None:
    first = publish(store)
    before = (store.path(first) / "manifest.json").read_bytes()
    assert publish(store, created_at="2026-02-02") == first
    assert (store.path(first) / "manifest.json").read_bytes() == before
    assert list(store.root.glob(".staging*")) == []


def test_of_two_results_for_one_key_the_oldest_counts(store: ArtifactStore) -> None:
    late = publish(store, "late\n", created_at="2026-03-03")
    early = publish(store, "early\n", created_at="2026-02-02")
    assert early.data_version != late.data_version
    assert store.find("instructions", KEY) == early


def test_a_flipped_bit_is_seen_and_the_message_says_what_to_do(store: ArtifactStore) -> None:
    ref = publish(store)
    path = store.path(ref) / "rows.jsonl"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"rows\.jsonl was changed .* Delete .* and run again"):
        store.verify(ref)


def test_a_missing_file_is_seen_and_computing_again_mends_the_artifact(store: ArtifactStore) -> None:
    ref = publish(store)
    (store.path(ref) / "rows.jsonl").unlink()
    with pytest.raises(StoreError, match=r"rows\.jsonl is missing"):
        store.verify(ref)
    assert store.find("instructions", KEY) is None
    assert publish(store) == ref
    assert store.verify(ref) == store.path(ref)


def with_model(store: ArtifactStore, format: str = "") -> Path:
    """A staging folder whose model file can differ in bytes and not in meaning."""
    staging = staged(store)
    header = json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "__metadata__": {"f": format}})
    (staging / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"ab")
    return staging


def test_what_garbage_collection_took_is_put_back_under_the_manifest_that_was_there(store: ArtifactStore) -> None:
    ref = store.publish(with_model(store), "sft_model", KEY, {**REPORT, "created_at": "2026-01-01"})
    folder = store.path(ref)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    store.mark_collected(ref)
    store.delete_collected(ref)
    assert not (folder / "model.safetensors").exists() and (folder / "collected.json").exists()
    assert store.publish(with_model(store), "sft_model", KEY, {**REPORT, "created_at": "2026-02-02"}) == ref
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert store.find("sft_model", KEY) == ref and store.verify(ref)
    assert list(store.root.glob(".staging*")) == []


def test_the_same_meaning_in_other_bytes_replaces_what_was_collected(store: ArtifactStore) -> None:
    ref = store.publish(with_model(store), "sft_model", KEY, {**REPORT, "created_at": "2026-01-01"})
    store.mark_collected(ref)
    store.delete_collected(ref)
    again = store.publish(with_model(store, "newer"), "sft_model", KEY, {**REPORT, "created_at": "2026-02-02"})
    assert again == ref and store.verify(ref)
    assert store.manifest(ref)["created_at"] == "2026-02-02"
    assert not (store.path(ref) / "collected.json").exists()


def test_the_mark_of_a_collection_is_no_part_of_the_artifact(store: ArtifactStore) -> None:
    ref = store.publish(with_model(store), "sft_model", KEY, REPORT)
    files = all_files(store.path(ref))
    store.mark_collected(ref)
    assert data_version(store.path(ref)) == ref.data_version
    assert all_files(store.path(ref)) == files


def test_a_folder_without_manifest_is_not_found_and_gives_way(store: ArtifactStore) -> None:
    ref = publish(store)
    (store.path(ref) / "manifest.json").unlink()
    assert store.find("instructions", KEY) is None
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        store.manifest(ref)
    assert publish(store) == ref
    assert store.verify(ref)


def test_a_manifest_that_is_not_json_is_named(store: ArtifactStore) -> None:
    ref = publish(store)
    (store.path(ref) / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(StoreError, match=r"manifest\.json is not JSON"):
        store.find("instructions", KEY)


def test_a_pickle_is_refused(store: ArtifactStore) -> None:
    staging = staged(store)
    (staging / "weights.bin").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(StoreError, match=r"weights\.bin can carry code"):
        store.publish(staging, "instructions", KEY, REPORT)
    assert store.find("instructions", KEY) is None


def test_an_empty_payload_is_refused(store: ArtifactStore) -> None:
    staging = staged(store)
    (staging / "rows.jsonl").unlink()
    with pytest.raises(StoreError, match="holds no payload"):
        store.publish(staging, "instructions", KEY, REPORT)


def publish_until_killed(home: Path, at: str) -> None:
    """Stop for ever at the first call of a step of publishing."""

    def wait(*arguments: Any) -> None:
        (home / "reached").touch()
        time.sleep(60)

    setattr(*{"manifest": (atomic, "write_json"), "sync": (atomic, "sync_tree"), "rename": (Path, "replace")}[at], wait)
    publish(ArtifactStore(home))


@pytest.mark.parametrize("at", ["manifest", "sync", "rename"])
def test_a_kill_while_publishing_leaves_nothing_visible(store: ArtifactStore, tmp_path: Path, at: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=publish_until_killed, args=(tmp_path, at))
    process.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid and (tmp_path / "reached").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.find("instructions", KEY) is None
    assert list(store.root.glob("[!.]*/*/*")) == []
    ref = publish(store)
    assert json.loads((store.path(ref) / "manifest.json").read_text())["key"] == KEY


def test_staging_folders_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (store.root / f".staging-{pid}-aaaaaaaa").mkdir(parents=True)
    store.new_staging()
    assert not (store.root / f".staging-{dead.pid}-aaaaaaaa").exists()
    assert (store.root / f".staging-{os.getpid()}-aaaaaaaa").exists()
