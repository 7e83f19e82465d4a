from pathlib import Path

import pytest

from alignment_pipeline.graph import build_graph, evaluation_asset, trunk_asset
from alignment_pipeline.recipe import load_recipe
from alignment_pipeline.stage import STAGE_FUNCTIONS, stage_function

RECIPES = Path(__file__).parents[2] / "recipes"

# Asset → (stage, recipe section, {input name: asset it reads}), in the order in which the graph is built.
SMOKE = {
    "instructions": ("instructions", "data", {}),
    "base_model": ("base_model", "base_model", {"instructions": "instructions"}),
    "formatted_dataset": (
        "formatted_dataset", "formatting", {"instructions": "instructions", "tokenizer": "base_model"},
    ),
    "sft_model": ("sft_model", "sft", {"dataset": "formatted_dataset", "base_model": "base_model"}),
    "sampled_responses": (
        "sampled_responses", "sampling", {"dataset": "formatted_dataset", "policy": "sft_model"},
    ),
    "preference_labels": (
        "preference_labels", "labelling", {"samples": "sampled_responses", "dataset": "formatted_dataset"},
    ),
    "human_preferences": ("human_preferences", "feedback", {"dataset": "formatted_dataset"}),
    "preference_pairs": (
        "preference_pairs", "pairs",
        {"labels": "preference_labels", "human": "human_preferences", "tokenizer": "base_model"},
    ),
    "reward_model": ("reward_model", "reward_model", {"pairs": "preference_pairs", "trunk": "sft_model"}),
    "reference_logprobs": (
        "reference_logprobs", "reference_logprobs", {"pairs": "preference_pairs", "trunk": "sft_model"},
    ),
    "dpo_policy": (
        "dpo_policy", "dpo",
        {"pairs": "preference_pairs", "reference_logprobs": "reference_logprobs", "trunk": "sft_model"},
    ),
    "ppo_policy": (
        "ppo_policy", "ppo", {"dataset": "formatted_dataset", "trunk": "sft_model", "reward_model": "reward_model"},
    ),
    "base_evaluation": (
        "evaluation", "evaluation",
        {"dataset": "formatted_dataset", "policy": "base_model", "trunk": "sft_model",
         "reward_model": "reward_model"},
    ),
    "sft_evaluation": (
        "evaluation", "evaluation",
        {"dataset": "formatted_dataset", "policy": "sft_model", "trunk": "sft_model", "reward_model": "reward_model"},
    ),
    "ppo_evaluation": (
        "evaluation", "evaluation",
        {"dataset": "formatted_dataset", "policy": "ppo_policy", "trunk": "sft_model",
         "reward_model": "reward_model"},
    ),
    "dpo_evaluation": (
        "evaluation", "evaluation",
        {"dataset": "formatted_dataset", "policy": "dpo_policy", "trunk": "sft_model",
         "reward_model": "reward_model"},
    ),
    "comparison": (
        "comparison", "evaluation",
        {"base_model": "base_evaluation", "sft_model": "sft_evaluation", "ppo_policy": "ppo_evaluation",
         "dpo_policy": "dpo_evaluation"},
    ),
    "decoding_sweep": (
        "decoding_sweep", "decoding",
        {"dataset": "formatted_dataset", "policy": "sft_model", "trunk": "sft_model", "reward_model": "reward_model"},
    ),
}  # fmt: skip


def graph_of(*overrides: str) -> dict[str, tuple[str, str, dict[str, str]]]:
    nodes = build_graph(load_recipe(RECIPES / "smoke.yaml", overrides))
    assert list(nodes) == [node.asset for node in nodes.values()]
    return {asset: (node.stage, node.section, dict(node.inputs)) for asset, node in nodes.items()}


def test_the_smoke_recipe_has_exactly_these_assets_and_inputs() -> None:
    assert graph_of() == SMOKE
    assert list(graph_of()) == list(SMOKE)


def test_without_sft_the_base_model_is_the_trunk_of_everything() -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml", ["sft=null"])
    graph = graph_of("sft=null")
    assert trunk_asset(recipe) == "base_model"
    assert set(SMOKE) - set(graph) == {"sft_model", "sft_evaluation"}
    trunks = {inputs["trunk"] for _, _, inputs in graph.values() if "trunk" in inputs}
    assert trunks | {graph["sampled_responses"][2]["policy"]} == {"base_model"}
    assert list(graph["comparison"][2]) == ["base_model", "ppo_policy", "dpo_policy"]


