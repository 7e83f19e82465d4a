"""The outside systems as Dagster resources, named by role: artifact store and compute, lineage, tracking."""

import functools
import os
from pathlib import Path
from typing import Any

import dagster as dg

from alignment_pipeline.errors import AlignmentError
from resources.compute import Compute
from resources.device import named_device, only_device
from resources.home import alignment_home, prepare_home
from resources.lineage.index import Lineage
from resources.tracking import Tracking


class ArtifactStoreResource(dg.ConfigurableResource[Any]):
    """Where everything is kept."""

    home: str

    def folder(self) -> Path:
        """The home folder, made if it is missing."""
        return prepare_home(Path(self.home))


class LineageResource(dg.ConfigurableResource[Any]):
    """The DuckDB index over the store's manifests."""

    artifact_store: dg.ResourceDependency[ArtifactStoreResource]

    def index(self) -> Lineage:
        """The index; opening is left to its methods."""
        return Lineage(self.artifact_store.folder())


class TrackingResource(dg.ConfigurableResource[Any]):
    """Weights & Biases, offline unless WANDB_MODE says otherwise."""

    artifact_store: dg.ResourceDependency[ArtifactStoreResource]
    project: str

    def tracker(self) -> Tracking:
        """The process's one tracker of this home."""
        return tracker_of(self.artifact_store.folder(), self.project)


class ComputeResource(dg.ConfigurableResource[Any]):
    """Runs stages: here and on one device."""

    artifact_store: dg.ResourceDependency[ArtifactStoreResource]
    lineage: dg.ResourceDependency[LineageResource]
    tracking: dg.ResourceDependency[TrackingResource]
    device: str

    def engine(self) -> Compute:
        """What makes assets in this process."""
        device = only_device(self.device)
        return Compute(self.artifact_store.folder(), self.tracking.tracker(), device, self.lineage.index())


@functools.cache
def tracker_of(home: Path, project: str) -> Tracking:
    """One tracker a process and home, so that W&B's worker starts once."""
    return Tracking(home, mode=os.environ.get("WANDB_MODE", "offline"), project=project)


def default_resources(home: Path | None = None) -> dict[str, Any]:
    """The resources of a code location, set by environment variables that the README lists."""
    store = ArtifactStoreResource(home=str(home or alignment_home()))
    tracking = TrackingResource(artifact_store=store, project=os.environ.get("WANDB_PROJECT", "alignment-pipeline"))
    lineage = LineageResource(artifact_store=store)
    return {
        "artifact_store": store,
        "lineage": lineage,
        "tracking": tracking,
        "compute": ComputeResource(artifact_store=store, lineage=lineage, tracking=tracking, device=named_device()),
    }


def require_executor(name: str) -> str:
    """Check the value of ALIGNMENT_EXECUTOR.

    Raises:
        AlignmentError: It is neither `in_process` nor `multiprocess`.
    """
    if name not in ("in_process", "multiprocess"):
        raise AlignmentError(f"ALIGNMENT_EXECUTOR: found {name!r}, expected in_process or multiprocess.")
    return name
