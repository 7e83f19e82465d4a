"""Dagster's staleness, as the web UI asks for it, beside `align run --dry-run`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from alignment_pipeline.recipe import load_recipe
from app.definitions import build_definitions
from app.recipes import find_recipe
from resources.forecast import forecast
from resources.home import REPOSITORY
from resources.runs import RunRecords

QUERY = "{ assetNodes { assetKey { path } staleStatus staleCauses { category key { path } } } }"
OF_DPO = {"dpo_policy", "dpo_evaluation", "comparison"}


def staleness(environment: Mapping[str, str]) -> dict[str, tuple[str, set[tuple[str, str]]]]:
    """Asset of `smoke` → its status, and the causes with the assets where they lie."""
    program = Path(sys.executable).parent / "dagster-graphql"
    done = subprocess.run(
        [program, "-m", "app.definitions", "-t", QUERY], env=environment, capture_output=True, text=True, timeout=120,
        cwd=environment["ALIGNMENT_HOME"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer, _ = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))
    return {
        node["assetKey"]["path"][1]: (
            node["staleStatus"], {(cause["key"]["path"][1], cause["category"]) for cause in node["staleCauses"]},
        )
        for node in answer["data"]["assetNodes"]
    }  # fmt: skip


def with_own_cause(found: Mapping[str, tuple[str, set[tuple[str, str]]]]) -> set[str]:
    return {asset for asset, (status, causes) in found.items() if status == "STALE" and (asset, "CODE") in causes}


def test_an_asset_is_stale_where_a_dry_run_would_compute_it(
    smoke_home: Path, tmp_path: Path, align: Callable[..., Any], environment: Callable[..., dict[str, str]]
) -> None:
    home, recipes = tmp_path / "home", tmp_path / "recipes"
    shutil.copytree(smoke_home, home, symlinks=True)
    recipes.mkdir()
    recipe_file = recipes / "smoke.yaml"
    shutil.copyfile(REPOSITORY / "recipes" / "smoke.yaml", recipe_file)
    original = recipe_file.read_text()
    of_recipes = {"ALIGNMENT_RECIPES": str(recipes), "WANDB_MODE": "disabled"}
    dagster = environment(ALIGNMENT_HOME=str(home), DAGSTER_HOME=str(home / "dagster"), **of_recipes)

    def verdicts() -> dict[str, Any]:
        recipe = load_recipe(recipe_file)
        assets = RunRecords(home).current("smoke")
        return {verdict.asset: verdict for verdict in forecast(home, recipe, list(assets))}

    fresh = staleness(dagster)
    assert {status for status, _ in fresh.values()} == {"FRESH"} and len(fresh) == 18

    assert "beta: 0.1" in original
    recipe_file.write_text(original.replace("beta: 0.1", "beta: 0.2"))
    to_compute = {asset for asset, verdict in verdicts().items() if verdict.kind == "compute"}
    assert with_own_cause(staleness(dagster)) == to_compute == {"dpo_policy"}
    done = align(home, "run", "smoke", env=of_recipes)
    assert done.returncode == 0 and "15 of 18 assets reused" in done.stdout, done.stdout
    assert {status for status, _ in staleness(dagster).values()} == {"FRESH"}

    recipe_file.write_text(original)
    reverted = verdicts()
    assert {verdict.kind for verdict in reverted.values()} == {"reuse"}
    assert {asset for asset, verdict in reverted.items() if verdict.reasons} == OF_DPO
    own = {asset for asset, verdict in reverted.items() if any(each.startswith("dpo.") for each in verdict.reasons)}
    assert with_own_cause(staleness(dagster)) == own == {"dpo_policy"}


def test_what_the_launchpad_changed_is_recorded_as_the_version_that_ran(tmp_path: Path) -> None:
    key = dg.AssetKey(["smoke", "instructions"])
    recipe, other = find_recipe("smoke"), find_recipe("smoke", ["data.max_chars=1500", "seed=4"])
    defined, changed = (
        build_definitions([each]).resolve_assets_def(key).code_versions_by_key[key] for each in (recipe, other)
    )
    assert defined != changed
    job = build_definitions([recipe]).resolve_job_def("smoke")
    with dg.DagsterInstance.ephemeral() as instance:
        for config, version in (({}, defined), ({"max_chars": 1500, "seed": 4}, changed), ({}, defined)):
            ops = {"smoke__instructions": {"config": config}}
            assert job.execute_in_process({"ops": ops}, instance=instance, asset_selection=[key]).success
            event = instance.get_latest_materialization_event(key)
            assert event is not None and event.asset_materialization is not None
            tags = event.asset_materialization.tags
            assert tags is not None and tags["dagster/code_version"] == version