def test_without_a_reward_model_nothing_is_scored_by_one() -> None:
    graph = graph_of("reward_model=null", "ppo=null")
    assert set(SMOKE) - set(graph) == {"reward_model", "ppo_policy", "ppo_evaluation"}
    assert not any("reward_model" in inputs for _, _, inputs in graph.values())


def test_a_reward_model_that_starts_from_another_model_does_not_read_the_trunk() -> None:
    graph = graph_of("reward_model.path=m")
    assert {asset for asset in SMOKE if graph[asset] != SMOKE[asset]} == {"reward_model"}
    assert graph["reward_model"][2] == {"pairs": "preference_pairs"}


def test_a_reward_classifier_reads_nothing_and_stands_where_a_reward_model_would() -> None:
    graph = graph_of("reward_model=null", "reward_classifier={label: A, path: m}")
    assert set(graph) ^ set(SMOKE) == {"reward_classifier", "reward_model"}
    assert graph["reward_classifier"] == ("reward_classifier", "reward_classifier", {})
    for asset in ("ppo_policy", "base_evaluation", "sft_evaluation", "ppo_evaluation", "dpo_evaluation"):
        _, _, inputs = graph[asset]
        assert inputs["reward_classifier"] == "reward_classifier" and "reward_model" not in inputs


def test_the_sentiment_recipe_trains_the_base_model_itself() -> None:
    nodes = build_graph(load_recipe(RECIPES / "stories_sentiment.yaml"))
    assert {asset: dict(node.inputs) for asset, node in nodes.items()} == {
        "instructions": {},
        "base_model": {},
        "formatted_dataset": {"instructions": "instructions", "tokenizer": "base_model"},
        "reward_classifier": {},
        "ppo_policy": {
            "dataset": "formatted_dataset", "trunk": "base_model", "reward_classifier": "reward_classifier",
        },
        "base_evaluation": {
            "dataset": "formatted_dataset", "policy": "base_model", "trunk": "base_model",
            "reward_classifier": "reward_classifier",
        },
        "ppo_evaluation": {
            "dataset": "formatted_dataset", "policy": "ppo_policy", "trunk": "base_model",
            "reward_classifier": "reward_classifier",
        },
        "comparison": {"base_model": "base_evaluation", "ppo_policy": "ppo_evaluation"},
    }  # fmt: skip


def test_a_sweep_is_of_the_trunk_unless_another_policy_is_named() -> None:
    assert graph_of("sft=null")["decoding_sweep"][2]["policy"] == "base_model"
    inputs = graph_of("decoding.policy=dpo_policy")["decoding_sweep"][2]
    assert (inputs["policy"], inputs["trunk"]) == ("dpo_policy", "sft_model")
    assert set(SMOKE) - set(graph_of("decoding=null")) == {"decoding_sweep"}


def test_reference_logprobs_exist_for_dpo_only() -> None:
    assert set(SMOKE) - set(graph_of("dpo=null")) == {"reference_logprobs", "dpo_policy", "dpo_evaluation"}


def test_without_feedback_pairs_come_from_labels_alone_and_without_labels_from_people_alone() -> None:
    assert graph_of("feedback=null")["preference_pairs"][2] == {
        "labels": "preference_labels", "tokenizer": "base_model"
    }  # fmt: skip
    people_only = graph_of("sampling=null", "labelling=null")
    assert people_only["preference_pairs"][2] == {"human": "human_preferences", "tokenizer": "base_model"}


@pytest.mark.parametrize("given", ["base_model.path=m", "base_model.hub_name=a/b"])
def test_a_base_model_that_is_given_does_not_depend_on_the_data(given: str) -> None:
    assert graph_of(given)["base_model"][2] == {}


@pytest.mark.parametrize("overrides", [[], ["sft=null"], ["ppo=null", "reward_model=null"], ["dpo=null"]])
def test_parents_come_before_children(overrides: list[str]) -> None:
    seen: set[str] = set()
    for asset, (_, _, inputs) in graph_of(*overrides).items():
        assert set(inputs.values()) <= seen
        seen.add(asset)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_asset_of_a_shipped_recipe_has_a_stage_function(path: Path) -> None:
    for node in build_graph(load_recipe(path)).values():
        assert callable(stage_function(node.stage))
        assert node.config is not None


def test_evaluations_are_named_for_their_policy() -> None:
    assert evaluation_asset("base_model") == "base_evaluation"
    assert evaluation_asset("ppo_policy") == "ppo_evaluation"


def test_every_stage_function_can_be_imported() -> None:
    assert all(callable(stage_function(stage)) for stage in STAGE_FUNCTIONS)
