import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from alignment_pipeline.classifier import ClassifierScorer
from alignment_pipeline.decoding import respond
from alignment_pipeline.errors import ModelError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stages.evaluation import evaluate_policy, exact_kl, summarize
from alignment_pipeline.tokenization import encode

PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131]]
RESPONSES = [[44, 45, 1], [99, 98, 97, 96, 95, 1], [3]]
ROUNDING = 1e-4  # sums of up to six divergences of 300 float32 terms each, of size 1 to 10 in all


def naive_kl(policy: Any, trunk: Any, prompt: list[int], response: list[int], temperature: float) -> float:
    total = 0.0
    for number in range(len(response)):
        prefix = torch.tensor([prompt + response[:number]])
        with torch.inference_mode():
            p, q = ((model(prefix).logits[0, -1].double() / temperature).softmax(-1) for model in (policy, trunk))
        total += (p * (p / q).log()).sum().item()
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_the_kl_is_the_sum_over_the_vocabulary_at_each_token_of_the_response(
    tiny_models: Any, architecture: str, temperature: float
) -> None:
    policy, trunk = tiny_models.build(architecture, seed=0), tiny_models.build(architecture, seed=1)
    expected = [naive_kl(policy, trunk, *pair, temperature) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    for batch_size in (1, 3):
        found = exact_kl(policy, trunk, PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id, batch_size, temperature)
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    assert min(expected) > 0.1


def test_a_model_has_no_divergence_from_itself(tiny_models: Any) -> None:
    model, twin = tiny_models.build("opt"), tiny_models.build("opt")
    assert exact_kl(model, twin, PROMPTS, RESPONSES, tiny_models.tokenizer.pad_token_id, 2) == [0.0, 0.0, 0.0]


def test_a_divergence_is_never_negative(tiny_models: Any) -> None:
    generator = random.Random(0)
    prompts = [[generator.randrange(2, 300) for _ in range(4)] for _ in range(64)]
    policy, trunk = tiny_models.build("opt"), tiny_models.build("opt")
    with torch.no_grad():  # so close that rounding decides the sign of many terms
        for parameter in policy.parameters():
            parameter.mul_(1 + 1e-6)
    assert min(exact_kl(policy, trunk, prompts, prompts, tiny_models.tokenizer.pad_token_id, 16)) >= 0


def test_an_evaluation_has_one_row_for_each_test_prompt_and_its_summary_is_that_of_the_rows(smoke: Any) -> None:
    folder = smoke.artifact("ppo_evaluation")
    rows = read_jsonl(folder / "examples.jsonl")
    test_prompts = {row["prompt_id"] for row in read_jsonl(smoke.artifact("formatted_dataset") / "test.jsonl")}
    assert len({row["prompt_id"] for row in rows}) == len(rows) == min(24, len(test_prompts))
    assert {row["prompt_id"] for row in rows} <= test_prompts
    assert {row["judge"] for row in rows} == {"gold_rule"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"] == summarize(rows) == dict(smoke.results["ppo_evaluation"].metrics)
    assert summary["judge_title"] == "gold score"
    assert summary["metrics"]["eval/kl_nats"] > 0


def test_all_policies_answer_the_same_prompts_and_the_trunk_is_at_no_distance_from_itself(smoke: Any) -> None:
    prompts = {
        asset: [row["prompt_id"] for row in read_jsonl(smoke.artifact(asset) / "examples.jsonl")]
        for asset in ("base_evaluation", "sft_evaluation", "ppo_evaluation", "dpo_evaluation")
    }
    assert len(set(map(tuple, prompts.values()))) == 1
    assert {row["kl_nats"] for row in read_jsonl(smoke.artifact("sft_evaluation") / "examples.jsonl")} == {0.0}


def test_without_a_reward_model_there_is_no_learned_score(smoke: Any, tmp_path: Path) -> None:
    spec = smoke.spec("sft_evaluation", tmp_path, prompts=4, max_new_tokens=4)
    spec = dataclasses.replace(spec, inputs={name: spec.inputs[name] for name in ("dataset", "policy", "trunk")})
    result = evaluate_policy(spec, ProgressLog(tmp_path / "progress.jsonl"))
    assert "eval/learned_score" not in result.metrics
    assert {row["learned_score"] for row in read_jsonl(spec.output_dir / "examples.jsonl")} == {None}


def sft_evaluation_without_reward_model(smoke: Any, folder: Path, **inputs: Path) -> Any:
    spec = smoke.spec("sft_evaluation", folder, prompts=8, max_new_tokens=6, judge="reward_classifier")
    kept = {name: spec.inputs[name] for name in ("dataset", "policy", "trunk")}
    return dataclasses.replace(spec, inputs=kept | inputs)


def test_a_reward_classifier_judges_prompt_and_response_by_its_labels_share_and_scores_by_its_logit(
    smoke: Any, tmp_path: Path, tokenizer: Any
) -> None:
    labels = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=len(tokenizer), dim=16, hidden_dim=32, n_layers=1, n_heads=2,
                         pad_token_id=tokenizer.pad_token_id, initializer_range=0.4, **labels)
    )  # fmt: skip
    classifier = tmp_path / "classifier"
    model.save_pretrained(classifier / "model")
    tokenizer.save_pretrained(classifier / "model")
    (classifier / "summary.json").write_text('{"label": "NEGATIVE"}')
    spec = sft_evaluation_without_reward_model(smoke, tmp_path / "run", reward_classifier=classifier)
    result = evaluate_policy(spec, ProgressLog(tmp_path / "progress.jsonl"))
    rows = read_jsonl(spec.output_dir / "examples.jsonl")
    scorer = ClassifierScorer.load(classifier, "NEGATIVE")
    texts = [row["prompt"] + row["response"] for row in rows]
    rounding = 1e-5  # float32 in batches of another shape
    assert [row["judge_score"] for row in rows] == pytest.approx(scorer.probabilities(texts, 1), abs=rounding)
    assert [row["learned_score"] for row in rows] == pytest.approx(scorer.scores(texts, 1), abs=rounding)
    assert result.metrics["eval/learned_score"] == pytest.approx(sum(scorer.scores(texts, 1)) / 8, abs=rounding)
    assert {row["judge"] for row in rows} == {"reward_classifier"}
    assert json.loads((spec.output_dir / "summary.json").read_text())["judge_title"] == "P(label)"
    assert len({row["judge_score"] for row in rows}) > 4


