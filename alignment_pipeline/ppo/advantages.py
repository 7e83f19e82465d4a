"""Rewards a token, generalized advantage estimation, and whitening, as pure functions of tensors.

`B` responses, `T` columns (prompt, response and padding); `mask` is True on response tokens, contiguous in a row.
"""

import torch


def token_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """The KL penalty on every response token, and the score on the last: -c (log π - log π_ref) + score.

    Args:
        scores: (B,)
        logprobs: (B, T) at sampling.
        ref_logprobs: (B, T) under the reference policy.
        mask: (B, T), True on response tokens.
        kl_coef: c, per nat.

    Returns:
        (B, T), zero outside the mask.

    Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2; the k1 estimator of the KL a token.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    last = _last_column(mask)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages A_t = Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t, with V = 0 after the last response token.

    Args:
        rewards: (B, T)
        values: (B, T); columns outside the mask are read as 0.
        mask: (B, T), True on response tokens.
        gamma: γ
        gae_lambda: λ

    Returns:
        Advantages and returns (advantages + values), both (B, T) and zero outside the mask.

    Source: Schulman et al. 2015, arXiv 1506.02438, equation 16.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for column in reversed(range(values.shape[1])):
        counts = mask[:, column]
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        following = torch.where(counts, delta + gamma * gae_lambda * following, 0.0)
        advantages[:, column] = following
        next_value = values[:, column]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and variance 1 over the columns that count; zero elsewhere. (B, T) → (B, T)."""
    counted = values[mask]
    scale = torch.rsqrt(counted.var(unbiased=False) + 1e-8)
    return torch.where(mask, (values - counted.mean()) * scale, 0.0)


def _last_column(mask: torch.Tensor) -> torch.Tensor:
    """Column of each row's last response token: (B, T) → (B,)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).max(dim=1).values.clamp(min=0)
