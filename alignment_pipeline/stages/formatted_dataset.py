"""The stage `formatted_dataset`: rows as prompt and completion, measured in tokens, too long ones dropped.

`train.jsonl`, `validation.jsonl`, `test.jsonl`: {id, prompt_id, instruction, input, prompt, completion, reference,
prompt_tokens, completion_tokens}, where completion = output + EOS and reference = output. `dropped.jsonl`: {id, reason,
prompt_tokens, completion_tokens}. `summary.json`: the template, counts and length statistics by split.

Prompt and completion are tokenized SEPARATELY, and trainers and samplers concatenate the ids. A joint tokenization can
merge across the boundary: the policy would then be trained on other prompt ids than it is sampled with, and the loss
mask would cut a token in two.

An instruction's prompt is in the recipe's template (`templates`). A row of preference data keeps its `rejected`
response, which starts as completions do and is without the end token, and has `rejected_tokens`, end token counted.

A plain text's prompt is its first tokens, as many as seed and row id say, and its completion the rest. Prompts are then
known here for the first time: `prompt_id` is made of them, and where one stands in several splits it is kept in the one
that is held out most and dropped from the others, so that no prompt of the test split is trained on.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment_pipeline.atomic import write_json
from alignment_pipeline.configs import FormattingConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.limits import max_positions
from alignment_pipeline.plots import histogram
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import (
    is_plain_text,
    normalised,
    prefix_length,
    prompt_id,
    splits_share_no_prompt,
)
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.stages.instructions import SPLITS
from alignment_pipeline.templates import Template
from alignment_pipeline.tokenization import encode, encode_prompts, encode_responses

_BATCH_ROWS = 1000
_LENGTHS = ("prompt_tokens", "completion_tokens")
_MOST_HELD_OUT_FIRST = ("test", "validation", "train")

Row = dict[str, Any]


def format_dataset(spec: StageSpec[FormattingConfig], log: ProgressLog) -> StageResult:
    """Format and measure every row; inputs are `instructions` and `tokenizer`.

    Raises:
        ModelError: The tokenizer cannot be loaded or has no EOS token.
        DataError: The length limits leave a split without rows.
    """
    limit = max_positions(spec.inputs["tokenizer"])
    if limit is not None and spec.config.max_tokens > limit:
        raise DataError(
            f"formatting.max_tokens: found {spec.config.max_tokens}, expected at most {limit}, the longest sequence "
            "that the base model can read."
        )
    tokenizer = _load_tokenizer(spec.inputs["tokenizer"] / "model")
    template = Template(spec.config.template, tokenizer)
    source = read_jsonl(spec.inputs["instructions"] / "rows.jsonl")
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    dropped: list[Row] = []
    without_eos = 0
    split_of = {split: number for number, split in enumerate(_MOST_HELD_OUT_FIRST)}
    ordered = sorted(source, key=lambda row: split_of[row["split"]])
    taken: dict[str, str] = {}
    for done, (split, row, ends_with_eos) in enumerate(_formatted(ordered, template, spec), start=1):
        reason = _drop_reason(row, tokenizer.eos_token, spec.config)
        if reason is None and is_plain_text(row) and taken.setdefault(normalised(row["prompt"]), split) != split:
            reason = "prompt_is_held_out"
        if reason is None:
            rows[split].append(row)
            without_eos += not ends_with_eos
        else:
            dropped.append({"id": row["id"], "reason": reason, **{name: row[name] for name in _LENGTHS}})
        if done % _BATCH_ROWS == 0 or done == len(source):
            log.step("tokenize", done, len(source))
    by_reason = dict(sorted(Counter(row["reason"] for row in dropped).items()))
    _require_every_split(rows, by_reason, spec.config)

    for split in SPLITS:
        write_jsonl(spec.output_dir / f"{split}.jsonl", rows[split])
    write_jsonl(spec.output_dir / "dropped.jsonl", dropped)
    summary = {
        "template": {"name": template.name, "chat_template_sha256": template.sha256},
        "rows_in": len(source),
        "kept": sum(map(len, rows.values())),
        "dropped": len(dropped),
        "dropped_by_reason": by_reason,
        "splits": {split: {"rows": len(rows[split]), **_statistics(rows[split])} for split in SPLITS},
    }
    write_json(spec.output_dir / "summary.json", summary)
    kept = [row for split in SPLITS for row in rows[split]]
    lengths = {name.removesuffix("_tokens"): [float(row[name]) for row in kept] for name in _LENGTHS}
    histogram(spec.output_dir / "extras" / "lengths.png", lengths, "Length of prompts and completions", "tokens")
    log.note(f"{len(kept)} of {len(source)} rows formatted, {len(dropped)} dropped {by_reason}")
    ends = StageCheck(
        "completions_end_with_eos",
        passed=not without_eos,
        detail=f"{without_eos} of {len(kept)} completions do not end with {tokenizer.eos_token!r} when tokenized",
        blocking=True,
    )
    return StageResult(metrics=_metrics(summary, kept), checks=(_leak_check(spec.output_dir), ends))


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder}: found no such folder, expected a tokenizer in it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: found no tokenizer that can be loaded ({error}).") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"{folder}: found a tokenizer without an EOS token, expected one to end responses with.")
    return tokenizer


def _formatted(
    source: Sequence[Row], template: Template, spec: StageSpec[FormattingConfig]
) -> Iterator[tuple[str, Row, bool]]:
    """Each row with its split, its lengths, and whether its tokenized completion ends with EOS."""
    tokenizer, start_of_response = template.tokenizer, template.response_start
    for start in range(0, len(source), _BATCH_ROWS):
        batch = source[start : start + _BATCH_ROWS]
        texts = [
            cut_text(row["output"], tokenizer, _prefix_tokens(row, spec))
            if is_plain_text(row)
            else (template.prompt(row), row["output"])
            for row in batch
        ]
        prompts = [prompt for prompt, _ in texts]
        starts = ["" if is_plain_text(row) else start_of_response for row in batch]
        completions = [start + text + tokenizer.eos_token for start, (_, text) in zip(starts, texts, strict=True)]
        prompt_ids, completion_ids = encode_prompts(tokenizer, prompts), encode(tokenizer, completions)
        for index, row in enumerate(batch):
            formatted = {
                "id": row["id"],
                "prompt_id": prompt_id(prompts[index], "") if is_plain_text(row) else row["prompt_id"],
                "instruction": row["instruction"],
                "input": row["input"],
                "prompt": prompts[index],
                "completion": completions[index],
                "reference": texts[index][1],
                "prompt_tokens": len(prompt_ids[index]),
                "completion_tokens": len(completion_ids[index]),
            }
            if "rejected" in row:
                (rejected_ids,) = encode_responses(tokenizer, [starts[index] + row["rejected"]])
                formatted |= {"rejected": starts[index] + row["rejected"], "rejected_tokens": len(rejected_ids)}
            yield row["split"], formatted, completion_ids[index][-1:] == [tokenizer.eos_token_id]


def _prefix_tokens(row: Row, spec: StageSpec[FormattingConfig]) -> int:
    return prefix_length(spec.seed, row["id"], spec.config.prefix_tokens_min, spec.config.prefix_tokens_max)


def cut_text(text: str, tokenizer: Any, tokens: int) -> tuple[str, str]:
    """The beginning of a text, `tokens` tokens long, and the rest; two empty texts where there is no place to cut.

    A place to cut is where beginning and rest, tokenized apart, are the text's own tokens; the beginning is longer than
    asked for up to the next such place. With a tokenizer that puts a space before every text that is between words, and
    the rest is then without its leading space, just as a continuation by the policy decodes.
    """
    (ids,) = encode(tokenizer, [text])
    for cut in range(tokens, len(ids)):
        prompt = tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False)
        if not prompt.strip() or not text.startswith(prompt):
            continue
        whole = text[len(prompt) :]
        for rest in (whole, whole.removeprefix(" ")):
            if rest.strip() and encode(tokenizer, [prompt, rest]) == [ids[:cut], ids[cut:]]:
                return prompt, rest
    return "", ""


def _drop_reason(row: Row, eos_token: str, config: FormattingConfig) -> str | None:
    if not row["prompt"]:
        return "no_place_to_cut"
    responses = row["reference"] + row.get("rejected", "")
    if eos_token in responses or (is_plain_text(row) and eos_token in row["prompt"]):
        return "contains_eos"
    if row["prompt_tokens"] > config.max_prompt_tokens:
        return "over_max_prompt_tokens"
    longest = max(row["completion_tokens"], row.get("rejected_tokens", 0))
    return "over_max_tokens" if row["prompt_tokens"] + longest > config.max_tokens else None


def _require_every_split(rows: Mapping[str, Sequence[Row]], by_reason: Mapping[str, int], config: Any) -> None:
    empty = [split for split in SPLITS if not rows[split]]
    if empty:
        raise DataError(
            f"formatting: found no rows left in {' and '.join(empty)} (dropped by reason: {dict(by_reason)}); expected "
            f"at least one. Raise formatting.max_prompt_tokens ({config.max_prompt_tokens}) or formatting.max_tokens "
            f"({config.max_tokens}), or give more rows."
        )


def _statistics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    return {name: _distribution([row[name] for row in rows]) for name in _LENGTHS}


def _distribution(values: Sequence[int]) -> dict[str, float]:
    return {
        "min": min(values),
        "mean": round(sum(values) / len(values), 2),
        "p50": float(np.percentile(values, 50)),
        "p95": round(float(np.percentile(values, 95)), 2),
        "max": max(values),
    }


def _metrics(summary: Mapping[str, Any], kept: Sequence[Row]) -> dict[str, float]:
    metrics = {f"data/{split}": float(values["rows"]) for split, values in summary["splits"].items()}
    metrics["data/dropped"] = float(summary["dropped"])
    for name, distribution in _statistics(kept).items():
        metrics[f"data/{name}_mean"] = distribution["mean"]
        metrics[f"data/{name}_max"] = float(distribution["max"])
    return metrics


def _leak_check(output_dir: Path) -> StageCheck:
    """The leak check over the files as written."""
    return splits_share_no_prompt(
        {split: [row["prompt"] for row in read_jsonl(output_dir / f"{split}.jsonl")] for split in SPLITS}
    )
