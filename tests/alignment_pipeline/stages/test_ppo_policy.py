import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.models import new_scorer, save_trained
from alignment_pipeline.ppo.rollout import Rollout
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.sequences import Response, pack
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.ppo_policy import rollout_metrics, train_ppo

FLOAT32 = 1e-6


@pytest.fixture
def toy(tmp_path: Path, tiny_models: Any) -> Any:
    """PPO against a small scorer that is nobody's preference: what its random head likes can be learned in seconds."""
    trunk = tiny_models.save(tiny_models.build("opt"), tmp_path / "trunk")
    scorer = new_scorer(tiny_models.save(tiny_models.build("opt", seed=7), tmp_path / "other") / "model")
    torch.manual_seed(0)
    torch.nn.init.normal_(scorer.score.weight, std=0.5)

    def train(weight: float | None = None, **config: Any) -> dict[str, list[float]]:
        if weight is not None:
            scorer.score.weight.data[0, 0] = weight
            scorer.save_pretrained(tmp_path / "reward" / "model")
        else:
            save_trained(scorer, tiny_models.tokenizer, tmp_path / "reward")
        write_jsonl(tmp_path / "dataset" / "train.jsonl", ({"prompt": f"{number}:"} for number in [*range(64)] * 2))
        inputs = {"trunk": trunk, "reward_model": tmp_path / "reward", "dataset": tmp_path / "dataset"}
        settings = {"method": "full", "learning_rate": 2e-2, "updates": 20, "ppo_epochs": 4, "rollout_batch_size": 64,
                    "minibatch_size": 32, "max_new_tokens": 2, "missing_eos_penalty": 0.0, "kl_coef": 0.0}  # fmt: skip
        output = tmp_path / "output"
        output.mkdir()
        log = ProgressLog(tmp_path / "progress.jsonl")
        spec = StageSpec(PpoConfig(**(settings | config)), inputs, output, tmp_path / "work", seed=0)
        result = train_ppo(spec, log)
        series = metric_series(log.path).values()
        history = {name: [metrics[name] for metrics in series] for name in next(iter(series))}
        return history | {"gain": [result.metrics["objective/score_gain"]]}

    return train


@pytest.mark.parametrize(
    ("config", "rise"),
    [
        # Full training finds the one or two tokens that the scorer likes most: it rises by 2.4, nearly to the top.
        ({}, 1.5),
        # An adapter of a random trunk, its embeddings frozen, shifts the distribution only: 0.5. A mean over three
        # rollouts has a standard error of 0.06, so that 0.35 is four of the difference's.
        (
            {
                "method": "lora",
                "lora_rank": 8,
                "lora_alpha": 16,
                "learning_rate": 1e-2,
                "max_new_tokens": 1,
                "updates": 40,
            },
            0.35,
        ),
    ],
    ids=["full", "lora"],
)
def test_the_score_rises(toy: Any, config: dict[str, Any], rise: float) -> None:
    history = toy(**config)
    scores = history["objective/score"]
    assert statistics.fmean(scores[-3:]) > statistics.fmean(scores[:3]) + rise
    assert history["gain"][0] > rise
    assert history["objective/kl"][0] == 0.0  # the first rollout is the reference's own
    assert history["objective/kl"][-1] > 0.5


def test_a_kl_penalty_keeps_the_policy_near_the_reference(toy: Any) -> None:
    history = toy(kl_coef=3.0)
    assert statistics.fmean(history["objective/kl"][-3:]) < 2.0  # nats a response; 8.8 without the penalty


def test_gradients_that_are_not_finite_stop_the_stage_and_publish_nothing(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"PPO's gradient is not finite.*nothing was published"):
        toy(weight=float("nan"))
    assert list((tmp_path / "output").iterdir()) == []


def test_too_few_prompts_for_a_rollout_are_an_error_with_the_numbers(toy: Any) -> None:
    with pytest.raises(DataError, match=r"Found 64 training prompts, expected at least .* \(96\)"):
        toy(rollout_batch_size=96)  # the 128 rows hold 64 distinct prompts


def test_rollout_metrics_of_a_hand_made_rollout() -> None:
    batch = pack([[5], [6, 7]], [[8, 1], [9]], pad_id=0)
    mask = batch.response_mask  # columns: [no, yes, yes], [no, no, yes]
    returns = torch.where(mask, torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 2.0]]), float("nan"))
    values = torch.where(mask, torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]), float("nan"))
    rollout = Rollout(
        batch, [Response([8, 1], "", True), Response([9], "", False)], values, values, values, returns,
        scores=torch.tensor([1.0, 3.0]), kl_nats=torch.tensor([0.5, 1.5]), ended=torch.tensor([True, False]),
    )  # fmt: skip
    metrics = rollout_metrics(rollout, PpoConfig(kl_coef=0.1))
    # Errors 0, 1, -1 with variance 2/3; returns 1, 3, 2 with variance 2/3.
    expected = {
        "objective/score": 2.0,
        "objective/kl": 1.0,
        "objective/reward": 1.9,
        "response/mean_tokens": 1.5,
        "response/eos_rate": 0.5,
        "value/explained_variance": 0.0,
    }
    assert metrics == pytest.approx(expected, abs=FLOAT32)


def test_every_update_reports_the_metrics_of_the_field(smoke: Any, tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    smoke.run("ppo_policy", tmp_path / "run", log)
    series = metric_series(log.path)
    assert list(series) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    names = {
        "objective/score", "objective/kl", "objective/reward", "response/mean_tokens", "response/eos_rate",
        "value/explained_variance", "loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction",
        "policy/entropy", "train/grad_norm", "train/tokens",
    }  # fmt: skip
    assert all(set(metrics) == names for metrics in series.values())
    tokens = [metrics["train/tokens"] for metrics in series.values()]
    assert tokens == sorted(tokens) and tokens[0] > 0
