"""Which assets a recipe has, and which reads which: the one place where the graph's shape is decided.

`TRUNK` is the model that policies are trained from and measured against: the SFT model, or the base model in a recipe
without `sft`. Assets, the command line and tests all derive from `build_graph`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment_pipeline.configs import StageConfig
from alignment_pipeline.recipe import Recipe


@dataclass(frozen=True)
class StageNode:
    """One asset of a recipe.

    Attributes:
        asset: Name within the recipe, for example `sft_evaluation`.
        stage: Library stage that computes it, for example `evaluation`.
        section: Recipe section that configures it, the name used by `--set`.
        config: That section.
        inputs: Name the stage knows an input by → asset that it reads.
    """

    asset: str
    stage: str
    section: str
    config: StageConfig
    inputs: Mapping[str, str]


def build_graph(recipe: Recipe) -> dict[str, StageNode]:
    """All assets of a recipe by name, parents before children."""
    nodes: dict[str, StageNode] = {}

    def add(asset: str, section: str, *, stage: str | None = None, **inputs: str | None) -> None:
        config: StageConfig | None = getattr(recipe, section)
        if config is not None:
            present = {name: source for name, source in inputs.items() if source is not None and source in nodes}
            nodes[asset] = StageNode(asset, stage or asset, section, config, present)

    trunk = trunk_asset(recipe)
    add("instructions", "data")
    add("base_model", "base_model", instructions=None if _is_given(recipe.base_model) else "instructions")
    add("formatted_dataset", "formatting", instructions="instructions", tokenizer="base_model")
    add("sft_model", "sft", dataset="formatted_dataset", base_model="base_model")
    add("sampled_responses", "sampling", dataset="formatted_dataset", policy=trunk)
    add("preference_labels", "labelling", samples="sampled_responses", dataset="formatted_dataset")
    add("human_preferences", "feedback", dataset="formatted_dataset")
    add("preference_pairs", "pairs", labels="preference_labels", human="human_preferences", tokenizer="base_model")
    scorer_given = recipe.reward_model is not None and recipe.reward_model.is_given
    add("reward_model", "reward_model", pairs="preference_pairs", trunk=None if scorer_given else trunk)
    add("reward_classifier", "reward_classifier")
    if recipe.dpo:
        add("reference_logprobs", "reference_logprobs", pairs="preference_pairs", trunk=trunk)
    add("dpo_policy", "dpo", pairs="preference_pairs", reference_logprobs="reference_logprobs", trunk=trunk)
    # A recipe has one of them; the other is not among the nodes and so no input.
    rewards = {"reward_model": "reward_model", "reward_classifier": "reward_classifier"}
    of_ppo = {} if recipe.ppo and recipe.ppo.reward_function else rewards
    add("ppo_policy", "ppo", dataset="formatted_dataset", trunk=trunk, **of_ppo)
    if recipe.evaluation is None:
        return nodes
    policies = [asset for asset in ("base_model", "sft_model", "ppo_policy", "dpo_policy") if asset in nodes]
    for policy in policies:
        add(
            evaluation_asset(policy), "evaluation", stage="evaluation",
            dataset="formatted_dataset", policy=policy, trunk=trunk, **rewards,
        )  # fmt: skip
    evaluations: dict[str, Any] = {policy: evaluation_asset(policy) for policy in policies}
    add("comparison", "evaluation", **evaluations)
    swept = (recipe.decoding and recipe.decoding.policy) or trunk
    add("decoding_sweep", "decoding", dataset="formatted_dataset", policy=swept, trunk=trunk, **rewards)
    return nodes


def trunk_asset(recipe: Recipe) -> str:
    """The model that policies start from: `sft_model`, or `base_model` in a recipe without `sft`."""
    return "sft_model" if recipe.sft else "base_model"


def evaluation_asset(policy: str) -> str:
    """Name of the asset that evaluates a policy: `ppo_policy` → `ppo_evaluation`."""
    return policy.removesuffix("_model").removesuffix("_policy") + "_evaluation"


def _is_given(config: Any) -> bool:
    return bool(config.path or config.hub_name)
