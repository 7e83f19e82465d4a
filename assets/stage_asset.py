"""Turns a node of a recipe's graph into a Dagster asset. What is special to a stage is in the file named for it.

An asset's Dagster code version stands for the stage's code, the keyed configuration and the seed; its inputs' data
versions Dagster compares itself. So the web UI shows an asset as stale where `align run --dry-run` would compute it, or
go back to an earlier artifact. Dagster sees neither input files (`data.path`, the feedback journal) nor files that are
gone from the store: those only the dry run knows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg

from alignment_pipeline.code_version import stage_code_version
from alignment_pipeline.configs import StageConfig
from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.graph import StageNode
from alignment_pipeline.recipe import Recipe, validate_recipe
from assets.checks import check_specs
from assets.config_schema import launchpad_schema
from assets.presentation import asset_metadata
from resources.compute import Compute, Outcome, Request
from resources.dagster_resources import ComputeResource
from resources.plan import settings_version

GPU_POOL = "gpu"
OWNER = "team:alignment"
RECIPE_TAG = "alignment/recipe"
STARTED_BY_TAG = "alignment/started_by"
OVERRIDES_TAG = "alignment/overrides"
CODE_VERSION_TAG = "dagster/code_version"  # Dagster's own, of a materialization
RECORD_TAG = "alignment/run_record"  # whose run record this is, where Dagster chose another id for the run


def stage_asset(
    recipe: Recipe,
    node: StageNode,
    *,
    description: str,
    kinds: set[str],
    tables: Sequence[str] = (),
    on_gpu: bool = False,
    takes_in_feedback: bool = False,
) -> dg.AssetsDefinition:
    """An asset that makes a stage's artifact.

    Args:
        recipe: The recipe that the node belongs to.
        node: What to compute, and from what.
        description: One sentence on what the thing is and who uses it.
        kinds: Labels on the asset in the web UI.
        tables: Tables of the artifact whose first rows are shown.
        on_gpu: Whether the step takes a slot of the `gpu` pool.
        takes_in_feedback: Whether the recipe's inbox is taken in first.
    """

    @dg.asset(
        key=[recipe.name, node.asset],
        deps=[dg.AssetKey([recipe.name, source]) for source in node.inputs.values()],
        description=description,
        group_name=recipe.name,
        kinds=kinds,
        owners=[OWNER],
        tags={"alignment/stage": node.stage},
        code_version=settings_version(stage_code_version(node.stage), node.config.keyed_values(), recipe.seed),
        check_specs=check_specs(recipe, node),
        config_schema=launchpad_schema(node.config, recipe.seed),
        pool=GPU_POOL if on_gpu else None,
    )
    def materialize(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:  # type: ignore[type-arg]  # Dagster compares it
        try:
            engine = compute.engine()
            outcome = _materialize(context, engine, recipe, node, takes_in_feedback)
        except AlignmentError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error
        made = outcome.manifest
        version = settings_version(made["code_version"], made["config"], made["seed"])
        return dg.MaterializeResult(
            data_version=dg.DataVersion(outcome.ref.data_version),
            tags={CODE_VERSION_TAG: version},  # the launchpad may have changed what the definition says
            metadata=asset_metadata(outcome, recipe.name, node, tables, engine.tracking_link(node, outcome)),
            check_results=[
                dg.AssetCheckResult(
                    check_name=check["name"],
                    passed=check["passed"],
                    severity=dg.AssetCheckSeverity.ERROR if check["blocking"] else dg.AssetCheckSeverity.WARN,
                    description=check["detail"],
                )
                for check in made["checks"]
            ],
        )

    return materialize


def _materialize(
    context: dg.AssetExecutionContext, engine: Compute, recipe: Recipe, node: StageNode, takes_in_feedback: bool
) -> Outcome:
    run = context.run
    config, seed = _configured(recipe, node, context.op_execution_context.op_config)
    record = run.run_id if run.parent_run_id else run.tags.get(RECORD_TAG, run.run_id)  # a re-execution copies tags
    selected = run.asset_selection or context.job_def.asset_layer.executable_asset_keys
    if len({key.path[0] for key in selected}) > 1:
        record = f"{record}-{recipe.name}"  # a run over several recipes has a record for each
    engine.runs.start(
        record,
        recipe.name,
        started_by=_starter(run.tags),
        planned=[key.path[-1] for key in selected if key.path[0] == recipe.name],
        overrides=[line for line in run.tags.get(OVERRIDES_TAG, "").split("\n") if line],
    )
    files: Mapping[str, Path] = config.input_files()
    if takes_in_feedback:
        files = {**files, "journal": engine.take_in_feedback(recipe.name)}
    outcome = engine.materialize(Request(record, recipe.name, node, config, seed, files))
    context.log.info("%s %s %s", node.asset, "reused" if outcome.reused else "computed", outcome.folder)
    return outcome


def _configured(recipe: Recipe, node: StageNode, values: Mapping[str, object]) -> tuple[StageConfig, int]:
    """The section as the launchpad set it, checked together with the rest of the recipe."""
    section = {name: value for name, value in values.items() if name != "seed"}
    raw = recipe.model_dump() | {node.section: section, "seed": values["seed"]}
    checked = validate_recipe(raw, source=f"run config of {recipe.name}/{node.asset}")
    config: StageConfig = getattr(checked, node.section)
    return config, checked.seed


def _starter(tags: Mapping[str, str]) -> str:
    for tag, what in (("dagster/schedule_name", "schedule"), ("dagster/sensor_name", "sensor")):
        if tag in tags:
            return f"{what} {tags[tag]}"
    return tags.get(STARTED_BY_TAG, "dagster")
