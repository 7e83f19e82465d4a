"""What the store knows of one policy: what it was made from, how it was measured, which checks hold, how to repeat it.

Belongs here: reading manifests, run records' assets and evaluation tables; not the index, which may lag behind them.
The words for people are in `model_card`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import DataError, MissingArtifactError
from alignment_pipeline.graph import StageNode, build_graph, evaluation_asset, trunk_asset
from alignment_pipeline.identity import EXTRAS, MANIFEST, file_sha256, read_jsonl
from alignment_pipeline.recipe import Recipe
from alignment_pipeline.statistics import mean, standard_error, wilson_interval
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.overrides import file_override, without_folders
from resources.plan import content_sha256
from resources.reasons import file_key

_NORMAL_95 = 1.96
_SOURCE_KEYS = ("path", "hub_name", "train_path")


@dataclass(frozen=True)
class Made:
    """An artifact and what its manifest says."""

    ref: ArtifactRef
    manifest: Mapping[str, Any]
    manifest_sha256: str

    def files(self) -> dict[str, Mapping[str, str]]:
        """Input name → path and sha256 of the files that were read beside artifacts."""
        return {name: entry for name, entry in self.manifest["inputs"].items() if "stage" not in entry}


@dataclass(frozen=True)
class Metric:
    """A measured number with its 95% interval, if it has one."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measured:
    """A policy's evaluation; `opponent` and the win rate are there once policies were compared."""

    evaluation: Made
    comparison: Made | None
    judge_title: str
    prompts: int
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Check:
    """A proposition about an asset that was looked at, and whether it holds."""

    asset: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class PolicyRecord:
    """Everything that is told of a policy.

    Attributes:
        recipe: As it was run, overrides included.
        policy: Name of the asset.
        lineage: Asset → artifact of all ancestors, parents before children, and of the policy, which is the last.
        measured: None if this policy has not been evaluated.
        checks: Of all these artifacts, as far as they concern the policy.
        overrides: What `align run` needs beside the recipe's name to make the same; files without their folders.
        licences: Section of the recipe that names a source → its licence, None if it is not stated.
        hub_commit: Commit of a hub dataset that was read.
        base_commit: Commit of a base model of the hub.
    """

    recipe: Recipe
    policy: str
    lineage: Mapping[str, Made]
    measured: Measured | None
    checks: tuple[Check, ...]
    overrides: tuple[str, ...]
    licences: Mapping[str, str | None]
    hub_commit: str | None
    base_commit: str | None

    @property
    def itself(self) -> Made:
        """The policy's own artifact."""
        return self.lineage[self.policy]

    @property
    def trunk(self) -> str:
        """The asset that policies of this recipe start from and are measured against."""
        return trunk_asset(self.recipe)


def gather(
    store: ArtifactStore, recipe: Recipe, policy: str, assets: Mapping[str, ArtifactRef], overrides: Iterable[str]
) -> PolicyRecord:
    """Collect what is known of a policy.

    Args:
        store: Where the artifacts are.
        recipe: As it was run.
        policy: Name of the asset.
        assets: Asset → artifact of the run, or what is current.
        overrides: Of the run.

    Raises:
        MissingArtifactError: The recipe has no such policy, or it has not been made.
        StoreError: A manifest or table cannot be read.
    """
    graph = build_graph(recipe)
    policies = [node.inputs["policy"] for node in graph.values() if node.stage == "evaluation"]
    if policy not in policies:
        raise MissingArtifactError(f"{recipe.name} has no policy {policy!r}, expected one of: {', '.join(policies)}.")
    if policy not in assets:
        raise MissingArtifactError(f"{policy} of {recipe.name} has not been made yet. Run `align run {recipe.name}`.")
    lineage = _lineage(store, assets[policy])
    measured = _measured(store, policy, lineage[policy].ref, assets)
    overrides = list(overrides)
    return PolicyRecord(
        recipe=recipe,
        policy=policy,
        lineage=lineage,
        measured=measured,
        checks=tuple(_checks(lineage, policy, measured)),
        overrides=tuple(_needed_overrides(recipe, overrides, lineage, measured)),
        licences=_licences(recipe, overrides, lineage),
        hub_commit=_hub_commit(store, lineage, "instructions"),
        base_commit=_hub_commit(store, lineage, "base_model"),
    )


