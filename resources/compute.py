"""Compute: runs one stage for one asset. Key → lease → reuse or compute → publish → record → index.

The same code path serves a run in one process, a process a step, and the web UI.
"""

import contextlib
import errno
import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment_pipeline.configs import StageConfig
from alignment_pipeline.errors import AlignmentError, DataError, StoreError
from alignment_pipeline.graph import StageNode
from alignment_pipeline.identity import EXTRAS, MANIFEST
from alignment_pipeline.plots import training_curves
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageResult, StageSpec, stage_function
from resources import leases
from resources.artifact_store import ArtifactRef, ArtifactStore, lease_name
from resources.feedback import FeedbackInbox
from resources.home import REPOSITORY
from resources.leakage import EVALUATING, leak_check, with_leak_check
from resources.lineage.index import Lineage
from resources.plan import Plan, content_sha256, make_plan, read_files
from resources.runs import FAILED, INTERRUPTED, RunRecords
from resources.tracking import Tracking

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "dagster", "duckdb")
_TRACKED_STAGES = frozenset({"base_model", "sft_model", "reward_model", "reward_classifier", "dpo_policy", "ppo_policy",
                              "evaluation", "decoding_sweep"})  # fmt: skip
_TRACKING_FOLDER_WAIT_S = 2.0  # the first run of a process opens once wandb is imported
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Request:
    """One asset to be made in one run."""

    run_id: str
    recipe: str
    node: StageNode
    config: StageConfig
    seed: int
    files: Mapping[str, Path]

    @property
    def asset_id(self) -> str:
        """`recipe/asset`, as in the web UI."""
        return f"{self.recipe}/{self.node.asset}"


@dataclass(frozen=True)
class Outcome:
    """An asset that exists: where it is, whether it was there before, and if not, why it was computed."""

    ref: ArtifactRef
    folder: Path
    manifest: Mapping[str, Any]
    reused: bool
    reasons: tuple[str, ...]


class Compute:
    """Makes assets of a home folder, on one device."""

    def __init__(self, home: Path, tracking: Tracking, device: str = "cpu", lineage: Lineage | None = None) -> None:
        self.home = home
        self.store = ArtifactStore(home)
        self.runs = RunRecords(home)
        self.lineage = lineage or Lineage(home)
        self.tracking = tracking
        self.device = device

    def materialize(self, request: Request) -> Outcome:
        """Make an asset, or find that it exists already.

        Raises:
            AlignmentError: Something a user can act on; the run's events name it.
        """
        node = request.node
        self.runs.event(request.run_id, "started", asset=node.asset)
        started = time.monotonic()
        try:
            outcome, ended = self._make(request)
        except BaseException as error:
            problem = _as_user_error(error)
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                text = str(problem or ": ".join(filter(None, [type(error).__name__, *str(error).splitlines()[:1]])))
                self.runs.event(request.run_id, "failed", asset=node.asset, error=text)
                self.runs.finish(request.run_id, FAILED if isinstance(error, Exception) else INTERRUPTED)
                self.lineage.try_sync()
            if problem is not None and problem is not error:
                raise problem from error
            raise
        warning = self._index(request, outcome, ended)
        if warning:
            self.runs.event(request.run_id, "note", asset=node.asset, text=warning)
        self.runs.event(
            request.run_id, "finished", asset=node.asset, reused=outcome.reused, reasons=list(outcome.reasons),
            seconds=time.monotonic() - started, metrics=dict(outcome.manifest["metrics"]),
        )  # fmt: skip
        return outcome

    def _index(self, request: Request, outcome: Outcome, ended: bool) -> str | None:
        """Bring the index up to what was made; everything once the run has ended. Returns what went wrong."""
        if ended:
            return self.lineage.try_sync()
        manifest = f"artifacts/{outcome.ref.artifact_id}/{MANIFEST}"
        return None if outcome.reused else self.lineage.try_sync(only=[manifest, f"runs/{request.run_id}.json"])

    def take_in_feedback(self, recipe: str) -> Path:
        """Take in a recipe's waiting votes; returns the journal of all of them."""
        return FeedbackInbox(self.home, recipe).take_in()

    def tracking_link(self, node: StageNode, outcome: Outcome) -> str | Path | None:
        """Address, or local folder, of the W&B run that belongs to an artifact, if there is one."""
        if node.stage not in _TRACKED_STAGES:
            return None
        return self.tracking.link(
            _tracking_id(node, outcome.ref.key), 0.0 if outcome.reused else _TRACKING_FOLDER_WAIT_S
        )

    def _make(self, request: Request) -> tuple[Outcome, bool]:
        """Find or compute an artifact and record it; also whether that ended the run."""
        while True:
            outcome = self._find_or_compute(request)
            usable = all(check["passed"] or not check["blocking"] for check in outcome.manifest["checks"])
            ended = self.runs.record_asset(
                request.run_id, request.recipe, request.node.asset, outcome.ref, reused=outcome.reused, usable=usable
            )
            # Garbage collection keeps what is recorded; what it took away before that is computed anew.
            if self.store.is_whole(outcome.ref):
                return outcome, ended

    def _find_or_compute(self, request: Request) -> Outcome:
        node = replace(request.node, config=request.config)
        parents = self.runs.resolve(request.run_id, request.recipe, list(node.inputs.values()))
        previous = self.runs.current(request.recipe).get(node.asset)
        plan = make_plan(self.store, node, request.seed, parents, read_files(node, request.files), previous)
        if plan.found:
            return self._reuse(plan.found)
        with leases.hold(
            self.home,
            lease_name(node.stage, plan.key),
            on_wait=lambda text: self.runs.event(request.run_id, "note", asset=node.asset, text=text),
        ) as lease:
            if found := self.store.find(node.stage, plan.key):
                return self._reuse(found)
            ref = self._compute(request, plan, lease)
        return Outcome(ref, self.store.path(ref), with_leak_check(self.store, ref), False, plan.reasons)

    def _reuse(self, ref: ArtifactRef) -> Outcome:
        return Outcome(ref, self.store.path(ref), with_leak_check(self.store, ref), True, ())

    def _compute(self, request: Request, plan: Plan, lease: leases.Lease) -> ArtifactRef:
        stage = request.node.stage
        work = self.home / "work" / plan.key[:20]
        work.mkdir(parents=True, exist_ok=True)
        staging = self.store.new_staging()
        log = ProgressLog(work / "progress.jsonl")
        parents = [ref.as_dict() for ref in plan.inputs.values()]
        self.runs.event(request.run_id, "computing", asset=request.node.asset, log=str(log.path), inputs=parents)
        tracked = self._follow(request, plan, log)
        started = time.monotonic()
        exit_code = 1
        result = StageResult()
        try:
            folders = {name: self.store.verify(ref) for name, ref in plan.inputs.items()} | dict(request.files)
            spec = StageSpec(request.config, folders, staging, work, request.seed, self.device)
            result = stage_function(stage)(spec, log)
            if stage in EVALUATING:
                result = replace(result, checks=(*result.checks, leak_check(self.store, plan.inputs, staging)))
            log.close()
            (staging / EXTRAS).mkdir(exist_ok=True)
            training_curves(staging / EXTRAS / "curves.png", log.path)
            shutil.copyfile(log.path, staging / EXTRAS / "progress.jsonl")
            for name, path in request.files.items():
                if content_sha256(request.node, name, path) != plan.description["inputs"][name]["sha256"]:
                    raise DataError(f"{path} was changed while it was read; nothing was published. Run again.")
            lease.require()
            report = _report(result, time.monotonic() - started, self.device)
            ref = self.store.publish(staging, stage, plan.key, {**plan.description, **report})
            exit_code = 0
        finally:
            log.close()
            shutil.rmtree(staging, ignore_errors=True)
            if tracked:
                self.tracking.finish(tracked, exit_code, log.path, dict(result.metrics))
            _free_device(self.device)
        shutil.rmtree(work)
        return ref

    def _follow(self, request: Request, plan: Plan, log: ProgressLog) -> str | None:
        """Start a W&B run for stages that train or evaluate. Its id follows from the key: a resumed stage goes on."""
        node = request.node
        if node.stage not in _TRACKED_STAGES:
            return None
        tracking_id = _tracking_id(node, plan.key)
        self.tracking.follow(
            run_id=tracking_id,
            name=f"{request.recipe}/{node.asset}",
            group=request.run_id,
            job_type=node.stage,
            tags=[request.recipe],
            config={
                "recipe": request.recipe, "asset": node.asset, "key": plan.key, "dagster_run_id": request.run_id,
                "seed": request.seed, "code_version": plan.description["code_version"], **plan.description["config"],
            },
            log=log.path,
        )  # fmt: skip
        return tracking_id


