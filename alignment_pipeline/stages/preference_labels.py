"""`preference_labels`: pairs of responses with the preferred one named, by a rule, a reference, or the dataset."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.configs import LabellingConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.judges import RuleName, judge
from alignment_pipeline.preferences import PreferencePair, make_pair
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageResult, StageSpec

Row = dict[str, Any]

_DATASET_METHODS = ("dataset_answer", "dataset_pair")


def label_preferences(spec: StageSpec[LabellingConfig], log: ProgressLog) -> StageResult:
    """Make at most `pairs_per_prompt` pairs from each prompt's samples; ties and identical pairs are dropped, counted.

    With `dataset_pair` there are no samples: every row of the train split is one pair.

    Writes `pairs.jsonl` (see `preferences` for the columns) and `summary.json`.
    """
    config = spec.config
    asked = _asked(spec)
    dropped: Counter[str] = Counter()
    pairs: list[PreferencePair] = []
    for number, (row, responses) in enumerate(asked, 1):
        kept = 0
        for better, worse in _candidates(config.method, row, responses):
            if better.text == worse.text:
                dropped["identical"] += 1
            elif not better.text.strip() or not worse.text.strip():
                dropped["empty"] += 1
            elif better.score is not None and better.score == worse.score:
                dropped["tie"] += 1
            elif kept < config.pairs_per_prompt:
                kept += 1
                pairs.append(
                    make_pair(
                        prompt_id=row["prompt_id"],
                        prompt=row["prompt"],
                        chosen=better.text,
                        rejected=worse.text,
                        chosen_ended=better.ended,
                        rejected_ended=worse.ended,
                        source="dataset" if config.method in _DATASET_METHODS else "sampled",
                        labeller=config.method,
                        chosen_score=better.score,
                        rejected_score=worse.score,
                    )
                )
        if number % 200 == 0 or number == len(asked):
            log.step("label", number, len(asked), {"pairs/count": len(pairs)})
    if not pairs:
        raise DataError(
            f"No pair is left from {sum(len(responses) for _, responses in asked)} samples (dropped: {dict(dropped)}). "
            "Raise sampling.samples_per_prompt or sampling.temperature so that responses differ."
        )
    write_jsonl(spec.output_dir / "pairs.jsonl", pairs)
    summary = {"pairs": len(pairs), "labeller": config.method, "dropped": dict(sorted(dropped.items()))}
    atomic.write_json(spec.output_dir / "summary.json", summary)
    return StageResult(
        {
            "pairs/count": float(len(pairs)),
            "pairs/ties": float(dropped["tie"]),
            "pairs/identical": float(dropped["identical"]),
            "pairs/empty": float(dropped["empty"]),
            "pairs/chosen_longer_share": sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
            / len(pairs),
        }
    )


@dataclass(frozen=True)
class _Response:
    """A response that may stand in a pair: whether it came to its end, and its score if a rule gave one."""

    text: str
    ended: bool
    score: float | None = None


def _asked(spec: StageSpec[LabellingConfig]) -> list[tuple[Row, list[Row]]]:
    """Rows of the train split, one a prompt, with its samples; where rows are pairs themselves, every row and none."""
    rows = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    if spec.config.method == "dataset_pair":
        return [(row, []) for row in rows]
    references = {row["prompt_id"]: row for row in rows}
    samples: dict[str, list[Row]] = defaultdict(list)
    for sample in read_jsonl(spec.inputs["samples"] / "samples.jsonl"):
        samples[sample["prompt_id"]].append(sample)
    return [(references[prompt_id], responses) for prompt_id, responses in samples.items()]


def _candidates(method: str, row: Row, samples: list[Row]) -> Iterable[tuple[_Response, _Response]]:
    """(preferred, other) candidates of one prompt, the pairs furthest apart first."""
    if method in _DATASET_METHODS:
        # The completion without its end token: the template may put a space before the dataset's answer.
        answer = _Response(row["completion"][: row["completion"].index(row["reference"]) + len(row["reference"])], True)
        if method == "dataset_pair":
            yield answer, _Response(row["rejected"], True)
        for sample in samples:
            yield answer, _Response(sample["response"], sample["ended"])
        return
    name: RuleName = "gold_rule" if method == "gold_rule" else "reference_chrf"
    scores = judge(name, [row] * len(samples), [sample["response"] for sample in samples])
    ranked = sorted(zip(scores, samples, strict=True), key=lambda pair: -pair[0])
    combinations = itertools.combinations(range(len(ranked)), 2)
    for better, worse in sorted(combinations, key=lambda pair: ranked[pair[1]][0] - ranked[pair[0]][0]):
        yield _scored(*ranked[better]), _scored(*ranked[worse])


def _scored(score: float, sample: dict[str, Any]) -> _Response:
    return _Response(sample["response"], sample["ended"], score)