def as_json(record: PolicyRecord) -> dict[str, Any]:
    """The lineage for programs: every artifact with what identifies it, and the sha256 of its manifest."""
    return {
        "recipe": record.recipe.name,
        "policy": record.policy,
        "overrides": list(record.overrides),
        "artifacts": {asset: _identity(made) for asset, made in record.lineage.items()},
        "evaluation": _identity(record.measured.evaluation) if record.measured else None,
    }


def _identity(made: Made) -> dict[str, Any]:
    inputs = {
        name: {key: value for key, value in entry.items() if key != "path"}
        for name, entry in made.manifest["inputs"].items()
    }
    return {
        "artifact_id": made.ref.artifact_id, **made.ref.as_dict(), "manifest_sha256": made.manifest_sha256,
        "code_version": made.manifest["code_version"], "seed": made.manifest["seed"],
        "config": made.manifest["config"], "inputs": inputs,
    }  # fmt: skip


def _lineage(store: ArtifactStore, policy: ArtifactRef) -> dict[str, Made]:
    """Asset → artifact, parents first. A stage among a policy's ancestors is one asset, and has its name."""
    found: dict[str, Made] = {}

    def visit(ref: ArtifactRef) -> None:
        if ref.stage in found:
            return
        made = _read(store, ref)
        for entry in made.manifest["inputs"].values():
            if "stage" in entry:
                visit(ArtifactRef(**entry))
        found[ref.stage] = made

    visit(policy)
    return found


def _read(store: ArtifactStore, ref: ArtifactRef) -> Made:
    manifest = store.manifest(ref)
    return Made(ref, manifest, file_sha256(store.path(ref) / MANIFEST))


