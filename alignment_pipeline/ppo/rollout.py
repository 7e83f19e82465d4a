"""A rollout: responses of the current policy with everything that an update needs, computed once.

Log-probabilities are taken by the same forward pass that training uses, not from generation, and on the microbatches
that the first epoch will train on, so that the ratio there is exactly 1. They are all at the sampling temperature.

Shapes: `B` responses, `T` response columns (the longest response's tokens), masks True on response tokens.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import NonFiniteError
from alignment_pipeline.generation import Response, generate
from alignment_pipeline.ppo.advantages import gae, whiten
from alignment_pipeline.ppo.plan import microbatches
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rewards import ScoreStatistics, token_kls, token_rewards, with_missing_end
from alignment_pipeline.sequences import TokenBatch, pack
from alignment_pipeline.tokenization import TokenIds


@dataclass(frozen=True)
class Prompt:
    """What a response is sampled for: the dataset row's identity, the text, and its token ids."""

    row_id: str
    text: str
    token_ids: TokenIds


ScoreFunction = Callable[[Sequence[Prompt], Sequence[Response]], Sequence[float]]
"""Prompts and their responses → one score each."""


@dataclass(frozen=True)
class Rollout:
    """Responses and what was computed of them. Tensors of rows are (B,), of tokens (B, T) and zero outside the mask.

    Attributes:
        scores: As the reward gave them.
        rewarded_scores: Normalised, clipped, and less the penalty for a missing end.
        penalty_kl_nats: KL by the configured estimator, added up over the response: what is penalised.
        kl_nats: Log-ratio to the reference, added up over the response, at the sampling temperature.
        kl_nats_at_1: The same at temperature 1.
        kl_nats_k3: The k3 estimate, added up, at the sampling temperature; never negative.
    """

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    batch: TokenBatch
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    entropies: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    scores: torch.Tensor
    rewarded_scores: torch.Tensor
    penalty_kl_nats: torch.Tensor
    kl_nats: torch.Tensor
    kl_nats_at_1: torch.Tensor
    kl_nats_k3: torch.Tensor
    ended: torch.Tensor
    sampling_s: float
    scoring_s: float


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities, values and entropies of a batch's responses: (B, T), zero outside the mask."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    logprobs_at_1: torch.Tensor
    ref_logprobs_at_1: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor


@torch.no_grad()
def collect(
    policy: PolicyWithValue,
    score: ScoreFunction,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: PpoConfig,
    *,
    seed: int,
    first_epoch: Sequence[Sequence[int]],
    kl_coef: float,
    statistics: ScoreStatistics,
    processes: Processes,
) -> tuple[Rollout, ScoreStatistics]:
    """Sample a response to each prompt, score it, and compute advantages. Steps as in arXiv 2403.17031.

    Args:
        policy: The policy, its reference and its values.
        score: The reward.
        tokenizer: Of the policy.
        prompts: B prompts.
        config: Of the stage.
        seed: Of the sampling.
        first_epoch: Row numbers of the minibatches that will be trained on first.
        kl_coef: Weight of the KL penalty.
        statistics: Of the scores of earlier rollouts.
        processes: Those that share the work.

    Returns:
        The rollout, and the score statistics after it.

    Raises:
        NonFiniteError: A score, log-probability or value is a NaN or an infinity.
    """
    started = time.monotonic()
    # 1. responses
    responses = _sample(policy, tokenizer, prompts, config, seed, processes)
    sampled = time.monotonic()
    # 2. log-probabilities and values, microbatch by microbatch as the first epoch will compute them
    batch = pack(
        [prompt.token_ids for prompt in prompts], [response.token_ids for response in responses],
        tokenizer.pad_token_id, policy.device,
    )  # fmt: skip
    mask = batch.response_columns
    likelihoods = _likelihoods(policy, batch, first_epoch, config, processes)
    for what, tensor in (
        ("log-probability", likelihoods.logprobs),
        ("reference's log-probability", likelihoods.ref_logprobs),
        ("value", likelihoods.values),
    ):
        require_finite(f"the {what} of a token", tensor, prompts)
    # 3. scores: normalised, clipped, and less a penalty where the response does not end
    scores = _scores(score, prompts, responses, processes).to(policy.device)
    require_finite("the score", scores, prompts)
    ended = torch.tensor([response.ended for response in responses], device=policy.device)
    if config.score_normalization == "running" or statistics.sum_of_squares == 0:  # equal scores have no unit yet
        statistics = statistics.including(scores)
    rewarded_scores = scores if config.score_normalization == "none" else statistics.normalised(scores)
    if config.score_clip is not None:
        rewarded_scores = rewarded_scores.clamp(-config.score_clip, config.score_clip)
    rewarded_scores = with_missing_end(rewarded_scores, ended, config.missing_eos_penalty)
    # 4. rewards, advantages, returns
    kls = token_kls(likelihoods.logprobs, likelihoods.ref_logprobs, mask, config.kl_estimator)
    rewards = token_rewards(rewarded_scores, kls, mask, kl_coef)
    if config.reward_whitening == "scale":
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, likelihoods.values, mask, config.gamma, config.gae_lambda)
    rollout = Rollout(
        prompts=prompts,
        responses=responses,
        batch=batch,
        mask=mask,
        old_logprobs=likelihoods.logprobs,
        old_values=likelihoods.values,
        entropies=likelihoods.entropies,
        advantages=whiten(advantages, mask),
        returns=returns,
        scores=scores,
        rewarded_scores=rewarded_scores,
        penalty_kl_nats=kls.sum(1),
        kl_nats=(likelihoods.logprobs - likelihoods.ref_logprobs).sum(1),
        kl_nats_at_1=(likelihoods.logprobs_at_1 - likelihoods.ref_logprobs_at_1).sum(1),
        kl_nats_k3=token_kls(likelihoods.logprobs, likelihoods.ref_logprobs, mask, "k3").sum(1),
        ended=ended,
        sampling_s=sampled - started,
        scoring_s=time.monotonic() - sampled,
    )
    return rollout, statistics


