"""A policy for other people: its model card, and a folder that `transformers` loads without this project."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.errors import AlignmentError, MissingArtifactError, StoreError
from app.recipes import find_recipe
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.home import alignment_home
from resources.model_card import model_card
from resources.policy_record import PolicyRecord, as_json, gather
from resources.runs import RunRecords

CARD_FILE = "README.md"
LINEAGE_FILE = "lineage.json"


def card_of(recipe: str, policy: str, run_id: str | None) -> str:
    """The model card of a recipe's policy: the current one, or that of a run.

    Raises:
        AlignmentError: There is no such recipe, run or policy.
    """
    return model_card(record_of(recipe, policy, run_id))


def export_policy(recipe: str, policy: str, run_id: str | None, folder: Path) -> None:
    """Write a policy's merged weights, tokenizer, card and lineage to a new folder, which appears when it is whole.

    Raises:
        AlignmentError: There is no such recipe, run or policy, or the folder cannot be written to.
    """
    folder = folder.expanduser().resolve()
    _require_free(folder)
    record = record_of(recipe, policy, run_id)
    from transformers.utils.logging import disable_progress_bar

    from alignment_pipeline.models import load_policy, load_tokenizer, require_finite, weights_sha256

    store = ArtifactStore(alignment_home())
    ref = record.itself.ref
    trunk = record.itself.manifest["inputs"].get("trunk")
    source, foundation = store.verify(ref), store.verify(ArtifactRef(**trunk) if trunk else ref)
    disable_progress_bar()
    with warnings.catch_warnings(), _appearing(folder) as staging:
        warnings.simplefilter("ignore")  # deprecations between transformers and PEFT
        model, tokenizer = load_policy(source, foundation), load_tokenizer(foundation)
        require_finite(model)
        model.config.use_cache = True  # trainers leave it off, and generation is slow without
        lineage = as_json(record) | {"weights_sha256": weights_sha256(model)}
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        atomic.write_text(staging / CARD_FILE, model_card(record))
        atomic.write_json(staging / LINEAGE_FILE, lineage)


def record_of(recipe_name: str, policy: str, run_id: str | None) -> PolicyRecord:
    """What is known of a recipe's policy, the recipe being as it was run."""
    home = alignment_home()
    runs = RunRecords(home)
    known = runs.current(recipe_name)
    if run_id is not None:
        run = runs.read(run_id)
        made = runs.of_run(run_id)
        if run["recipe"] != recipe_name:
            raise StoreError(f"Run {run_id} is of the recipe {run['recipe']}, expected {recipe_name}.")
        if policy in known and policy not in made:
            raise MissingArtifactError(f"Run {run_id} made no {policy}; it made: {', '.join(made) or 'nothing'}.")
        known |= made
    else:
        run = _newest_run_with(runs, recipe_name, policy, known.get(policy))
    overrides: list[str] = run.get("overrides", [])
    return gather(ArtifactStore(home), find_recipe(recipe_name, overrides), policy, known, overrides)


def _newest_run_with(runs: RunRecords, recipe: str, policy: str, ref: ArtifactRef | None) -> dict[str, Any]:
    """The record of the run that made an artifact a recipe's current one; empty if there is none."""
    entry = {} if ref is None else ref.as_dict()
    found = (
        run
        for run in reversed(runs.all())
        if run["recipe"] == recipe and entry and entry.items() <= run["assets"].get(policy, {}).items()
    )
    return next(found, {})


def _require_free(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        found = "is not empty" if folder.is_dir() else "is a file"
        raise AlignmentError(f"{folder} {found}, expected a new or an empty folder. Name another one, or remove it.")


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside the place that is renamed into it, or removed if something goes wrong.

    Raises:
        StoreError: It cannot be written.
    """
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        atomic.sync_tree(staging)
        staging.replace(folder)
        atomic.sync_directory(folder.parent)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror or error}); nothing was exported.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
