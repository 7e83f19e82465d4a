"""Proximal policy optimization of a language model: rollout → rewards → advantages → clipped updates.

Source: arXiv 1707.06347, with the details of arXiv 1909.08593 and 2403.17031. Departures:

1. One trunk serves as policy, reference (adapters off), reward model (its adapter) and value model.
2. Old log-probabilities come from the training forward pass, so that the first ratio is exactly 1.
3. Losses are means over a minibatch's tokens, whatever its microbatches and processes.
4. Dropout is off throughout.
5. What an update draws at random is a function of the seed and the update's number.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import NonFiniteError, RecipeError
from alignment_pipeline.ppo.losses import approx_kls, policy_losses, value_losses
from alignment_pipeline.ppo.metrics import rollout_metrics
from alignment_pipeline.ppo.plan import microbatches, minibatches
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rewards import ScoreStatistics, adapted_kl_coef
from alignment_pipeline.ppo.rollout import Prompt, Rollout, ScoreFunction, collect

_STEP_METRICS = (
    "loss/policy", "loss/value", "policy/approx_kl", "policy/ratio", "policy/clip_fraction", "value/clip_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One minibatch: its metrics, and whether the weights were changed by it."""

    metrics: dict[str, float]
    taken: bool
    grad_norm: float = 0.0


