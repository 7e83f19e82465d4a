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
from alignment_pipeline.models import MODEL_FOLDER, load_causal_lm, load_tokenizer, save_trained, with_adapter
from alignment_pipeline.padding import require_documents_apart, without_padding
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.sequences import causal_lm_of
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.tokenization import encode, encode_prompts
from alignment_pipeline.training import dataset_of, seed_everything, train, trainer_arguments, training_dataset
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
        eval_dataset=dataset_of(labelled_rows(spec, tokenizer, "validation"), "validation rows"),
        processing_class=tokenizer,
    )
    with without_padding(causal_lm_of(model).base_model):
        train(trainer, spec, log)
        log.note("Measuring the loss on the validation split.")
        evaluation = trainer.evaluate()
    save_trained(trainer.model, tokenizer, spec.output_dir, merge=True)
    return StageResult(
        {
            "eval/loss": evaluation["eval_loss"],
            "eval/perplexity": math.exp(min(evaluation["eval_loss"], 50.0)),
            "eval/token_accuracy": evaluation["eval_mean_token_accuracy"],
            "train/steps": float(trainer.state.global_step),
        }
    )


def labelled_rows(spec: StageSpec[SftConfig], tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """Token ids and labels of a split; prompt tokens have no label (-100), the end token has one."""
    rows = read_jsonl(spec.inputs["dataset"] / f"{split}.jsonl")
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    completions = encode(tokenizer, [row["completion"] for row in rows])
    return [
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
