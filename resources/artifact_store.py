"""The artifact store: immutable folders at `artifacts/<stage>/<key>/<data version>/`, shared by all recipes.

Belongs here: layout, manifests, verification, atomic publication, deletion of model bytes. What a key means is in
`alignment_pipeline.identity`, which bytes may go in `resources.garbage`.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import COLLECTED, MANIFEST, all_files, data_version, file_sha256

MANIFEST_FORMAT = 1
_SHORT = 20  # hex digits of a hash in a folder's name
_SHOWN = 8  # the same where people read them
_MODEL_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ArtifactRef:
    """Names one artifact: stage, key (what was to be computed) and data version (what came out)."""

    stage: str
    key: str
    data_version: str

    @property
    def artifact_id(self) -> str:
        """The artifact's folder below `artifacts/`, the id used in SQL."""
        return f"{self.stage}/{self.key[:_SHORT]}/{self.data_version[:_SHORT]}"

    @property
    def lease(self) -> str:
        """Name of the lease under which the artifact's files are written or deleted."""
        return lease_name(self.stage, self.key)

    def as_dict(self) -> dict[str, str]:
        """For manifests and run records."""
        return {"stage": self.stage, "key": self.key, "data_version": self.data_version}


def lease_name(stage: str, key: str) -> str:
    """Name of the lease on computing a key."""
    return f"{stage}-{key[:_SHORT]}"


def parents(manifest: Mapping[str, Any]) -> dict[str, ArtifactRef]:
    """The artifacts that an artifact was made from, by input name; files from outside the store are left out."""
    return {name: ArtifactRef(**entry) for name, entry in manifest["inputs"].items() if "stage" in entry}


class ArtifactStore:
    """Reads and publishes artifacts below one home folder."""

    def __init__(self, home: Path) -> None:
        self.root = home / "artifacts"

    def path(self, ref: ArtifactRef) -> Path:
        """Folder of an artifact."""
        return self.root / ref.artifact_id

    def manifest(self, ref: ArtifactRef) -> dict[str, Any]:
        """Manifest of an artifact.

        Raises:
            StoreError: It is missing or is not JSON.
        """
        return _read_manifest(self.path(ref))

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key, the oldest if computing it twice gave two results; None if there is none.

        Files are checked by presence and size here; `verify` reads them.
        """
        found = []
        for folder in (self.root / stage / key[:_SHORT]).glob("*"):
            if not _is_whole(folder):
                continue
            manifest = _read_manifest(folder)
            if manifest["key"] == key:
                found.append((manifest["created_at"], manifest["data_version"]))
        return ArtifactRef(stage, key, min(found)[1]) if found else None

    def is_whole(self, ref: ArtifactRef) -> bool:
        """Whether all files of an artifact are there, by size."""
        return _is_whole(self.path(ref))

    def all(self) -> list[ArtifactRef]:
        """Every artifact that has a manifest, whole or not, in the order of their folders."""
        manifests = map(_read_manifest, sorted(path.parent for path in self.root.glob(f"[!.]*/*/*/{MANIFEST}")))
        return [ArtifactRef(found["stage"], found["key"], found["data_version"]) for found in manifests]

    def family(self, refs: Iterable[ArtifactRef]) -> dict[ArtifactRef, dict[str, Any] | None]:
        """The artifacts and everything behind them, with their manifests; None for one that is gone."""
        found: dict[ArtifactRef, dict[str, Any] | None] = {}
        pending = list(refs)
        while pending:
            ref = pending.pop()
            if ref in found:
                continue
            found[ref] = manifest = self.manifest(ref) if (self.path(ref) / MANIFEST).is_file() else None
            pending.extend(parents(manifest).values() if manifest else ())
        return found

    def fault(self, stage: str, key: str) -> str | None:
        """What keeps artifacts of a key from being found: a file that is missing or cut; None if there are none."""
        faults = map(_fault, sorted((self.root / stage / key[:_SHORT]).glob("*")))
        return next(filter(None, faults), None)

    def of_stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Manifests of a stage's artifacts, without those that lack a file."""
        for folder in sorted((self.root / stage).glob("*/*")):
            if _is_whole(folder):
                yield _read_manifest(folder)

    def verify(self, ref: ArtifactRef) -> Path:
        """The artifact's folder, after every file's sha256 has been found to be the manifest's.

        Raises:
            StoreError: A file is missing, was changed or was deleted by `align gc`; names it and says what to do.
        """
        folder = self.path(ref)
        if (folder / COLLECTED).is_file():
            when = json.loads((folder / COLLECTED).read_text(encoding="utf-8"))["collected_at"]
            raise StoreError(
                f"The model in {folder} was deleted by `align gc` on {when[:10]}. Run again: it is computed anew."
            )
        for entry in self.manifest(ref)["files"]:
            path = folder / entry["path"]
            if not _holds(folder, entry):
                state = "was changed" if path.is_file() else "is missing"
                raise StoreError(
                    f"{path} {state} since it was published, expected sha256 {entry['sha256'][:12]}…. "
                    f"Delete {folder} and run again: the artifact is computed anew."
                )
        return folder

    def new_staging(self) -> Path:
        """An empty folder on the store's own file system, to be published or discarded.

        What killed processes left behind is removed on the way.
        """
        for left in self.abandoned():
            shutil.rmtree(left, ignore_errors=True)
        staging = self.root / f".staging-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        return staging

    def abandoned(self) -> Iterator[Path]:
        """Staging folders of processes that are gone."""
        for folder in sorted(self.root.glob(".staging-*")):
            if not is_alive(int(folder.name.split("-")[1])):
                yield folder

    def publish(self, staging: Path, stage: str, key: str, manifest: Mapping[str, Any]) -> ArtifactRef:
        """Seal a staging folder with its manifest and rename it into its place.

        Publishing the same content again is not an error: what is there stays, and files that it lacks are put back.
        Its manifest stays too, if those are the very files that it lists, so that nobody has to read it again.
        """
        ref = ArtifactRef(stage, key, data_version(staging))
        files = [
            {"path": path.relative_to(staging).as_posix(), "size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in all_files(staging)
        ]
        atomic.write_json(staging / MANIFEST, {"format": MANIFEST_FORMAT, **ref.as_dict(), **manifest, "files": files})
        atomic.sync_tree(staging)
        target = self.path(ref)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(staging if _is_whole(target) or _put_back(staging, target) else target)
        if staging.exists():
            staging.replace(target)
        atomic.sync_directory(target.parent)
        return ref

    def model_files(self, ref: ArtifactRef) -> list[dict[str, Any]]:
        """Path and size of an artifact's model files (safetensors) that are on disk."""
        folder = self.path(ref)
        return [file for file in _model_files(self.manifest(ref)) if (folder / file["path"]).is_file()]

    def mark_collected(self, ref: ArtifactRef) -> None:
        """Say beside the manifest that the model files are deleted: from here on the artifact counts as absent."""
        path = self.path(ref) / COLLECTED
        if not path.exists():  # an earlier deletion that was interrupted keeps its date
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            atomic.write_json(path, {"collected_at": now, "files": _model_files(self.manifest(ref))})

    def delete_collected(self, ref: ArtifactRef) -> None:
        """Delete the model files of an artifact that is marked; its tables and extras stay."""
        for file in self.model_files(ref):
            (self.path(ref) / file["path"]).unlink(missing_ok=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing. Delete {folder} and run again: it is computed anew.") from None
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}). Delete {folder} and run again.") from error
    return manifest


