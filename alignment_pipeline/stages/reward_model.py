"""`reward_model`: a Bradley–Terry scorer (TRL's RewardTrainer) on the trunk, or on another model that is given.

`adapter/` (of the trunk) or `model/`; of a given model always `model/`, merged, with its own tokenizer.
`scores.jsonl`: one row a held-out pair, see `reward_report.ScoredPair`.
`dropped.jsonl`: {id, split, reason} of the pairs that are too long.
`summary.json`: {own_tokenizer, max_tokens, pairs: {train, validation, dropped}, table: the report's rows, metrics,
held_out_tokens_sha256: of the held-out pairs' token ids, as they were read}.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from alignment_pipeline import atomic, plots
from alignment_pipeline.configs import RewardModelConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.given_model import give_padding_of_its_own, read_given_model, record_source
from alignment_pipeline.identity import digest, write_jsonl
from alignment_pipeline.limits import max_positions, positions_of
from alignment_pipeline.models import (
    MODEL_FOLDER,
    load_tokenizer,
    merged,
    new_scorer,
    save_model,
    save_trained,
    turn_dropout_off,
    with_adapter,
)
from alignment_pipeline.padding import without_padding
from alignment_pipeline.preferences import PreferencePair, read_pairs
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.reward import (
    MAX_TOKENS,
    OWN_TOKENIZER,
    SUMMARY,
    RewardEncoder,
    RewardScorer,
    score_rows,
)
from alignment_pipeline.reward_report import PLAUSIBLE_ACCURACY, calibration, pair_scores, report, score_pairs
from alignment_pipeline.sequences import causal_lm_of
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.statistics import win_rate
from alignment_pipeline.tokenization import TokenIds
from alignment_pipeline.training import seed_everything, train, trainer_arguments, training_dataset

SPLITS = ("train", "validation")
_LONGEST_TABLE = 4098
"""Positions of Longformer: models that read more compute positions and have no table of them to run out of."""

TokenizedPair = dict[str, TokenIds]
"""`chosen_ids` and `rejected_ids`, TRL's names: prompt and response of each side."""


def train_reward_model(spec: StageSpec[RewardModelConfig], log: ProgressLog) -> StageResult:
    """Train on the training pairs; report how held-out ones are told apart.

    Raises:
        ModelError: A given model cannot be read safely, or cannot read as much as it says.
        DataError: A split holds no pair that is short enough.
    """
    seed_everything(spec.seed)
    model, encoder = _start(spec)
    pairs = {split: read_pairs(spec.inputs["pairs"] / f"{split}.jsonl") for split in SPLITS}
    kept, rows = _fitting(pairs, encoder)
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows["train"]]
    trainer = RewardTrainer(
        model=with_adapter(model, spec.config, "SEQ_CLS"),
        args=TrlRewardConfig(**trainer_arguments(spec, spec.config), max_length=None),
        train_dataset=training_dataset(rows["train"], lengths, spec, "preference pairs"),
        processing_class=encoder.tokenizer,
    )
    with without_padding(causal_lm_of(model).base_model):
        train(trainer, spec, log)
    log.note("Scoring held-out pairs.")
    trainer.model.eval()
    metrics = _measure(spec, RewardScorer(trainer.model, encoder), pairs, kept, digest(rows["validation"]))
    if spec.config.is_given:
        save_model(merged(trainer.model), encoder.tokenizer, spec.output_dir)
        record_source(spec.output_dir, _source(spec.config), spec.config.hub_revision)
    else:
        save_trained(trainer.model, encoder.tokenizer, spec.output_dir)
    steps = {"train/steps": float(trainer.state.global_step)}
    return StageResult(metrics | steps, _checks(metrics, len(kept["validation"])))


def _start(spec: StageSpec[RewardModelConfig]) -> tuple[Any, RewardEncoder]:
    """The model that is trained, and how it reads text."""
    config = spec.config
    if not config.is_given:
        trunk = spec.inputs["trunk"]
        encoder = RewardEncoder.within(load_tokenizer(trunk), max_positions(trunk), config.max_tokens, own=False)
        return new_scorer(trunk / MODEL_FOLDER).to(spec.device), encoder
    model, tokenizer = read_given_model(
        "reward_model", _source(config), config.hub_revision, AutoModelForSequenceClassification, new_head=True
    )
    give_padding_of_its_own(model, tokenizer, spec.seed)
    turn_dropout_off(model)
    encoder = RewardEncoder.within(tokenizer, positions_of(model.config.to_dict()), config.max_tokens, own=True)
    _require_readable(model, encoder, str(_source(config)))
    return model.to(spec.device), encoder


def _require_readable(model: Any, encoder: RewardEncoder, source: str) -> None:
    """Try the longest text: RoBERTa's kind reads fewer tokens than its config's positions.

    On the CPU: on a GPU an index out of range ends the process.

    Raises:
        ModelError: The model fails on it.
    """
    limit = encoder.max_tokens
    if limit is None or limit > _LONGEST_TABLE:
        return
    (long,) = encoder.encode(["a " * limit], ["a"], [True])
    try:
        score_rows(model, [encoder.cut(long)], encoder.tokenizer.pad_token_id, 1)
    except (IndexError, RuntimeError) as error:
        raise ModelError(
            f"reward_model: {source} cannot read {limit} tokens ({str(error).splitlines()[0]}), though its files allow "
            "them; expected a limit that it can read. Set reward_model.max_tokens lower: RoBERTa reads 512."
        ) from error


