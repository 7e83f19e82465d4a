"""The contract of a stage: one function from a spec to a result, the same in a notebook, a step or a worker.

A stage reads its input folders, writes its payload below `output_dir` (plots and notes below `output_dir/extras`),
keeps checkpoints below `work_dir`, and reports through the progress log. It knows no orchestrator and no database.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from alignment_pipeline.configs import StageConfig
from alignment_pipeline.progress import ProgressLog

ConfigT = TypeVar("ConfigT", bound=StageConfig, covariant=True)

STAGE_FUNCTIONS: Mapping[str, str] = {
    "instructions": "ingest_instructions",
    "base_model": "prepare_base_model",
    "formatted_dataset": "format_dataset",
    "sft_model": "train_sft",
    "sampled_responses": "sample_responses",
    "preference_labels": "label_preferences",
    "human_preferences": "collect_human_preferences",
    "preference_pairs": "unite_preference_pairs",
    "reward_model": "train_reward_model",
    "reward_classifier": "prepare_reward_classifier",
    "reference_logprobs": "score_reference_logprobs",
    "dpo_policy": "train_dpo",
    "ppo_policy": "train_ppo",
    "evaluation": "evaluate_policy",
    "comparison": "compare_policies",
    "decoding_sweep": "sweep_decoding",
}
"""Stage name → its function in `alignment_pipeline.stages.<stage name>`."""


@dataclass(frozen=True)
class StageSpec(Generic[ConfigT]):
    """Everything a stage needs to run.

    Attributes:
        config: The stage's section of the recipe.
        inputs: Input name → folder of the artifact (or, for feedback, the journal file).
        output_dir: Empty folder for the payload.
        work_dir: Folder that survives a crash, for checkpoints.
        seed: Seed of every random choice in the stage.
        device: Torch device, such as `cpu` or `cuda:0`; not part of the key.
    """

    config: ConfigT
    inputs: Mapping[str, Path]
    output_dir: Path
    work_dir: Path
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class StageCheck:
    """A proposition about the result that can be false. A blocking one stops what is downstream."""

    name: str
    passed: bool
    detail: str
    blocking: bool = False


@dataclass(frozen=True)
class StageResult:
    """What a stage reports beside its files: final metrics (`group/name` → value) and checks."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[StageCheck, ...] = ()


StageFunction = Callable[[StageSpec[Any], ProgressLog], StageResult]


def stage_function(stage: str) -> StageFunction:
    """Import a stage's function; torch and the trainers are imported here and not before."""
    module = importlib.import_module(f"alignment_pipeline.stages.{stage}")
    function: StageFunction = getattr(module, STAGE_FUNCTIONS[stage])
    return function
