"""The prompt template, and what makes two prompts the same: identity, normal form and split.

Belongs here: pure functions of text. Tokenization is in `stages.formatted_dataset`.

A prompt's split depends on its own text, the seed and the purpose only: not on order, other rows or row counts.

A plain text is a row with neither instruction nor input, its output the whole text. Its prompt is the text's beginning,
which is cut in tokens and so known once there is a tokenizer; until then the whole text stands for it.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping

from alignment_pipeline.identity import canonical_json
from alignment_pipeline.stage import StageCheck

ID_CHARS = 16
PROMPT_HEADER = "### Instruction:\n"

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def format_prompt(instruction: str, input: str) -> str:
    """Put an instruction and its input (left out where blank) into the template that every stage uses."""
    input_part = f"### Input:\n{input}\n\n" if input.strip() else ""
    return f"{PROMPT_HEADER}{instruction}\n\n{input_part}### Response:\n"


def is_plain_text(row: Mapping[str, str]) -> bool:
    """Whether a row is a plain text; a row of instruction and output never has an empty instruction."""
    return not row["instruction"]


def split_text(row: Mapping[str, str]) -> str:
    """What a row's split goes by: its formatted prompt, or a plain text as a whole."""
    return row["output"] if is_plain_text(row) else format_prompt(row["instruction"], row["input"])


def prefix_length(seed: int, row_id: str, shortest: int, longest: int) -> int:
    """How many tokens of a plain text are its prompt: uniform from `shortest` to `longest`, both included.

    A function of seed and row alone. Source: TRL's former `LengthSampler`, which leaves its upper bound out and draws
    from a global generator, so that a prompt depended on the rows before it.
    """
    position = _uniform("prefix_length", seed, row_id)
    return shortest + int(position * (longest - shortest + 1))


def prompt_id(instruction: str, input: str) -> str:
    """Identity of a prompt: the start of the sha256 of both texts, byte for byte."""
    return identity_of(canonical_json(instruction), canonical_json(input))


def row_id(instruction: str, input: str, output: str) -> str:
    """Identity of a row: the start of the sha256 of its three texts, byte for byte."""
    return identity_of(canonical_json(instruction), canonical_json(input), canonical_json(output))


def identity_of(*quoted: str) -> str:
    """Identity of a list of texts that are canonical JSON already: the start of the sha256 of the list's."""
    return hashlib.sha256(f"[{','.join(quoted)}]".encode("utf-8", "surrogatepass")).hexdigest()[:ID_CHARS]


def normalised(prompt: str) -> str:
    """The form in which prompts that differ in case and whitespace only are equal; splits go by it."""
    return " ".join(prompt.split()).casefold()


def split_position(seed: int, purpose: str, prompt: str) -> float:
    """Where a prompt falls in [0, 1), uniformly, as a function of its normal form.

    Args:
        seed: Seed of the recipe.
        purpose: Name of the split that is made. Positions for two purposes are independent: the pairs' held-out share
            is drawn from prompts that all have high positions in the split of the instructions.
        prompt: Formatted prompt.
    """
    return _uniform(purpose, seed, normalised(prompt))


def _uniform(purpose: str, seed: int, text: str) -> float:
    """A number in [0, 1) that is a function of the canonical JSON of the three as a list, uniform over texts."""
    whole = hashlib.sha256(f"[{canonical_json(purpose)},{seed},{canonical_json(text)}]".encode()).digest()
    return (int.from_bytes(whole[:8]) >> 11) / 2**53  # 53 bits: a float holds them, so that 1.0 cannot come out


def splits_share_no_prompt(prompts: Mapping[str, Iterable[str]]) -> StageCheck:
    """Check that no normalised prompt stands in two splits.

    Args:
        prompts: Split → formatted prompts of the rows written.
    """
    split_of: dict[str, str] = {}
    shared = 0
    for split, texts in prompts.items():
        for text in {normalised(text) for text in texts}:
            shared += split_of.setdefault(text, split) != split
    return leak_check(len(split_of), shared, prompts)


def leak_check(distinct: int, shared: int, splits: Iterable[str]) -> StageCheck:
    """The check that no prompt stands in two splits, from the counts of distinct and of shared normalised prompts."""
    detail = f"{distinct} distinct prompts, {shared} in more than one of {', '.join(splits)}"
    return StageCheck("splits_share_no_prompt", passed=not shared, detail=detail, blocking=True)


def is_utf8_text(text: str) -> bool:
    """Whether text can be written as UTF-8; JSON can smuggle in lone surrogates, which cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def control_character(text: str) -> str | None:
    """The first C0, C1 or DEL character other than tab and line ends, or None."""
    found = _CONTROL_CHARACTER.search(text)
    return found.group() if found else None
