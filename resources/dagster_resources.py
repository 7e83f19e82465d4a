"""The outside systems as Dagster resources, named by role: artifact store and compute, lineage, tracking."""

import functools
import os
from pathlib import Path
from typing import Any

import dagster as dg

from alignment_pipeline.errors import AlignmentError
from resources.compute import Compute
from resources.home import alignment_home, prepare_home
from resources.lineage.index import Lineage
from resources.tracking import Tracking

DEVICE_VARIABLE = "ALIGNMENT_DEVICE"


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
        device = _only_visible(self.device if self.device != "auto" else _best_device())
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
    device = os.environ.get(DEVICE_VARIABLE, "auto")
    return {
        "artifact_store": store,
        "lineage": lineage,
        "tracking": tracking,
        "compute": ComputeResource(artifact_store=store, lineage=lineage, tracking=tracking, device=device),
    }


def _best_device() -> str:
    """`cuda:0` where the driver is there, without importing torch to find out (a reused asset never needs it)."""
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists():
        return "cuda:0"
    return "cpu"


def _only_visible(device: str) -> str:
    """Hide all GPUs but the chosen one, before torch is imported: the trainers take every one that they see."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible == [""] or len(visible) > 1:
        index = int(number or 0)
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if visible == [""] else visible[min(index, len(visible) - 1)]
    return "cuda:0"


def require_executor(name: str) -> str:
    """Check the value of ALIGNMENT_EXECUTOR.

    Raises:
        AlignmentError: It is neither `in_process` nor `multiprocess`.
    """
    if name not in ("in_process", "multiprocess"):
        raise AlignmentError(f"ALIGNMENT_EXECUTOR: found {name!r}, expected in_process or multiprocess.")
    return name
