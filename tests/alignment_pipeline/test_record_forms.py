"""Each form of records, and each way in which a record of it can be bad."""

from typing import Any

import pytest
from pydantic import ValidationError

from alignment_pipeline.configs import DataConfig
from alignment_pipeline.record_forms import Example, Refused, read_example, read_pair, read_prompt, renamed

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Why?\n"}
ANSWER = {"role": "assistant", "content": "So."}
OTHER = {"role": "assistant", "content": "Thus."}
MORE = {"role": "user", "content": "And?"}
HUMAN = "\n\nHuman: Why?\n\nAssistant:"


def read(record: Any, form: str, **config: Any) -> Example | Refused:
    return read_example(record, DataConfig(**{"form": form, **config}))


ONE_TURN = {
    "texts": {"prompt": " Why?\n", "chosen": "So.", "rejected": "Thus."},
    "messages with the prompt in them": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "the prompt's text and messages with it": {
        "prompt": " Why?\n",
        "chosen": [USER, ANSWER],
        "rejected": [USER, OTHER],
    },
    "the prompt's text and answers": {"prompt": " Why?\n", "chosen": [ANSWER], "rejected": [OTHER]},
    "the prompt's messages and answers": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "the prompt's messages and texts": {"prompt": [USER], "chosen": "So.", "rejected": "Thus."},
    "more keys in messages": {"chosen": [USER | {"name": None}, ANSWER], "rejected": [USER, OTHER], "prompt": None},
}


@pytest.mark.parametrize("record", ONE_TURN.values(), ids=ONE_TURN)
def test_a_preference_of_one_turn_is_the_same_example_in_every_spelling(record: Any) -> None:
    assert read({**record, "score": 1}, "preferences") == Example(" Why?\n", "", "So.", "Thus.")


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": HUMAN + " So.", "rejected": HUMAN + " Thus. \n"},
        {"prompt": HUMAN, "chosen": " So.", "rejected": "Thus.\n"},
        {"prompt": "\n\nHuman: Why?", "chosen": "So.", "rejected": "Thus."},
        {"prompt": HUMAN, "chosen": HUMAN + " So.", "rejected": HUMAN + " Thus."},
        {"prompt": " Why?\n", "chosen": HUMAN + " So.", "rejected": HUMAN + " Thus."},
        {"prompt": [USER], "chosen": HUMAN + " So.", "rejected": HUMAN + " Thus."},
        {"prompt": HUMAN, "chosen": HUMAN + " So.", "rejected": " Thus."},
    ],
)
def test_turns_of_a_dialogue_lose_the_white_space_around_them(record: Any) -> None:
    assert read(record, "preferences") == Example("Why?", "", "So.", "Thus.")


def test_a_prompt_of_several_messages_is_kept_as_messages_and_as_their_transcript() -> None:
    messages = [SYSTEM, USER, ANSWER, MORE]
    transcript = "System: Be brief.\n\nHuman:  Why?\n\n\nAssistant: So.\n\nHuman: And?"
    for record in (
        {"chosen": [*messages, ANSWER], "rejected": [*messages, OTHER]},
        {"prompt": messages, "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": messages, "chosen": [*messages, ANSWER], "rejected": [*messages, OTHER]},
    ):
        assert read(record, "preferences") == Example(transcript, "", "So.", "Thus.", messages)
    # The prompt's text beside messages that have a system message too.
    answers = {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}
    assert read({"prompt": USER["content"], **answers}, "preferences") == read(answers, "preferences")
    dialogue = "\n\nHuman: Why?\n\nAssistant: Because: a\n\nb\n\nHuman: And?\n\nAssistant:"
    assert read({"chosen": dialogue + " So.", "rejected": dialogue + " Thus."}, "preferences") == Example(
        "Human: Why?\n\nAssistant: Because: a\n\nb\n\nHuman: And?", "", "So.", "Thus.",
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because: a\n\nb"}, MORE],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, ANSWER]}, Example(" Why?\n", "", "So.")),
        ({"prompt": [USER], "completion": [ANSWER]}, Example(" Why?\n", "", "So.")),
        ({"prompt": " Why?\n", "completion": "So.", "messages": None}, Example(" Why?\n", "", "So.")),
        (
            {"messages": [SYSTEM, USER, ANSWER]},
            Example("System: Be brief.\n\nHuman:  Why?\n", "", "So.", None, [SYSTEM, USER]),
        ),
        (
            {"prompt": [USER, OTHER, MORE], "completion": [ANSWER]},
            Example("Human:  Why?\n\n\nAssistant: Thus.\n\nHuman: And?", "", "So.", None, [USER, OTHER, MORE]),
        ),
    ],
)
def test_of_a_conversation_the_last_message_is_the_output(record: Any, expected: Example) -> None:
    assert read(record, "conversations") == expected