class PpoTrainer:
    """Trains a policy, one rollout and its optimizer steps at a time.

    Attributes:
        updates_done: Rounds so far.
        rollout: The last one.
    """

    def __init__(
        self,
        policy: PolicyWithValue,
        score: ScoreFunction,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        config: PpoConfig,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self._policy, self._score, self._tokenizer, self._prompts = policy, score, tokenizer, list(prompts)
        self._config, self._seed = config, seed
        self._processes = processes or Processes(policy.device)
        if config.minibatch_size < self._processes.count:
            raise RecipeError(
                f"ppo.minibatch_size: found {config.minibatch_size}, expected at least the {self._processes.count} "
                "processes that share a minibatch. Raise it, or start fewer processes."
            )
        groups = [
            {"params": policy.policy_parameters(), "lr": config.learning_rate},
            {"params": policy.value_parameters(), "lr": config.value_learning_rate or config.learning_rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda update: learning_rate_share(update, config)
        )
        self._kl_coef, self._statistics = config.kl_coef, ScoreStatistics()
        self.updates_done, self._tokens = 0, 0
        self.rollout: Rollout | None = None

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, for a checkpoint."""
        statistics = self._statistics
        return {
            "trained": self._policy.trained_state(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "kl_coef": self._kl_coef,
            "score_statistics": [statistics.count, statistics.mean, statistics.sum_of_squares],
            "updates_done": self.updates_done,
            "tokens": self._tokens,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._policy.load_trained_state(state["trained"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._kl_coef, self._statistics = state["kl_coef"], ScoreStatistics(*state["score_statistics"])
        self.updates_done, self._tokens = state["updates_done"], state["tokens"]

    def update(self) -> dict[str, float]:
        """Collect one rollout and train on it.

        Returns:
            Metrics of the rollout, and means over the optimizer steps.

        Raises:
            NonFiniteError: A NaN or an infinity turned up. Weights and optimizer are as the last good step left them.
        """
        config, number = self._config, self.updates_done
        chosen = random.Random(f"{self._seed}/{number}").sample(self._prompts, config.rollout_batch_size)
        order = minibatches(
            len(chosen), config.minibatch_size, config.ppo_epochs, seed=self._seed * 104_729 + number
        )  # fmt: skip
        self.rollout, self._statistics = collect(
            self._policy, self._score, self._tokenizer, chosen, config, seed=self._seed * 7919 + number,
            first_epoch=order[0], kl_coef=self._kl_coef, statistics=self._statistics, processes=self._processes,
        )  # fmt: skip
        started = time.monotonic()
        steps = self._train_on(self.rollout, order)
        self._tokens += int(self.rollout.batch.attention_mask.sum())
        metrics = rollout_metrics(self.rollout, self._kl_coef)
        metrics |= {name: sum(step.metrics[name] for step in steps) / len(steps) for name in steps[0].metrics}
        taken = sum(step.taken for step in steps)
        metrics |= {
            "train/grad_norm": sum(step.grad_norm for step in steps) / max(1, taken),
            "train/steps": float(taken),
            "train/learning_rate": float(self._schedule.get_last_lr()[0]),
            "train/tokens": float(self._tokens),
            "time/update_s": time.monotonic() - started,
        }
        if config.kl_target_nats is not None:
            kl = metrics["objective/kl"]
            self._kl_coef = adapted_kl_coef(self._kl_coef, kl, config.kl_target_nats, len(chosen), config.kl_horizon)
        self._schedule.step()
        self.updates_done += 1
        return metrics

    @property
    def _trains_only_values(self) -> bool:
        return self.updates_done < self._config.value_warmup_updates

    def _train_on(self, rollout: Rollout, order: Sequence[Sequence[Sequence[int]]]) -> list[_Step]:
        """Optimizer steps by epoch and minibatch, until they are done or the policy has moved too far."""
        steps: list[_Step] = []
        for epoch in order:
            for rows in epoch:
                steps.append(self._step(rollout, rows))
                if not steps[-1].taken:
                    return steps
        return steps

    def _step(self, rollout: Rollout, minibatch: Sequence[int]) -> _Step:
        """Forward and backward passes over a minibatch's microbatches, then one step of the optimizer."""
        config = self._config
        lengths = rollout.batch.attention_mask.sum(1).tolist()
        token_count = int(rollout.mask[minibatch].sum())
        self._optimizer.zero_grad()
        totals = torch.zeros(len(_STEP_METRICS), device=self._policy.device)
        size = config.microbatch_size or config.minibatch_size
        for rows in microbatches(self._processes.share(minibatch), lengths, size):
            totals += self._backward(rollout, rows.to(self._policy.device), token_count)
        metrics = dict(zip(_STEP_METRICS, (self._processes.sum(totals) / token_count).tolist(), strict=True))
        if config.approx_kl_stop is not None and metrics["policy/approx_kl"] > config.approx_kl_stop:
            return _Step(metrics, taken=False)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._processes.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not torch.isfinite(norm):
            self._optimizer.zero_grad()
            raise NonFiniteError("a gradient", [rollout.prompts[row].row_id for row in minibatch])
        self._optimizer.step()
        return _Step(metrics, taken=True, grad_norm=norm.item())

    def _backward(self, rollout: Rollout, rows: torch.Tensor, token_count: int) -> torch.Tensor:
        """Add the gradients of one microbatch; returns the sums over its tokens that `_STEP_METRICS` names."""
        config = self._config
        now = self._policy.evaluate(
            rollout.batch.rows(rows), config.temperature,
            all_statistics=config.entropy_coef > 0, only_values=self._trains_only_values,
        )  # fmt: skip
        columns = now.logprobs.shape[1]
        mask, old_logprobs, old_values, advantages, returns = (
            tensor[rows, :columns]
            for tensor in (rollout.mask, rollout.old_logprobs, rollout.old_values, rollout.advantages, rollout.returns)
        )
        surrogate, clipped = policy_losses(
            now.logprobs, old_logprobs, advantages, mask,
            config.clip_range, config.clip_range_high, config.dual_clip,
        )  # fmt: skip
        error, value_clipped = value_losses(now.values, old_values, returns, mask, config.value_clip_range)
        loss = config.value_coef * error.sum()
        if not self._trains_only_values:
            loss = loss + surrogate.sum() - config.entropy_coef * now.entropies.sum()
        (loss / token_count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        with torch.no_grad():
            kls = approx_kls(now.logprobs, old_logprobs, mask)
            ratios = torch.where(mask, torch.exp(now.logprobs - old_logprobs), 0.0)
            counted = (surrogate, error, kls, ratios, clipped & mask, value_clipped & mask)
            return torch.stack([values.sum().float() for values in counted])


def learning_rate_share(update: int, config: PpoConfig) -> float:
    """Share of the peak learning rate at an update (from 0): a linear warm-up, then the configured schedule."""
    warmup = int(config.warmup_fraction * config.updates)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, config.updates - warmup)
    falling = {"linear": 1 - progress, "cosine": 0.5 * (1 + cos(pi * progress)), "constant": 1.0}
    return falling[config.schedule]
