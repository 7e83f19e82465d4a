"""`reward_classifier`: a text classifier whose score for one label, chosen by name, is the reward.

`model/`: the classifier with its own tokenizer, given (a folder or the hub) or trained here on labelled text.
`summary.json`: {label, labels, source} and, of a trained one, {texts_in, kept, quarantined, by_reason, splits}.
`quarantine.jsonl`, of a trained one: {reason, source_line, detail}.

A trained one is a small ModernBERT (arXiv 2412.13663) whose mean over the tokens is classified. Trained from scratch on
a few thousand sentences it is little more than a bag of words, which is what so little data teaches: pooling at a first
token, as BERT does, would first have to learn attention.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from alignment_pipeline import atomic, checkpoint
from alignment_pipeline.classifier import SUMMARY, ClassifierScorer, padded, require_label, token_ids
from alignment_pipeline.configs import RewardClassifierConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.given_model import give_padding_of_its_own, read_given_model, record_source
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.models import save_model
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import normalised, split_position
from alignment_pipeline.row_files import read_rows
from alignment_pipeline.rows import RawRow, shown, text_problem
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.stages.base_model import build_tokenizer
from alignment_pipeline.statistics import wilson_interval
from alignment_pipeline.tokenization import TokenIds

_LOG_EVERY = 10
_LONG_TEXT = "a word and " * 4000
"""Longer than any encoder reads: scoring it shows whether the limits in a given model's files are true."""

Labelled = tuple[str, int]
"""A text and the number of its label."""


def prepare_reward_classifier(spec: StageSpec[RewardClassifierConfig], log: ProgressLog) -> StageResult:
    """Write the classifier to `model/` and the chosen label to `summary.json`.

    Raises:
        ModelError: A given classifier cannot be read safely, is none, or has no label of that name.
        DataError: The labelled text cannot be read, or holds too little.
    """
    config = spec.config
    if config.train_path is not None:
        return _train(Path(config.train_path), spec, log)
    return _adopt(Path(config.path) if config.path is not None else str(config.hub_name), spec)


def _adopt(source: Path | str, spec: StageSpec[RewardClassifierConfig]) -> StageResult:
    """Copy a given classifier into the store as safetensors, and try it."""
    config = spec.config
    model, tokenizer = read_given_model(
        "reward_classifier", source, config.hub_revision, AutoModelForSequenceClassification
    )
    require_label(model.config.id2label, config.label, str(source))
    give_padding_of_its_own(model, tokenizer, spec.seed)
    save_model(model, tokenizer, spec.output_dir)
    record_source(spec.output_dir, source, config.hub_revision)
    kind = "folder" if isinstance(source, Path) else f"hub {source}"
    _write_summary(spec, model, {"source": kind})
    try:
        ClassifierScorer.load(spec.output_dir).scores(["", _LONG_TEXT], batch_size=1)
    except (IndexError, RuntimeError) as error:
        raise ModelError(
            f"reward_classifier: {source} cannot score a long text ({str(error).splitlines()[0]}); expected a "
            "model_max_length in tokenizer_config.json that the model can read."
        ) from error
    return StageResult(
        {
            "classifier/parameters": float(model.num_parameters()),
            "classifier/labels": float(model.config.num_labels),
        }
    )


