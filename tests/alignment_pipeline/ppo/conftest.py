"""A small PPO, whole: a policy of two layers, prompts, a reward written in Python, and a trainer of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.generation import Response
from alignment_pipeline.ppo.plan import minibatches
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rewards import ScoreStatistics
from alignment_pipeline.ppo.rollout import Prompt, Rollout, ScoreFunction, collect
from alignment_pipeline.ppo.trainer import PpoTrainer

PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61]]
SETTINGS: dict[str, Any] = {
    "lora_rank": 2, "updates": 4, "rollout_batch_size": 8, "minibatch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-2,
    "max_new_tokens_min": 1, "max_new_tokens": 8, "kl_coef": 0.3,
}  # fmt: skip


def token_score(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
    """A reward that depends on the response and knows no batch."""
    return [sum(response.token_ids) % 7 / 3 - len(response.token_ids) / 8 for response in responses]


class PpoCase:
    """What a test of PPO needs, made from a configuration's changes."""

    def __init__(
        self, tiny_models: Any, architecture: str = "opt", score: ScoreFunction = token_score,
        reward_adapter: Path | None = None, reward_model: Any = None, **config: Any,
    ) -> None:  # fmt: skip
        self.tokenizer, self.config, self.score = tiny_models.tokenizer, PpoConfig(**(SETTINGS | config)), score
        self.prompts = [Prompt(f"row {row}", f"{row}:", [row + 20, *PROMPTS[row % 4]]) for row in range(16)]
        torch.manual_seed(0)
        self.policy = PolicyWithValue(tiny_models.build(architecture), self.config, reward_adapter, reward_model)

    def shaken(self) -> "PpoCase":
        """As if trained for a while: policy, values and reference differ."""
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.policy.policy_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for parameter in self.policy.value_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return self

    def collect(self, seed: int = 0, rows: int = 8, **changes: Any) -> tuple[Rollout, ScoreStatistics]:
        """One rollout on the first `rows` prompts."""
        order = minibatches(rows, self.config.minibatch_size, 1, seed)[0]
        settings = {"seed": seed, "first_epoch": order, "kl_coef": self.config.kl_coef,
                    "statistics": ScoreStatistics(), "processes": Processes()} | changes  # fmt: skip
        return collect(self.policy, self.score, self.tokenizer, self.prompts[:rows], self.config, **settings)

    def trainer(self, seed: int = 0) -> PpoTrainer:
        return PpoTrainer(self.policy, self.score, self.tokenizer, self.prompts, self.config, seed)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of everything that is trained."""
        return {name: tensor.clone() for name, tensor in self.policy.trained_state().items()}


@pytest.fixture
def ppo_case(tiny_models: Any) -> Callable[..., PpoCase]:
    return lambda *arguments, **config: PpoCase(tiny_models, *arguments, **config)
