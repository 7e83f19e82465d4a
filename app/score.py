"""`align score`: what a recipe's reward says of responses, and which of two it prefers."""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment_pipeline.errors import DataError, MissingArtifactError, RecipeError
from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import Recipe
from alignment_pipeline.record_forms import Answered, Refused, is_dialogue, read_pair, read_prompt
from alignment_pipeline.rows import shown
from alignment_pipeline.templates import Template
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.device import named_device, only_device
from resources.home import alignment_home
from resources.prompt_form import template_of
from resources.runs import RunRecords

_PAIR = ("chosen", "rejected")
_SIDES = (("response",), ("response_a", "response_b"), _PAIR)
_EXPECTED = (
    'expected {"prompt": …, "response": …}, or in every line "response_a" and "response_b" (or "chosen" and "rejected")'
)
_REWARDS = ("reward_model", "reward_classifier")
_BATCH_SIZE = 32
_SHOWN_CHARS = 48

Score = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Prompts in their template and responses → scores."""


def score_file(console: Console, recipe: Recipe, file: Path | None, *, as_json: bool) -> None:
    """Print the score of each line's response or, of two, which one is preferred, and how often the first.

    Args:
        console: Where tables go; JSON goes to standard output.
        recipe: Its current reward model scores, or its classifier by the logit of its label.
        file: JSON lines {prompt, response}, {prompt, response_a, response_b} or, A being the chosen one, {prompt,
            chosen, rejected}; standard input if None. Prompts are texts, dialogues "\\n\\nHuman: …" or messages, as in
            preference data; for a recipe of plain texts they are texts.
        as_json: Print JSON lines.

    Raises:
        RecipeError: The recipe has neither of them.
        MissingArtifactError: It has not been made.
        DataError: The lines cannot be read, or hold something else.
    """
    rewards = [name for name in _REWARDS if name in build_graph(recipe)]
    if not rewards:
        raise RecipeError(
            f"{recipe.name} has neither a reward_model nor a reward_classifier, expected one to score by."
        )
    refs = RunRecords(alignment_home()).current(recipe.name)
    if rewards[0] not in refs:
        raise MissingArtifactError(f"{rewards[0]} of {recipe.name} has not been made. Run `align run {recipe.name}`.")
    device = only_device(named_device())
    where = "standard input" if file is None else str(file)
    records = read_lines(_lines(file), where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between transformers and PEFT
        template = _template(recipe, refs, refs[rewards[0]])
        rows = [_answered(record, place, plain=template is None) for place, record in records.items()]
        score = _scorer(refs[rewards[0]], template.tokenizer if template else None, device)
        prompts = [_in_template(template, row) for row in rows]
        start = template.response_start if template else ""
        sides = zip(*(row.responses for row in rows), strict=True)
        scores = [score(prompts, [start + response for response in side]) for side in sides]
    if as_json:
        for line in _as_json(scores):
            sys.stdout.write(json.dumps(line) + "\n")
    else:
        _print(console, f"{rewards[0]} of {recipe.name}", rows, scores)


def read_lines(lines: Iterable[str], where: str) -> dict[str, dict[str, Any]]:
    """Records by where they stand, all with the same keys; blank lines are left out.

    Raises:
        DataError: There is no record, or a line holds something else.
    """
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: found no JSON ({error}), {_EXPECTED}.") from error
        if not _sides(record):
            raise DataError(f"{place}: found {line.strip()[:80]}, {_EXPECTED}.")
        first = first or record
        if _sides(first) != _sides(record):
            now, before = (" and ".join(_sides(each)) for each in (record, first))
            raise DataError(f"{place}: found {now} after {before}, {_EXPECTED}.")
        found[place] = record
    if not found:
        raise DataError(f"{where}: found no line, {_EXPECTED}.")
    return found


def _sides(record: Any) -> tuple[str, ...]:
    """The keys of a record's responses, whatever else it has; none if it has not both."""
    keys = set(record) if isinstance(record, dict) else set()
    return next((sides for sides in _SIDES if keys.issuperset(sides)), ())


def _answered(record: Mapping[str, Any], place: str, *, plain: bool) -> Answered:
    """A record's prompt and responses; responses, and in a recipe of plain texts prompts, are taken as they are.

    Raises:
        DataError: They cannot be used.
    """
    sides, prompt = _sides(record), record.get("prompt")
    if sides == _PAIR and not plain:
        found = read_pair(record)
    else:
        texts = {"prompt": prompt} if plain else {}
        texts |= {side: record[side] for side in sides}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"{place}: found {name}: {shown(text)}, expected a text.")
        as_it_is = plain or (isinstance(prompt, str) and not is_dialogue(prompt))
        found = Answered(str(prompt), None, []) if as_it_is else read_prompt(prompt)
        if isinstance(found, Answered):
            found = found._replace(responses=[record[side] if as_it_is else record[side].strip() for side in sides])
    if isinstance(found, Refused):
        raise DataError(f"{place}: found {found.reason}: {found.detail}; {_EXPECTED}.")
    return found