def _train(path: Path, spec: StageSpec[RewardClassifierConfig], log: ProgressLog) -> StageResult:
    config = spec.config
    raw = list(read_rows(path))
    kept, quarantined = sift_labelled(raw, config)
    parts = _split(kept, config, spec.seed)
    by_reason = dict(sorted(Counter(row["reason"] for row in quarantined).items()))
    if not parts["train"] or not parts["validation"] or len({label for _, label in parts["train"]}) < 2:
        raise DataError(
            f"{path}: found {len(raw)} rows, of them {len(parts['train'])} to train on and {len(parts['validation'])} "
            f"held out (in quarantine by reason: {by_reason}); expected texts of at least two labels to train on and "
            'one held out, as {"text": ..., "label": ...} with labels '
            f"{', '.join(f'{number} or {name}' for number, name in enumerate(config.label_names))}."
        )
    log.note(f"{len(kept)} of {len(raw)} labelled texts kept, {len(quarantined)} in quarantine {by_reason}.")
    tokenizer = build_text_tokenizer([text for text, _ in parts["train"]], config)
    model = build_classifier(config, tokenizer, spec.seed).to(spec.device)
    ids = token_ids(tokenizer, [text for text, _ in parts["train"]], config.max_positions)
    loss, steps = _fit(model, tokenizer, ids, [label for _, label in parts["train"]], spec, log)
    save_model(model, tokenizer, spec.output_dir)
    write_jsonl(spec.output_dir / "quarantine.jsonl", quarantined)
    counts = {"texts_in": len(raw), "kept": len(kept), "quarantined": len(quarantined), "by_reason": by_reason,
              "splits": {name: len(rows) for name, rows in parts.items()}}  # fmt: skip
    _write_summary(spec, model, {"source": "trained", **counts})
    log.note("Measuring the accuracy on held-out texts.")
    accuracy = _accuracy(spec, parts["validation"])
    metrics, beats = _held_out_report(accuracy, majority_accuracy(parts), len(parts["validation"]))
    reconcile = StageCheck(
        "counts_reconcile",
        passed=len(raw) == sum(map(len, parts.values())) + len(quarantined),
        detail=f"{len(raw)} texts in, {len(kept)} kept + {len(quarantined)} quarantined",
        blocking=True,
    )
    sizes = {"classifier/parameters": model.num_parameters(), "classifier/labels": model.config.num_labels,
             "train/steps": steps}  # fmt: skip
    return StageResult(
        {**metrics, "train/loss": loss, **{name: float(value) for name, value in sizes.items()}}, (reconcile, beats)
    )


def sift_labelled(raw: Sequence[RawRow], config: RewardClassifierConfig) -> tuple[list[Labelled], list[dict[str, Any]]]:
    """Part rows into labelled texts and quarantined ones, both in the source's order."""
    numbers = {name: number for number, name in enumerate(config.label_names)}
    kept: list[Labelled] = []
    quarantined: list[dict[str, Any]] = []
    line_of: dict[str, int] = {}
    for row in raw:
        problem = (row.problem, row.detail) if row.problem else _problem(row.value, numbers, config.max_chars)
        if problem is None:
            text, label = row.value["text"], row.value["label"]
            first = line_of.setdefault(normalised(text), row.source_line)
            if first == row.source_line:
                kept.append((text, numbers[label] if isinstance(label, str) else label))
                continue
            problem = ("duplicate", f"same text as row {first}, up to case and whitespace")
        quarantined.append({"reason": problem[0], "source_line": row.source_line, "detail": problem[1]})
    return kept, quarantined


def _problem(value: Any, numbers: Mapping[str, int], max_chars: int) -> tuple[str, str] | None:
    """The first reason why a parsed row cannot be used, or None."""
    if not isinstance(value, dict):
        return "wrong_type", shown(value)
    missing = [name for name in ("text", "label") if name not in value]
    if missing:
        return "missing_key", f"no {' and no '.join(missing)} among {shown(sorted(value))}"
    text, label = value["text"], value["label"]
    if problem := text_problem("text", text):
        return problem
    if not text.strip():
        return "empty_text", shown(text)
    if len(text) > max_chars:
        return "over_long", f"{len(text)} characters, {max_chars} allowed"
    if isinstance(label, bool) or not isinstance(label, int | str):  # Python counts True as 1
        return "wrong_type", f"label: {shown(label)}"
    if label not in (numbers if isinstance(label, str) else numbers.values()):
        return "unknown_label", f"{shown(label)}, expected one of {shown([*numbers.values(), *numbers])}"
    return None


def _split(rows: Sequence[Labelled], config: RewardClassifierConfig, seed: int) -> dict[str, list[Labelled]]:
    """Rows by split, as a function of text and seed; no text stands in both."""
    parts: dict[str, list[Labelled]] = {"train": [], "validation": []}
    for text, label in rows:
        held_out = split_position(seed, "reward_classifier", text) < config.validation_fraction
        parts["validation" if held_out else "train"].append((text, label))
    return parts


