"""The stage `human_preferences`: people's votes in, preference pairs out, bad votes to quarantine.

A vote is a line {"prompt" or "instruction" (+ "input"), "chosen", "rejected", optional "labeller"}. A prompt that is
not in the template is taken as an instruction and put into it. A prompt that the dataset does not know is welcome.

Two people may disagree: the same two responses with opposite votes are two pairs, and both are kept. A vote about a
prompt of the validation or test split is refused, since learning from it would leak into what measures the result.

`pairs.jsonl`: see `preferences`. `quarantine.jsonl`: {reason, source_line, detail}. `summary.json`: counts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignment_pipeline.atomic import write_json
from alignment_pipeline.configs import FeedbackConfig
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.preferences import PAIRS_FILE, PreferencePair, make_pair, pair_id
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import (
    PROMPT_HEADER,
    format_prompt,
    normalised,
    prompt_id,
)
from alignment_pipeline.rows import UNDECODABLE_KEY, RawRow, parse_jsonl, shown, text_problem
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec

DEFAULT_LABELLER = "human"
_HELD_OUT = ("validation", "test")

Problem = tuple[str, str]
"""Reason and detail."""


@dataclass(frozen=True)
class KnownPrompts:
    """What the dataset says about prompts.

    Attributes:
        ids: Formatted prompt → prompt_id.
        held_out: Normalised formatted prompts of the validation and test splits.
        held_out_bare: The same without the template: instruction and input only.
        eos_token: The text that ends the dataset's completions.
    """

    ids: Mapping[str, str]
    held_out: frozenset[str]
    held_out_bare: frozenset[str]
    eos_token: str

    @classmethod
    def of(cls, dataset: Path) -> Self:
        """Read them from a formatted dataset."""
        rows = {split: read_jsonl(dataset / f"{split}.jsonl") for split in ("train", *_HELD_OUT)}
        held_out = [row for split in _HELD_OUT for row in rows[split]]
        first = rows["train"][0]
        return cls(
            ids={row["prompt"]: row["prompt_id"] for split in rows for row in rows[split]},
            held_out=frozenset(normalised(row["prompt"]) for row in held_out),
            held_out_bare=frozenset(normalised(f"{row['instruction']} {row['input']}") for row in held_out),
            eos_token=first["completion"][len(first["reference"]) :],
        )

    def holds_out(self, prompt: str, bare: str) -> bool:
        """Whether a prompt, formatted or as its bare text, belongs to a held-out split."""
        if normalised(prompt) in self.held_out:
            return True
        return prompt not in self.ids and normalised(bare) in self.held_out_bare


def collect_human_preferences(spec: StageSpec[FeedbackConfig], log: ProgressLog) -> StageResult:
    """Turn the votes in the journal into pairs; no journal or an empty one means no votes yet."""
    known = KnownPrompts.of(spec.inputs["dataset"])
    journal = spec.inputs.get("journal")
    votes = parse_jsonl(journal.read_bytes()) if journal is not None and journal.is_file() else []
    pairs: dict[str, PreferencePair] = {}
    quarantined: list[dict[str, Any]] = []
    for vote in votes:
        pair = _read_vote(vote, known, spec.config.max_chars)
        if not isinstance(pair, tuple) and pair["id"] in pairs:
            pair = ("duplicate", f"same prompt, chosen and rejected as pair {pair['id']}")
        if isinstance(pair, tuple):
            reason, detail = pair
            quarantined.append({"reason": reason, "source_line": vote.source_line, "detail": detail})
        else:
            pairs[pair["id"]] = pair
    return _write(spec.output_dir, list(pairs.values()), quarantined, len(votes), log)


def _write(
    output_dir: Path,
    pairs: Sequence[PreferencePair],
    quarantined: Sequence[dict[str, Any]],
    rows_in: int,
    log: ProgressLog,
) -> StageResult:
    write_jsonl(output_dir / PAIRS_FILE, pairs)
    write_jsonl(output_dir / "quarantine.jsonl", quarantined)
    ids = {pair["id"] for pair in pairs}
    opposed = sum(pair_id(pair["prompt"], pair["rejected"], pair["chosen"]) in ids for pair in pairs)
    counts = {"rows_in": rows_in, "kept": len(pairs), "quarantined": len(quarantined)}
    summary = {
        **counts,
        "by_reason": dict(sorted(Counter(row["reason"] for row in quarantined).items())),
        "by_labeller": dict(sorted(Counter(pair["labeller"] for pair in pairs).items())),
        "opposed": opposed,
    }
    write_json(output_dir / "summary.json", summary)
    log.note(f"{len(pairs)} of {rows_in} votes kept, {len(quarantined)} in quarantine {summary['by_reason']}")
    reconcile = StageCheck(
        "counts_reconcile",
        passed=rows_in == len(pairs) + len(quarantined),
        detail=f"{rows_in} votes in, {len(pairs)} kept + {len(quarantined)} quarantined",
        blocking=True,
    )
    metrics = {f"feedback/{name}": float(count) for name, count in counts.items()}
    return StageResult(metrics=metrics, checks=(reconcile,))


def _read_vote(vote: RawRow, known: KnownPrompts, max_chars: int) -> PreferencePair | Problem:
    """The vote's pair, or why it cannot be used."""
    problem = (vote.problem, vote.detail) if vote.problem else _form_problem(vote.value)
    if problem is not None:
        return problem
    texts: dict[str, str] = {name: text for name, text in vote.value.items() if isinstance(text, str)}
    prompt, identity = _prompt(texts, known)
    chosen, rejected = texts["chosen"], texts["rejected"]
    labeller = texts.get("labeller", "").strip() or DEFAULT_LABELLER
    bare = texts.get("prompt") or f"{texts['instruction']} {texts.get('input', '')}"
    problem = _content_problem({"prompt": prompt, "chosen": chosen, "rejected": rejected}, known, max_chars)
    if problem is None and known.holds_out(prompt, bare):
        problem = ("held_out_prompt", f"belongs to the validation or test split: {shown(prompt)}")
    if problem is not None:
        return problem
    return make_pair(
        prompt_id=identity, prompt=prompt, chosen=chosen, rejected=rejected, source="human", labeller=labeller
    )


