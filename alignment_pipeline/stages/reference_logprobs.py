"""`reference_logprobs`: log p(response | prompt) of every pair under the trunk, computed once and shared by DPO sweeps.

TRL's own cache is keyed by the whole DPO configuration, so that a new learning rate recomputes it.
"""

from alignment_pipeline.configs import ReferenceLogprobsConfig
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import MODEL_FOLDER, autocast, load_causal_lm, load_tokenizer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.sequences import sum_logprobs
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.tokenization import encode_prompts, encode_side


def score_reference_logprobs(spec: StageSpec[ReferenceLogprobsConfig], log: ProgressLog) -> StageResult:
    """Write `train.jsonl` and `validation.jsonl`: id, ref_chosen_logprob, ref_rejected_logprob (nats)."""
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    model = load_causal_lm(spec.inputs["trunk"] / MODEL_FOLDER, spec.device)
    metrics: dict[str, float] = {}
    for number, split in enumerate(("train", "validation"), 1):
        pairs = read_jsonl(spec.inputs["pairs"] / f"{split}.jsonl")
        prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs])
        with autocast(spec.config.precision, spec.device):
            chosen, rejected = (
                sum_logprobs(
                    model, prompts, encode_side(tokenizer, pairs, side),
                    tokenizer.pad_token_id, spec.config.batch_size,
                )
                for side in ("chosen", "rejected")
            )  # fmt: skip
        write_jsonl(
            spec.output_dir / f"{split}.jsonl",
            (
                {"id": pair["id"], "ref_chosen_logprob": better, "ref_rejected_logprob": worse}
                for pair, better, worse in zip(pairs, chosen, rejected, strict=True)
            ),
        )
        metrics[f"reference/{split}_margin"] = (sum(chosen) - sum(rejected)) / len(pairs)
        log.step("score", number, 2, metrics)
    return StageResult(metrics)
