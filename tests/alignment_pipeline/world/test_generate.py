"""What a user of the generated rows may rely on: distinct, repeatable, readable back, and solved."""

import builtins
import keyword
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from alignment_pipeline.world.families import FAMILIES
from alignment_pipeline.world.generate import (
    FUNCTION_NAMES,
    NAMED_SHARE,
    OPENERS,
    STYLES,
    count_instructions,
    generate_rows,
    parse_task,
)
from alignment_pipeline.world.gold import judge_response
from alignment_pipeline.world.task import Task, TaskFamily

REPOSITORY = Path(__file__).parents[3]
ROWS = generate_rows(6_000, seed=11)

# Arguments to compare the accepted expressions of our own families on, by type.
SAMPLES = {
    "int": [-7, -1, 0, 1, 2, 4, 9, 33],
    "str": ["", "a", "abba", " Key of rain ", "x,y-z", "banana" * 9],
    "list[int]": [[], [3], [5, 3, 5, 40, -2], list(range(40))],
    "list[str]": [[], ["a"], ["b", "a", "b"]],
    "dict[str, int]": [{}, {"age": 3, "sun": 1}, {word: len(word) for word in ("key", "id", "moon", "city")}],
}
TYPES = {"int": int, "str": str, "bool": bool, "list[int]": list, "list[str]": list}


def test_a_row_has_exactly_the_three_columns_and_all_are_text():
    for row in ROWS:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) for text in row.values())


def test_every_generated_output_is_correct_under_the_gold_rule():
    for row in ROWS:
        verdict = judge_response(row["instruction"], row["input"], row["output"])
        assert verdict.correct, row


def test_every_family_appears():
    seen = {parse_task(row["instruction"], row["input"]).family.name for row in ROWS}
    assert seen == {family.name for family in FAMILIES}
    assert len(FAMILIES) >= 48


def test_no_two_rows_share_a_prompt():
    assert len({(row["instruction"], row["input"]) for row in ROWS}) == len(ROWS)


def test_more_than_fifty_thousand_distinct_prompts_are_available():
    rows = generate_rows(50_001, seed=0)
    assert len({(row["instruction"], row["input"]) for row in rows}) == 50_001


def test_every_promised_row_can_be_drawn():
    count = count_instructions()
    assert len(generate_rows(count, seed=0)) == count


def test_more_rows_than_available_are_refused_with_the_number_there_is():
    with pytest.raises(ValueError, match=str(count_instructions())):
        generate_rows(count_instructions() + 1, seed=0)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="-1"):
        generate_rows(-1, seed=0)


def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others():
    assert generate_rows(500, seed=3) == generate_rows(500, seed=3)
    assert generate_rows(500, seed=3) != generate_rows(500, seed=4)


def test_a_smaller_count_gives_the_first_rows_of_a_larger_one():
    assert ROWS[:500] == generate_rows(500, seed=11)


def test_rows_do_not_depend_on_the_hash_seed():
    program = "from alignment_pipeline.world.generate import generate_rows; print(generate_rows(300, seed=5))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert printed == {f"{generate_rows(300, seed=5)}\n"}


def test_the_promised_share_of_rows_asks_for_a_function_name():
    # Four standard errors of a share of 0.4 over 6,000 rows are 0.025.
    share = sum(row["input"] != "" for row in ROWS) / len(ROWS)
    assert share == pytest.approx(NAMED_SHARE, abs=0.025)


def test_a_row_that_asks_for_a_name_defines_that_name():
    named = [row for row in ROWS if row["input"]]
    assert all(row["output"].startswith(f"def {row['input'].removeprefix('Name: ')}(") for row in named)


def test_every_style_has_its_share_of_the_rows():
    assert sum(style.share for style in STYLES) == pytest.approx(1.0)
    written = Counter(
        (" -> " in row["output"], '"""' in row["output"], "    result = " in row["output"]) for row in ROWS
    )
    for style in STYLES:
        # Four standard errors of a share of 0.3 over 6,000 rows are 0.024.
        share = written[style.typed, style.documented, style.verbose] / len(ROWS)
        assert share == pytest.approx(style.share, abs=0.024), style


def test_outputs_are_short_enough_for_a_small_model():
    assert max(len(row["output"]) for row in ROWS) <= 140
    assert sum(len(row["output"]) for row in ROWS) / len(ROWS) <= 70


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_wording_of_a_task_is_read_back_as_that_task(family: TaskFamily):
    for values in family.settings():
        for phrase in family.phrases:
            for opener in OPENERS:
                instruction = f"{opener} {phrase.format(**dict(values))}."
                assert parse_task(instruction, "") == Task(family, values, family.name)
            assert parse_task(instruction, "Name: shift") == Task(family, values, "shift")


@pytest.mark.parametrize(
    ("instruction", "name_line"),
    [
        ("Write a Python function that adds 1000 to a number.", ""),
        ("Write a Python function that adds 7 to a number", ""),
        ("Write a Python function that adds 7 to a number!", ""),
        ("Kindly write a function that adds 7 to a number.", ""),
        ("Write a Python function that adds 7 to a number.", "Name: import"),
        ("Write a Python function that adds 7 to a number.", "shift"),
        ("", ""),
    ],
)
def test_a_prompt_from_elsewhere_is_no_task(instruction: str, name_line: str):
    assert parse_task(instruction, name_line) is None


def test_ten_thousand_prompts_are_parsed_in_under_a_second():
    start = time.perf_counter()
    for row in (ROWS * 2)[:10_000]:
        parse_task(row["instruction"], row["input"])
    assert time.perf_counter() - start < 1.0


def test_no_function_name_hides_a_builtin_or_a_keyword():
    names = [*FUNCTION_NAMES, *(family.name for family in FAMILIES)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert not [name for name in names if hasattr(builtins, name) or keyword.iskeyword(name)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_offers_at_least_four_phrases_and_a_docstring_line(family: TaskFamily):
    assert len(set(family.phrases)) == len(family.phrases) >= 4
    assert family.summary.endswith(".")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_accepted_expressions_of_a_family_agree_and_have_the_return_type(family: TaskFamily):
    # These are this project's own constants, so they may be run; a response never is.
    (name, _, first_type), *others = [argument.partition(": ") for argument in family.arguments]
    for values in family.settings()[:3]:
        for sample in SAMPLES[first_type]:
            for second in SAMPLES["int"] if others else [0]:
                arguments = {name: sample, "b": second}
                outcomes = [_outcome(expression, arguments) for expression in Task(family, values, "f").expressions]
                assert outcomes == outcomes[:1] * len(outcomes)
                assert all(outcome is None or type(outcome) is TYPES[family.returns] for outcome in outcomes)


def _outcome(expression: str, arguments: dict[str, object]) -> object:
    """The value of an expression, or None where the arguments have none, such as the first item of an empty list."""
    try:
        return eval(expression, dict(arguments))  # noqa: S307  a constant of this project, never a response
    except (LookupError, ValueError):
        return None