def _tracking_id(node: StageNode, key: str) -> str:
    """A W&B run's id follows from the key, so that a resumed stage goes on in its run."""
    return f"{node.asset}-{key[:16]}"


def _report(result: StageResult, wall_s: float, device: str) -> dict[str, Any]:
    """The part of a manifest that says how it went; none of it is part of an identity."""
    return {
        "metrics": dict(result.metrics),
        "checks": [vars(check) for check in result.checks],
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "timings": {"wall_s": round(wall_s, 3)},
        "environment": {
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": _named(device),
            "cpu_count": os.cpu_count(),
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


def _free_device(device: str) -> None:
    """Give back what a stage's models hold on a GPU: trainers are cycles, which Python collects when it likes."""
    torch = sys.modules.get("torch")  # a stage that did not import it has nothing there
    if torch is not None and device.startswith("cuda"):
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that failed the stage fails here again
            torch.cuda.empty_cache()


def _named(device: str) -> str:
    """The device, of a GPU with its make and torch's CUDA version: `cuda:0 (NVIDIA H100 80GB HBM3, CUDA 13.0)`."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return device  # the stage did not use it
    return f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"


def _git_commit() -> str | None:
    """Commit of the checkout, with `+` for uncommitted changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _as_user_error(error: BaseException) -> AlignmentError | None:
    """The error as something a user can act on, or None if it is a defect (or an interruption)."""
    if isinstance(error, AlignmentError):
        return error
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        full = isinstance(link, OSError) and link.errno in _FULL_DISK
        # safetensors and torch report a failed write in their own error classes, by its text.
        if full or any(text in str(link) for text in ("No space left on device", "File too large", "os error 28")):
            return StoreError(
                f"The disk is full ({str(link).splitlines()[0]}). Nothing was published; checkpoints and earlier "
                "results are as they were. Free some space, or set ALIGNMENT_HOME to another disk, and run again."
            )
    if isinstance(error, PermissionError):
        return StoreError(f"{error.filename} cannot be used ({error.strerror}); check its permissions.")
    return None
