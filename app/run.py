"""Executes one run of a recipe on Dagster, in this process or a process a step, with the live display."""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import sqlalchemy.exc
from rich.console import Console

from alignment_pipeline.errors import RecipeError, StoreError
from alignment_pipeline.recipe import Recipe
from app.definitions import EXECUTOR_VARIABLE, build_definitions
from app.live import LiveRun
from app.recipes import select_assets
from assets.stage_asset import OVERRIDES_TAG, RECIPE_TAG, RECORD_TAG, STARTED_BY_TAG
from resources.artifact_store import ArtifactStore
from resources.dagster_resources import require_executor, tracker_of
from resources.home import alignment_home, prepare_home, use_dagster_instance
from resources.leakage import with_leak_check
from resources.runs import FAILED, INTERRUPTED, RunRecords
from resources.tracking import Tracking

_TRACKING_WAIT_S = 10.0


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended, and what it was to make."""

    run_id: str
    exit_code: int
    assets: tuple[str, ...]


def execute_run(
    console: Console, recipe: Recipe, select: list[str], overrides: list[str], *, verbose: bool
) -> RunOutcome:
    """Make the selected assets of a recipe (all of them if none is named), and say how it went.

    Raises:
        AlignmentError: The recipe, the selection or the home cannot be used.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(
            f"Found WORLD_SIZE={os.environ['WORLD_SIZE']}, as torchrun sets it; `align` starts one process. "
            "Call alignment_pipeline.stages.ppo_policy.train_ppo under torchrun instead."
        )
    home = prepare_home(alignment_home())
    use_dagster_instance(home)
    assets = select_assets(recipe, select)
    require_executor(os.environ.get(EXECUTOR_VARIABLE, "in_process"))
    _tracker(home)
    run_id = str(uuid.uuid4())
    runs = RunRecords(home)
    runs.start(run_id, recipe.name, "align", assets, overrides)
    log = home / "runs" / f"{run_id}.log"
    started = time.monotonic()
    console.print(f"Run {run_id[:8]} of {recipe.name}: {len(assets)} assets in {home}", highlight=False)
    try:
        with _logs_to(log, verbose) as terminal, LiveRun(terminal, runs.events_path(run_id), list(assets)) as live:
            success = _execute(recipe, assets, run_id, overrides)
        interrupted = runs.read(run_id)["status"] == INTERRUPTED  # Dagster reports it as a failed step
    except sqlalchemy.exc.OperationalError as failure:
        with contextlib.suppress(OSError):
            runs.finish(run_id, FAILED)
        raise StoreError(
            f"Dagster's records in {home / 'dagster'} cannot be written ({failure.orig}). If the disk is full, free "
            "some space or set ALIGNMENT_HOME to another disk; then run again. Artifacts and checkpoints are as before."
        ) from failure
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        interrupted = True
    if interrupted:
        runs.finish(run_id, INTERRUPTED)
        console.print("Stopped. Run the same command again: it goes on from the last checkpoint.")
        return RunOutcome(run_id, 130, assets)
    _close_tracking(console, home)
    if not success:
        runs.finish(run_id, FAILED)
        blocked = list(_failed_blocking_checks(home, runs, run_id))
        for message in blocked:
            console.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
        if not live.errors and not blocked:
            console.print("Error: a defect of ours, not yours; the log has its traceback.", style="red")
        for asset, error in live.errors.items():
            console.print(f"Error in {asset}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(f"Log: {log}", style="dim", highlight=False, soft_wrap=True)
        return RunOutcome(run_id, 1, assets)
    seconds = time.monotonic() - started
    console.print(f"Done in {seconds:.0f} s: {live.reused} of {len(assets)} assets reused.", highlight=False)
    return RunOutcome(run_id, 0, assets)


def _failed_blocking_checks(home: Path, runs: RunRecords, run_id: str) -> Iterator[str]:
    """Why what is downstream of a run's assets was not made, one sentence a check."""
    store = ArtifactStore(home)
    for asset, ref in runs.of_run(run_id).items():
        for check in with_leak_check(store, ref)["checks"]:
            if check["blocking"] and not check["passed"]:
                yield f"Error in {asset}: {check['name']} does not hold, nothing downstream was made: {check['detail']}"


def _execute(recipe: Recipe, assets: tuple[str, ...], run_id: str, overrides: list[str]) -> bool:
    tags = {RECIPE_TAG: recipe.name, STARTED_BY_TAG: "align"}
    if overrides:
        tags[OVERRIDES_TAG] = "\n".join(overrides)
    selection = [dg.AssetKey([recipe.name, asset]) for asset in assets]
    with dg.DagsterInstance.get() as instance:
        if os.environ.get(EXECUTOR_VARIABLE, "in_process") == "multiprocess":
            job = dg.build_reconstructable_job(
                "app.definitions", "recipe_job", reconstructable_kwargs={"name": recipe.name, "overrides": overrides}
            )
            tags[RECORD_TAG] = run_id  # execute_job takes no id
            with dg.execute_job(job, instance, tags=tags, asset_selection=selection, raise_on_error=False) as result:
                return result.success
        job_definition = build_definitions([recipe]).resolve_job_def(recipe.name)
        return job_definition.execute_in_process(
            instance=instance, tags=tags, asset_selection=selection, run_id=run_id, raise_on_error=False
        ).success


@contextlib.contextmanager
def _logs_to(path: Path, verbose: bool) -> Iterator[Console]:
    """Send everything that libraries print to a file, and give a console that still writes to the terminal."""
    if verbose:
        yield Console()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    terminal = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8")
    try:
        yield Console(file=terminal)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, log):
            os.close(descriptor)
        terminal.close()


def _close_tracking(console: Console, home: Path) -> None:
    """Give W&B's worker a little time; it goes on by itself if it needs more."""
    remark = _tracker(home).close(_TRACKING_WAIT_S)
    if remark:
        console.print(remark, style="dim", highlight=False, soft_wrap=True)


def _tracker(home: Path) -> Tracking:
    """The tracker that the run's stages use; an unknown WANDB_MODE is refused here, before anything starts."""
    return tracker_of(home, os.environ.get("WANDB_PROJECT", "alignment-pipeline"))
