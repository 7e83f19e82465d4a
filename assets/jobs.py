"""Named selections of a recipe's assets. The job that makes everything bears the recipe's name."""

from typing import Any, TypeAlias

import dagster as dg

from alignment_pipeline.graph import StageNode, build_graph
from alignment_pipeline.recipe import Recipe
from assets.stage_asset import RECIPE_TAG

AssetJob: TypeAlias = Any
"""What `dg.define_asset_job` returns; Dagster keeps the class private."""


def evaluation_job_name(recipe: Recipe) -> str:
    """Name of the job that the nightly schedule starts."""
    return f"{recipe.name}_evaluation"


def retraining_job_name(recipe: Recipe) -> str:
    """Name of the job that the feedback sensor requests."""
    return f"{recipe.name}_retraining"


def everything_job(recipe: Recipe) -> AssetJob:
    """All of a recipe's assets."""
    return _job(recipe, recipe.name, list(build_graph(recipe)), f"Everything of {recipe.name}: {recipe.description}")


def evaluation_job(recipe: Recipe) -> AssetJob:
    """The evaluations, the comparison and the decoding sweep, of the policies as they are."""
    stages = ("evaluation", "comparison", "decoding_sweep")
    names = [node.asset for node in build_graph(recipe).values() if node.stage in stages]
    return _job(recipe, evaluation_job_name(recipe), names, "Evaluate the current policies and compare them.")


def retraining_job(recipe: Recipe) -> AssetJob:
    """The human preferences and all that learns from them."""
    graph = build_graph(recipe)
    names = ["human_preferences", *_downstream(graph, "human_preferences")]
    return _job(recipe, retraining_job_name(recipe), names, "Take in people's votes and train what learns from them.")


def _job(recipe: Recipe, name: str, assets: list[str], description: str) -> AssetJob:
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*(dg.AssetKey([recipe.name, asset]) for asset in assets)),
        description=description,
        tags={RECIPE_TAG: recipe.name},
    )


def _downstream(graph: dict[str, StageNode], source: str) -> list[str]:
    """Assets that read `source`, directly or not; `graph` is in topological order."""
    reached = {source}
    for node in graph.values():
        if reached & set(node.inputs.values()):
            reached.add(node.asset)
    return [asset for asset in graph if asset in reached and asset != source]