def _lines(file: Path | None) -> list[str]:
    try:
        return list(sys.stdin) if file is None else file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file or 'standard input'} cannot be read ({error}), expected JSON lines.") from error


def _template(recipe: Recipe, refs: Mapping[str, ArtifactRef], reward: ArtifactRef) -> Template | None:
    """The template that the reward was trained with, its tokenizer where it is chat; None for plain texts.

    Raises:
        MissingArtifactError: The base model, whose tokenizer brings the chat template, has not been made.
    """
    store = ArtifactStore(alignment_home())
    name = template_of(store, reward, refs, recipe)
    if name != "chat":
        return Template(name, None) if name else None
    from alignment_pipeline.models import load_tokenizer

    behind = [ref for ref in store.family([reward]) if ref.stage == "base_model"]
    base = behind[0] if behind else refs.get("base_model")
    if base is None:
        raise MissingArtifactError(f"base_model of {recipe.name} has not been made. Run `align run {recipe.name}`.")
    return Template(name, load_tokenizer(store.verify(base)))


def _in_template(template: Template | None, row: Answered) -> str:
    return template.prompt({**row._asdict(), "input": ""}) if template else row.instruction


def _scorer(ref: ArtifactRef, chat_tokenizer: Any, device: str) -> Score:
    """How an artifact scores; a classifier reads chats without their special tokens, as in PPO and in evaluations."""
    from transformers.utils import logging

    from alignment_pipeline.classifier import ClassifierScorer, whole_texts
    from alignment_pipeline.reward import RewardScorer
    from alignment_pipeline.tokenization import encode, encode_prompts

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that the trunk has no score head is known: the adapter brings it
    store = ArtifactStore(alignment_home())
    folder = store.verify(ref)
    if ref.stage == "reward_classifier":
        classifier = ClassifierScorer.load(folder, device=device)

        def texts(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
            if chat_tokenizer is None:
                return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            return whole_texts(
                chat_tokenizer, encode_prompts(chat_tokenizer, prompts), encode(chat_tokenizer, responses)
            )

        return lambda prompts, responses: classifier.scores(texts(prompts, responses), _BATCH_SIZE)
    trunk = store.manifest(ref)["inputs"].get("trunk")
    scorer = RewardScorer.load(folder, store.verify(ArtifactRef(**trunk)) if trunk else None, device)
    return lambda prompts, responses: scorer.score(prompts, responses, batch_size=_BATCH_SIZE)


def _as_json(scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A value for each line and, of pairs, one more for all of them."""
    if len(scores) == 1:
        return [{"score": score} for score in scores[0]]
    from alignment_pipeline.reward import Preference

    pairs = [{"score_a": a, "score_b": b, "preferred": _preferred(a, b)} for a, b in zip(*scores, strict=True)]
    return [*pairs, {"preference_of_a": vars(Preference.between(*scores))}]


def _print(console: Console, title: str, rows: Sequence[Answered], scores: Sequence[Sequence[float]]) -> None:
    title = f"Scores by {title}"
    table = Table("prompt", title=title, min_width=len(title), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    columns = ["score"] if len(scores) == 1 else ["score of A", "score of B", "preferred"]
    for column in columns:
        table.add_column(column, justify="right")
    for row, numbers in zip(rows, zip(*scores, strict=True), strict=True):
        prompt = " ".join(row.instruction.split())
        shown = prompt if len(prompt) <= _SHOWN_CHARS else prompt[: _SHOWN_CHARS - 1] + "…"
        verdict = [_preferred(*numbers) or "neither"] if len(numbers) == 2 else []
        table.add_row(shown, *(f"{number:.3f}" for number in numbers), *verdict)
    console.print(table, markup=False, highlight=False)
    if len(scores) == 2:
        from alignment_pipeline.reward import Preference

        found = Preference.between(*scores)
        console.print(
            f"A is preferred in {found.win_rate:.1%} of {found.pairs} pairs, 95% interval {found.low:.1%} to "
            f"{found.high:.1%}; ties count half.",
            highlight=False, markup=False,
        )  # fmt: skip


def _preferred(a: float, b: float) -> str | None:
    return None if a == b else "A" if a > b else "B"
