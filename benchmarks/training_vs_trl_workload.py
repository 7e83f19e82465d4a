"""What both sides of `training_vs_trl.py` start from: one base model, the same instructions, the same pairs.

The base model is the library's own: OPT of 4 layers × 256 and 8,000 tokens, pretrained for some steps on CodeAlpaca's
unpaired text. Instructions are CodeAlpaca-20k, formatted; pairs are `python_code_dpo`'s in the same template, those
whose sides both fit TRL's default length of 1,024 tokens, exactly as many as the steps read once, and some held out.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment_pipeline.configs import BaseModelConfig, DataConfig, FormattingConfig, StageConfig
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import MODEL_FOLDER, load_causal_lm, load_tokenizer, new_scorer
from alignment_pipeline.preferences import make_pair
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import format_prompt, prompt_id
from alignment_pipeline.reward import score_rows
from alignment_pipeline.sequences import sum_logprobs
from alignment_pipeline.stage import StageSpec, stage_function
from alignment_pipeline.tokenization import encode, encode_side

MAX_TOKENS = 1024
MAX_NEW_TOKENS = 128
HELD_OUT_PAIRS = 64
HELD_OUT_ROWS = 128
INSTRUCTIONS_FILE, PREFERENCES_FILE = "codealpaca/code_alpaca_20k.jsonl", "code_preference/python_code_dpo.jsonl"
BASE_MODEL = BaseModelConfig(
    vocab_size=8000, hidden_size=256, num_layers=4, num_heads=4, max_positions=MAX_TOKENS,
    pretrain_steps=100, pretrain_batch_size=8, pretrain_block_tokens=128, pretrain_learning_rate=1e-3,
    document_copies=1,
)  # fmt: skip
INSTRUCTIONS: dict[str, Any] = {"max_chars": 6000, "validation_fraction": 0.006, "test_fraction": 0.006}
FORMATTING = FormattingConfig(max_prompt_tokens=512, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Workload:
    """Folders of artifacts for ours, and JSON lines of the same rows for the plain scripts.

    Attributes:
        base_model: Artifact; the plain scripts load its `model/`.
        dataset: Formatted instructions.
        pairs: `train.jsonl` and `validation.jsonl` of preference pairs.
        plain_sft: prompt, completion.
        plain_pairs: prompt, chosen, rejected.
        plain_prompts: prompt.
        votes: The pairs as votes for the product's inbox.
        instructions: CodeAlpaca as it is.
    """

    base_model: Path
    dataset: Path
    pairs: Path
    plain_sft: Path
    plain_pairs: Path
    plain_prompts: Path
    votes: Path
    instructions: Path


def make_workload(folder: Path, data: Path, pair_count: int, seed: int) -> Workload:
    """Build the base model and write all rows; takes a minute or two."""
    config = DataConfig(path=str(data / INSTRUCTIONS_FILE), **INSTRUCTIONS)
    instructions = run_stage("instructions", config, {}, folder / "instructions", seed)
    base_model = run_stage("base_model", BASE_MODEL, {"instructions": instructions}, folder / "base_model", seed)
    inputs = {"instructions": instructions, "tokenizer": base_model}
    dataset = run_stage("formatted_dataset", FORMATTING, inputs, folder / "dataset", seed)
    tokenizer = load_tokenizer(base_model)
    rows = [row for row in read_jsonl(dataset / "train.jsonl") if _tokenizes_in_parts(tokenizer, row)]
    write_jsonl(dataset / "train.jsonl", rows)
    write_jsonl(dataset / "validation.jsonl", read_jsonl(dataset / "validation.jsonl")[:HELD_OUT_ROWS])
    votes = _votes(data / PREFERENCES_FILE, tokenizer, pair_count + HELD_OUT_PAIRS, seed)
    pairs = [_pair(vote) for vote in votes]
    write_jsonl(folder / "pairs" / "train.jsonl", pairs[:pair_count])
    write_jsonl(folder / "pairs" / "validation.jsonl", pairs[pair_count:])
    workload = Workload(
        base_model, dataset, folder / "pairs",
        *(folder / f"{name}.jsonl" for name in ("sft", "pairs_plain", "prompts", "votes")),
        data / INSTRUCTIONS_FILE,
    )  # fmt: skip
    end = len(tokenizer.eos_token)
    _write(workload.plain_sft, [{"prompt": row["prompt"], "completion": row["completion"][:-end]} for row in rows])
    keys = ("prompt", "chosen", "rejected")
    _write(workload.plain_pairs, [{key: pair[key] for key in keys} for pair in pairs[:pair_count]])
    _write(workload.plain_prompts, [{"prompt": row["prompt"]} for row in rows])
    _write(workload.votes, votes)
    return workload


def run_stage(
    stage: str, config: StageConfig, inputs: dict[str, Path], folder: Path, seed: int, log: ProgressLog | None = None
) -> Path:
    """Compute a stage below a new folder; returns the artifact's."""
    output, work = folder / "output", folder / "work"
    output.mkdir(parents=True)
    work.mkdir()
    log = log or ProgressLog(folder / "progress.jsonl")
    stage_function(stage)(StageSpec(config, inputs, output, work, seed), log)
    return output


