import pytest
import torch

from alignment_pipeline.generation import Response
from alignment_pipeline.ppo.metrics import explained_variance, rollout_metrics
from alignment_pipeline.ppo.rollout import Prompt, Rollout
from alignment_pipeline.sequences import pack

FLOAT32 = 1e-6  # a few float32 operations on numbers of size 1
NAN = float("nan")


def test_rollout_metrics_of_a_hand_made_rollout() -> None:
    batch = pack([[5], [6, 7]], [[8, 1], [9]], pad_id=0)
    mask = torch.tensor([[True, True], [True, False]])
    rollout = Rollout(
        prompts=[Prompt("a", "A", [5]), Prompt("b", "B", [6, 7])],
        responses=[Response([8, 1], "", True), Response([9], "", False)],
        batch=batch,
        mask=mask,
        old_logprobs=torch.tensor([[-1.0, -2.0], [-4.0, 0.0]]),
        old_values=torch.tensor([[1.0, 2.0], [3.0, NAN]]),
        entropies=torch.tensor([[1.0, 3.0], [5.0, NAN]]),
        advantages=torch.zeros(2, 2),
        returns=torch.tensor([[1.0, 3.0], [2.0, NAN]]),
        scores=torch.tensor([1.0, 3.0]),
        rewarded_scores=torch.tensor([0.5, 1.5]),
        penalty_kl_nats=torch.tensor([1.0, 2.0]),
        kl_nats=torch.tensor([0.5, 1.5]),
        kl_nats_at_1=torch.tensor([0.25, 0.5]),
        kl_nats_k3=torch.tensor([0.75, 1.75]),
        ended=torch.tensor([True, False]),
        sampling_s=2.0,
        scoring_s=3.0,
    )
    expected = {
        "objective/score": 2.0,
        "objective/score_std": 1.0,
        "objective/rewarded_score": 1.0,
        "objective/reward": 1.0 - 0.15,  # less 0.1 a nat of what is penalised
        "objective/kl": 1.0,
        "objective/kl_k3": 1.25,
        "objective/kl_at_temperature_1": 0.375,
        "objective/kl_coef": 0.1,
        "objective/entropy": 3.5,  # -log p of a response: 3 and 4
        "policy/entropy": 3.0,  # exact, a token: 1, 3, 5
        "response/mean_tokens": 1.5,
        "response/eos_rate": 0.5,
        "value/mean": 2.0,
        "value/return_mean": 2.0,
        "value/explained_variance": 0.0,  # errors 0, 1, -1 and returns 1, 3, 2: variance 2/3 both
        "time/sampling_s": 2.0,
        "time/scoring_s": 3.0,
        "time/rollout_s": 5.0,
    }
    assert rollout_metrics(rollout, kl_coef=0.1) == pytest.approx(expected, abs=FLOAT32)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones() -> None:
    returns = torch.tensor([[1.0, 3.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask) == pytest.approx(0.0, abs=FLOAT32)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0, abs=FLOAT32)  # 1 - 2²
