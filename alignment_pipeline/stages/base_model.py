"""`base_model`: the model that everything starts from, built from the training text, or read from a folder or the hub.

A built base is a small OPT with a byte-level BPE tokenizer. It is pretrained on unpaired text of the train split only:
instructions and outputs as separate documents, never an instruction with its answer, so that "SFT beats base" means
that instruction following was learned by SFT.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alignment_pipeline import checkpoint
from alignment_pipeline.configs import BaseModelConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.given_model import PAD, give_padding_of_its_own, read_given_model, record_source
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.models import MODEL_FOLDER, load_causal_lm, save_model
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import format_prompt, is_plain_text
from alignment_pipeline.stage import StageResult, StageSpec

EOS = "</s>"
_CHECKPOINT_EVERY_S = 30.0
_LOG_EVERY = 5


def prepare_base_model(spec: StageSpec[BaseModelConfig], log: ProgressLog) -> StageResult:
    """Write the base model and its tokenizer to `model/`."""
    config = spec.config
    if config.path is not None:
        return _adopt(Path(config.path), None, spec)
    if config.hub_name is not None:
        return _adopt(config.hub_name, config.hub_revision, spec)
    rows = [row for row in read_jsonl(spec.inputs["instructions"] / "rows.jsonl") if row["split"] == "train"]
    documents = unpaired_documents(rows, spec.seed)
    log.note(f"Training a tokenizer of {config.vocab_size} tokens on {len(documents)} documents.")
    tokenizer = build_tokenizer(documents, config.vocab_size, config.max_positions)
    model = build_model(config, tokenizer, spec.seed).to(spec.device)
    blocks = _blocks(documents, tokenizer, config.pretrain_block_tokens, config.document_copies)
    loss = _pretrain(model, blocks, spec, log)
    save_model(model, tokenizer, spec.output_dir)
    return StageResult(
        {"base/parameters": float(model.num_parameters()), "base/vocabulary": float(len(tokenizer)), "train/loss": loss}
    )


def unpaired_documents(rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """Prompts and outputs of the rows as separate documents in a seeded order.

    A prompt's document ends before `### Response:`, so that no document holds what follows it. A plain text is a
    document as it is.
    """
    prompts = [
        format_prompt(row["instruction"], row["input"]).partition("### Response:")[0]
        for row in rows
        if not is_plain_text(row)
    ]
    documents = [*(prompt.rstrip() for prompt in prompts), *(row["output"] for row in rows)]
    random.Random(seed).shuffle(documents)
    return documents


def build_tokenizer(documents: Sequence[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on documents; padding and end are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's own words are part of what is tokenized, whatever the documents hold.
    tokenizer.train_from_iterator([*documents, *["### Instruction:\n### Input:\n### Response:\n"] * 100], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, model_max_length=max_tokens
    )


def build_model(config: BaseModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> OPTForCausalLM:
    """A randomly initialised OPT of the configured shape, dropout off."""
    torch.manual_seed(seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            word_embed_proj_dim=config.hidden_size,
            ffn_dim=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _adopt(source: Path | str, revision: str | None, spec: StageSpec[BaseModelConfig]) -> StageResult:
    """Copy a given model into the store as safetensors, with a padding token of its own."""
    model, tokenizer = read_given_model("base_model", source, revision, AutoModelForCausalLM)
    if tokenizer.eos_token is None:
        raise ModelError(f"base_model: the tokenizer of {source} has no end token, expected one.")
    give_padding_of_its_own(model, tokenizer, spec.seed)
    model.config.eos_token_id = tokenizer.eos_token_id
    save_model(model, tokenizer, spec.output_dir)
    record_source(spec.output_dir, source, revision)
    load_causal_lm(spec.output_dir / MODEL_FOLDER)
    return StageResult({"base/parameters": float(model.num_parameters()), "base/vocabulary": float(len(tokenizer))})


def _blocks(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_tokens: int, copies: int
) -> torch.Tensor:
    """Documents, each ended and standing `copies` times in a row, joined and cut: (blocks, block_tokens).

    A document's second copy can only be predicted by looking the first one up. That teaches attention to copy in a few
    hundred steps (induction heads, https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads),
    which following an instruction needs, for names and numbers.
    """
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        stream.extend((*ids, tokenizer.eos_token_id) * copies)
    count = len(stream) // block_tokens
    if count == 0:
        raise ModelError(f"The training text has {len(stream)} tokens, expected at least one block of {block_tokens}.")
    return torch.tensor(stream[: count * block_tokens]).view(count, block_tokens)


def _pretrain(model: OPTForCausalLM, blocks: torch.Tensor, spec: StageSpec[BaseModelConfig], log: ProgressLog) -> float:
    """Next-token training with AdamW, linear warm-up and cosine decay; resumes exactly. Returns the last mean loss."""
    config = spec.config
    steps, warmup = config.pretrain_steps, max(1, config.pretrain_steps // 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.pretrain_learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))),
    )
    start, losses = 0, []
    if state := checkpoint.load_state(spec.work_dir):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, losses = state["step"], state["losses"]
        log.note(f"Resuming pretraining after step {start} of {steps}.")
    model.train()
    pacer = Pacer(_CHECKPOINT_EVERY_S)
    for step in range(start, steps):
        # The batch is a function of seed and step, so that a resumed run sees the same ones.
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
        chosen = torch.randint(len(blocks), (config.pretrain_batch_size,), generator=generator)
        batch = blocks[chosen].to(spec.device)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-19:], loss.item()]
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
            tokens = (step + 1) * batch.numel()
            log.step("pretrain", step + 1, steps, {"train/loss": losses[-1], "train/tokens": tokens})
        if pacer.is_due() and step + 1 < steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses,
                     "schedule": schedule.state_dict(), "step": step + 1}  # fmt: skip
            checkpoint.save_state(spec.work_dir, step + 1, state)
    model.eval()
    return sum(losses) / len(losses)
