"""Generalized advantage estimation and whitening, as pure functions of tensors.

`B` responses, `T` response columns; `mask` is True on response tokens, contiguous in a row.
"""

import torch


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


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Scale to variance 1 over the columns that count, and shift to mean 0 unless the mean is kept.

    Args:
        values: (B, T)
        mask: (B, T), True where a column counts.
        shift_mean: False for rewards, whose sign means something.

    Returns:
        (B, T), zero outside the mask.
    """
    counted = values[mask]
    mean = counted.mean()
    whitened = (values - mean) * torch.rsqrt(counted.var(unbiased=False) + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)