BAD_PREFERENCES = {
    "missing_key": [
        {}, {"prompt": "p", "chosen": "c"}, {"prompt": "p", "rejected": "r"}, {"chosen": "c", "rejected": "r"},
        {"prompt": None, "chosen": "c", "rejected": "r"}, {"chosen": [ANSWER], "rejected": [OTHER]},
    ],
    "wrong_type": [
        [1], None, {"prompt": 1, "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": None, "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": 3}, {"prompt": "p", "chosen": {"role": "user"}, "rejected": "r"},
        {"prompt": "p", "chosen": ["c"], "rejected": ["r"]},
        {"chosen": [USER, {"role": "assistant", "content": None}], "rejected": [USER, OTHER]},
    ],
    "empty_prompt": [
        {"prompt": " \n", "chosen": "c", "rejected": "r"}, {"prompt": [], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        {"chosen": [SYSTEM | {"content": ""}, USER, ANSWER], "rejected": [SYSTEM | {"content": ""}, USER, OTHER]},
    ],
    "empty_chosen": [
        {"prompt": "p", "chosen": " ", "rejected": "r"}, {"chosen": HUMAN, "rejected": HUMAN + " r"},
        {"prompt": "p", "chosen": [{"role": "assistant", "content": ""}], "rejected": [OTHER]},
    ],
    "empty_rejected": [{"prompt": "p", "chosen": "c", "rejected": "\n"}, {"chosen": HUMAN + "c", "rejected": HUMAN}],
    "identical_pair": [
        {"prompt": "p", "chosen": "c", "rejected": "c"}, {"chosen": HUMAN + " c", "rejected": HUMAN + " c\n"},
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
    ],
    "prompts_differ": [
        {"chosen": HUMAN + " c", "rejected": "\n\nHuman: Where?\n\nAssistant: r"},
        {"chosen": HUMAN + " c", "rejected": HUMAN + " c" + HUMAN + " r"},
        {"chosen": [USER, ANSWER], "rejected": [MORE, OTHER]},
        {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "other", "chosen": HUMAN + " c", "rejected": HUMAN + " r"},
        {"prompt": HUMAN, "chosen": "\n\nHuman: So\n\nAssistant: c", "rejected": "\n\nHuman: So\n\nAssistant: r"},
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    ],
    "no_response": [
        {"chosen": HUMAN + " a\n\nHuman: b", "rejected": HUMAN + " c"},
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
        {"chosen": [USER, ANSWER, MORE], "rejected": [USER, OTHER]}, {"chosen": [], "rejected": []},
        {"prompt": "p", "chosen": [USER], "rejected": [OTHER]},
    ],
    "bad_roles": [
        {"chosen": [USER, MORE, ANSWER], "rejected": [USER, MORE, OTHER]},
        {"chosen": [SYSTEM, ANSWER], "rejected": [SYSTEM, OTHER]},
        {"chosen": [USER, SYSTEM, ANSWER], "rejected": [USER, SYSTEM, OTHER]},
        {"chosen": [USER, ANSWER, ANSWER], "rejected": [USER, ANSWER, OTHER]},
        {"chosen": [{"role": "tool", "content": "x"}, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [{"content": "x"}, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [{"role": ["user"], "content": "x"}, ANSWER], "rejected": [USER, OTHER]},
        {side: f"\n\nHuman: a\n\nHuman: b\n\nAssistant: {side}" for side in ("chosen", "rejected")},
        {side: [USER, ANSWER] * 40 + [ANSWER, OTHER | {"content": side}] for side in ("chosen", "rejected")},
    ],
    "control_characters": [
        {"prompt": "p\x00", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "\x1b[0m"},
        {"chosen": [USER, {"role": "assistant", "content": "\x7f"}], "rejected": [USER, OTHER]},
    ],
    "invalid_utf8": [{"prompt": "p", "chosen": "\ud800", "rejected": "r"}],
    "over_long": [{"prompt": "p" * 40, "chosen": "c" * 30, "rejected": "r" * 31}],
    "too_short": [{"prompt": "p", "chosen": "c", "rejected": "r"}],
}  # fmt: skip
BAD_CONVERSATIONS = {
    "missing_key": [{}, {"messages": None}, {"prompt": "p"}, {"completion": "c"}, {"prompt": "p", "completion": None}],
    "wrong_type": [3, {"messages": "m"}, {"messages": [USER, "x"]}, {"prompt": 3, "completion": "c"},
                   {"prompt": "p", "completion": {}}],
    "no_response": [{"messages": []}, {"messages": [USER]}, {"messages": [USER, ANSWER, MORE]},
                    {"prompt": [USER], "completion": [MORE]}],
    "bad_roles": [{"messages": [USER, ANSWER, OTHER]}, {"messages": [ANSWER, OTHER]}, {"messages": [{}, ANSWER]},
                  {"prompt": [USER], "completion": [ANSWER, OTHER]}],
    "empty_prompt": [{"messages": [ANSWER]}, {"prompt": "", "completion": "c"}],
    "empty_output": [{"prompt": "p", "completion": " "}, {"messages": [USER, {"role": "assistant", "content": ""}]}],
    "control_characters": [{"prompt": "p", "completion": "\x00"}],
    "invalid_utf8": [{"messages": [USER, {"role": "assistant", "content": "\udc00"}]}],
    "over_long": [{"prompt": "p" * 50, "completion": "c" * 51}],
    "too_short": [{"prompt": "p", "completion": "c"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "reason", "record"),
    [
        pytest.param(form, reason, record, id=f"{form}-{reason}-{number}")
        for form, bad in (("preferences", BAD_PREFERENCES), ("conversations", BAD_CONVERSATIONS))
        for reason, records in bad.items()
        for number, record in enumerate(records)
    ],
)
def test_each_bad_record_of_each_form_is_refused_with_its_reason(form: str, reason: str, record: Any) -> None:
    refused = read(record, form, max_chars=100, min_chars=4 if reason == "too_short" else 0)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert refused.detail.isprintable() and len(refused.detail) <= 200


def test_columns_are_renamed_exchanged_and_left_out_before_a_record_is_judged() -> None:
    record = {"prompt": "p", "completion": "c", "input": 3, "more": [1]}
    mapped = read(record, "instructions", columns={"instruction": "prompt", "output": "completion", "input": None})
    assert mapped == Example("p", "", "c")
    exchanged = {"chosen": "rejected", "rejected": "chosen"}
    pair = {"prompt": "p", "chosen": "bad", "rejected": "good"}
    assert read(pair, "preferences", columns=exchanged) == Example("p", "", "good", "bad")
    assert renamed({"a": 1}, {"b": "c", "a": None}) == {}
    chat = {"prompt": "p", "conversation": [USER, ANSWER]}
    assert read(chat, "conversations", columns={"messages": "conversation"}) == Example(" Why?\n", "", "So.")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"columns": {"prompt": "a"}}, "columns: found 'prompt', expected one of instruction, input, output"),
        ({"columns": {"instruction": "a"}, "form": "preferences"}, "expected one of prompt, chosen, rejected"),
        ({"columns": {"output": None}}, r"columns\.output: found null, but instructions need it"),
        ({"columns": {}}, "at least 1 item"),
        ({"columns": {"output": 3}}, "valid string"),
        ({"form": "chats"}, "'instructions', 'preferences' or 'conversations'"),
        ({"text_field": "text", "form": "preferences"}, "text_field beside form or columns"),
        ({"text_field": "text", "columns": {"output": "a"}}, "text_field beside form or columns"),
        ({"world_rows": 30, "form": "conversations"}, "beside world_rows"),
        ({"world_rows": 30, "sql": "SELECT 1"}, "beside world_rows"),
        ({"world_rows": 30, "columns": {"output": "a"}}, "beside world_rows"),
    ],
)
def test_settings_that_cannot_be_read_together_are_mistakes_of_the_recipe(config: Any, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DataConfig(**config)


TURNS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
]  # fmt: skip
DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
TRANSCRIPT = "Human: a\n\nAssistant: b\n\nHuman: c"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Say a.", ("Say a.", None, [])),
        (DIALOGUE, (TRANSCRIPT, TURNS, [])),
        (TURNS, (TRANSCRIPT, TURNS, [])),
        (TURNS[:1], ("a", None, [])),
        (TURNS[:2], Refused("bad_roles", "user assistant; expected user and assistant in turn, a system message before "
                                         "them at most")),
        (None, Refused("wrong_type", "prompt: None")),
    ],
    ids=["text", "dialogue", "messages", "one message", "ends with the assistant", "nothing"],
)  # fmt: skip
def test_a_prompt_by_itself_is_read_as_that_of_preference_data(prompt: Any, expected: Any) -> None:
    assert read_prompt(prompt) == expected


def test_a_pair_to_score_may_be_the_same_twice_and_is_read_as_preference_data() -> None:
    assert read_pair({"chosen": f"{DIALOGUE} d", "rejected": f"{DIALOGUE} d"}) == (TRANSCRIPT, TURNS, ["d", "d"])
    assert read_pair({"chosen": "d"}) == Refused("missing_key", "no rejected among ['chosen']")
