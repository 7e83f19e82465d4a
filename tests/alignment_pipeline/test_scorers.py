from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import RecipeError
from alignment_pipeline.generation import Response
from alignment_pipeline.models import load_causal_lm
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.rollout import Prompt
from alignment_pipeline.reward import RewardScorer
from alignment_pipeline.scorers import FunctionScorer, RewardModelScorer, SharedTrunkScorer

# Batched and one-by-one products, and W + s·BA merged or not, add in another order: float32, scores of size 1 to 10.
ROUNDING = 1e-4
# Not in the order of their lengths, by which batches are made.
PROMPTS = [Prompt("a", "A", [18, 5, 77, 42, 9, 130, 131]), Prompt("b", "B", [91]), Prompt("c", "C", [7, 12, 250])]
RESPONSES = [Response([3, 9], "x", False), Response([99, 98, 97, 96, 1], "xyz", True), Response([44, 1], "xy", True)]

RewardArtifact = Callable[[str], tuple[Path, Path]]


def one_by_one(scorer: Any) -> list[float]:
    """The score head's output at each row's last token, no batch and no padding."""
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt.token_ids + response.token_ids])
            scores.append(scorer.score(scorer.base_model(input_ids=ids).last_hidden_state[0, -1]).item())
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("architecture", ["opt", "opt_projected", "gpt2", "llama"])
def test_a_reward_model_gives_the_same_scores_in_its_own_memory_and_on_the_policys_trunk(
    tiny_models: Any, reward_artifact: RewardArtifact, architecture: str, batch_size: int
) -> None:
    trunk, reward = reward_artifact(architecture)
    scorer = RewardScorer.load(reward, trunk)
    policy = PolicyWithValue(load_causal_lm(trunk / "model"), PpoConfig(lora_rank=2), reward)
    with torch.no_grad():  # a trained policy: its adapter has no part in the scores
        for parameter in policy.policy_parameters():
            parameter.normal_(std=0.2)
    expected = one_by_one(scorer.model)
    apart = RewardModelScorer(scorer, tiny_models.tokenizer, batch_size)(PROMPTS, RESPONSES)
    assert apart == pytest.approx(expected, abs=ROUNDING)
    shared = SharedTrunkScorer(policy, scorer.encoder, batch_size)(PROMPTS, RESPONSES)
    assert shared == pytest.approx(expected, abs=ROUNDING)
    short = replace(scorer, encoder=replace(scorer.encoder, max_tokens=3))
    apart = RewardModelScorer(short, tiny_models.tokenizer, batch_size)(PROMPTS, RESPONSES)
    cut = SharedTrunkScorer(policy, short.encoder, batch_size)(PROMPTS, RESPONSES)
    assert cut == pytest.approx(apart, abs=ROUNDING) and cut != pytest.approx(shared, abs=ROUNDING)
    assert min(abs(a - b) for a, b in ((shared[0], shared[1]), (shared[1], shared[2]))) > 10 * ROUNDING


def function_in(folder: Path, source: str, name: str = "reward") -> str:
    path = folder / "rewards.py"
    path.write_text(source)
    return f"{path}:{name}"


def test_a_function_gets_texts_and_its_numbers_are_the_scores(tmp_path: Path) -> None:
    source = "def reward(prompts, responses):\n    return [ord(p) + len(r) for p, r in zip(prompts, responses)]\n"
    scores = FunctionScorer(function_in(tmp_path, source))(PROMPTS, RESPONSES)
    assert scores == [66.0, 69.0, 69.0]
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize("given", ["(1, 2, 3)", "iter([1, 2, 3])", "__import__('numpy').array([1, 2, 3])"])
def test_a_function_may_return_any_sequence_of_numbers(tmp_path: Path, given: str) -> None:
    scorer = FunctionScorer(function_in(tmp_path, f"def reward(prompts, responses):\n    return {given}\n"))
    assert scorer(PROMPTS, RESPONSES) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [1.0, 2.0]", r"reward returned 2 scores for 3 responses, expected one for each"),
        ("return [1.0] * 4", r"reward returned 4 scores for 3 responses, expected one for each"),
        ("return ['good', 'bad', 'bad']", r"reward failed: ValueError\(.*could not convert string to float: 'good'"),
        ("return [None] * 3", r"reward failed: TypeError\("),
        ("return 1.0", r"reward failed: TypeError\(.*not iterable"),
        ("return None", r"reward failed: TypeError\(.*not iterable"),
        ("raise KeyError('no such test')", r"reward failed: KeyError\('no such test'\)"),
        ("return responses[7]", r"reward failed: IndexError\("),
    ],
)
def test_what_a_function_does_wrong_is_said_with_its_name(tmp_path: Path, body: str, expected: str) -> None:
    scorer = FunctionScorer(function_in(tmp_path, f"def reward(prompts, responses):\n    {body}\n"))
    with pytest.raises(RecipeError, match=r"^ppo\.reward_function: .*rewards\.py:" + expected):
        scorer(PROMPTS, RESPONSES)


def test_a_score_that_is_not_finite_is_left_to_the_rollouts_check(tmp_path: Path) -> None:
    scorer = FunctionScorer(function_in(tmp_path, "def reward(p, r):\n    return [float('nan')] * len(r)\n"))
    assert [score != score for score in scorer(PROMPTS, RESPONSES)] == [True] * 3


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("def other(p, r): ...\n", "reward", r"has no function 'reward', expected one of those in it: other"),
        ("reward = 3\n", "reward", r"has no function 'reward', expected one of those in it: none"),
        ("def reward(:\n", "reward", r"cannot be imported: SyntaxError\("),
        ("import no_such_module\n", "reward", r"cannot be imported: ModuleNotFoundError\("),
    ],
)
def test_a_file_without_the_function_is_refused_before_anything_is_sampled(
    tmp_path: Path, source: str, name: str, expected: str
) -> None:
    with pytest.raises(RecipeError, match=r"^ppo\.reward_function: .*rewards\.py " + expected):
        FunctionScorer(function_in(tmp_path, source, name))


@pytest.mark.parametrize("reference", ["gone.py:reward", "rewards.py", ":reward", "", "folder:reward"])
def test_a_reference_that_names_no_file_and_function_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    function_in(tmp_path, "def reward(p, r): ...\n")
    with pytest.raises(RecipeError, match=r"found '.*', expected file\.py:function with a file that exists"):
        FunctionScorer(reference)


def test_a_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rewards.txt").write_text("hello")
    with pytest.raises(RecipeError, match=r"rewards\.txt is not a Python file, expected one"):
        FunctionScorer(f"{tmp_path / 'rewards.txt'}:reward")


def test_a_reward_file_may_define_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Rule:\n"
        "    weight: float = 2.0\n\ndef reward(prompts, responses):\n    return [Rule().weight for _ in responses]\n"
    )
    scorer = FunctionScorer(f"{path}:reward")
    assert scorer([Prompt("a", "A", [1])], [Response([2], "x", False)]) == [2.0]