def _is_whole(folder: Path) -> bool:
    """Whether the manifest and every file it lists are there, and none is being deleted."""
    return _fault(folder) is None


def _fault(folder: Path) -> str | None:
    """What an artifact lacks to be used; None if it is whole. Files are looked at by presence and size."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    if (folder / COLLECTED).exists():
        return "`align gc` has deleted its weights"
    for entry in _read_manifest(folder)["files"]:
        path = folder / entry["path"]
        if not path.is_file():
            return f"{entry['path']} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{entry['path']} holds {path.stat().st_size} bytes, expected {entry['size']}"
    return None


def _holds(folder: Path, entry: Mapping[str, Any]) -> bool:
    path = folder / entry["path"]
    return path.is_file() and bool(file_sha256(path) == entry["sha256"])


def _put_back(staging: Path, folder: Path) -> bool:
    """Move what an artifact lacks from a staging folder into it, if that holds the very files its manifest lists."""
    if not (folder / MANIFEST).is_file():
        return False
    missing = [entry for entry in _read_manifest(folder)["files"] if not _holds(folder, entry)]
    if not all(_holds(staging, entry) for entry in missing):
        return False
    for entry in missing:
        path = folder / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        (staging / entry["path"]).replace(path)
        atomic.sync_directory(path.parent)
    (folder / COLLECTED).unlink(missing_ok=True)
    return True


def _model_files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [file for file in manifest["files"] if file["path"].endswith(_MODEL_SUFFIX)]
    return [{"path": file["path"], "size": file["size"]} for file in found]


def short_id(artifact_id: str) -> str:
    """The beginning of each part of an id, enough to find it: LIKE 'sft_model/ea7b7d2b%'."""
    stage, key, version = artifact_id.split("/")
    return f"{stage}/{key[:_SHOWN]}/{version[:_SHOWN]}"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
