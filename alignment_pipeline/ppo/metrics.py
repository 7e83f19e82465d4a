"""PPO's metrics under the field's names, over response tokens only. KL in nats a response, times in seconds."""

import torch

from alignment_pipeline.ppo.losses import masked_mean
from alignment_pipeline.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What a rollout says of the policy that sampled it."""
    mask = rollout.mask
    return {
        "objective/score": rollout.scores.mean().item(),
        "objective/score_std": rollout.scores.std(unbiased=False).item(),
        "objective/rewarded_score": rollout.rewarded_scores.mean().item(),
        "objective/reward": (rollout.rewarded_scores - kl_coef * rollout.penalty_kl_nats).mean().item(),
        "objective/kl": rollout.kl_nats.mean().item(),
        "objective/kl_k3": rollout.kl_nats_k3.mean().item(),
        "objective/kl_at_temperature_1": rollout.kl_nats_at_1.mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -rollout.old_logprobs.sum(1).mean().item(),
        "policy/entropy": masked_mean(rollout.entropies, mask).item(),
        "response/mean_tokens": mask.sum(1).float().mean().item(),
        "response/eos_rate": rollout.ended.float().mean().item(),
        "value/mean": masked_mean(rollout.old_values, mask).item(),
        "value/return_mean": masked_mean(rollout.returns, mask).item(),
        "value/explained_variance": explained_variance(rollout.old_values, rollout.returns, mask),
        "time/sampling_s": rollout.sampling_s,
        "time/scoring_s": rollout.scoring_s,
        "time/rollout_s": rollout.sampling_s + rollout.scoring_s,
    }


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the columns that count; 0 for constant values, 1 at best."""
    errors, targets = (returns - values)[mask], returns[mask]
    return (1 - errors.var(unbiased=False) / (targets.var(unbiased=False) + 1e-8)).item()
