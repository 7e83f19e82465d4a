"""The project's own PPO and DPO on the oracle's problem: nothing of either is written here.

PPO is `PpoTrainer` with the exact reward as its score. DPO is `TokenizedDPOTrainer` on Bradley-Terry pairs drawn from
π_ref, with reference log-probabilities computed beforehand. Both return the policy's exact distribution.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback

from alignment_pipeline.configs import DpoConfig, PpoConfig
from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.generation import Response
from alignment_pipeline.oracle import (
    PROMPT,
    PROMPT_IDS,
    RESPONSE_TOKENS,
    Point,
    Problem,
    dpo_sampling_error,
    draw_pairs,
    point_of,
    response_index,
    response_logprobs,
)
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.rollout import Prompt
from alignment_pipeline.ppo.trainer import PpoTrainer
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.sequences import sum_logprobs
from alignment_pipeline.stage import StageSpec

EPSILON_NATS = 0.01
"""KL(π ‖ π*) below which a policy counts as converged. DPO's number of pairs follows from it."""

FIRST_LOSS_TOLERANCE = 1e-5
"""Of DPO's first loss and ln 2: float32 log-probabilities computed in two batch shapes differ by about 1e-6."""

PPO_UPDATES = 100
MAX_PAIRS = 250_000  # about a minute of training
_SAMPLING_ERROR_NATS = EPSILON_NATS / 8  # what finitely many pairs may cost DPO, in expectation
_MIN_PAIRS = 40_000  # fewer make too few optimizer steps
_DPO_BATCH = 256
_ROLLOUT = 512

Watch = Callable[[int, int], None]
"""Told how many steps of how many are done."""


@dataclass(frozen=True)
class Trained:
    """A trained policy, exactly.

    Attributes:
        logprobs: (N,) log π of every response.
        way: Where the policy was in the reward-KL plane: before and after each of PPO's updates; DPO's end alone.
        first_metrics: What the trainer reported of its first step.
    """

    logprobs: torch.Tensor
    way: list[Point]
    first_metrics: Mapping[str, float]


def ppo_config(beta: float, updates: int = PPO_UPDATES) -> PpoConfig:
    """PPO whose objective is exactly E[r] - β KL: no discount, no bootstrap, no penalty for having no end token."""
    return PpoConfig.model_validate(
        {"method": "full", "kl_coef": beta, "gamma": 1.0, "gae_lambda": 1.0, "missing_eos_penalty": 0.0,
         "max_new_tokens": RESPONSE_TOKENS, "updates": updates, "rollout_batch_size": _ROLLOUT,
         "minibatch_size": _ROLLOUT, "generation_batch_size": _ROLLOUT, "ppo_epochs": 2, "learning_rate": 1e-3,
         "value_clip_range": 0.5}
    )  # fmt: skip


def train_ppo(problem: Problem, config: PpoConfig, seed: int, watch: Watch | None = None) -> Trained:
    """PPO on the exact reward."""

    def score(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        index = response_index(torch.tensor([response.token_ids for response in responses]))
        scores: list[float] = problem.rewards[index].tolist()
        return scores

    torch.manual_seed(seed)
    policy = PolicyWithValue(copy.deepcopy(problem.model), config)
    prompts = [Prompt(str(row), PROMPT, PROMPT_IDS) for row in range(config.rollout_batch_size)]
    trainer = PpoTrainer(policy, score, problem.tokenizer, prompts, config, seed)
    way = [point_of(problem, _exact_logprobs(policy.model, problem))]
    first_metrics: dict[str, float] = {}
    for update in range(1, config.updates + 1):
        metrics = trainer.update()
        first_metrics = first_metrics or metrics
        way.append(point_of(problem, _exact_logprobs(policy.model, problem)))
        if watch:
            watch(update, config.updates)
    return Trained(_exact_logprobs(policy.model, problem), way, first_metrics)


def pairs_needed(problem: Problem, beta: float) -> int:
    """Pairs whose sampling error is small against ε; it grows with 1 / β².

    Raises:
        AlignmentError: β is so small that this would be more than `MAX_PAIRS`.
    """
    count = round(dpo_sampling_error(problem, beta, 1) / _SAMPLING_ERROR_NATS)
    if count > MAX_PAIRS:
        raise AlignmentError(
            f"β = {beta:g}: found that DPO needs {count:,} pairs to come within {EPSILON_NATS:g} nats of the optimum, "
            f"expected at most {MAX_PAIRS:,} (the number grows with 1/β²). Use a larger β."
        )
    return max(_MIN_PAIRS, count)


def train_dpo(
    problem: Problem, beta: float, seed: int, folder: Path, pairs: int | None = None, watch: Watch | None = None
) -> Trained:
    """DPO on drawn pairs, one pass.

    Args:
        problem: The problem.
        beta: DPO's β, which is also the one of the optimum.
        seed: Seed of the pairs and of their order.
        folder: Empty folder for the trainer's log.
        pairs: Number of pairs; what `pairs_needed` says if left out.
        watch: Told of each step.
    """
    from trl import DPOConfig as TrlDpoConfig  # seconds, and PPO needs none of it

    from alignment_pipeline.training import dataset_of, seed_everything, train, trainer_arguments
    from alignment_pipeline.trl_adapter import TokenizedDPOTrainer, make_head_fast

    make_head_fast()
    seed_everything(seed)
    config = DpoConfig.model_validate(
        {
            "method": "full",
            "beta": beta,
            "learning_rate": 1e-3,
            "batch_size": _DPO_BATCH,
            "batching": "shuffled",
            "checkpoint_every_s": 1e9,
        }
    )
    spec = StageSpec(config, {}, folder / "output", folder / "work", seed)
    model = copy.deepcopy(problem.model)
    trainer = TokenizedDPOTrainer(
        model=model,
        args=TrlDpoConfig(**trainer_arguments(spec, config), beta=beta, max_length=None, precompute_ref_log_probs=True),
        train_dataset=dataset_of(_pair_rows(problem, pairs or pairs_needed(problem, beta), seed), "preference pairs"),
        processing_class=problem.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every step
    log = _WatchedLog(folder / "progress.jsonl", watch)
    train(trainer, spec, log)
    log.close()
    logprobs = _exact_logprobs(trainer.model, problem)
    return Trained(logprobs, [point_of(problem, logprobs)], metric_series(log.path)["train", 1])


class _WatchedLog(ProgressLog):
    """A progress log that also tells a watcher."""

    def __init__(self, path: Path, watch: Watch | None) -> None:
        super().__init__(path)
        self._watch = watch

    def step(self, phase: str, step: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        super().step(phase, step, total, metrics)
        if self._watch:
            self._watch(step, total)


def _pair_rows(problem: Problem, count: int, seed: int) -> list[dict[str, object]]:
    """Rows of `TokenizedDPOTrainer`; the reference log-probabilities are those of `reference_logprobs`' function."""
    responses = problem.responses.tolist()
    ref_logprobs = sum_logprobs(problem.model, [PROMPT_IDS] * len(responses), responses, 0, batch_size=len(responses))
    chosen, rejected = (index.tolist() for index in draw_pairs(problem, count, seed))
    return [
        {"prompt_ids": PROMPT_IDS, "chosen_ids": responses[better], "rejected_ids": responses[worse],
         "ref_chosen_logps": ref_logprobs[better], "ref_rejected_logps": ref_logprobs[worse]}
        for better, worse in zip(chosen, rejected, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _exact_logprobs(model: torch.nn.Module, problem: Problem) -> torch.Tensor:
    return response_logprobs(model, problem.responses)
