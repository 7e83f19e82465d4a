"""PPO's losses as pure functions of tensors.

`B` responses, `T` columns (prompt, response and padding), masks True on response tokens. Other columns may hold
anything.
"""

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the columns that count: (B, T), (B, T) → ()."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate: -mean min(r A, clip(r, 1-ε, 1+ε) A), with r = exp(logprobs - old_logprobs).

    Args:
        logprobs: (B, T) log-probabilities under the policy that is trained.
        old_logprobs: (B, T) log-probabilities at sampling.
        advantages: (B, T)
        mask: (B, T), True on response tokens.
        clip_range: ε.

    Returns:
        The loss () and the share of tokens whose ratio was clipped ().

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clipped = (-advantages * clipped_ratio > -advantages * ratio).float()
    return masked_mean(losses, mask), masked_mean(clipped, mask)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Clipped value error: ½ mean max((V - R)², (clip(V, V_old ± ε) - R)²).

    Args:
        values: (B, T) values now.
        old_values: (B, T) values at sampling.
        returns: (B, T)
        mask: (B, T), True on response tokens.
        clip_range: ε.

    Source: https://github.com/openai/baselines/blob/ea25b9e8/baselines/ppo2/model.py#L68-L75
    """
    # Masked before the squares: a NaN in another column would reach the gradient through them.
    values, old_values, returns = (torch.where(mask, column, 0.0) for column in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def approx_kl(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(old ‖ now) a token, by the k3 estimator (r - 1) - log r: unbiased and never negative.

    Source: http://joschu.net/blog/kl-approx.html
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)
