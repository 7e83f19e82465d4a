"""`sampled_responses`: what the trunk answers to training prompts; raw material for preference pairs."""

import random
from typing import Any

from alignment_pipeline.configs import SamplingConfig
from alignment_pipeline.generation import generate
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.tokenization import encode_prompts

MAX_EMPTY_SHARE = 0.5


def sample_responses(spec: StageSpec[SamplingConfig], log: ProgressLog) -> StageResult:
    """Sample `samples_per_prompt` responses for a seeded choice of training prompts.

    Writes `samples.jsonl`: prompt_id, prompt, sample (number within the prompt), response, tokens, ended.
    """
    config = spec.config
    rows: list[dict[str, Any]] = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    unique = list({row["prompt_id"]: row for row in rows}.values())
    chosen = random.Random(spec.seed).sample(unique, min(config.prompts, len(unique)))
    tokenizer = load_tokenizer(spec.inputs["policy"])
    model = load_policy(spec.inputs["policy"], spec.inputs["policy"], spec.device)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in chosen])
    samples: list[dict[str, Any]] = []
    for number in range(config.samples_per_prompt):
        responses = generate(
            model, tokenizer, prompts,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            batch_size=config.batch_size, seed=spec.seed * 1009 + number,
        )  # fmt: skip
        samples.extend(
            {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "sample": number, "response": response.text,
             "tokens": len(response.token_ids), "ended": response.ended}
            for row, response in zip(chosen, responses, strict=True)
        )  # fmt: skip
        log.step("sample", number + 1, config.samples_per_prompt, {"samples/count": len(samples)})
    write_jsonl(spec.output_dir / "samples.jsonl", samples)
    empty = sum(not sample["response"].strip() for sample in samples) / len(samples)
    return StageResult(
        {
            "samples/count": float(len(samples)),
            "samples/eos_rate": sum(sample["ended"] for sample in samples) / len(samples),
            "samples/mean_tokens": sum(sample["tokens"] for sample in samples) / len(samples),
            "samples/empty_share": empty,
        },
        (
            StageCheck(
                "responses_are_not_empty",
                empty < MAX_EMPTY_SHARE,
                f"{empty:.1%} of {len(samples)} sampled responses are empty; fewer than {MAX_EMPTY_SHARE:.0%} may be.",
                blocking=True,
            ),
        ),
    )
