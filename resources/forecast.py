"""What a run would do with each asset, said without doing it: nothing is written, computed or taken in.

A parent that is made anew leaves open what reads it. Whatever it comes out as, what reads it can be reused only if an
artifact agrees in all else; where none does, that is certain to be computed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment_pipeline.graph import StageNode, build_graph
from alignment_pipeline.recipe import Recipe
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.feedback import FeedbackInbox
from resources.leakage import with_leak_check
from resources.plan import changes, describe, incomplete, make_plan, read_files, version_of
from resources.runs import RunRecords, pick


@dataclass(frozen=True)
class Verdict:
    """What a run would do with an asset.

    Attributes:
        asset: Its name within the recipe.
        kind: `undecided` is reused if the parents that are made anew come out as they were; `blocked` is not made, as
            something it reads fails a blocking check.
        reasons: Why; for `reuse`, what differs from the recipe's current artifact, if that is another one.
        artifact: What is reused.
    """

    asset: str
    kind: Literal["reuse", "compute", "undecided", "blocked"]
    reasons: tuple[str, ...] = ()
    artifact: ArtifactRef | None = None


def forecast(home: Path, recipe: Recipe, assets: Collection[str]) -> list[Verdict]:
    """What a run that makes these assets of a recipe would do with each, parents before children.

    Raises:
        AlignmentError: The run would fail: an input is missing, or inputs do not belong together.
    """
    store, inbox = ArtifactStore(home), FeedbackInbox(home, recipe.name)
    current = RunRecords(home).current(recipe.name)
    known = dict(current)  # what each asset would be when what reads it is planned
    verdicts: dict[str, Verdict] = {}
    for node in build_graph(recipe).values():
        if node.asset in assets:
            read = [verdicts[asset] for asset in node.inputs.values() if asset in verdicts]
            verdict = _blocked(store, node, read) or _planned(store, inbox, recipe, node, known, read)
            verdicts[node.asset] = verdict
            if verdict.artifact:
                known[node.asset] = verdict.artifact
    return list(verdicts.values())


def _planned(
    store: ArtifactStore, inbox: FeedbackInbox, recipe: Recipe, node: StageNode,
    known: Mapping[str, ArtifactRef], read: Iterable[Verdict],
) -> Verdict:  # fmt: skip
    """The verdict on an asset that nothing blocks; `known[node.asset]` is still the recipe's current artifact of it."""
    files = read_files(node, node.config.input_files())
    waiting = 0
    if node.stage == "human_preferences":
        journal, waiting = inbox.preview()
        files = {**files, "journal": {"sha256": journal, "path": str(inbox.journal)}}
    votes = (f"{waiting} {'vote waits' if waiting == 1 else 'votes wait'} in the inbox",) if waiting else ()
    previous = known.get(node.asset)
    unknown = [verdict for verdict in read if verdict.artifact is None]
    left_open = {verdict.asset for verdict in unknown}
    parents = pick(known, recipe.name, [asset for asset in node.inputs.values() if asset not in left_open])
    if not unknown:
        plan = make_plan(store, node, recipe.seed, parents, files, previous)
        if plan.found:
            return Verdict(node.asset, "reuse", plan.reasons, plan.found)
        return Verdict(node.asset, "compute", (*votes, *plan.reasons))
    inputs = {name: parents[asset] for name, asset in node.inputs.items() if asset in parents}
    description = describe(node, recipe.seed, inputs, files)
    if any(_agrees(manifest, description, node) for manifest in store.of_stage(node.stage)):
        return Verdict(node.asset, "undecided", (*_anew(unknown), "reused if what it reads comes out the same"))
    reasons = changes(store, node, previous, description)
    if previous and not reasons:
        reasons = incomplete(store, previous.stage, previous.key)
    return Verdict(node.asset, "compute", (*votes, *reasons))


def _anew(verdicts: Collection[Verdict]) -> Iterator[str]:
    for kind, may in (("compute", ""), ("undecided", "may be ")):
        names = [verdict.asset for verdict in verdicts if verdict.kind == kind]
        if names:
            be = may or ("is " if len(names) == 1 else "are ")
            yield f"reads {' and '.join(names)}, which {be}made anew"


def _agrees(manifest: Mapping[str, Any], description: Mapping[str, Any], node: StageNode) -> bool:
    """Whether an artifact was made from all that is described, whatever its other inputs were."""
    made_from, known = manifest["inputs"], description["inputs"]
    return (
        all(manifest[name] == description[name] for name in ("code_version", "config", "seed"))
        and made_from.keys() == known.keys() | node.inputs.keys()
        and all(version_of(made_from[name]) == version_of(entry) for name, entry in known.items())
    )


def _blocked(store: ArtifactStore, node: StageNode, read: Iterable[Verdict]) -> Verdict | None:
    """The verdict on an asset that a run does not reach; None if nothing that it reads stops it."""
    for verdict in read:
        if verdict.kind == "blocked":
            return Verdict(node.asset, "blocked", (f"reads {verdict.asset}, which is not made",))
        checks = with_leak_check(store, verdict.artifact)["checks"] if verdict.artifact else ()
        for check in checks:
            if check["blocking"] and not check["passed"]:
                reason = f"reads {verdict.asset}, whose check {check['name']} does not hold"
                return Verdict(node.asset, "blocked", (reason,))
    return None
