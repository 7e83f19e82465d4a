"""A rollout: responses of the current policy with everything that an update needs, computed once.

Log-probabilities are taken by the same forward pass that training uses, not from generation, so that the ratio is 1 at
the first minibatch. They are all at the sampling temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.ppo.advantages import gae, token_rewards, whiten
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.reward import score_responses
from alignment_pipeline.sequences import Response, TokenBatch, TokenIds, generate, pack


@dataclass(frozen=True)
class Rollout:
    """All (B, T) but `scores` (B,), `kl_nats` (B,) and `ended` (B,)."""

    batch: TokenBatch
    responses: list[Response]
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    scores: torch.Tensor
    kl_nats: torch.Tensor
    ended: torch.Tensor


@torch.no_grad()
def collect(
    policy: PolicyWithValue,
    reward_model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    config: PpoConfig,
    seed: int,
) -> Rollout:
    """Sample a response to each prompt, score it, and compute advantages. Steps as in arXiv 2403.17031."""
    # 1. responses
    responses = generate(
        policy.model, tokenizer, prompts,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, batch_size=len(prompts), seed=seed,
    )  # fmt: skip
    token_ids = [response.token_ids for response in responses]
    batch = pack(prompts, token_ids, tokenizer.pad_token_id, policy.device)
    # 2. log-probabilities and values, minibatch by minibatch as the update will compute them
    rows = torch.split(torch.arange(len(prompts), device=policy.device), config.minibatch_size)
    old_logprobs, old_values = policy.evaluate_in_parts(batch, rows, config.temperature)
    with policy.as_reference():
        ref_logprobs, _ = policy.evaluate_in_parts(batch, rows, config.temperature)
    # 3. scores; a response that does not end is penalised
    scores = torch.tensor(
        score_responses(reward_model, prompts, token_ids, tokenizer.pad_token_id, len(prompts)), device=policy.device
    )
    ended = torch.tensor([response.ended for response in responses], device=policy.device)
    penalised = scores - config.missing_eos_penalty * (~ended).float()
    # 4. rewards, advantages, returns
    mask = batch.response_mask
    rewards = token_rewards(penalised, old_logprobs, ref_logprobs, mask, config.kl_coef)
    advantages, returns = gae(rewards, old_values, mask, config.gamma, config.gae_lambda)
    kl_nats = torch.where(mask, old_logprobs - ref_logprobs, 0.0).sum(1)
    return Rollout(
        batch, responses, old_logprobs, old_values, whiten(advantages, mask), returns, scores, kl_nats, ended
    )