def build_text_tokenizer(texts: Sequence[str], config: RewardClassifierConfig) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer to which neither case nor standing first in a text makes a word another one."""
    tokenizer = build_tokenizer([f" {text.lower()}" for text in texts], config.vocab_size, config.max_positions)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.truncation_side = "left"  # as the scorer reads
    return tokenizer


def build_classifier(
    config: RewardClassifierConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> ModernBertForSequenceClassification:
    """A randomly initialised encoder of the configured shape with the labels' names."""
    torch.manual_seed(seed)
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            classifier_pooling="mean",
            embedding_dropout=config.dropout,
            mlp_dropout=config.dropout,
            attention_dropout=config.dropout,
            classifier_dropout=config.dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            cls_token_id=None,
            sep_token_id=None,
            id2label=dict(enumerate(config.label_names)),
            label2id={name: number for number, name in enumerate(config.label_names)},
        )
    )


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[TokenIds],
    labels: Sequence[int],
    spec: StageSpec[RewardClassifierConfig],
    log: ProgressLog,
) -> tuple[float, int]:
    """Cross-entropy with AdamW, linear warm-up and decay; resumes exactly. Returns the last mean loss and the steps."""
    config = spec.config
    steps_per_epoch = math.ceil(len(ids) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    warmup = max(1, int(config.warmup_fraction * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)
    )
    start, losses = 0, []
    if state := checkpoint.load_state(spec.work_dir):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, losses = state["step"], state["losses"]
        log.note(f"Resuming the classifier's training after step {start} of {steps}.")
    targets = torch.tensor(labels, device=spec.device)
    model.train()
    pacer = Pacer(config.checkpoint_every_s)
    for step in range(start, steps):
        chosen = _rows_of_step(len(ids), step, steps_per_epoch, config.batch_size, spec.seed)
        batch = padded([ids[row] for row in chosen], tokenizer.pad_token_id, spec.device)
        torch.manual_seed(spec.seed * 1_000_003 + step)  # dropout, too, is a function of seed and step
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-19:], loss.item()]
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
            log.step("classify", step + 1, steps, {"train/loss": sum(losses) / len(losses)})
        if pacer.is_due() and step + 1 < steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses,
                     "schedule": schedule.state_dict(), "step": step + 1}  # fmt: skip
            checkpoint.save_state(spec.work_dir, step + 1, state)
    model.eval()
    return sum(losses) / len(losses), steps


def _rows_of_step(count: int, step: int, steps_per_epoch: int, batch_size: int, seed: int) -> list[int]:
    """Rows of a batch: each epoch is a permutation of its own, so that a resumed run sees the same batches."""
    epoch, number = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed * 104_729 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order[number * batch_size : (number + 1) * batch_size]


def _accuracy(spec: StageSpec[RewardClassifierConfig], held_out: Sequence[Labelled]) -> float:
    """Share of held-out texts whose own label has the highest score, of the classifier as it was written."""
    texts = [text for text, _ in held_out]
    scores = [
        ClassifierScorer.load(spec.output_dir, name, spec.device).scores(texts, 4 * spec.config.batch_size)
        for name in spec.config.label_names
    ]
    right = [max(range(len(row)), key=row.__getitem__) for row in zip(*scores, strict=True)]
    return sum(found == label for found, (_, label) in zip(right, held_out, strict=True)) / len(held_out)


def majority_accuracy(parts: Mapping[str, Sequence[Labelled]]) -> float:
    """Held-out accuracy of always naming the label that is most frequent among the training texts."""
    majority = Counter(label for _, label in parts["train"]).most_common(1)[0][0]
    return sum(label == majority for _, label in parts["validation"]) / len(parts["validation"])


def _held_out_report(accuracy: float, majority: float, count: int) -> tuple[dict[str, float], StageCheck]:
    low, high = wilson_interval(accuracy, count)
    metrics = {
        "classifier/held_out_accuracy": accuracy,
        "classifier/held_out_accuracy_low": low,
        "classifier/held_out_accuracy_high": high,
        "classifier/majority_accuracy": majority,
        "classifier/held_out_texts": float(count),
    }
    detail = (
        f"{accuracy:.1%} of {count} held-out texts, 95% interval {low:.1%} to {high:.1%}, "
        f"against {majority:.1%} by the most frequent label."
    )
    return metrics, StageCheck("reward_classifier_beats_majority", low > majority, detail)


def _write_summary(spec: StageSpec[RewardClassifierConfig], model: Any, values: Mapping[str, Any]) -> None:
    labels = {str(number): name for number, name in sorted(model.config.id2label.items())}
    atomic.write_json(spec.output_dir / SUMMARY, {"label": spec.config.label, "labels": labels, **values})
