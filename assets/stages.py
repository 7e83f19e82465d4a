"""Every asset of a recipe: what is special to each stage's asset is one entry of `STAGE_ASSETS`.

The bodies are all the same (inputs → one library call → metadata, see `stage_asset`), so there is no file per stage.
"""

from dataclasses import dataclass

import dagster as dg

from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import Recipe
from assets.stage_asset import stage_asset


@dataclass(frozen=True)
class StageAsset:
    """How a stage's asset is shown and scheduled; see `stage_asset` for the fields."""

    description: str
    kinds: frozenset[str]
    tables: tuple[str, ...] = ()
    on_gpu: bool = False
    takes_in_feedback: bool = False


_TABLE = frozenset({"python", "table"})
_MODEL = frozenset({"pytorch", "huggingface"})

STAGE_ASSETS: dict[str, StageAsset] = {
    "instructions": StageAsset(
        "Rows (instruction, input and output, or plain texts) that can be trained on, split by prompt; bad rows lie in "
        "quarantine with their reason. Everything downstream reads these.",
        _TABLE,
        ("rows.jsonl", "quarantine.jsonl"),
    ),
    "base_model": StageAsset(
        "The language model and tokenizer that everything starts from, as safetensors.", _MODEL, on_gpu=True
    ),
    "formatted_dataset": StageAsset(
        "Prompts (in the template, or a text's beginning) and completions with the end token, with lengths; read by "
        "training, sampling and evaluation.",
        _TABLE,
        ("train.jsonl", "dropped.jsonl"),
    ),
    "sft_model": StageAsset(
        "The base model tuned to follow instructions, the loss on the response only; the trunk and the reference of "
        "every policy.",
        _MODEL,
        on_gpu=True,
    ),
    "sampled_responses": StageAsset(
        "What the SFT model answers to training prompts, several times each; raw material for preference pairs.",
        frozenset({"pytorch", "table"}),
        ("samples.jsonl",),
        on_gpu=True,
    ),
    "preference_labels": StageAsset(
        "Pairs of responses with the preferred one named by the recipe's labeller.", _TABLE, ("pairs.jsonl",)
    ),
    "human_preferences": StageAsset(
        "People's votes from the recipe's feedback inbox, taken in once; bad votes lie in quarantine.",
        _TABLE,
        ("pairs.jsonl", "quarantine.jsonl"),
        takes_in_feedback=True,
    ),
    "preference_pairs": StageAsset(
        "All preference pairs, whatever their source, split by prompt; read by the reward model and DPO.",
        _TABLE,
        ("train.jsonl",),
    ),
    "reward_model": StageAsset(
        "A scorer of responses learned from the pairs (Bradley–Terry); PPO's reward and the learned score of every "
        "evaluation.",
        _MODEL,
        ("scores.jsonl",),
        on_gpu=True,
    ),
    "reward_classifier": StageAsset(
        "A text classifier whose score for the recipe's label is PPO's reward and the learned score of every "
        "evaluation; given, or trained on labelled text.",
        _MODEL,
        on_gpu=True,
    ),
    "reference_logprobs": StageAsset(
        "Log-probability of every pair's responses under the trunk, computed once and shared by DPO sweeps.",
        frozenset({"pytorch", "table"}),
        ("train.jsonl",),
        on_gpu=True,
    ),
    "dpo_policy": StageAsset("The trunk trained on the pairs directly, without a reward model.", _MODEL, on_gpu=True),
    "ppo_policy": StageAsset(
        "The trunk trained by reinforcement (PPO) against the recipe's reward.",
        _MODEL,
        ("extras/samples.jsonl",),
        on_gpu=True,
    ),
    "evaluation": StageAsset(
        "One policy's answers to test prompts, scored by the recipe's judge; read by the comparison.",
        frozenset({"pytorch", "table"}),
        ("examples.jsonl",),
        on_gpu=True,
    ),
    "comparison": StageAsset(
        "All policies side by side, with win rates against the model they were trained from: the recipe's result.",
        _TABLE,
        ("table.jsonl", "examples.jsonl"),
    ),
    "decoding_sweep": StageAsset(
        "One policy's answers to test prompts under several decoding settings: what temperature, top-k, top-p, beams "
        "and penalties do to score, variety, length and repetition.",
        frozenset({"pytorch", "table"}),
        ("table.jsonl", "examples.jsonl"),
        on_gpu=True,
    ),
}


def recipe_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """All assets of a recipe, parents before children."""
    assets = []
    for node in build_graph(recipe).values():
        special = STAGE_ASSETS[node.stage]
        assets.append(
            stage_asset(
                recipe,
                node,
                description=special.description,
                kinds=set(special.kinds),
                tables=special.tables,
                on_gpu=special.on_gpu,
                takes_in_feedback=special.takes_in_feedback,
            )
        )
    return assets
