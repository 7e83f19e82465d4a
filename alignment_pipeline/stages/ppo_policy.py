"""`ppo_policy`: the trunk trained by proximal policy optimization against the reward model.

TRL has no PPO since 1.13, so the loop is ours: rollout → rewards → advantages → clipped updates (arXiv 1707.06347,
with the details of arXiv 2403.17031). Departures:

1. One trunk serves as policy, reference (adapters off) and value model.
2. Old log-probabilities come from the training forward pass, so that the first ratio is 1.
3. Dropout is off throughout.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from alignment_pipeline import checkpoint
from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import MODEL_FOLDER, load_causal_lm, load_scorer, load_tokenizer, save_trained
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.ppo.losses import approx_kl, masked_mean, policy_loss, value_loss
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.rollout import Rollout, collect
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.sequences import TokenIds, encode
from alignment_pipeline.stage import StageResult, StageSpec


def train_ppo(spec: StageSpec[PpoConfig], log: ProgressLog) -> StageResult:
    """Train the policy; the reported score and KL are means over the last tenth of the updates."""
    config = spec.config
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    reward_model = load_scorer(spec.inputs["reward_model"], spec.inputs["trunk"], spec.device)
    torch.manual_seed(spec.seed)
    policy = PolicyWithValue(load_causal_lm(spec.inputs["trunk"] / MODEL_FOLDER, spec.device), config)
    prompts = _prompts(spec, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, eps=1e-5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / config.updates)
    start, history, tokens = _resume(spec, policy, optimizer, schedule, log)
    pacer = Pacer(config.checkpoint_every_s)
    for update in range(start, config.updates):
        chosen = _prompts_of_update(prompts, config.rollout_batch_size, spec.seed, update)
        rollout = collect(policy, reward_model, tokenizer, chosen, config, seed=spec.seed * 7919 + update)
        metrics = rollout_metrics(rollout, config) | _update_policy(
            policy, optimizer, rollout, config, spec.seed, update
        )
        schedule.step()
        tokens += float(rollout.batch.attention_mask.sum())
        history.append([metrics["objective/score"], metrics["objective/kl"]])
        log.step("ppo", update + 1, config.updates, metrics | {"train/tokens": tokens})
        if pacer.is_due() and update + 1 < config.updates:
            state = {"trained": policy.trained_state(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "history": history, "tokens": tokens}  # fmt: skip
            checkpoint.save_state(spec.work_dir, update + 1, state)
    save_trained(policy.model, tokenizer, spec.output_dir)
    last = history[-max(1, len(history) // 10) :]
    return StageResult(
        {
            "objective/score": sum(score for score, _ in last) / len(last),
            "objective/kl": sum(kl for _, kl in last) / len(last),
            "objective/score_gain": sum(score for score, _ in last) / len(last) - history[0][0],
            "train/updates": float(config.updates),
        }
    )


def rollout_metrics(rollout: Rollout, config: PpoConfig) -> dict[str, float]:
    """Metrics of a rollout under the field's names; KL in nats a response."""
    mask = rollout.batch.response_mask
    errors = torch.where(mask, rollout.returns - rollout.old_values, 0.0)[mask]
    variance = rollout.returns[mask].var(unbiased=False)
    return {
        "objective/score": rollout.scores.mean().item(),
        "objective/kl": rollout.kl_nats.mean().item(),
        "objective/reward": (rollout.scores - config.kl_coef * rollout.kl_nats).mean().item(),
        "response/mean_tokens": mask.sum(1).float().mean().item(),
        "response/eos_rate": rollout.ended.float().mean().item(),
        "value/explained_variance": (1 - errors.var(unbiased=False) / (variance + 1e-8)).item(),
    }


def _update_policy(
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: PpoConfig,
    seed: int,
    update: int,
) -> dict[str, float]:
    """Several epochs of minibatch steps on one rollout; returns the mean of each metric over the steps."""
    generator = torch.Generator().manual_seed(seed * 104_729 + update)
    steps: list[dict[str, float]] = []
    for _ in range(config.ppo_epochs):
        order = torch.randperm(config.rollout_batch_size, generator=generator)
        for rows in torch.split(order, config.minibatch_size):
            steps.append(_minibatch_step(policy, optimizer, rollout, rows.to(policy.device), config))
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def _minibatch_step(
    policy: PolicyWithValue, optimizer: torch.optim.Optimizer, rollout: Rollout, rows: torch.Tensor, config: PpoConfig
) -> dict[str, float]:
    part = rollout.batch.rows(rows)
    width, mask = part.input_ids.shape[1], part.response_mask
    old_logprobs, old_values, advantages, returns = (
        tensor[rows, :width]
        for tensor in (rollout.old_logprobs, rollout.old_values, rollout.advantages, rollout.returns)
    )
    logprobs, values, entropies = policy.evaluate(part, config.temperature)
    surrogate, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_range)
    error = value_loss(values, old_values, returns, mask, config.value_clip_range)
    loss = surrogate + config.value_coef * error
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm):
        raise ModelError(
            "PPO's gradient is not finite; the weights were left as they were and nothing was published. "
            "Lower ppo.learning_rate or raise ppo.kl_coef."
        )
    optimizer.step()
    return {
        "loss/policy": surrogate.item(),
        "loss/value": error.item(),
        "policy/approx_kl": approx_kl(logprobs.detach(), old_logprobs, mask).item(),
        "policy/clip_fraction": clip_fraction.item(),
        "policy/entropy": masked_mean(entropies, mask).item(),
        "train/grad_norm": norm.item(),
    }


def _prompts(spec: StageSpec[PpoConfig], tokenizer: Any) -> list[TokenIds]:
    rows = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    prompts = encode(tokenizer, sorted({row["prompt"] for row in rows}))
    if len(prompts) < spec.config.rollout_batch_size:
        raise DataError(
            f"Found {len(prompts)} training prompts, expected at least ppo.rollout_batch_size "
            f"({spec.config.rollout_batch_size}). Lower it or add data."
        )
    return prompts


def _prompts_of_update(prompts: Sequence[TokenIds], count: int, seed: int, update: int) -> list[TokenIds]:
    """A function of seed and update alone, so that a resumed run sees the same prompts."""
    return random.Random(f"{seed}/{update}").sample(list(prompts), count)


def _resume(
    spec: StageSpec[PpoConfig],
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    log: ProgressLog,
) -> tuple[int, list[list[float]], float]:
    """Updates done, their scores and KLs, and tokens trained on; the policy and optimizer as they were then."""
    state = checkpoint.load_state(spec.work_dir, spec.device)
    if state is None:
        return 0, [], 0.0
    policy.load_trained_state(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    history: list[list[float]] = state["history"]
    log.note(f"Resuming after update {len(history)} of {spec.config.updates}.")
    return len(history), history, state["tokens"]
