"""What an asset would be computed from, under which key, and whether that exists.

A run and `align run --dry-run` ask the same `make_plan`, so that they cannot disagree. Nothing here writes or computes.
What is said before the parents are known is in `resources.forecast`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment_pipeline.code_version import stage_code, stage_code_version
from alignment_pipeline.errors import DataError, StoreError
from alignment_pipeline.graph import StageNode
from alignment_pipeline.identity import artifact_key, digest, file_sha256
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.consistency import require_one_lineage
from resources.reasons import differences, file_key

FIRST_TIME = "first time"
Files = Mapping[str, Mapping[str, str]]
"""Input name → `sha256` and `path` of a file (or folder) that a stage reads."""


@dataclass(frozen=True)
class Plan:
    """What an asset is to be computed from.

    Attributes:
        key: Names the computation.
        description: What the key is made of, and the versions of the code's modules, as manifests have them.
        inputs: Input name → artifact.
        found: The artifact, if it exists.
        reasons: What differs from the recipe's current artifact of this asset; nothing if that was found.
    """

    key: str
    description: Mapping[str, Any]
    inputs: Mapping[str, ArtifactRef]
    found: ArtifactRef | None
    reasons: tuple[str, ...]


def make_plan(
    store: ArtifactStore,
    node: StageNode,
    seed: int,
    parents: Mapping[str, ArtifactRef],
    files: Files,
    previous: ArtifactRef | None,
) -> Plan:
    """Plan one asset.

    Args:
        store: Where artifacts are looked for.
        node: What is to be made; its config is the one that counts.
        seed: Seed of the stage's random choices.
        parents: Asset → artifact, for every asset that it reads.
        files: What it reads beside them.
        previous: The recipe's current artifact of this asset.

    Raises:
        StoreError: The parents do not belong together.
    """
    require_one_lineage(store, node.asset, parents)
    inputs = {name: parents[asset] for name, asset in node.inputs.items()}
    description = describe(node, seed, inputs, files)
    versions = {name: version_of(entry) for name, entry in description["inputs"].items()}
    key = artifact_key(node.stage, description["code_version"], description["config"], versions, seed)
    found = store.find(node.stage, key)
    if found is not None and previous in (None, found):
        return Plan(key, description, inputs, found, ())
    reasons = changes(store, node, previous, description)
    if found is None and (fault := incomplete(store, node.stage, key)):
        reasons = [*(reason for reason in reasons if reason != FIRST_TIME), *fault]
    return Plan(key, description, inputs, found, tuple(reasons))


def settings_version(code_version: str, config: Mapping[str, Any], seed: int) -> str:
    """All that an asset's key is made of but its inputs, in 16 hex digits: Dagster's code version of the asset."""
    return digest([code_version, dict(config), seed])[:16]


def read_files(node: StageNode, paths: Mapping[str, Path]) -> Files:
    """Hash what a stage reads beside its inputs.

    Raises:
        DataError: One of them does not exist or cannot be read.
    """
    return {name: {"sha256": content_sha256(node, name, path), "path": str(path)} for name, path in paths.items()}


def content_sha256(node: StageNode, name: str, path: Path) -> str:
    """What an input file (or a model's folder) holds, whatever it is called.

    Raises:
        DataError: It does not exist or cannot be read.
    """
    try:
        if path.is_dir():
            return digest({file.name: file_sha256(file) for file in sorted(path.iterdir()) if file.is_file()})
        return file_sha256(path)
    except OSError as error:
        found = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        key = file_key(node.section, name)
        raise DataError(
            f"{key}: {path} {found}, expected a file or folder that can be read. Correct the recipe, "
            f"or use `--set {key}=PATH`."
        ) from None


def describe(node: StageNode, seed: int, inputs: Mapping[str, ArtifactRef], files: Files) -> dict[str, Any]:
    """What a key is made of, and the versions of the code's modules, as manifests have them."""
    return {
        "code_version": stage_code_version(node.stage),
        "code": dict(stage_code(node.stage)),
        "config": node.config.keyed_values(),
        "seed": seed,
        "inputs": {name: ref.as_dict() for name, ref in inputs.items()} | {name: dict(files[name]) for name in files},
    }


def changes(
    store: ArtifactStore, node: StageNode, previous: ArtifactRef | None, description: Mapping[str, Any]
) -> list[str]:
    """What differs from the recipe's current artifact of an asset; inputs that the description leaves open do not."""
    if previous is None:
        return [FIRST_TIME]
    try:
        before = store.manifest(previous)
    except StoreError:
        return ["the previous artifact is gone"]
    left_open = node.inputs.keys() - description["inputs"].keys()
    inputs = {name: entry for name, entry in before["inputs"].items() if name not in left_open}
    return differences({**before, "inputs": inputs}, description, node.section, node.inputs)


def incomplete(store: ArtifactStore, stage: str, key: str) -> list[str]:
    """Says that a key was computed before, if files of that artifact are gone."""
    fault = store.fault(stage, key)
    return [f"the earlier artifact's files are incomplete: {fault}"] if fault else []


def version_of(entry: Mapping[str, str]) -> str:
    """The part of a manifest's input that counts: an artifact's data version, or what a file holds."""
    return entry.get("data_version") or entry["sha256"]
