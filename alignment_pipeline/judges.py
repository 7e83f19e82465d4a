"""Judges: who scores a response, from 0 to 1. Every table names the judge it used.

`gold_rule` parses the response by the built-in world's rule; `reference_chrf` measures closeness to the dataset's
answer; neither runs the response. `reward_classifier` is the probability of the classifier's label for prompt and
response, by `classifier.ClassifierScorer` in the evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sacrebleu.metrics import CHRF

from alignment_pipeline.configs import JudgeName
from alignment_pipeline.world.gold import judge_response

JUDGE_TITLES: dict[JudgeName, str] = {"gold_rule": "gold score", "reference_chrf": "chrF to reference",
                                         "reward_classifier": "P(label)"}  # fmt: skip


RuleName = Literal["gold_rule", "reference_chrf"]
"""Judges that need no model."""


def judge(name: RuleName, rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
    """Score each response to its dataset row (instruction, input, reference)."""
    score = _JUDGES[name]
    return [score(row, response) for row, response in zip(rows, responses, strict=True)]


def _gold_rule(row: dict[str, Any], response: str) -> float:
    return judge_response(row["instruction"], row["input"], response).score


_CHRF = CHRF()


def _reference_chrf(row: dict[str, Any], response: str) -> float:
    # chrF (Popović 2015) with sacrebleu's defaults: character 6-grams, beta 2, effective order.
    return float(_CHRF.sentence_score(response, [row["reference"]]).score) / 100


_JUDGES: dict[RuleName, Callable[[dict[str, Any], str], float]] = {
    "gold_rule": _gold_rule,
    "reference_chrf": _reference_chrf,
}
