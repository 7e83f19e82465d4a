"""The exact oracle: a language model so small that what alignment aims at can be computed by enumeration.

With a vocabulary of four tokens and responses of three there are 4³ = 64 responses. Their probabilities can be listed,
and with them the one policy that maximizes E[r] - β KL(π ‖ π_ref), which for a real model nobody can compute:

    π*(y) = π_ref(y) exp(r(y) / β) / Z,    Z = Σ π_ref(y) exp(r(y) / β)

Belongs here: the problem (a real, tiny transformers model, its tokenizer, a rule that scores) and pure mathematics over
all its responses. Training on it by the project's own PPO and DPO is in `oracle_training`.

Shape key: `N` = V^T all responses in lexical order, `T` response tokens, `V` vocabulary, `D` parameters, `K` directions
of a gradient. Probabilities are natural logarithms in float64.

Source: Rafailov et al. 2023, arXiv 2305.18290, equation 4 and appendix A.1.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignment_pipeline.generation import generate
from alignment_pipeline.ppo.advantages import gae

VOCABULARY = "abcd"
PROMPT = "a"
PROMPT_IDS = [VOCABULARY.index(PROMPT)]
RESPONSE_TOKENS = 3

GRADIENT_FALSE_ALARM_RATE = 1e-4
"""How often `check_gradient` would reject a right estimator, over all its directions, if seeds were drawn anew."""

GAE_TOLERANCE = 1e-12
"""Of `gae_error`: float64 sums of three terms of order one are right to about 1e-15."""

_INIT_STD = 0.2  # π_ref is then far from uniform, and still every response turns up among some thousand samples
_HIDDEN_SIZE = 32
_MAX_POSITIONS = 32
_CHUNK = 4096
_SECONDS_A_YEAR = 365.25 * 24 * 3600


@dataclass(frozen=True)
class Problem:
    """What is optimized: a reference policy and the reward of every response.

    Attributes:
        model: The reference policy, a causal language model over `VOCABULARY`.
        tokenizer: Its tokenizer. Padding and end token lie outside the model's vocabulary: it cannot sample them, so
            that every response has `RESPONSE_TOKENS` tokens.
        responses: (N, T) token ids of every response there is.
        rewards: (N,)
        ref_logprobs: (N,) log π_ref(y | `PROMPT`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    responses: torch.Tensor
    rewards: torch.Tensor
    ref_logprobs: torch.Tensor


@dataclass(frozen=True)
class Optimum:
    """The best policy at one β: log π* (N,), and log Z. No policy has a higher E[r] - β KL than β log Z."""

    logprobs: torch.Tensor
    log_z: float


@dataclass(frozen=True)
class Point:
    """Where a policy lies in the reward-KL plane: KL(π ‖ π_ref) in nats a response, and E[r]."""

    kl_nats: float
    reward: float


@dataclass(frozen=True)
class GradientCheck:
    """The log-derivative estimate of ∇E[r] against the exact gradient, along random directions.

    Attributes:
        samples: Responses drawn.
        z_scores: (estimate - exact) / standard error, one a direction; first without, then with a baseline.
        bound: What some |z| exceeds with a probability of `GRADIENT_FALSE_ALARM_RATE` if the estimator is unbiased.
        standard_error: Root mean square over the directions.
        baseline_standard_error: The same with the mean reward taken off every reward, as a value function does.
    """

    samples: int
    z_scores: list[float]
    bound: float
    standard_error: float
    baseline_standard_error: float

    @property
    def holds(self) -> bool:
        """Whether the estimate agrees with the exact gradient along every direction."""
        return all(abs(z) < self.bound for z in self.z_scores)  # a NaN does not


@dataclass(frozen=True)
class EnumerationCost:
    """What Z costs at a length: responses to score, and seconds, both as decimal logarithms."""

    vocab_size: int
    response_tokens: int
    log10_responses: float
    log10_seconds: float
    measured: bool

    @property
    def log10_years(self) -> float:
        """The time in years, as its decimal logarithm."""
        return self.log10_seconds - math.log10(_SECONDS_A_YEAR)


def build_problem(seed: int) -> Problem:
    """The problem of a seed: another seed is another reference policy with the same rewards."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=_HIDDEN_SIZE, word_embed_proj_dim=_HIDDEN_SIZE,
        ffn_dim=4 * _HIDDEN_SIZE, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=_MAX_POSITIONS,
        dropout=0.0, attention_dropout=0.0, init_std=_INIT_STD,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    responses = all_responses(len(VOCABULARY), RESPONSE_TOKENS)
    with torch.no_grad():
        ref_logprobs = response_logprobs(model, responses)
    return Problem(model, _tokenizer(), responses, reward(responses), ref_logprobs)


def all_responses(vocab_size: int, response_tokens: int) -> torch.Tensor:
    """Every sequence of a length, in lexical order: (V^T, T)."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=response_tokens)))


def reward(responses: torch.Tensor) -> torch.Tensor:
    """A point for each step up the alphabet, and two for ending on the prompt's `a`: (N, T) → (N,).

    The last token cannot have both, so that what is best for it depends on the tokens before: `bca`, `bda` and `cda`
    have 4 points, and climbing to the end, `bcd`, has 3.
    """
    prompt = torch.tensor([PROMPT_IDS]).expand(len(responses), -1)
    whole = torch.cat([prompt, responses], 1)
    steps_up = (whole[:, 1:] > whole[:, :-1]).sum(1)
    ends_at_home = responses[:, -1] == PROMPT_IDS[0]
    return steps_up.double() + 2.0 * ends_at_home.double()


def response_index(responses: torch.Tensor) -> torch.Tensor:
    """Where responses stand in the list of all of them: (B, T) → (B,)."""
    places = len(VOCABULARY) ** torch.arange(responses.shape[1] - 1, -1, -1)
    return (responses * places).sum(1)


def text_of(response: torch.Tensor) -> str:
    """A response (T,) as letters."""
    return "".join(VOCABULARY[token] for token in response.tolist())


def response_logprobs(model: Any, responses: torch.Tensor) -> torch.Tensor:
    """log π(y | `PROMPT`) by one forward pass of the model, from its logits alone: (N, T) → (N,)."""
    prompt = torch.tensor([PROMPT_IDS]).expand(len(responses), -1)
    logits = model(input_ids=torch.cat([prompt, responses], 1), use_cache=False).logits
    logprobs = logits[:, len(PROMPT_IDS) - 1 : -1].double().log_softmax(-1)
    sums: torch.Tensor = logprobs.gather(-1, responses[..., None]).squeeze(-1).sum(1)
    return sums


def optimum(ref_logprobs: torch.Tensor, rewards: torch.Tensor, beta: float) -> Optimum:
    """π* = π_ref exp(r / β) / Z."""
    unnormalised = ref_logprobs + rewards / beta
    log_z = unnormalised.logsumexp(0)
    return Optimum(unnormalised - log_z, log_z.item())


def kl_divergence(logprobs: torch.Tensor, other: torch.Tensor) -> float:
    """KL(π ‖ other) = Σ π log(π / other), nats."""
    return float((logprobs.exp() * (logprobs - other)).sum())


def mean_reward(logprobs: torch.Tensor, rewards: torch.Tensor) -> float:
    """E[r] = Σ π r."""
    return float((logprobs.exp() * rewards).sum())


def point_of(problem: Problem, logprobs: torch.Tensor) -> Point:
    """Where a policy lies in the reward-KL plane."""
    return Point(kl_divergence(logprobs, problem.ref_logprobs), mean_reward(logprobs, problem.rewards))


def frontier(problem: Problem, count: int = 200) -> list[Point]:
    """The exact reward-KL curve, traced by β from ∞ (the reference policy) towards 0 (the best response alone)."""
    betas = torch.logspace(3, -1.5, count).tolist()
    traced = [point_of(problem, optimum(problem.ref_logprobs, problem.rewards, beta).logprobs) for beta in betas]
    return [point_of(problem, problem.ref_logprobs), *traced]


def highest_reward(problem: Problem, kl_nats: float) -> float:
    """The curve at a KL: the least of β KL + β log Z over β, which is convex in β and no policy's E[r] exceeds."""

    def bound(log_beta: float) -> float:
        beta = math.exp(log_beta)
        return beta * kl_nats + beta * optimum(problem.ref_logprobs, problem.rewards, beta).log_z

    low, high = math.log(1e-4), math.log(1e6)
    for _ in range(100):  # ternary search: the interval shrinks to 1e-17 of itself
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if bound(left) < bound(right) else (left, high)
    return bound((low + high) / 2)


def dpo_sampling_error(problem: Problem, beta: float, pairs: int) -> float:
    """Expected KL(π ‖ π*) of a DPO that fits its pairs perfectly: what is left is that they are finitely many.

    With δ the error of the fitted rewards, KL ≈ Var_π*(δ) / 2β², and Cov(δ) is the inverse Fisher information of the
    Bradley-Terry model over pairs of different responses drawn from π_ref.
    """
    probabilities, rewards = problem.ref_logprobs.exp(), problem.rewards
    best = optimum(problem.ref_logprobs, rewards, beta).logprobs.exp()
    preference = (rewards[:, None] - rewards[None, :]).sigmoid()
    weights = torch.outer(probabilities, probabilities) * preference * (1 - preference)
    weights.fill_diagonal_(0.0)
    weights = weights / (1 - (probabilities**2).sum())
    information = 2 * (torch.diag(weights.sum(1)) - weights)
    covariance = torch.linalg.pinv(information, hermitian=True) / pairs
    spread = torch.diag(best) - torch.outer(best, best)
    return float((spread @ covariance).trace()) / (2 * beta**2)


def draw_pairs(problem: Problem, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of different responses drawn from π_ref, labelled by Bradley and Terry's P(a ≻ b) = σ(r(a) - r(b)).

    Returns:
        Indices of the chosen and of the rejected responses, (count,) each.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.empty((0, 2), dtype=torch.long)
    while len(pairs) < count:
        drawn = torch.multinomial(problem.ref_logprobs.exp(), 2 * count, replacement=True, generator=generator)
        drawn = drawn.view(count, 2)
        pairs = torch.cat([pairs, drawn[drawn[:, 0] != drawn[:, 1]]])
    first, second = pairs[:count].T
    is_first = (
        torch.rand(count, generator=generator, dtype=torch.float64)
        < (problem.rewards[first] - problem.rewards[second]).sigmoid()
    )
    return torch.where(is_first, first, second), torch.where(is_first, second, first)


def score_vectors(model: Any, responses: torch.Tensor) -> torch.Tensor:
    """∇ log π(y), flat, of each response: (N, D)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logprobs = response_logprobs(model, responses)
    rows = []
    for row in range(len(responses)):
        gradients = torch.autograd.grad(logprobs[row], parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(rows)


def exact_gradient(model: Any, problem: Problem) -> torch.Tensor:
    """∇ Σ π(y) r(y), flat: autograd through the enumeration, no log-derivative anywhere. (D,)"""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    value = (response_logprobs(model, problem.responses).exp() * problem.rewards).sum()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, parameters)]).double()


def check_gradient(problem: Problem, samples: int, seed: int, directions: int = 16) -> GradientCheck:
    """Compare the mean of r(y) ∇ log π(y) over sampled responses, and of (r(y) - E[r]) ∇ log π(y), with ∇E[r].

    Responses come from the project's own sampler. Along each of a few fixed directions an estimate is a mean of
    independent numbers, so that its z-score is normal; Bonferroni's correction covers directions and estimators.
    """
    drawn = generate(
        problem.model, problem.tokenizer, [PROMPT_IDS] * samples,
        max_new_tokens=RESPONSE_TOKENS, temperature=1.0, batch_size=samples, seed=seed,
    )  # fmt: skip
    index = response_index(torch.tensor([response.token_ids for response in drawn]))
    scores = score_vectors(problem.model, problem.responses)
    axes = torch.randn(scores.shape[1], directions, generator=torch.Generator().manual_seed(seed)).double()
    along = scores @ axes  # (N, K)
    exact = exact_gradient(problem.model, problem) @ axes
    rewards = problem.rewards[index][:, None]
    baseline = mean_reward(problem.ref_logprobs, problem.rewards)
    terms = torch.stack([rewards * along[index], (rewards - baseline) * along[index]])  # (2, B, K)
    errors = terms.std(1) / math.sqrt(samples)
    z_scores = (terms.mean(1) - exact) / errors
    standard_error, baseline_standard_error = errors.square().mean(1).sqrt().tolist()
    return GradientCheck(
        samples=samples,
        z_scores=z_scores.flatten().tolist(),
        bound=statistics.NormalDist().inv_cdf(1 - GRADIENT_FALSE_ALARM_RATE / (2 * z_scores.numel())),
        standard_error=standard_error,
        baseline_standard_error=baseline_standard_error,
    )


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """Advantages of one response as the double sum Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} - V_{t+l}), term by term."""
    following = [*values[1:], 0.0]
    return [
        sum(
            (gamma * gae_lambda) ** (later - start) * (rewards[later] + gamma * following[later] - values[later])
            for later in range(start, len(rewards))
        )
        for start in range(len(rewards))
    ]


def gae_error(seed: int, rows: int = 64) -> float:
    """Largest difference between `gae` and `gae_by_definition`, over random rewards, values, γ and λ."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, RESPONSE_TOKENS, generator=generator, dtype=torch.float64)
    coefficients = torch.rand(rows, 2, generator=generator).tolist()
    worst = 0.0
    for row, (gamma, gae_lambda) in enumerate(coefficients):
        part = slice(row, row + 1)
        found, _ = gae(rewards[part], values[part], torch.ones(1, RESPONSE_TOKENS, dtype=torch.bool), gamma, gae_lambda)
        expected = gae_by_definition(rewards[row].tolist(), values[row].tolist(), gamma, gae_lambda)
        worst = max(worst, float((found[0] - torch.tensor(expected, dtype=torch.float64)).abs().max()))
    return worst


