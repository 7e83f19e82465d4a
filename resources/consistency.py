"""Whether what a stage is about to read belongs together.

Artifacts name their parents by data version. Where two inputs go back to different versions of the same stage, say a
policy to one SFT model and the reward model to another, the result would be a number of nothing that ever existed.
"""

from collections.abc import Mapping

from alignment_pipeline.errors import StoreError
from resources.artifact_store import ArtifactRef, ArtifactStore, parents

_ONE_A_POLICY = frozenset({"evaluation"})  # several of them meet in a comparison


def require_one_lineage(store: ArtifactStore, asset: str, inputs: Mapping[str, ArtifactRef]) -> None:
    """Check that every stage behind the inputs (asset → artifact) has one data version.

    Raises:
        StoreError: Names the two inputs, the stage they disagree about, and what to run.
    """
    seen: dict[str, tuple[str, str]] = {}
    for source, ref in inputs.items():
        for stage, version in _ancestry(store, ref).items():
            other, known = seen.setdefault(stage, (source, version))
            if known != version:
                raise StoreError(
                    f"{asset} would read {other} and {source}, which go back to different versions of {stage} "
                    f"({known[:8]} and {version[:8]}). Make what is older anew: run the whole recipe, or "
                    f"--select {other} --select {source} with what lies between {stage} and them."
                )


def _ancestry(store: ArtifactStore, ref: ArtifactRef) -> dict[str, str]:
    """Stage → data version of an artifact and of everything behind it."""
    found: dict[str, str] = {}
    pending = [ref]
    while pending:
        current = pending.pop()
        if current.stage in found and current.stage not in _ONE_A_POLICY:
            continue
        if current.stage not in _ONE_A_POLICY:
            found[current.stage] = current.data_version
        pending.extend(parents(store.manifest(current)).values())
    return found
