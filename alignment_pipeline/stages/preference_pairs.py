"""The stage `preference_pairs`: the union of all sources of preferences, split by prompt.

`train.jsonl`, `validation.jsonl`: see `preferences`. `summary.json`: {splits: {split: {source: pairs}}, dropped:
{reason: pairs}, prompts: {split: prompts}}.

Splits go by the normalised prompt text, with the seeded hash of `prompts.split_position`: a pair added later moves no
other pair. A pair that two sources give is kept from the first, labels before people; opposite votes are two pairs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignment_pipeline.atomic import write_json
from alignment_pipeline.configs import PairsConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.limits import max_positions
from alignment_pipeline.preferences import PAIRS_FILE, PreferencePair, read_pairs
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import normalised, split_position, splits_share_no_prompt
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.tokenization import encode_prompts, encode_responses

SPLITS = ("train", "validation")


def unite_preference_pairs(spec: StageSpec[PairsConfig], log: ProgressLog) -> StageResult:
    """Unite the pairs of the inputs `labels` and `human`, where present, and split them.

    Pairs longer than the model of the input `tokenizer` can read are dropped and counted.

    Raises:
        DataError: No source, or no pair in one of the splits.
    """
    present = [spec.inputs[name] for name in ("labels", "human") if name in spec.inputs]
    if not present:
        raise DataError("pairs: found neither labels nor human preferences; add a labelling or a feedback section.")
    pairs, dropped = _unite([read_pairs(folder / PAIRS_FILE) for folder in present])
    if "tokenizer" in spec.inputs:
        readable = _readable(pairs, spec.inputs["tokenizer"])
        dropped["over_long"] = len(pairs) - len(readable)
        pairs = readable
    splits: dict[str, list[PreferencePair]] = {split: [] for split in SPLITS}
    for pair in pairs:
        held_out = split_position(spec.seed, "pairs", pair["prompt"]) < spec.config.validation_fraction
        splits["validation" if held_out else "train"].append(pair)
    prompts = {split: len({normalised(pair["prompt"]) for pair in splits[split]}) for split in SPLITS}
    _require_both_splits(splits, prompts, dropped)

    for split in SPLITS:
        write_jsonl(spec.output_dir / f"{split}.jsonl", splits[split])
    by_source = {split: dict(sorted(Counter(pair["source"] for pair in splits[split]).items())) for split in SPLITS}
    write_json(spec.output_dir / "summary.json", {"splits": by_source, "dropped": dropped, "prompts": prompts})
    log.note(f"{len(pairs)} pairs {by_source}, dropped {dropped}")
    metrics = {f"pairs/{split}": float(len(splits[split])) for split in SPLITS}
    metrics["pairs/human"] = float(sum(pair["source"] == "human" for pair in pairs))
    return StageResult(metrics=metrics, checks=(splits_share_no_prompt(_prompts_written(spec.output_dir)),))


def _unite(sources: Sequence[Sequence[PreferencePair]]) -> tuple[list[PreferencePair], dict[str, int]]:
    """Distinct pairs in the order of the sources, and how many were dropped by reason."""
    united: dict[str, PreferencePair] = {}
    dropped = {"identical": 0, "duplicate": 0}
    for pair in (pair for source in sources for pair in source):
        if pair["chosen"] == pair["rejected"]:
            dropped["identical"] += 1
        elif pair["id"] in united:
            dropped["duplicate"] += 1
        else:
            united[pair["id"]] = pair
    return list(united.values()), dropped


def _readable(pairs: list[PreferencePair], base_model: Path) -> list[PreferencePair]:
    """The pairs that fit the model's positions, both sides, with the tokens before the prompt and the end token."""
    limit = max_positions(base_model)
    if limit is None or not pairs:
        return pairs
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model / "model", local_files_only=True)
    prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs])
    chosen = encode_responses(tokenizer, [pair["chosen"] for pair in pairs])
    rejected = encode_responses(tokenizer, [pair["rejected"] for pair in pairs])
    return [
        pair
        for pair, prompt, better, worse in zip(pairs, prompts, chosen, rejected, strict=True)
        if len(prompt) + max(len(better), len(worse)) <= limit
    ]


def _require_both_splits(
    splits: Mapping[str, Sequence[PreferencePair]], prompts: Mapping[str, int], dropped: Mapping[str, int]
) -> None:
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        found = ", ".join(f"{len(splits[split])} pairs of {prompts[split]} prompts in {split}" for split in SPLITS)
        raise DataError(
            f"pairs: found {found} (dropped: {dict(dropped)}), expected at least one pair in each. "
            "Give more preferences (more sampling.prompts, or more votes on other prompts), or change "
            "pairs.validation_fraction."
        )


def _prompts_written(output_dir: Path) -> dict[str, list[str]]:
    return {split: [pair["prompt"] for pair in read_pairs(output_dir / f"{split}.jsonl")] for split in SPLITS}
