"""`reward_model`: a Bradley–Terry scorer on the trunk (TRL's RewardTrainer), beside a length-only baseline."""

from typing import Any

from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from alignment_pipeline.configs import RewardModelConfig
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import MODEL_FOLDER, load_tokenizer, new_scorer, save_trained, with_adapter
from alignment_pipeline.padding import without_padding
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.reward import length_baseline_accuracy, pair_accuracy, score_responses
from alignment_pipeline.sequences import causal_lm_of, encode, encode_side
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.training import seed_everything, train, trainer_arguments, training_dataset


def train_reward_model(spec: StageSpec[RewardModelConfig], log: ProgressLog) -> StageResult:
    """Train on the training pairs; report accuracy on held-out pairs and of preferring by length alone."""
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    pairs = {split: read_jsonl(spec.inputs["pairs"] / f"{split}.jsonl") for split in ("train", "validation")}
    seed_everything(spec.seed)
    model = with_adapter(new_scorer(spec.inputs["trunk"] / MODEL_FOLDER).to(spec.device), spec.config, "SEQ_CLS")
    rows = _tokenized(pairs["train"], tokenizer)
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    trainer = RewardTrainer(
        model=model,
        args=TrlRewardConfig(**trainer_arguments(spec, spec.config), max_length=None),
        train_dataset=training_dataset(rows, lengths, spec, "preference pairs"),
        processing_class=tokenizer,
    )
    with without_padding(causal_lm_of(model).base_model):
        train(trainer, spec, log)
    log.note("Scoring held-out pairs.")
    accuracy = _accuracy(trainer.model, tokenizer, pairs["validation"], spec.config.batch_size)
    baseline = length_baseline_accuracy(pairs["train"], pairs["validation"])
    save_trained(trainer.model, tokenizer, spec.output_dir)
    return StageResult(
        {
            "reward/held_out_accuracy": accuracy,
            "reward/length_baseline_accuracy": baseline,
            "reward/held_out_pairs": float(len(pairs["validation"])),
            "train/steps": float(trainer.state.global_step),
        },
        (
            StageCheck(
                "reward_model_beats_length_baseline",
                accuracy > baseline,
                f"{accuracy:.1%} of {len(pairs['validation'])} held-out pairs, against {baseline:.1%} by length alone.",
            ),
        ),
    )


def _tokenized(pairs: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    prompts = encode(tokenizer, [pair["prompt"] for pair in pairs])
    chosen, rejected = encode_side(tokenizer, pairs, "chosen"), encode_side(tokenizer, pairs, "rejected")
    return [
        {"chosen_ids": prompt + better, "rejected_ids": prompt + worse}
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]


def _accuracy(model: Any, tokenizer: Any, pairs: list[dict[str, Any]], batch_size: int) -> float:
    model.eval()
    prompts = encode(tokenizer, [pair["prompt"] for pair in pairs])
    scores = [
        score_responses(
            model, prompts, encode_side(tokenizer, pairs, side),
            tokenizer.pad_token_id, 4 * batch_size,
        )
        for side in ("chosen", "rejected")
    ]  # fmt: skip
    return pair_accuracy(*scores)
