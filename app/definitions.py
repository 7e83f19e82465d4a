"""The Dagster code location: one graph, its jobs, schedule and sensor for every recipe. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from alignment_pipeline.recipe import Recipe
from app.recipes import all_recipes, find_recipe
from assets.automation import feedback_sensor, nightly_evaluation
from assets.jobs import evaluation_job, everything_job, retraining_job
from assets.stages import recipe_assets
from resources.dagster_resources import default_resources, require_executor
from resources.home import alignment_home, use_dagster_instance

EXECUTOR_VARIABLE = "ALIGNMENT_EXECUTOR"


def build_definitions(recipes: Sequence[Recipe], resources: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Definitions for some recipes; `resources` replace the default ones by name."""
    with_evaluation = [recipe for recipe in recipes if recipe.evaluation]
    with_feedback = [recipe for recipe in recipes if recipe.feedback]
    return dg.Definitions(
        assets=[asset for recipe in recipes for asset in recipe_assets(recipe)],
        jobs=[
            *(everything_job(recipe) for recipe in recipes),
            *(evaluation_job(recipe) for recipe in with_evaluation),
            *(retraining_job(recipe) for recipe in with_feedback),
        ],
        schedules=[nightly_evaluation(recipe) for recipe in with_evaluation],
        sensors=[feedback_sensor(recipe) for recipe in with_feedback],
        resources={**default_resources(), **(resources or {})},
        executor=_executor(),
    )


def recipe_job(name: str, overrides: list[str]) -> dg.JobDefinition:
    """The job that makes everything of one recipe; step processes rebuild it from these arguments."""
    return build_definitions([find_recipe(name, overrides)]).resolve_job_def(name)


def _executor() -> dg.ExecutorDefinition:
    """One process for the run, or, with ALIGNMENT_EXECUTOR=multiprocess, a process a step."""
    if require_executor(os.environ.get(EXECUTOR_VARIABLE, "in_process")) == "in_process":
        return dg.in_process_executor
    forkserver = {"forkserver": {"preload_modules": ["app.preload"]}}
    return dg.multiprocess_executor.configured({"max_concurrent": os.cpu_count() or 1, "start_method": forkserver})


@dg.definitions
def defs() -> dg.Definitions:
    """All recipes of the recipes folder."""
    use_dagster_instance(alignment_home())
    return build_definitions(all_recipes())
