"""Which propositions each asset is checked for. They are decided in the library, beside the numbers they are about, or
where they are about other artifacts too, in `resources.leakage`.

Leakage and empty outputs block what is downstream; the rest warns and shows.
"""

import dagster as dg

from alignment_pipeline.graph import StageNode, trunk_asset
from alignment_pipeline.recipe import Recipe

_BLOCKING, _WARNING = True, False
_NOT_TRAINED_ON = (
    "evaluated_prompts_were_not_trained_on",
    _BLOCKING,
    "Nothing that the policy, its trunk or its reward comes from learned from an evaluated prompt.",
)

_CHECKS: dict[str, tuple[tuple[str, bool, str], ...]] = {
    "instructions": (
        ("splits_share_no_prompt", _BLOCKING, "No prompt stands in two of train, validation and test."),
        ("counts_reconcile", _BLOCKING, "Rows in = rows kept + rows in quarantine."),
    ),
    "formatted_dataset": (
        ("splits_share_no_prompt", _BLOCKING, "No formatted prompt stands in two splits."),
        ("completions_end_with_eos", _BLOCKING, "The last token of every completion is the end token."),
    ),
    "sampled_responses": (("responses_are_not_empty", _BLOCKING, "Most sampled responses hold text."),),
    "human_preferences": (("counts_reconcile", _BLOCKING, "Votes in = votes kept + votes in quarantine."),),
    "preference_pairs": (("splits_share_no_prompt", _BLOCKING, "No prompt has pairs in both splits."),),
    "reward_model": (
        ("reward_model_beats_length_baseline", _WARNING, "Held-out accuracy is above preferring by length alone."),
        ("reward_model_accuracy_is_plausible", _WARNING, "Held-out accuracy is not so high that it must be a pattern."),
    ),
    "ppo_policy": (
        (
            "saved_policy_is_the_trained_one",
            _BLOCKING,
            "What was written is what was trained, and not the trunk.",
        ),
    ),
    "evaluation": (
        ("responses_are_not_empty", _BLOCKING, "The evaluation is of text, not of silence."),
        _NOT_TRAINED_ON,
    ),
    "decoding_sweep": (_NOT_TRAINED_ON,),
}

_TRAINED_CLASSIFIER_CHECKS = (
    ("counts_reconcile", _BLOCKING, "Labelled texts in = texts kept + texts in quarantine."),
    ("reward_classifier_beats_majority", _WARNING, "Held-out accuracy is above always naming the most frequent label."),
)


def check_specs(recipe: Recipe, node: StageNode) -> list[dg.AssetCheckSpec]:
    """The checks of one asset."""
    key = dg.AssetKey([recipe.name, node.asset])
    checks = _CHECKS.get(node.stage, ())
    if node.stage == "comparison":
        checks = _comparison_checks(recipe, node)
    elif recipe.reward_classifier and recipe.reward_classifier.train_path and node.stage == "reward_classifier":
        checks = _TRAINED_CLASSIFIER_CHECKS
    return [
        dg.AssetCheckSpec(name, asset=key, blocking=blocking, description=description)
        for name, blocking, description in checks
    ]


def _comparison_checks(recipe: Recipe, node: StageNode) -> tuple[tuple[str, bool, str], ...]:
    trunk = trunk_asset(recipe)
    sft = (("sft_beats_base", _WARNING, "SFT is above the base model in BLEU and by the judge."),)
    policies = [policy for policy in node.inputs if policy not in ("base_model", trunk)]
    of_policies = [
        check
        for policy in policies
        for check in (
            (f"{policy}_beats_{trunk}", _WARNING, "The win rate's 95% interval is above one half."),
            (f"{policy}_kl_within_budget", _WARNING, "It is no further from the trunk than the recipe's budget."),
        )
    ]
    return (*(sft if recipe.sft else ()), *of_policies)