def _tokenizes_in_parts(tokenizer: Any, row: dict[str, Any]) -> bool:
    """Whether prompt and completion give the same tokens apart, as ours reads them, and joined, as TRL does."""
    prompt, completion, joined = encode(
        tokenizer, [row["prompt"], row["completion"], row["prompt"] + row["completion"]]
    )
    return prompt + completion == joined


def _votes(path: Path, tokenizer: Any, count: int, seed: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(rows)
    for row in rows:
        prompt = format_prompt(row["prompt"], "")
        sides = [row["chosen"].strip(), row["rejected"].strip()]
        whole = encode(tokenizer, [prompt + side for side in sides])
        parts = [encode(tokenizer, [prompt])[0] + encode(tokenizer, [side])[0] for side in sides]
        if sides[0] != sides[1] and all(sides) and whole == parts and max(map(len, whole)) < MAX_TOKENS:
            found.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
        if len(found) == count:
            return found
    raise SystemExit(f"{path}: found {len(found)} pairs that fit, expected {count}. Take fewer steps.")


def _pair(vote: dict[str, str]) -> Any:
    return make_pair(**vote, prompt_id=prompt_id(vote["prompt"], ""), source="dataset", labeller="dataset")


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def held_out_loss(stage: str, model: Path, workload: Workload) -> float:
    """Loss on held-out rows or pairs of a model folder, by the same code for both sides, in nats a token or a pair.

    DPO's is against the base model, with TRL's default beta of 0.1.
    """
    tokenizer = load_tokenizer(workload.base_model)
    pad_id = tokenizer.pad_token_id
    if stage == "sft":
        rows = read_jsonl(workload.dataset / "validation.jsonl")
        prompts = encode(tokenizer, [row["prompt"] for row in rows])
        completions = encode(tokenizer, [row["completion"] for row in rows])
        total = sum(sum_logprobs(load_causal_lm(model), prompts, completions, pad_id, 16))
        return -total / sum(map(len, completions))
    pairs = read_jsonl(workload.pairs / "validation.jsonl")
    prompts = encode(tokenizer, [pair["prompt"] for pair in pairs])
    sides = [encode_side(tokenizer, pairs, side) for side in ("chosen", "rejected")]
    if stage == "reward":
        scorer = new_scorer(model).eval()
        texts = ([[*prompt, *ids] for prompt, ids in zip(prompts, side, strict=True)] for side in sides)
        chosen, rejected = (score_rows(scorer, rows, pad_id, 16) for rows in texts)
        margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    else:
        models = (load_causal_lm(model), load_causal_lm(workload.base_model / MODEL_FOLDER))
        found = [[sum_logprobs(model, prompts, side, pad_id, 16) for side in sides] for model in models]
        now, before = ([a - b for a, b in zip(*each, strict=True)] for each in found)
        margins = [0.1 * (a - b) for a, b in zip(now, before, strict=True)]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