def _measured(
    store: ArtifactStore, policy: str, ref: ArtifactRef, assets: Mapping[str, ArtifactRef]
) -> Measured | None:
    """The evaluation among `assets` if it is of this very policy, with the comparison if that is of this evaluation."""
    evaluation = _child(store, assets.get(evaluation_asset(policy)), "policy", ref)
    if evaluation is None:
        return None
    folder = store.verify(evaluation.ref)
    rows = read_jsonl(folder / "examples.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    metrics = [Metric("bleu", evaluation.manifest["metrics"]["eval/bleu"]), *_means(rows)]
    comparison = _child(store, assets.get("comparison"), policy, evaluation.ref)
    if comparison is not None:
        table = read_jsonl(store.verify(comparison.ref) / "table.jsonl")
        row = next(row for row in table if row["policy"] == policy)
        if row["opponent"] != policy:
            metrics.append(Metric("win_rate", row["win_rate"], (row["win_rate_low"], row["win_rate_high"])))
    return Measured(
        evaluation, comparison, summary["judge_title"], len(rows), {metric.name: metric for metric in metrics}
    )


def _child(store: ArtifactStore, ref: ArtifactRef | None, name: str, parent: ArtifactRef) -> Made | None:
    """An artifact if it read `parent` as its input `name`."""
    if ref is None:
        return None
    made = _read(store, ref)
    entry = made.manifest["inputs"].get(name, {})
    return made if entry.get("data_version") == parent.data_version else None


def _means(rows: list[dict[str, Any]]) -> Iterable[Metric]:
    for name, column in (
        ("judge_score", "judge_score"),
        ("learned_score", "learned_score"),
        ("kl_nats", "kl_nats"),
        ("mean_tokens", "tokens"),
    ):
        values = [row[column] for row in rows]
        if None not in values:
            centre, half = mean(values), _NORMAL_95 * standard_error(values)
            yield Metric(name, centre, (centre - half, centre + half))
    ended = mean([float(row["ended"]) for row in rows])
    yield Metric("eos_rate", ended, wilson_interval(ended, len(rows)))


def _checks(lineage: Mapping[str, Made], policy: str, measured: Measured | None) -> Iterable[Check]:
    made = dict(lineage)
    others: set[str] = set()
    if measured:
        made[evaluation_asset(policy)] = measured.evaluation
        if measured.comparison:
            made["comparison"] = measured.comparison
            others = set(measured.comparison.manifest["inputs"]) - {policy}
    for asset, each in made.items():
        for check in each.manifest["checks"]:
            if not check["name"].startswith(tuple(f"{other}_" for other in others)):
                yield Check(asset, check["name"], check["passed"], check["detail"])


def _needed_overrides(
    recipe: Recipe, overrides: list[str], lineage: Mapping[str, Made], measured: Measured | None
) -> Iterable[str]:
    """The run's overrides that concern these artifacts, and what they were set to otherwise, in the web UI say."""
    graph = build_graph(recipe)
    policy = list(lineage)[-1]
    made = dict(lineage) | ({evaluation_asset(policy): measured.evaluation} if measured else {})
    sections = {graph[asset].section for asset in made if asset in graph}
    found: dict[str, None] = {}
    for override in overrides:
        section, _, last = override.partition("=")[0].partition(".")
        if section in sections or getattr(recipe, section, None) is None or not last:
            found[without_folders(override)] = None
    for asset, each in made.items():
        if asset in graph:
            found |= dict.fromkeys(_differences(graph[asset], each))
    seed = lineage[policy].manifest["seed"]
    if seed != recipe.seed:
        found[f"seed={seed}"] = None
    return found


def _differences(node: StageNode, made: Made) -> Iterable[str]:
    """Overrides that turn the recipe's settings of a stage into those that an artifact was made with."""
    config, values = made.manifest["config"], node.config.keyed_values()
    files, paths = made.files(), node.config.input_files()
    for name, value in config.items():
        if name not in files and value != values.get(name):
            yield f"{node.section}.{name}={json.dumps(value)}"
    for name in paths:
        if name not in files:
            yield f"{file_key(node.section, name)}=null"
    for name, entry in files.items():
        same = name in paths and _is_same_file(node, name, entry)
        if _is_key(node, name) and not (same and config.get(name) == values.get(name)):
            yield file_override(file_key(node.section, name), entry["path"], config.get(name))


def _is_key(node: StageNode, name: str) -> bool:
    """Whether the recipe names an input file; people's votes have their place in the home."""
    return file_key(node.section, name).partition(".")[2] in type(node.config).model_fields


def _is_same_file(node: StageNode, name: str, entry: Mapping[str, str]) -> bool:
    """Whether the recipe's file is the one that was read, by its place or, if it lies elsewhere, by its content."""
    path = node.config.input_files()[name]
    try:
        return entry["path"] == str(path) or entry["sha256"] == content_sha256(node, name, path)
    except DataError:
        return False


def _licences(recipe: Recipe, overrides: list[str], lineage: Mapping[str, Made]) -> dict[str, str | None]:
    """Stated licences of the sources. One in the recipe's file is not that of a source that was set in its place."""
    graph = build_graph(recipe)
    changed = {override.partition("=")[0] for override in overrides}
    found: dict[str, str | None] = {}
    own = recipe.reward_model is not None and recipe.reward_model.is_given
    for asset in "instructions", "base_model", "reward_classifier", *(("reward_model",) if own else ()):
        # A base model that read instructions was built from them.
        if asset in lineage and asset in graph and "instructions" not in lineage[asset].manifest["inputs"]:
            node = graph[asset]
            config: Any = node.config
            elsewhere = changed & {f"{node.section}.{key}" for key in _SOURCE_KEYS}
            stated = not elsewhere or f"{node.section}.license" in changed
            found[node.section] = config.license if stated and _is_same_source(node, lineage[asset]) else None
    return found


def _is_same_source(node: StageNode, made: Made) -> bool:
    """Whether an artifact was made from what the recipe names; of the built-in world, from however many rows."""
    config, values = made.manifest["config"], node.config.keyed_values()
    files, paths = made.files(), node.config.input_files()
    return (
        config.get("hub_name") == values.get("hub_name")
        and bool(config.get("world_rows")) == bool(values.get("world_rows"))
        and files.keys() == paths.keys()
        and all(_is_same_file(node, name, entry) for name, entry in files.items())
    )


def _hub_commit(store: ArtifactStore, lineage: Mapping[str, Made], asset: str) -> str | None:
    if asset not in lineage:
        return None
    path: Path = store.path(lineage[asset].ref) / EXTRAS / "source.json"
    source: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return source.get("commit")
