"""`dpo_policy`: the trunk trained on preference pairs directly (TRL's DPOTrainer; Rafailov et al., arXiv 2305.18290).

Departures from TRL's defaults: rows are tokenized here and carry the reference log-probabilities that
`reference_logprobs` computed, so that no reference model is in memory.
"""

import math
from pathlib import Path
from typing import Any

from trl import DPOConfig as TrlDpoConfig

from alignment_pipeline.configs import DpoConfig
from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import (
    MODEL_FOLDER,
    autocast,
    load_causal_lm,
    load_tokenizer,
    save_trained,
    with_adapter,
)
from alignment_pipeline.padding import without_padding
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.sequences import causal_lm_of, sum_logprobs
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.statistics import mean, win_rate
from alignment_pipeline.tokenization import encode_prompts, encode_side
from alignment_pipeline.training import seed_everything, train, trainer_arguments, training_dataset
from alignment_pipeline.trl_adapter import TokenizedDPOTrainer, make_head_fast


def train_dpo(spec: StageSpec[DpoConfig], log: ProgressLog) -> StageResult:
    """Train on the training pairs; report loss and implicit-reward accuracy on held-out pairs."""
    make_head_fast()
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    seed_everything(spec.seed)
    model = with_adapter(load_causal_lm(spec.inputs["trunk"] / MODEL_FOLDER, spec.device), spec.config, "CAUSAL_LM")
    rows = pair_rows(spec, tokenizer, "train")
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    trainer = TokenizedDPOTrainer(
        model=model,
        args=TrlDpoConfig(
            **trainer_arguments(spec, spec.config),
            beta=spec.config.beta,
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=training_dataset(rows, lengths, spec, "preference pairs"),
        processing_class=tokenizer,
    )
    with without_padding(causal_lm_of(model).base_model):
        train(trainer, spec, log)
    log.note("Measuring held-out pairs.")
    margins = _held_out_margins(spec, trainer.model.eval(), tokenizer)
    save_trained(trainer.model, tokenizer, spec.output_dir)
    return StageResult(
        {
            "eval/loss": mean([max(0.0, -margin) + math.log1p(math.exp(-abs(margin))) for margin in margins]),
            "dpo/held_out_accuracy": win_rate(margins, [0.0] * len(margins)),
            "dpo/held_out_margin": mean(margins),
            "train/steps": float(trainer.state.global_step),
        }
    )


def _held_out_margins(spec: StageSpec[DpoConfig], model: Any, tokenizer: Any) -> list[float]:
    """β (log π/π_ref of the chosen response - the same of the rejected one) of each held-out pair, in nats."""
    rows = pair_rows(spec, tokenizer, "validation")
    prompts = [row["prompt_ids"] for row in rows]
    with autocast(spec.config.precision, spec.device):
        chosen, rejected = (
            sum_logprobs(
                model, prompts, [row[f"{side}_ids"] for row in rows], tokenizer.pad_token_id, 2 * spec.config.batch_size
            )
            for side in ("chosen", "rejected")
        )
    return [
        spec.config.beta * (better - row["ref_chosen_logps"] - worse + row["ref_rejected_logps"])
        for better, worse, row in zip(chosen, rejected, rows, strict=True)
    ]


def pair_rows(spec: StageSpec[DpoConfig], tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """Token ids of a split's pairs with their reference log-probabilities.

    Raises:
        StoreError: The two tables do not describe the same pairs in the same order.
    """
    pairs = read_jsonl(spec.inputs["pairs"] / f"{split}.jsonl")
    scored = _reference(spec.inputs["reference_logprobs"] / f"{split}.jsonl", [pair["id"] for pair in pairs])
    prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs])
    chosen, rejected = encode_side(tokenizer, pairs, "chosen"), encode_side(tokenizer, pairs, "rejected")
    return [
        {"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse,
         "ref_chosen_logps": row["ref_chosen_logprob"], "ref_rejected_logps": row["ref_rejected_logprob"]}
        for prompt, better, worse, row in zip(prompts, chosen, rejected, scored, strict=True)
    ]  # fmt: skip


def _reference(path: Path, pair_ids: list[str]) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    if [row["id"] for row in rows] != pair_ids:
        raise StoreError(
            f"{path}: the reference log-probabilities are of other pairs than preference_pairs holds. "
            "Materialize reference_logprobs again."
        )
    return rows
