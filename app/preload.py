"""Imported once by the forkserver of the multiprocess executor, so that each step's process starts warm.

The storages below are private to Dagster and imported late by it (1.5 s a process); where a version has moved one, the
step imports it itself and only that time is lost.
"""

import contextlib
import importlib

import app.definitions

__all__ = ["app"]

for _name in (
    "sqlalchemy",
    "alembic.config",
    "alembic.script",
    "dagster._core.executor.multiprocess",
    "dagster._core.storage.sqlite_storage",
    "dagster._core.storage.local_compute_log_manager",
    "dagster._core.storage.event_log.sqlite",
    "dagster._core.storage.runs.sqlite",
    "dagster._core.storage.schedules.sqlite",
    "dagster._core.run_coordinator",
    "dagster._core.launcher.default_run_launcher",
    "torch",
    "transformers",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
