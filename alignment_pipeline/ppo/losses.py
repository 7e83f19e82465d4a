"""PPO's losses, one a token, as pure functions of tensors.

`B` responses, `T` response columns, masks True on response tokens. Other columns may hold anything and come out as 0.
Means are the trainer's: it adds up tokens over microbatches and processes and divides by the whole minibatch's count.
"""

import torch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp, as OpenRLHF does: exp(20) is large and finite in float32."""


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the columns that count: (B, T), (B, T) → ()."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def policy_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate of each token: -min(r A, clip(r, 1-ε, 1+ε') A), with r = exp(logprobs - old_logprobs).

    Args:
        logprobs: (B, T) log-probabilities under the policy that is trained.
        old_logprobs: (B, T) log-probabilities at sampling.
        advantages: (B, T)
        mask: (B, T), True on response tokens.
        clip_range: ε.
        clip_range_high: ε'; ε if left out.
        dual_clip: c > 1: where A < 0 the loss is at most -c A, however large the ratio. None: unbounded.

    Returns:
        Losses (B, T), and (B, T) bool, True where the clip decides (the gradient is zero there).

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7; dual clip: Ye et al. 2019, arXiv 1912.09729, equation 5.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, advantages = torch.exp(log_ratio), torch.where(mask, advantages, 0.0)
    high = clip_range if clip_range_high is None else clip_range_high
    plain, limited = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high)
    losses, clipped = torch.maximum(plain, limited), limited > plain
    if dual_clip is not None:
        bounded = (advantages < 0) & (losses > -dual_clip * advantages)
        losses, clipped = torch.where(bounded, -dual_clip * advantages, losses), clipped | bounded
    return losses, clipped


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped value error of each token: ½ max((V - R)², (clip(V, V_old ± ε) - R)²).

    Args:
        values: (B, T) values now.
        old_values: (B, T) values at sampling.
        returns: (B, T)
        mask: (B, T), True on response tokens.
        clip_range: ε.

    Returns:
        Losses (B, T), and (B, T) bool, True where the clip decides.

    Source: https://github.com/openai/baselines/blob/ea25b9e8/baselines/ppo2/model.py#L68-L75
    """
    # Masked before the squares: a NaN in another column would reach the gradient through them.
    values, old_values, returns = (torch.where(mask, column, 0.0) for column in (values, old_values, returns))
    limited = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain_error, limited_error = (values - returns) ** 2, (limited - returns) ** 2
    return 0.5 * torch.maximum(plain_error, limited_error), limited_error > plain_error


def approx_kls(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(old ‖ now) at each token, by the k3 estimator (r - 1) - log r: (B, T), unbiased and never negative.

    Source: http://joschu.net/blog/kl-approx.html
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio
