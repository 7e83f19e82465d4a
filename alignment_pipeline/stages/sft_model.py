"""`sft_model`: the base model tuned to follow instructions, the loss on the response only (TRL's SFTTrainer).

Rows are tokenized here, prompt and completion apart, so that training and sampling see the same boundary. With LoRA the
published `model/` is merged, a standalone trunk for everything after it; the adapter lies beside it.
"""

import math
from typing import Any

from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from alignment_pipeline.configs import SftConfig
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import (
    MODEL_FOLDER,
    autocast,
    load_causal_lm,
    load_tokenizer,
    save_trained,
    with_adapter,
)
from alignment_pipeline.padding import require_documents_apart, without_padding
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.sequences import causal_lm_of, likelihoods
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.tokenization import TokenIds, encode, encode_prompts
from alignment_pipeline.training import seed_everything, train, trainer_arguments, training_dataset
from alignment_pipeline.trl_adapter import make_head_fast


def train_sft(spec: StageSpec[SftConfig], log: ProgressLog) -> StageResult:
    """Fine-tune the base model on the train split and report the loss on the validation split, in nats a token."""
    make_head_fast()
    tokenizer = load_tokenizer(spec.inputs["base_model"])
    seed_everything(spec.seed)
    model = with_adapter(
        load_causal_lm(spec.inputs["base_model"] / MODEL_FOLDER, spec.device), spec.config, "CAUSAL_LM"
    )
    if spec.config.packing == "packed":
        require_documents_apart(causal_lm_of(model).base_model)
    arguments = TrlSftConfig(
        **trainer_arguments(spec, spec.config),
        max_length=None,  # rows that are too long were dropped when they were formatted
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=spec.config.packing == "packed",
    )
    rows = labelled_rows(spec, tokenizer, "train")
    lengths = [len(row["input_ids"]) for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=training_dataset(rows, lengths, spec, "instruction rows"),
        processing_class=tokenizer,
    )
    with without_padding(causal_lm_of(model).base_model):
        train(trainer, spec, log)
    log.note("Measuring the loss on the validation split.")
    metrics = _held_out(spec, trainer.model.eval(), tokenizer)
    save_trained(trainer.model, tokenizer, spec.output_dir, merge=True)
    return StageResult(metrics | {"train/steps": float(trainer.state.global_step)})


def _held_out(spec: StageSpec[SftConfig], model: Any, tokenizer: Any) -> dict[str, float]:
    """Loss, perplexity and accuracy of the validation split, every token counting alike."""
    prompts, completions = _token_ids(spec, tokenizer, "validation")
    with autocast(spec.config.precision, spec.device):
        found = likelihoods(model, prompts, completions, tokenizer.pad_token_id, spec.config.batch_size)
    tokens = sum(map(len, completions))
    loss = -sum(row.logprob for row in found) / tokens
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 50.0)),
        "eval/token_accuracy": sum(row.likeliest for row in found) / tokens,
    }


def labelled_rows(spec: StageSpec[SftConfig], tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """Token ids and labels of a split; prompt tokens have no label (-100), the end token has one."""
    return [
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for prompt, completion in zip(*_token_ids(spec, tokenizer, split), strict=True)
    ]


def _token_ids(spec: StageSpec[SftConfig], tokenizer: Any, split: str) -> tuple[list[TokenIds], list[TokenIds]]:
    """Prompts and completions of a split."""
    rows = read_jsonl(spec.inputs["dataset"] / f"{split}.jsonl")
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return prompts, encode(tokenizer, [row["completion"] for row in rows])
