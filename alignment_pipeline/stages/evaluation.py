"""`*_evaluation`: one policy measured on test prompts that no stage trained on.

Each prompt gets one response. BLEU is corpus BLEU of the responses against the dataset's answers; the KL from the trunk
is exact at each token of the response (a sum over the vocabulary), added up over the response. Both distributions are
taken at the sampling temperature, so that over sampled responses the mean is an unbiased estimate of KL(policy ‖ trunk)
in nats a response. Greedy, beam, truncated (top-k, top-p) and penalised responses are not draws from the policy: over
them it is the divergence of the whole distributions, at temperature 1 without sampling, along the responses given.

The learned score is the recipe's reward: the reward model's score, or the reward classifier's logit of its label.
"""

import random
from typing import Any

import torch

from alignment_pipeline import atomic
from alignment_pipeline.bleu import corpus_bleu
from alignment_pipeline.classifier import ClassifierScorer, whole_texts
from alignment_pipeline.decoding import in_words, respond
from alignment_pipeline.decoding_configs import DecodingSweepConfig, EvaluationConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.generation import Response
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.judges import JUDGE_TITLES, judge
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.reward import RewardScorer
from alignment_pipeline.sequences import HEAD_ROWS, apply_head, by_length, pack, per_row, response_hidden
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.statistics import mean
from alignment_pipeline.tokenization import TokenIds, encode_prompts

MAX_EMPTY_SHARE = 0.95
_STEPS = 4


def evaluate_policy(spec: StageSpec[EvaluationConfig], log: ProgressLog) -> StageResult:
    """Write `examples.jsonl` (one row a prompt) and `summary.json` (the metrics).

    Every policy of a recipe answers the same prompts with the same seed.
    """
    config = spec.config
    rows = asked_rows(spec)
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    policy = load_policy(spec.inputs["policy"], spec.inputs["trunk"], spec.device)
    responses = respond(policy, tokenizer, prompts, config, batch_size=config.batch_size, seed=spec.seed)
    log.step("evaluate", 1, _STEPS)
    trunk = load_policy(spec.inputs["trunk"], spec.inputs["trunk"], spec.device)
    token_ids = [response.token_ids for response in responses]
    kl_nats = exact_kl(
        policy, trunk, prompts, token_ids, tokenizer.pad_token_id, config.batch_size, config.temperature or 1.0
    )
    log.step("evaluate", 2, _STEPS)
    judged, learned = scored(spec, tokenizer, rows, prompts, responses)
    decoding = f"{in_words(config)}, up to {config.max_new_tokens} tokens"
    log.step("evaluate", 3, _STEPS)
    examples = [
        {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "reference": row["reference"],
         "response": response.text, "judge": config.judge, "judge_score": judge_score,
         "learned_score": learned_score, "kl_nats": kl, "tokens": len(response.token_ids), "ended": response.ended,
         "temperature": config.temperature, "decoding": decoding}
        for row, response, judge_score, learned_score, kl in zip(rows, responses, judged, learned, kl_nats, strict=True)
    ]  # fmt: skip
    write_jsonl(spec.output_dir / "examples.jsonl", examples)
    metrics = summarize(examples)
    summary = {
        "judge": config.judge,
        "judge_title": JUDGE_TITLES[config.judge],
        "prompts": len(rows),
        "metrics": metrics,
    }
    atomic.write_json(spec.output_dir / "summary.json", summary)
    log.step("evaluate", _STEPS, _STEPS, metrics)
    return StageResult(metrics, _checks(metrics))