def _source(config: RewardModelConfig) -> Path | str:
    return Path(config.path) if config.path is not None else str(config.hub_name)


def _fitting(
    pairs: Mapping[str, list[PreferencePair]], encoder: RewardEncoder
) -> tuple[dict[str, list[PreferencePair]], dict[str, list[TokenizedPair]]]:
    """The pairs of each split that are short enough on both sides, and the tokens of them.

    Raises:
        DataError: None is, in one of the splits.
    """
    kept: dict[str, list[PreferencePair]] = {}
    rows: dict[str, list[TokenizedPair]] = {}
    for split, given in pairs.items():
        prompts = [pair["prompt"] for pair in given]
        chosen = encoder.encode(prompts, [p["chosen"] for p in given], [p["chosen_ended"] for p in given])
        rejected = encoder.encode(prompts, [p["rejected"] for p in given], [p["rejected_ended"] for p in given])
        fitting = [encoder.fits(better) and encoder.fits(worse) for better, worse in zip(chosen, rejected, strict=True)]
        kept[split] = [pair for pair, fits in zip(given, fitting, strict=True) if fits]
        rows[split] = [
            {"chosen_ids": better, "rejected_ids": worse}
            for better, worse, fits in zip(chosen, rejected, fitting, strict=True)
            if fits
        ]
        if not kept[split]:
            raise DataError(
                f"reward_model: found {len(given)} pairs in {split}, none of at most {encoder.max_tokens} tokens on "
                "both sides, expected at least one. Raise reward_model.max_tokens or give a model that reads more."
            )
    return kept, rows


def _measure(
    spec: StageSpec[RewardModelConfig],
    scorer: RewardScorer,
    pairs: Mapping[str, Sequence[PreferencePair]],
    kept: Mapping[str, Sequence[PreferencePair]],
    held_out_tokens: str,
) -> dict[str, float]:
    """Write `scores.jsonl`, `summary.json` and the plots; the metrics."""
    train_pairs, held_out, batch_size = kept["train"], kept["validation"], 4 * spec.config.batch_size
    scored = score_pairs(scorer, held_out, spec.seed, batch_size)
    table, metrics = report(scored, train_pairs, held_out)
    seen = random.Random(spec.seed).sample(train_pairs, min(len(train_pairs), len(held_out)))
    metrics["reward/train_accuracy"] = win_rate(
        *pair_scores(scorer, seen, [pair["prompt"] for pair in seen], batch_size)
    )
    counts = {split: len(kept[split]) for split in SPLITS}
    read = {pair["id"] for split in SPLITS for pair in kept[split]}
    dropped = [
        {"id": pair["id"], "split": split, "reason": "over_long"}
        for split, whole in pairs.items()
        for pair in whole
        if pair["id"] not in read
    ]
    counts["dropped"] = len(dropped)
    metrics["reward/held_out_pairs"] = float(counts["validation"])
    metrics["reward/dropped_pairs"] = float(counts["dropped"])
    write_jsonl(spec.output_dir / "scores.jsonl", scored)
    write_jsonl(spec.output_dir / "dropped.jsonl", dropped)
    summary = {OWN_TOKENIZER: scorer.encoder.own, MAX_TOKENS: scorer.encoder.max_tokens, "pairs": counts,
               "table": table, "metrics": metrics, "held_out_tokens_sha256": held_out_tokens}  # fmt: skip
    atomic.write_json(spec.output_dir / SUMMARY, summary)
    _draw(spec.output_dir / "extras", scored)
    return metrics


def _draw(folder: Path, scored: Sequence[Mapping[str, Any]]) -> None:
    margins = {"its own prompt": [row["margin"] for row in scored]}
    if scored[0]["shuffled_chosen_score"] is not None:
        margins["another prompt"] = [row["shuffled_chosen_score"] - row["shuffled_rejected_score"] for row in scored]
    plots.histogram(
        folder / "margins.png", margins, f"Margins of {len(scored)} held-out pairs", "score of chosen - rejected"
    )
    bins = calibration(margins["its own prompt"])
    plots.reliability(
        folder / "calibration.png", [(each.confidence, each.accuracy, each.pairs) for each in bins],
        f"Calibration on {len(scored)} held-out pairs",
    )  # fmt: skip


def _checks(metrics: Mapping[str, float], held_out: int) -> tuple[StageCheck, ...]:
    accuracy, baseline = metrics["reward/held_out_accuracy"], metrics["reward/length_baseline_accuracy"]
    return (
        StageCheck(
            "reward_model_beats_length_baseline",
            accuracy > baseline,
            f"{accuracy:.1%} of {held_out} held-out pairs, against {baseline:.1%} by length alone.",
        ),
        StageCheck(
            "reward_model_accuracy_is_plausible",
            accuracy <= PLAUSIBLE_ACCURACY,
            f"{accuracy:.1%} of {held_out} held-out pairs; above {PLAUSIBLE_ACCURACY:.0%} look for a surface pattern "
            "that tells chosen from rejected, or a leak.",
        ),
    )