def require_finite(what: str, values: torch.Tensor, prompts: Sequence[Prompt]) -> None:
    """Refuse rows (B,) or tokens (B, T) with a NaN or an infinity, naming the dataset rows that they belong to."""
    bad = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
    if bad.any():
        raise NonFiniteError(what, [prompts[row].row_id for row in bad.nonzero().flatten().tolist()])


def response_limits(count: int, config: PpoConfig, seed: int) -> list[int]:
    """Longest length of each response: drawn uniformly between the bounds, or the same for all."""
    if config.max_new_tokens_min is None:
        return [config.max_new_tokens] * count
    draw = random.Random(f"response lengths/{seed}")
    return [draw.randint(config.max_new_tokens_min, config.max_new_tokens) for _ in range(count)]


def _sample(
    policy: PolicyWithValue,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: PpoConfig,
    seed: int,
    processes: Processes,
) -> list[Response]:
    limits = response_limits(len(prompts), config, seed)
    rows = processes.share(range(len(prompts)))
    responses = generate(
        policy.model, tokenizer, [prompts[row].token_ids for row in rows],
        max_new_tokens=[limits[row] for row in rows], temperature=config.temperature,
        batch_size=config.generation_batch_size, seed=seed, row_numbers=rows,
    )  # fmt: skip
    return processes.gather(responses, len(prompts))


def _likelihoods(
    policy: PolicyWithValue,
    batch: TokenBatch,
    minibatches: Sequence[Sequence[int]],
    config: PpoConfig,
    processes: Processes,
) -> Likelihoods:
    lengths = batch.attention_mask.sum(1).tolist()
    columns = batch.response_columns.shape[1]
    names = [field.name for field in dataclasses.fields(Likelihoods)]
    found = {name: torch.zeros((len(lengths), columns), device=policy.device) for name in names}
    for minibatch in minibatches:
        for rows in microbatches(processes.share(minibatch), lengths, config.microbatch_size or config.minibatch_size):
            part = batch.rows(rows.to(policy.device))
            now = policy.evaluate(part, config.temperature)
            reference, reference_at_1 = policy.reference_logprobs(part, config.temperature)
            values = (now.logprobs, reference, now.logprobs_at_1, reference_at_1, now.values, now.entropies)
            for name, value in zip(names, values, strict=True):
                found[name][rows, : value.shape[1]] = value
    return Likelihoods(**{name: processes.sum(tensor) for name, tensor in found.items()})


def _scores(
    score: ScoreFunction, prompts: Sequence[Prompt], responses: Sequence[Response], processes: Processes
) -> torch.Tensor:
    mine = [float(value) for value in score(processes.share(prompts), processes.share(responses))]
    return torch.tensor(processes.gather(mine, len(prompts)))
