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

    Where two inputs meet in the same content, what that was made from is not compared: the same rows may have come from
    two sources.

    Raises:
        StoreError: Names the two inputs, the stage they disagree about, and what to run.
    """
    seen: dict[str, tuple[str, str]] = {}
    for source, ref in inputs.items():
        pending = [ref]
        while pending:
            current = pending.pop()
            if current.stage not in _ONE_A_POLICY:
                other, known = seen.get(current.stage, (source, None))
                if other != source and known != current.data_version:
                    raise StoreError(
                        f"{asset} would read {other} and {source}, which go back to different versions of "
                        f"{current.stage} ({str(known)[:8]} and {current.data_version[:8]}). Make what is older anew: "
                        f"run the whole recipe, or --select {other} --select {source} with what lies between "
                        f"{current.stage} and them."
                    )
                if known is not None:
                    continue
                seen[current.stage] = (source, current.data_version)
            pending.extend(parents(store.manifest(current)).values())
