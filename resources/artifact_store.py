"""The artifact store: immutable folders at `artifacts/<stage>/<key>/<data version>/`, shared by all recipes.

Belongs here: layout, manifests, verification, atomic publication. What a key means is in `alignment_pipeline.identity`.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import MANIFEST, all_files, data_version, file_sha256

MANIFEST_FORMAT = 1
_SHORT = 20  # hex digits of a hash in a folder's name


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

    def as_dict(self) -> dict[str, str]:
        """For manifests and run records."""
        return {"stage": self.stage, "key": self.key, "data_version": self.data_version}


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
        return self._read_manifest(self.path(ref))

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key, the oldest if computing it twice gave two results; None if there is none.

        Files are checked by presence and size here; `verify` reads them.
        """
        found = []
        for folder in (self.root / stage / key[:_SHORT]).glob("*"):
            if not self._is_whole(folder):
                continue
            manifest = self._read_manifest(folder)
            if manifest["key"] == key:
                found.append((manifest["created_at"], manifest["data_version"]))
        return ArtifactRef(stage, key, min(found)[1]) if found else None

    def fault(self, stage: str, key: str) -> str | None:
        """What keeps artifacts of a key from being found: a file that is missing or cut; None if there are none."""
        faults = map(self._fault, sorted((self.root / stage / key[:_SHORT]).glob("*")))
        return next(filter(None, faults), None)

    def of_stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Manifests of a stage's artifacts, without those that lack a file."""
        for folder in sorted((self.root / stage).glob("*/*")):
            if self._is_whole(folder):
                yield self._read_manifest(folder)

    def verify(self, ref: ArtifactRef) -> Path:
        """The artifact's folder, after every file's sha256 has been found to be the manifest's.

        Raises:
            StoreError: A file is missing or was changed; names it and says what to do.
        """
        folder = self.path(ref)
        for entry in self.manifest(ref)["files"]:
            path = folder / entry["path"]
            if not path.is_file() or file_sha256(path) != entry["sha256"]:
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
        for left in self.root.glob(".staging-*"):
            if not _is_alive(int(left.name.split("-")[1])):
                shutil.rmtree(left, ignore_errors=True)
        staging = self.root / f".staging-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        return staging

    def publish(self, staging: Path, stage: str, key: str, manifest: Mapping[str, Any]) -> ArtifactRef:
        """Seal a staging folder with its manifest and rename it into its place.

        Publishing the same content again is not an error: what is there stays, unless files of it are missing.
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
            shutil.rmtree(staging if self._is_whole(target) else target)
        if staging.exists():
            staging.replace(target)
        atomic.sync_directory(target.parent)
        return ref

    def _read_manifest(self, folder: Path) -> dict[str, Any]:
        path = folder / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{path} is missing. Delete {folder} and run again: it is computed anew.") from None
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}). Delete {folder} and run again.") from error
        return manifest

    def _is_whole(self, folder: Path) -> bool:
        """Whether the manifest and every file it lists are there, by size."""
        return self._fault(folder) is None

    def _fault(self, folder: Path) -> str | None:
        if not (folder / MANIFEST).is_file():
            return f"{MANIFEST} is missing"
        for entry in self._read_manifest(folder)["files"]:
            path = folder / entry["path"]
            if not path.is_file():
                return f"{entry['path']} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{entry['path']} holds {path.stat().st_size} bytes, expected {entry['size']}"
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
