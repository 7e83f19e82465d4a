"""The asset graph of `smoke` as Dagster sees it. A change here is a change that people see in the web UI."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import Recipe
from app.definitions import build_definitions
from app.recipes import all_recipes, find_recipe
from assets.config_schema import launchpad_schema

# Asset: what it reads, and whether it takes a slot of the gpu pool.
GRAPH = {
    "instructions": ([], False),
    "base_model": (["instructions"], True),
    "formatted_dataset": (["base_model", "instructions"], False),
    "sft_model": (["base_model", "formatted_dataset"], True),
    "sampled_responses": (["formatted_dataset", "sft_model"], True),
    "preference_labels": (["formatted_dataset", "sampled_responses"], False),
    "human_preferences": (["formatted_dataset"], False),
    "preference_pairs": (["base_model", "human_preferences", "preference_labels"], False),
    "reward_model": (["preference_pairs", "sft_model"], True),
    "reference_logprobs": (["preference_pairs", "sft_model"], True),
    "dpo_policy": (["preference_pairs", "reference_logprobs", "sft_model"], True),
    "ppo_policy": (["formatted_dataset", "reward_model", "sft_model"], True),
    "base_evaluation": (["base_model", "formatted_dataset", "reward_model", "sft_model"], True),
    "sft_evaluation": (["formatted_dataset", "reward_model", "sft_model"], True),
    "ppo_evaluation": (["formatted_dataset", "ppo_policy", "reward_model", "sft_model"], True),
    "dpo_evaluation": (["dpo_policy", "formatted_dataset", "reward_model", "sft_model"], True),
    "comparison": (["base_evaluation", "dpo_evaluation", "ppo_evaluation", "sft_evaluation"], False),
    "decoding_sweep": (["formatted_dataset", "reward_model", "sft_model"], True),
}
RETRAINED = {
    "human_preferences", "preference_pairs", "reward_model", "reference_logprobs", "dpo_policy", "ppo_policy",
    "base_evaluation", "sft_evaluation", "ppo_evaluation", "dpo_evaluation", "comparison", "decoding_sweep",
}  # fmt: skip
EVALUATED = {
    "base_evaluation", "sft_evaluation", "ppo_evaluation", "dpo_evaluation", "comparison", "decoding_sweep"
}  # fmt: skip
KINDS = {
    "table": {"instructions", "formatted_dataset", "preference_labels", "human_preferences", "preference_pairs",
              "comparison", "sampled_responses", "reference_logprobs", *EVALUATED},
    "huggingface": {"base_model", "sft_model", "reward_model", "dpo_policy", "ppo_policy"},
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke() -> Recipe:
    return find_recipe("smoke")


@pytest.fixture(scope="module")
def definitions(smoke: Recipe) -> dg.Definitions:
    return build_definitions([smoke])


def name_of(key: dg.AssetKey) -> str:
    recipe, asset = key.path
    assert recipe == "smoke"
    return asset


def test_assets_and_what_they_read(definitions: dg.Definitions) -> None:
    read = {name_of(s.key): sorted(name_of(d.asset_key) for d in s.deps) for s in definitions.resolve_all_asset_specs()}
    assert read == {asset: reads for asset, (reads, _) in GRAPH.items()}


def test_how_assets_are_labelled(definitions: dg.Definitions, smoke: Recipe) -> None:
    nodes = build_graph(smoke)
    for spec in definitions.resolve_all_asset_specs():
        asset = name_of(spec.key)
        assert (spec.group_name, list(spec.owners)) == ("smoke", ["team:alignment"])
        assert spec.tags["alignment/stage"] == nodes[asset].stage
        assert {kind for kind, assets in KINDS.items() if asset in assets} <= spec.kinds
        assert spec.description and spec.description.endswith(".")


@pytest.mark.parametrize(
    ("override", "sections"),
    [
        ("dpo.beta=0.2", {"dpo"}),
        ("dpo.checkpoint_every_s=1", set()),
        ("evaluation.prompts=20", {"evaluation"}),
        ("description=another", set()),
        ("seed=1", {node.section for node in build_graph(find_recipe("smoke")).values()}),
    ],
)
def test_a_keyed_value_changes_the_code_version_of_its_assets_and_no_other(
    definitions: dg.Definitions, smoke: Recipe, override: str, sections: set[str]
) -> None:
    before, after = (
        {name_of(spec.key): spec.code_version for spec in each.resolve_all_asset_specs()}
        for each in (definitions, build_definitions([find_recipe("smoke", [override])]))
    )
    changed = {asset for asset in before if before[asset] != after[asset]}
    assert changed == {node.asset for node in build_graph(smoke).values() if node.section in sections}


def test_what_trains_or_generates_takes_a_slot_of_the_gpu_pool(definitions: dg.Definitions) -> None:
    pools = {
        asset: definitions.resolve_assets_def(dg.AssetKey(["smoke", asset])).op.pool == "gpu"
        for asset in GRAPH
    }  # fmt: skip
    assert pools == {asset: on_gpu for asset, (_, on_gpu) in GRAPH.items()}


def test_jobs_and_what_they_make(definitions: dg.Definitions) -> None:
    made = {
        job.name: {name_of(key) for key in job.asset_layer.executable_asset_keys}
        for job in definitions.resolve_all_job_defs()
        if not job.name.startswith("__")
    }
    assert made == {"smoke": set(GRAPH), "smoke_evaluation": EVALUATED, "smoke_retraining": RETRAINED}


def test_the_schedule_and_the_sensor_are_off_until_a_person_turns_them_on(definitions: dg.Definitions) -> None:
    schedule = definitions.resolve_schedule_def("smoke_nightly_evaluation")
    sensor = definitions.resolve_sensor_def("smoke_feedback")
    assert (schedule.job_name, schedule.cron_schedule) == ("smoke_evaluation", "0 3 * * *")
    assert sensor.job_name == "smoke_retraining"
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def test_a_recipe_without_an_evaluation_has_neither_its_job_nor_its_schedule() -> None:
    repository = build_definitions([find_recipe("reward_gpt2")]).get_repository_def()
    assert repository.schedule_defs == []
    jobs = {job.name for job in repository.get_all_jobs()}
    assert "reward_gpt2" in jobs and "reward_gpt2_evaluation" not in jobs


def test_a_recipe_without_feedback_has_no_sensor_and_no_retraining_job() -> None:
    recipe = find_recipe("smoke", ["feedback=null"])
    repository = build_definitions([recipe]).get_repository_def()
    assert list(repository.sensor_defs) == []
    assert "smoke_retraining" not in repository.job_names


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], {"counts_reconcile", "reward_classifier_beats_majority"}),
        (["reward_classifier.train_path=null", "reward_classifier.path=folder"], set()),
    ],
    ids=["trained", "given"],
)
def test_a_classifier_is_checked_for_what_only_a_trained_one_reports(overrides: list[str], names: set[str]) -> None:
    definitions = build_definitions([find_recipe("stories_sentiment", overrides)])
    graph = definitions.resolve_asset_graph()
    declared = {key for key in graph.asset_check_keys if key.asset_key.path[-1] == "reward_classifier"}
    assert {key.name for key in declared} == names
    assert {key.name for key in declared if graph.get_check_spec(key).blocking} == names & {"counts_reconcile"}


def sections() -> Iterator[Any]:
    for recipe in all_recipes():
        for node in build_graph(recipe).values():
            yield pytest.param(recipe, node, id=f"{recipe.name}-{node.asset}")


@pytest.mark.parametrize(("recipe", "node"), list(sections()))
def test_the_launchpad_shows_every_field_with_its_value_and_meaning(recipe: Recipe, node: Any) -> None:
    form = launchpad_schema(node.config, recipe.seed)
    shown = {name: field.default_value for name, field in form.items() if name != "seed"}
    assert type(node.config)(**shown) == node.config
    assert list(form) == ["seed", *type(node.config).model_fields]
    for name, field in type(node.config).model_fields.items():
        if not name.startswith("hub_"):
            assert form[name].default_value == getattr(node.config, name)
        assert form[name].description == field.description and field.description
        assert form[name].is_required is False
    assert form["seed"].default_value == recipe.seed


TYPES = {
    ("sft", "learning_rate"): (1e-3, "x"),
    ("sft", "batch_size"): (4, 4.5),
    ("sft", "max_steps"): (None, "x"),
    ("sft", "method"): ("full", 3),
    ("sft", "lora_targets"): (["q_proj", "v_proj"], object()),
    ("data", "path"): (None, 3),
    ("data", "columns"): ({"instruction": "prompt", "input": None}, {"instruction": 3}),
    ("data", "form"): ("preferences", None),
    ("evaluation", "judge"): ("reference_chrf", None),
    ("evaluation", "top_p"): (0.5, "x"),
    ("decoding", "temperatures"): ([0.0, 0.3], 0.3),
    ("decoding", "top_ks"): ([3], ["x"]),
    ("decoding", "policy"): ("dpo_policy", 3),
}


@pytest.mark.parametrize(("section", "name"), TYPES)
def test_the_launchpad_takes_the_fields_type_and_refuses_another(
    smoke: Recipe, definitions: dg.Definitions, section: str, name: str
) -> None:
    asset = next(node.asset for node in build_graph(smoke).values() if node.section == section)
    job = definitions.resolve_job_def("smoke")
    good, bad = TYPES[section, name]

    def set_to(value: Any) -> Any:
        checked = dg.validate_run_config(job, {"ops": {f"smoke__{asset}": {"config": {name: value}}}})
        return checked["ops"][f"smoke__{asset}"]["config"][name]

    assert set_to(good) == good
    if name != "lora_targets":  # text or a list: Dagster takes anything and the recipe's model decides
        with pytest.raises(dg.DagsterInvalidConfigError):
            set_to(bad)


def test_the_launchpads_defaults_are_the_recipe(smoke: Recipe, definitions: dg.Definitions) -> None:
    checked = dg.validate_run_config(definitions.resolve_job_def("smoke"), {})
    for node in build_graph(smoke).values():
        config = dict(checked["ops"][f"smoke__{node.asset}"]["config"])
        assert config.pop("seed") == smoke.seed
        assert type(node.config).model_validate(config) == node.config


def test_an_unknown_key_in_the_launchpad_is_refused(definitions: dg.Definitions) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="learning_rat"):
        dg.validate_run_config(
            definitions.resolve_job_def("smoke"), {"ops": {"smoke__sft_model": {"config": {"learning_rat": 1.0}}}}
        )


def test_the_checks_are_those_that_the_stages_really_report(smoke_home: Path, definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    declared = {
        (name_of(key.asset_key), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    }
    (record,) = (smoke_home / "runs").glob("*.json")
    reported = set()
    for asset, ref in json.loads(record.read_text())["assets"].items():
        folder = smoke_home / "artifacts" / ref["stage"] / ref["key"][:20] / ref["data_version"][:20]
        for check in json.loads((folder / "manifest.json").read_text())["checks"]:
            reported.add((asset, check["name"], check["blocking"]))
    assert declared == reported
    assert {asset for asset, _, _ in declared} >= {"instructions", "sampled_responses", "comparison"}