def test_a_judge_that_is_a_classifier_needs_one(smoke: Any, tmp_path: Path) -> None:
    spec = sft_evaluation_without_reward_model(smoke, tmp_path)
    with pytest.raises(ModelError, match="found reward_classifier without such an artifact"):
        evaluate_policy(spec, ProgressLog(tmp_path / "progress.jsonl"))


def test_a_greedy_evaluation_does_not_depend_on_the_seed(smoke: Any, tmp_path: Path) -> None:
    responses = []
    for seed in (0, 1):
        spec = smoke.spec("sft_evaluation", tmp_path / str(seed), temperature=0.0, prompts=1000, max_new_tokens=8)
        evaluate_policy(dataclasses.replace(spec, seed=seed), ProgressLog(tmp_path / "progress.jsonl"))
        rows = read_jsonl(spec.output_dir / "examples.jsonl")
        responses.append({row["prompt_id"]: row["response"] for row in rows})
    assert responses[0] == responses[1]


def row(response: str, **values: Any) -> dict[str, Any]:
    return {"response": response, "reference": "def f(x):\n    return x", "judge_score": 0.5, "kl_nats": 1.0,
            "tokens": 3, "ended": True, "learned_score": None} | values  # fmt: skip


def test_a_summary_of_hand_made_rows() -> None:
    same = "def f(x):\n    return x"
    metrics = summarize([row(same, judge_score=1.0, kl_nats=2.0, tokens=5), row(" \n", ended=False, judge_score=0.0)])
    assert metrics["eval/judge_score"] == 0.5
    assert metrics["eval/kl_nats"] == 1.5
    assert metrics["eval/mean_tokens"] == 4
    assert metrics["eval/eos_rate"] == 0.5
    assert metrics["eval/empty_share"] == 0.5
    assert "eval/learned_score" not in metrics
    assert summarize([row(same), row(same)])["eval/bleu"] == pytest.approx(100, abs=1e-9)  # double precision
    assert summarize([row(same, learned_score=1.0), row(same, learned_score=2.0)])["eval/learned_score"] == 1.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "temperature 1, up to 8 tokens"),
        ({"top_k": 3, "repetition_penalty": 1.5}, "temperature 1, top-k 3, rep. penalty 1.5, up to 8 tokens"),
        ({"temperature": 0.0, "num_beams": 3, "min_new_tokens": 5}, "beams 3, min 5 tokens, up to 8 tokens"),
    ],
    ids=["sampled", "top-k", "beams"],
)
def test_an_evaluation_decodes_as_its_settings_say_and_records_them(
    smoke: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    spec = smoke.spec("ppo_evaluation", tmp_path, prompts=6, max_new_tokens=8, **changes)
    evaluate_policy(spec, ProgressLog(tmp_path / "progress.jsonl"))
    rows = read_jsonl(spec.output_dir / "examples.jsonl")
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    policy = load_policy(spec.inputs["policy"], spec.inputs["trunk"])
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    expected = respond(policy, tokenizer, prompts, spec.config, batch_size=128, seed=0)
    assert [row["response"] for row in rows] == [response.text for response in expected]
    assert {row["decoding"] for row in rows} == {words}
    kl = exact_kl(policy, load_policy(spec.inputs["trunk"], spec.inputs["trunk"]), prompts,
                  [response.token_ids for response in expected], tokenizer.pad_token_id, 128)  # fmt: skip
    assert [row["kl_nats"] for row in rows] == pytest.approx(kl, abs=ROUNDING)