@torch.no_grad()
def enumeration_costs(model: Any, longest: int, extrapolate: Sequence[tuple[int, int]]) -> list[EnumerationCost]:
    """Time Z for responses of 1 to `longest` tokens, then extrapolate to other vocabularies and lengths.

    Args:
        model: The tiny model.
        longest: Most response tokens that are measured.
        extrapolate: Vocabulary sizes and lengths. Their time is V^T at the last measured row's time a response: a lower
            bound, since larger models and longer responses take more.
    """
    rows = []
    vocab_size = len(VOCABULARY)
    _seconds_of_z(model, 1)  # not counted: it pays for what only a first call costs
    for length in range(1, longest + 1):
        rows.append(_cost(vocab_size, length, math.log10(_seconds_of_z(model, length)), measured=True))
    per_response = rows[-1].log10_seconds - rows[-1].log10_responses
    for size, length in extrapolate:
        rows.append(_cost(size, length, per_response + length * math.log10(size), measured=False))
    return rows


def _seconds_of_z(model: Any, length: int) -> float:
    started = time.perf_counter()
    responses = all_responses(len(VOCABULARY), length)
    logprobs = torch.cat([response_logprobs(model, part) for part in torch.split(responses, _CHUNK)])
    optimum(logprobs, reward(responses), beta=1.0)
    return time.perf_counter() - started


def _cost(vocab_size: int, length: int, log10_seconds: float, *, measured: bool) -> EnumerationCost:
    return EnumerationCost(vocab_size, length, length * math.log10(vocab_size), log10_seconds, measured)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; padding and end token behind them."""
    words = {word: number for number, word in enumerate([*VOCABULARY, "<pad>", "<eos>"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
