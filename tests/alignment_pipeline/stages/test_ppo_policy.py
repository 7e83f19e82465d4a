import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import DataError, ModelError, RecipeError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import load_scorer, load_tokenizer, new_scorer, save_trained
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.progress import ProgressLog, metric_series, read_progress
from alignment_pipeline.scorers import FunctionScorer, RewardModelScorer, SharedTrunkScorer
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages import ppo_policy
from alignment_pipeline.stages.ppo_policy import NON_FINITE_FILE, train_ppo

# What a random head likes, learned in seconds.
SETTINGS: dict[str, Any] = {
    "method": "full", "learning_rate": 2e-2, "updates": 20, "ppo_epochs": 4, "rollout_batch_size": 64,
    "minibatch_size": 32, "max_new_tokens": 2, "missing_eos_penalty": 0.0, "kl_coef": 0.0,
}  # fmt: skip
# A round, whole, in a tenth of a second.
SHORT: dict[str, Any] = {"updates": 2, "rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "lora_rank": 2}


class Toy:
    """PPO of a small random trunk against a small random reward model, or a function."""

    def __init__(self, folder: Path, tiny_models: Any) -> None:
        self.folder = folder
        self.tokenizer = tiny_models.tokenizer
        trunk = tiny_models.save(tiny_models.build("opt"), folder / "trunk")
        self.scorer = new_scorer(tiny_models.save(tiny_models.build("opt", seed=7), folder / "other") / "model")
        torch.manual_seed(0)
        torch.nn.init.normal_(self.scorer.score.weight, std=0.5)
        save_trained(self.scorer, tiny_models.tokenizer, folder / "reward")
        rows = ({"prompt": f"{number}:", "prompt_id": f"id {number}"} for number in [*range(64)] * 2)
        write_jsonl(folder / "dataset" / "train.jsonl", rows)
        self.inputs = {"trunk": trunk, "reward_model": folder / "reward", "dataset": folder / "dataset"}
        self.log_path = folder / "progress.jsonl"

    def spec(self, **config: Any) -> StageSpec[PpoConfig]:
        output = self.folder / "output"
        output.mkdir(exist_ok=True)
        return StageSpec(PpoConfig(**(SETTINGS | config)), self.inputs, output, self.folder / "work", seed=0)

    def train(self, **config: Any) -> StageResult:
        return train_ppo(self.spec(**config), ProgressLog(self.log_path))

    def history(self) -> dict[str, list[float]]:
        series = metric_series(self.log_path).values()
        return {name: [metrics[name] for metrics in series] for name in next(iter(series))}

    def rewarded_by(self, source: str) -> str:
        """A reward function in a file, and no reward model."""
        self.inputs.pop("reward_model", None)
        (self.folder / "rewards.py").write_text(source)
        return f"{self.folder / 'rewards.py'}:reward"


@pytest.fixture
def toy(tmp_path: Path, tiny_models: Any) -> Toy:
    return Toy(tmp_path, tiny_models)


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
def test_the_score_rises(toy: Toy, config: dict[str, Any], rise: float) -> None:
    result, history = toy.train(**config), toy.history()
    scores = history["objective/score"]
    assert statistics.fmean(scores[-3:]) > statistics.fmean(scores[:3]) + rise
    assert result.metrics["objective/score_gain"] > rise
    assert history["objective/kl"][0] == 0.0  # the first rollout is the reference's own
    assert history["objective/kl"][-1] > 0.5


def test_a_kl_penalty_keeps_the_policy_near_the_reference(toy: Toy) -> None:
    toy.train(kl_coef=3.0)
    assert statistics.fmean(toy.history()["objective/kl"][-3:]) < 2.0  # nats a response; 8.8 without the penalty


def test_an_adaptive_coefficient_brings_the_kl_to_its_target_under_normalised_scores(toy: Toy) -> None:
    target = 1.5
    result = toy.train(kl_coef=0.05, kl_target_nats=target, kl_horizon=64, score_normalization="running", updates=40)
    history = toy.history()
    # Overshoots at first (the coefficient starts far too low), and comes back: within a factor of 1.6 at the end.
    assert target / 1.6 < statistics.fmean(history["objective/kl"][-8:]) < target * 1.6
    assert max(history["objective/kl"]) > 1.6 * target
    assert history["objective/kl_coef"][-1] > 0.2
    assert result.metrics["objective/score_gain"] > 0.3


def test_a_reward_function_is_learned_without_a_reward_model(toy: Toy) -> None:
    reference = toy.rewarded_by("def reward(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    toy.train(reward_function=reference, updates=12)
    scores = toy.history()["objective/score"]
    assert statistics.fmean(scores[-3:]) > statistics.fmean(scores[:3]) + 0.3


def test_a_broken_reward_function_stops_the_stage_with_its_name(toy: Toy) -> None:
    reference = toy.rewarded_by("def reward(prompts, responses):\n    return [1.0]\n")
    with pytest.raises(RecipeError, match=r"rewards\.py:reward returned 1 scores for 8 responses"):
        toy.train(**SHORT, reward_function=reference)


class TestNumbersThatAreNotFinite:
    def test_a_score_names_its_rows_and_publishes_nothing(self, toy: Toy) -> None:
        reference = toy.rewarded_by(
            "def reward(prompts, responses):\n"
            "    return [float('nan') if p in ('3:', '7:') else 0.0 for p in prompts]\n"
        )  # fmt: skip
        with pytest.raises(ModelError, match=r"PPO update 1: Found the score .* nothing was published") as caught:
            toy.train(reward_function=reference)
        assert list((toy.folder / "output").iterdir()) == []
        path = toy.folder / "work" / NON_FINITE_FILE
        record = json.loads(path.read_text())
        assert sorted(record["prompt_ids"]) == ["id 3", "id 7"]
        assert record["update"] == 1 and "the score" in record["problem"]
        assert str(path) in str(caught.value) and "ppo.learning_rate" in str(caught.value)
        notes = [line["text"] for line in read_progress(toy.log_path) if line["kind"] == "note"]
        assert any(note.startswith("Update 1: Found the score") and "id 3" in note for note in notes)

    def test_a_reward_model_with_a_nan_in_it(self, toy: Toy) -> None:
        toy.scorer.score.weight.data[0, 0] = float("nan")
        toy.scorer.save_pretrained(toy.folder / "reward" / "model")
        with pytest.raises(ModelError, match=r"PPO update 1: Found the score"):
            toy.train()
        assert list((toy.folder / "output").iterdir()) == []
        assert len(json.loads((toy.folder / "work" / NON_FINITE_FILE).read_text())["prompt_ids"]) == 64

    def test_a_gradient(self, toy: Toy) -> None:
        reference = toy.rewarded_by("def reward(p, r):\n    return [1e38] + [0.0] * (len(r) - 1)\n")
        with pytest.raises(ModelError, match=r"PPO update 1: Found a gradient that is"):
            toy.train(**SHORT, reward_function=reference)
        assert len(json.loads((toy.folder / "work" / NON_FINITE_FILE).read_text())["prompt_ids"]) == 8
        assert list((toy.folder / "output").iterdir()) == []


def test_too_few_prompts_for_a_rollout_are_an_error_with_the_numbers(toy: Toy) -> None:
    with pytest.raises(DataError, match=r"Found 64 training prompts, expected at least .* \(96\)"):
        toy.train(rollout_batch_size=96)  # the 128 rows hold 64 distinct prompts


class TestWhereScoresComeFrom:
    @pytest.mark.parametrize(
        ("method", "expected"), [("lora", SharedTrunkScorer), ("full", RewardModelScorer)], ids=["lora", "full"]
    )
    def test_a_reward_adapter_moves_in_with_a_policy_that_is_an_adapter_too(
        self, reward_artifact: Callable[[str], tuple[Path, Path]], toy: Toy, method: str, expected: type
    ) -> None:
        toy.inputs["trunk"], toy.inputs["reward_model"] = reward_artifact("opt")
        spec = toy.spec(**SHORT | {"method": method})
        policy, score = ppo_policy._policy_and_score(spec, toy.tokenizer, "cpu")
        assert isinstance(score, expected)
        assert policy.holds_reward_adapter == (method == "lora")

    def test_a_whole_reward_model_stays_beside_it(self, toy: Toy) -> None:
        spec = toy.spec(**SHORT | {"method": "lora"})
        policy, score = ppo_policy._policy_and_score(spec, toy.tokenizer, "cpu")
        assert isinstance(score, RewardModelScorer)
        assert not policy.holds_reward_adapter

    def test_a_reward_function_stands_in_for_a_reward_model(self, toy: Toy) -> None:
        spec = toy.spec(**SHORT, reward_function=toy.rewarded_by("def reward(p, r): ...\n"))
        _, score = ppo_policy._policy_and_score(spec, toy.tokenizer, "cpu")
        assert isinstance(score, FunctionScorer)

    def test_both_ways_train_the_same_policy(
        self, reward_artifact: Callable[[str], tuple[Path, Path]], toy: Toy
    ) -> None:
        toy.inputs["trunk"], toy.inputs["reward_model"] = reward_artifact("opt")
        settings = SHORT | {"method": "lora"}
        shared = toy.train(**settings)
        merged = load_scorer(toy.inputs["reward_model"], toy.inputs["trunk"])
        toy.inputs["reward_model"] = toy.folder / "merged"
        save_trained(merged, toy.tokenizer, toy.folder / "merged")
        apart = toy.train(**settings)
        # Adapters merged or not: float32 rounding of scores of size 1 to 10.
        assert apart.metrics["objective/score"] == pytest.approx(shared.metrics["objective/score"], abs=1e-4)


class TestTheSavedPolicyIsTheTrainedOne:
    @pytest.fixture(params=["lora", "full"])
    def trained(self, request: pytest.FixtureRequest, toy: Toy) -> tuple[StageSpec[PpoConfig], PolicyWithValue]:
        """A policy that is unlike its trunk, and was written."""
        spec = toy.spec(**SHORT | {"method": request.param, "value_trunk": "separate"})
        policy, _ = ppo_policy._policy_and_score(spec, toy.tokenizer, "cpu")
        with torch.no_grad():
            for parameter in policy.policy_parameters():
                parameter.add_(0.01)
        save_trained(policy.model, load_tokenizer(toy.inputs["trunk"]), spec.output_dir)
        return spec, policy

    def test_it_passes_where_it_is_so(self, trained: tuple[StageSpec[PpoConfig], PolicyWithValue]) -> None:
        check = ppo_policy._saved_is_trained(*trained)
        assert (check.name, check.passed, check.blocking) == ("saved_policy_is_the_trained_one", True, True)

    def test_it_fails_where_a_single_number_in_the_file_is_another(
        self, trained: tuple[StageSpec[PpoConfig], PolicyWithValue]
    ) -> None:
        (path,) = trained[0].output_dir.rglob("*.safetensors")
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        tensors[name].view(-1)[0] += 0.001
        save_file(tensors, path, metadata={"format": "pt"})
        check = ppo_policy._saved_is_trained(*trained)
        assert not check.passed and "read back" in check.detail

    def test_it_fails_where_nothing_was_trained(self, toy: Toy) -> None:
        for method in ("lora", "full"):
            spec = toy.spec(**SHORT | {"method": method})
            policy, _ = ppo_policy._policy_and_score(spec, toy.tokenizer, "cpu")
            save_trained(policy.model, load_tokenizer(toy.inputs["trunk"]), spec.output_dir)
            assert not ppo_policy._saved_is_trained(spec, policy).passed

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_a_run_reports_it(self, toy: Toy, method: str) -> None:
        checks = toy.train(**SHORT | {"method": method}).checks
        assert [(check.name, check.passed) for check in checks] == [("saved_policy_is_the_trained_one", True)]


def test_every_response_is_recorded_and_the_samples_are_some_of_them(toy: Toy) -> None:
    toy.train(**SHORT | {"updates": 3})
    rollouts, samples = (
        read_jsonl(toy.folder / "output" / "extras" / name) for name in ("rollouts.jsonl", "samples.jsonl")
    )
    assert [row["update"] for row in rollouts] == [1] * 8 + [2] * 8 + [3] * 8
    assert samples == [*rollouts[0:4], *rollouts[8:12], *rollouts[16:20]]
    names = {"update", "prompt_id", "prompt", "response", "score", "kl_nats", "tokens", "ended"}
    assert all(set(row) == names for row in rollouts)
    assert all(row["prompt_id"] == f"id {row['prompt'].removesuffix(':')}" for row in rollouts)
    assert {row["kl_nats"] for row in rollouts[:8]} == {0.0}
    history = toy.history()
    for name, column in ("objective/score", "score"), ("objective/kl", "kl_nats"):
        means = [statistics.fmean(row[column] for row in rollouts[start : start + 8]) for start in (0, 8, 16)]
        assert history[name] == pytest.approx(means, abs=1e-5)  # float32 means of numbers of size 1
    assert (toy.folder / "output" / "extras" / "score_kl.png").stat().st_size > 1000


def test_rollouts_are_to_training_prompts_of_the_dataset(smoke: Any) -> None:
    rollouts = read_jsonl(smoke.artifact("ppo_policy") / "extras" / "rollouts.jsonl")
    config = smoke.config("ppo_policy")
    assert len(rollouts) == config.updates * config.rollout_batch_size
    rows = read_jsonl(smoke.artifact("formatted_dataset") / "train.jsonl")
    prompts = {row["prompt_id"]: row["prompt"] for row in rows}
    assert all(prompts[row["prompt_id"]] == row["prompt"] for row in rollouts)


def test_the_reported_score_and_kl_are_means_over_the_last_tenth_of_the_updates(toy: Toy) -> None:
    metrics, history = toy.train(**SHORT | {"updates": 20}).metrics, toy.history()
    for name in ("objective/score", "objective/kl"):
        assert metrics[name] == pytest.approx(statistics.fmean(history[name][-2:]))
    assert metrics["objective/score_gain"] == metrics["objective/score"] - history["objective/score"][0]
    assert metrics["train/updates"] == 20


def test_every_update_reports_the_metrics_of_the_field(smoke: Any, tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    smoke.run("ppo_policy", tmp_path / "run", log)
    series = metric_series(log.path)
    assert list(series) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    names = {
        "objective/score", "objective/score_std", "objective/rewarded_score", "objective/reward", "objective/kl",
        "objective/kl_k3", "objective/kl_at_temperature_1", "objective/kl_coef", "objective/entropy",
        "policy/entropy", "policy/approx_kl", "policy/ratio", "policy/clip_fraction",
        "value/mean", "value/return_mean", "value/explained_variance", "value/clip_fraction",
        "response/mean_tokens", "response/eos_rate", "loss/policy", "loss/value",
        "train/grad_norm", "train/steps", "train/learning_rate", "train/tokens",
        "time/sampling_s", "time/scoring_s", "time/rollout_s", "time/update_s",
    }  # fmt: skip
    assert all(set(metrics) == names for metrics in series.values())
    tokens = [metrics["train/tokens"] for metrics in series.values()]
    assert tokens == sorted(tokens) and tokens[0] > 0
