import hashlib

import pytest

from alignment_pipeline.prompts import (
    control_character,
    format_prompt,
    is_plain_text,
    is_utf8_text,
    normalised,
    prefix_length,
    prompt_id,
    row_id,
    split_position,
    split_text,
    splits_share_no_prompt,
)


def test_the_template_is_the_courses_template() -> None:
    assert format_prompt("Add.", "") == "### Instruction:\nAdd.\n\n### Response:\n"
    assert format_prompt("Add.", "1 2\n") == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n\n### Response:\n"
    assert format_prompt("Add.", " \n") == format_prompt("Add.", "")


def test_identities_are_the_sha256_of_the_canonical_texts() -> None:
    assert prompt_id("ä", "b") == hashlib.sha256('["ä","b"]'.encode()).hexdigest()[:16]
    assert row_id("a", "b", "c") == hashlib.sha256(b'["a","b","c"]').hexdigest()[:16]
    assert prompt_id("ab", "") != prompt_id("a", "b")


def test_prompts_that_differ_in_case_and_whitespace_have_one_split_position() -> None:
    assert normalised(" Print\tthe  STRASSE\n") == normalised("print the straße")
    assert split_position(1, "instructions", "Print  It.\n") == split_position(1, "instructions", "print it.")


def test_split_positions_are_uniform_and_independent_between_seeds_and_purposes() -> None:
    prompts = [f"prompt {number}" for number in range(4000)]
    first = [split_position(0, "instructions", prompt) for prompt in prompts]
    assert all(0 <= position < 1 for position in first)
    low = [index for index, position in enumerate(first) if position < 0.2]
    # 4,000 draws: the standard deviation of a share of 0.2 is 0.006, of 0.5 among 800 it is 0.018; four of them.
    assert len(low) / len(prompts) == pytest.approx(0.2, abs=0.026)
    for seed, purpose in ((1, "instructions"), (0, "pairs")):
        other = [split_position(seed, purpose, prompts[index]) for index in low]
        assert sum(position < 0.5 for position in other) / len(low) == pytest.approx(0.5, abs=0.072)


def test_a_prompt_in_two_splits_fails_the_check_even_if_case_and_whitespace_differ() -> None:
    clean = splits_share_no_prompt({"train": ["a", "a", "b"], "test": ["c"]})
    assert clean.passed and clean.blocking and clean.name == "splits_share_no_prompt"
    leaked = splits_share_no_prompt({"train": ["Do  It"], "validation": [], "test": ["do it", "c"]})
    assert not leaked.passed
    assert "2 distinct prompts, 1 in more than one" in leaked.detail


@pytest.mark.parametrize("character", ["\x00", "\x08", "\x0b", "\x0c", "\x1f", "\x7f", "\x80", "\x9f"])
def test_control_characters_are_found(character: str) -> None:
    assert control_character(f"a{character}b") == character


def test_tab_line_ends_and_printable_characters_are_no_control_characters() -> None:
    assert control_character("a\tb\nc\r\nd ~\xa0é\u2028\U0001f600") is None


def test_lone_surrogates_are_not_utf8_text() -> None:
    assert is_utf8_text("\U0001f600")
    assert not is_utf8_text("\ud83d")


def test_a_row_without_an_instruction_is_a_plain_text_and_its_split_goes_by_the_whole_of_it() -> None:
    text = {"instruction": "", "input": "", "output": "A film about trains."}
    row = {"instruction": "Add.", "input": "1", "output": "A film about trains."}
    assert (is_plain_text(text), is_plain_text(row)) == (True, False)
    assert (split_text(text), split_text(row)) == ("A film about trains.", format_prompt("Add.", "1"))


def test_prefix_lengths_are_uniform_over_both_bounds_and_a_function_of_seed_and_row() -> None:
    rows = [row_id("", "", f"text {number}") for number in range(7000)]
    lengths = [prefix_length(0, row, 2, 8) for row in rows]
    for length in range(2, 9):
        # 7,000 draws of 7 values: the standard deviation of a share of 1/7 is 0.0042; four of them.
        assert lengths.count(length) / len(rows) == pytest.approx(1 / 7, abs=0.017)
    assert set(lengths) == set(range(2, 9))
    assert [prefix_length(0, row, 2, 8) for row in reversed(rows)] == lengths[::-1]
    other = [prefix_length(1, row, 2, 8) for row in rows]
    assert sum(a == b for a, b in zip(lengths, other, strict=True)) / len(rows) == pytest.approx(1 / 7, abs=0.017)
    assert {prefix_length(0, row, 5, 5) for row in rows} == {5}
