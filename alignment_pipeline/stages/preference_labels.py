"""`preference_labels`: pairs of responses with the preferred one named, by a rule, a reference, or the dataset."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.configs import JudgeName, LabellingConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.judges import judge
from alignment_pipeline.preferences import pair_id
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageResult, StageSpec


def label_preferences(spec: StageSpec[LabellingConfig], log: ProgressLog) -> StageResult:
    """Make at most `pairs_per_prompt` pairs from each prompt's samples; ties and identical pairs are dropped, counted.

    Writes `pairs.jsonl` (see `preferences` for the columns) and `summary.json`.
    """
    config = spec.config
    references = {row["prompt_id"]: row for row in read_jsonl(spec.inputs["dataset"] / "train.jsonl")}
    samples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in read_jsonl(spec.inputs["samples"] / "samples.jsonl"):
        samples[sample["prompt_id"]].append(sample)
    dropped: Counter[str] = Counter()
    pairs: list[dict[str, Any]] = []
    for number, (prompt_id, responses) in enumerate(samples.items(), 1):
        candidates = _candidates(config.method, references[prompt_id], [sample["response"] for sample in responses])
        kept = 0
        for (chosen, chosen_score), (rejected, rejected_score) in candidates:
            if chosen == rejected:
                dropped["identical"] += 1
            elif not chosen.strip() or not rejected.strip():
                dropped["empty"] += 1
            elif chosen_score is not None and chosen_score == rejected_score:
                dropped["tie"] += 1
            elif kept < config.pairs_per_prompt:
                kept += 1
                prompt = references[prompt_id]["prompt"]
                pairs.append(
                    {"id": pair_id(prompt, chosen, rejected), "prompt_id": prompt_id, "prompt": prompt,
                     "chosen": chosen, "rejected": rejected, "labeller": config.method,
                     "source": "dataset" if config.method == "dataset_answer" else "sampled",
                     "chosen_score": chosen_score, "rejected_score": rejected_score}
                )  # fmt: skip
        if number % 200 == 0 or number == len(samples):
            log.step("label", number, len(samples), {"pairs/count": len(pairs)})
    if not pairs:
        raise DataError(
            f"No pair is left from {sum(map(len, samples.values()))} samples (dropped: {dict(dropped)}). "
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


Scored = tuple[str, float | None]


def _candidates(method: str, row: dict[str, Any], responses: list[str]) -> Iterable[tuple[Scored, Scored]]:
    """(preferred, other) candidates of one prompt, the pairs furthest apart first."""
    if method == "dataset_answer":
        for response in responses:
            yield (row["reference"], None), (response, None)
        return
    name: JudgeName = "gold_rule" if method == "gold_rule" else "reference_chrf"
    scores = judge(name, [row] * len(responses), responses)
    ranked = sorted(zip(responses, scores, strict=True), key=lambda scored: -scored[1])
    combinations = itertools.combinations(range(len(ranked)), 2)
    for better, worse in sorted(combinations, key=lambda pair: ranked[pair[1]][1] - ranked[pair[0]][1]):
        yield ranked[better], ranked[worse]
