"""From scores to rewards: normalisation, the missing end, the KL penalty and its coefficient.

`B` responses, `T` response columns; `mask` is True on response tokens, contiguous in a row. A *score* is one number a
response, a *reward* one a token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]

KL_LOG_RATIO_LIMIT = 10.0
"""A token's log-ratio is clamped to this in the KL penalty, as OpenRLHF does: one odd token is not the whole reward."""

_ESTIMATORS: Mapping[KlEstimator, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio**2,
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}


def token_kls(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, estimator: KlEstimator
) -> torch.Tensor:
    """Estimate of KL(π ‖ π_ref) at each token sampled from π: (B, T), zero outside the mask.

    With x = log π - log π_ref: k1 = x, unbiased and of either sign; k2 = x²/2, biased, of low variance; k3 =
    (e^-x - 1) + x, unbiased and never negative.

    Source: http://joschu.net/blog/kl-approx.html
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs, 0.0).clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
    kls: torch.Tensor = _ESTIMATORS[estimator](log_ratio)
    return kls


def token_rewards(scores: torch.Tensor, kls: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """The KL penalty on every response token, and the score on the last: -c KL_t + score.

    Args:
        scores: (B,)
        kls: (B, T), from `token_kls`.
        mask: (B, T), True on response tokens.
        kl_coef: c, per nat.

    Returns:
        (B, T), zero outside the mask.

    Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2.
    """
    rewards = torch.where(mask, -kl_coef * kls, 0.0)
    return rewards.scatter_add(1, last_column(mask)[:, None], scores[:, None].to(rewards.dtype))


def last_column(mask: torch.Tensor) -> torch.Tensor:
    """Column of each row's last response token: (B, T) → (B,)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).max(dim=1).values.clamp(min=0)


def with_missing_end(scores: torch.Tensor, ended: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores with a penalty taken off where the response does not end: (B,), (B,) → (B,).

    Source: Stiennon et al. 2020's EOS trick, as in arXiv 2403.17031, detail 19.
    """
    return scores - penalty * (~ended).to(scores.dtype)


def adapted_kl_coef(kl_coef: float, kl_nats: float, target_nats: float, episodes: int, horizon: int) -> float:
    """The proportional controller: c (1 + e n / h), with e = clip(KL / target - 1, ±0.2).

    Args:
        kl_coef: c, per nat.
        kl_nats: Mean KL of the rollout's responses.
        target_nats: KL that is aimed at.
        episodes: n, responses in the rollout.
        horizon: h, responses over which the coefficient may change by a fifth.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """
    error = min(0.2, max(-0.2, kl_nats / target_nats - 1))
    return kl_coef * (1 + error * episodes / horizon)


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and spread of all scores seen, by Welford's and Chan's formulas; immutable, so that a checkpoint holds it.

    Attributes:
        count: Scores seen.
        mean: Their mean.
        sum_of_squares: Sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    sum_of_squares: float = 0.0

    def including(self, scores: torch.Tensor) -> "ScoreStatistics":
        """The statistics after (B,) more scores."""
        values = scores.double()
        count, mean = values.numel(), values.mean().item()
        total, gap = self.count + count, mean - self.mean
        squares = ((values - mean) ** 2).sum().item() + gap**2 * self.count * count / total
        return ScoreStatistics(total, self.mean + gap * count / total, self.sum_of_squares + squares)

    def normalised(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B,) less the mean, divided by the standard deviation."""
        deviation = math.sqrt(self.sum_of_squares / max(1, self.count))
        return (scores - self.mean) / (deviation + 1e-8)
