"""Release records: which policy was released, when and by whom.

    releases/<release id>.json

A record is written once and never changed. What a release names is kept by `align gc`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import StoreError
from resources.artifact_store import ArtifactRef
from resources.runs import RunRecords

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Release:
    """One released artifact; `released_at` is an ISO time, `released_by` a person or a program."""

    release_id: str
    recipe: str
    asset: str
    stage: str
    key: str
    data_version: str
    released_at: str
    released_by: str
    note: str

    @property
    def ref(self) -> ArtifactRef:
        """The artifact."""
        return ArtifactRef(self.stage, self.key, self.data_version)


class Releases:
    """Reads and writes release records below one home folder."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "releases"
        self._runs = RunRecords(home)

    def write(self, release: Release) -> None:
        """Record a release.

        Raises:
            StoreError: Its id cannot be a file's name, or there is a release with that id.
        """
        if not _ID.fullmatch(release.release_id):
            raise StoreError(
                f"Release id: found {release.release_id!r}, expected letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit."
            )
        path = self._folder / f"{release.release_id}.json"
        with self._runs.locked():
            if path.exists():
                raise StoreError(f"There is a release {release.release_id} already ({path}). Choose another id.")
            atomic.write_json(path, asdict(release))

    def all(self) -> list[Release]:
        """All releases, oldest first.

        Raises:
            StoreError: A record is malformed; names it and says what to do.
        """
        found = [_read(path) for path in self._folder.glob("*.json")]
        return sorted(found, key=lambda release: (release.released_at, release.release_id))


def _read(path: Path) -> Release:
    names = [field.name for field in fields(Release)]
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Release(**{name: str(raw[name]) for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not a release record ({type(error).__name__}: {error}); expected a JSON object with "
            f"{', '.join(names)}. Mend it, or move it away if nothing of it is to be kept."
        ) from error