def summarize(examples: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an evaluation's rows."""
    texts, references = [row["response"] for row in examples], [row["reference"] for row in examples]
    metrics = {
        "eval/bleu": corpus_bleu(texts, references),
        "eval/judge_score": mean([row["judge_score"] for row in examples]),
        "eval/kl_nats": mean([row["kl_nats"] for row in examples]),
        "eval/mean_tokens": mean([row["tokens"] for row in examples]),
        "eval/eos_rate": mean([float(row["ended"]) for row in examples]),
        "eval/empty_share": mean([float(not row["response"].strip()) for row in examples]),
    }
    if examples[0]["learned_score"] is not None:
        metrics["eval/learned_score"] = mean([row["learned_score"] for row in examples])
    return metrics


@torch.inference_mode()
def exact_kl(
    policy: Any,
    trunk: Any,
    prompts: list[TokenIds],
    responses: list[TokenIds],
    pad_id: int,
    batch_size: int,
    temperature: float = 1.0,
) -> list[float]:
    """Σ_t KL(policy(·|prefix_t) ‖ trunk(·|prefix_t)) of each response, nats, both at `temperature`."""
    sums: dict[int, float] = {}
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in by_length(lengths, batch_size):
        batch = pack([prompts[row] for row in rows], [responses[row] for row in rows], pad_id, policy.device)
        hidden = [torch.split(response_hidden(model, batch), HEAD_ROWS) for model in (policy, trunk)]
        parts = []
        for few, few_of_trunk in zip(*hidden, strict=True):
            ours = (apply_head(policy, few) / temperature).log_softmax(-1)
            theirs = (apply_head(trunk, few_of_trunk) / temperature).log_softmax(-1)
            parts.append((ours.exp() * (ours - theirs)).sum(-1))
        kl = per_row(torch.cat(parts), batch)
        # Rounding can leave a sum of zeros at -1e-7; a divergence is not negative.
        sums.update(zip(rows, kl.clamp(min=0.0).tolist(), strict=True))
    return [sums[row] for row in range(len(lengths))]


def asked_rows(spec: StageSpec[EvaluationConfig | DecodingSweepConfig]) -> list[dict[str, Any]]:
    """A seeded choice of the test split's rows, each prompt once."""
    rows = read_jsonl(spec.inputs["dataset"] / "test.jsonl")
    unique = list({row["prompt_id"]: row for row in rows}.values())
    return random.Random(spec.seed).sample(unique, min(spec.config.prompts, len(unique)))


def scored(
    spec: StageSpec[EvaluationConfig | DecodingSweepConfig],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    prompts: list[TokenIds],
    responses: list[Response],
) -> tuple[list[float], list[float] | list[None]]:
    """Each response's score by the judge, and its learned score where there is a reward to learn it from."""
    token_ids, batch_size = [response.token_ids for response in responses], spec.config.batch_size
    classifier, texts = _classifier(spec), whole_texts(tokenizer, prompts, token_ids)
    learned: list[float] | list[None]
    if classifier is not None:
        learned = classifier.scores(texts, batch_size)
    else:
        learned = _learned_scores(spec, [row["prompt"] for row in rows], prompts, token_ids, tokenizer)
    if spec.config.judge == "reward_classifier":
        return _require(classifier).probabilities(texts, batch_size), learned
    return judge(spec.config.judge, rows, [response.text for response in responses]), learned


def _classifier(spec: StageSpec[EvaluationConfig | DecodingSweepConfig]) -> ClassifierScorer | None:
    if "reward_classifier" not in spec.inputs:
        return None
    return ClassifierScorer.load(spec.inputs["reward_classifier"], device=spec.device)


def _require(classifier: ClassifierScorer | None) -> ClassifierScorer:
    if classifier is None:
        raise ModelError("evaluation.judge: found reward_classifier without such an artifact, expected it as an input.")
    return classifier


def _learned_scores(
    spec: StageSpec[EvaluationConfig | DecodingSweepConfig],
    texts: list[str],
    prompts: list[TokenIds],
    responses: list[TokenIds],
    tokenizer: Any,
) -> list[float] | list[None]:
    if "reward_model" not in spec.inputs:
        return [None] * len(prompts)
    scorer = RewardScorer.load(spec.inputs["reward_model"], spec.inputs["trunk"], spec.device)
    return scorer.score_sampled(tokenizer, texts, prompts, responses, spec.config.batch_size)


def _checks(metrics: dict[str, float]) -> tuple[StageCheck, ...]:
    empty = metrics["eval/empty_share"]
    return (
        StageCheck(
            "responses_are_not_empty",
            empty < MAX_EMPTY_SHARE,
            f"{empty:.1%} of the responses are empty; fewer than {MAX_EMPTY_SHARE:.0%} may be.",
            blocking=True,
        ),
    )
