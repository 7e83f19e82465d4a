import math
from typing import Any

import pytest

from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.sequences import sum_logprobs
from alignment_pipeline.tokenization import encode_prompts, encode_side

ROUNDING = 1e-4  # nats; a merged adapter rounds otherwise


def test_held_out_numbers_are_of_the_published_policy_and_every_pair_counts_alike(smoke: Any) -> None:
    trunk, folder = smoke.artifact("sft_model"), smoke.artifact("dpo_policy")
    metrics = smoke.results["dpo_policy"].metrics
    pairs = read_jsonl(smoke.artifact("preference_pairs") / "validation.jsonl")
    reference = read_jsonl(smoke.artifact("reference_logprobs") / "validation.jsonl")
    tokenizer, policy = load_tokenizer(trunk), load_policy(folder, trunk)
    prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs])
    chosen, rejected = (
        sum_logprobs(policy, prompts, encode_side(tokenizer, pairs, side), tokenizer.pad_token_id, 1)
        for side in ("chosen", "rejected")
    )
    beta = smoke.graph["dpo_policy"].config.beta
    margins = [
        beta * (better - row["ref_chosen_logprob"] - worse + row["ref_rejected_logprob"])
        for better, worse, row in zip(chosen, rejected, reference, strict=True)
    ]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    right = [margin > 0 for margin in margins]
    assert metrics["dpo/held_out_margin"] == pytest.approx(sum(margins) / len(margins), abs=ROUNDING)
    assert metrics["eval/loss"] == pytest.approx(sum(losses) / len(losses), abs=ROUNDING)
    assert metrics["dpo/held_out_accuracy"] == pytest.approx(sum(right) / len(right), abs=1 / len(right))