def _form_problem(value: Any) -> Problem | None:
    """What is wrong with the vote's keys, types and characters."""
    if not isinstance(value, dict):
        return "wrong_type", shown(value)
    if set(value) == {UNDECODABLE_KEY}:
        return "invalid_utf8", shown(value[UNDECODABLE_KEY])
    prompt_key = "prompt" if value.get("prompt") is not None else "instruction"
    missing = [name for name in (prompt_key, "chosen", "rejected") if name not in value]
    if missing:
        names = " and no ".join("prompt or instruction" if name == "instruction" else name for name in missing)
        return "missing_key", f"no {names} among {shown(sorted(value))}"
    optional = [name for name in ("input", "labeller") if value.get(name) is not None]
    for name in (prompt_key, "chosen", "rejected", *optional):
        text = value[name]
        problem = text_problem(name, text)
        if problem is not None:
            return problem
        if name in (prompt_key, "chosen", "rejected") and not text.strip():
            return "empty", f"{name}: {shown(text)}"
    return None


def _content_problem(texts: Mapping[str, str], known: KnownPrompts, max_chars: int) -> Problem | None:
    for name, text in texts.items():
        if len(text) > max_chars:
            return "over_long", f"{name}: {len(text)} characters, {max_chars} allowed"
    for name in ("chosen", "rejected"):
        if known.eos_token and known.eos_token in texts[name]:
            return "contains_eos", f"{name} holds {known.eos_token}: {shown(texts[name])}"
    return ("identical", shown(texts["chosen"])) if texts["chosen"] == texts["rejected"] else None


def _prompt(texts: Mapping[str, str], known: KnownPrompts) -> tuple[str, str]:
    """The vote's formatted prompt and its prompt_id."""
    given = texts.get("prompt")
    if given is not None and given.startswith(PROMPT_HEADER):
        return given, known.ids.get(given, prompt_id(given, ""))
    instruction, input = (given, "") if given is not None else (texts["instruction"], texts.get("input", ""))
    prompt = format_prompt(instruction, input)
    return prompt, known.ids.get(prompt, prompt_id(instruction, input))
