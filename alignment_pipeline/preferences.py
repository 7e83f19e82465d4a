"""The preference pair, the record that every source of preferences writes and every preference learner reads.

A line of a `pairs.jsonl` (or of the union's `train.jsonl` and `validation.jsonl`) holds exactly these keys:

    {"id": str,              # pair_id(prompt, chosen, rejected)
     "prompt_id": str,       # as in instructions/rows.jsonl; from the prompt's text if it is not there
     "prompt": str,          # in the template, ends with "### Response:\\n"
     "chosen": str,          # response text WITHOUT the EOS string
     "rejected": str,        # the same
     "chosen_ended": bool,   # whether the response came to its end; trainers append the EOS token only then
     "rejected_ended": bool, # the same
     "source": "dataset" | "sampled" | "human",
     "labeller": str,        # who preferred: a rule's or judge's name, or a person's
     "chosen_score": float | null,     # null unless a rule scored
     "rejected_score": float | null}   # the same

There is no weight: a pair counts once. The two responses may stand in two pairs with opposite votes.
"""

from pathlib import Path
from typing import Literal, TypedDict, cast

from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import digest, read_jsonl
from alignment_pipeline.prompts import ID_CHARS

PAIRS_FILE = "pairs.jsonl"

PairSource = Literal["dataset", "sampled", "human"]

_SOURCES = ("dataset", "sampled", "human")
_TEXTS = ("id", "prompt_id", "prompt", "chosen", "rejected", "labeller")
_SCORES = ("chosen_score", "rejected_score")
_ENDED = ("chosen_ended", "rejected_ended")


class PreferencePair(TypedDict):
    """One preference: of two responses to a prompt, which one a labeller chose. The module says what each key holds."""

    id: str
    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_ended: bool
    rejected_ended: bool
    source: PairSource
    labeller: str
    chosen_score: float | None
    rejected_score: float | None


def pair_id(prompt: str, chosen: str, rejected: str) -> str:
    """Identity of a pair: the start of the sha256 of its three texts; the opposite vote is another pair."""
    return digest([prompt, chosen, rejected])[:ID_CHARS]


def make_pair(
    *,
    prompt_id: str,
    prompt: str,
    chosen: str,
    rejected: str,
    source: PairSource,
    labeller: str,
    chosen_score: float | None = None,
    rejected_score: float | None = None,
    chosen_ended: bool = True,
    rejected_ended: bool = True,
) -> PreferencePair:
    """A pair with its identity."""
    return PreferencePair(
        id=pair_id(prompt, chosen, rejected),
        prompt_id=prompt_id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_ended=chosen_ended,
        rejected_ended=rejected_ended,
        source=source,
        labeller=labeller,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )


def read_pairs(path: Path) -> list[PreferencePair]:
    """Read a file of pairs and hold every one to the contract.

    Raises:
        DataError: The file is missing, or a line breaks the contract.
    """
    if not path.is_file():
        raise DataError(f"{path}: found no such file, expected preference pairs. Materialise their stage.")
    rows = read_jsonl(path)
    for line, row in enumerate(rows, start=1):
        fits = (
            set(row) == {*_TEXTS, *_SCORES, *_ENDED, "source"}
            and all(isinstance(row[name], str) for name in _TEXTS)
            and all(row[name] is None or isinstance(row[name], int | float) for name in _SCORES)
            and all(isinstance(row[name], bool) for name in _ENDED)
            and row["source"] in _SOURCES
            and row["id"] == pair_id(row["prompt"], row["chosen"], row["rejected"])
        )
        if not fits:
            raise DataError(
                f"{path}, line {line}: found keys {sorted(row)} and source {row.get('source')!r}, expected the record "
                "described in alignment_pipeline/preferences.py with an id that matches its texts."
            )
    return [cast(PreferencePair, row) for row in rows]
