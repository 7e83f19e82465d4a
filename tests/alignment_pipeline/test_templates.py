from typing import Any

import pytest

from alignment_pipeline.errors import ModelError
from alignment_pipeline.prompts import format_prompt
from alignment_pipeline.templates import Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
ROW = {"instruction": "Add.", "input": "1 2"}
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHATML
    return chatty


def test_an_instruction_goes_into_the_header_form(tokenizer: Any) -> None:
    template = Template("instruction", tokenizer)
    assert template.prompt(ROW) == format_prompt("Add.", "1 2")
    assert (template.response_start, template.sha256) == ("", None)


def test_a_dialogue_of_human_and_assistant_ends_where_a_response_begins_with_its_space(tokenizer: Any) -> None:
    template = Template("human_assistant", tokenizer)
    assert template.prompt(ROW) == "\n\nHuman: Add.\n\n1 2\n\nAssistant:"
    assert template.prompt(ROW | {"messages": TURNS}) == (
        "Be short.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    )
    assert template.response_start == " "


def test_a_chat_template_gets_the_messages_and_no_thoughts(chat_tokenizer: Any) -> None:
    template = Template("chat", chat_tokenizer)
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert template.prompt({"instruction": "Add.", "input": " "}) == f"<|im_start|>user\nAdd.<|im_end|>\n{end}"
    assert template.prompt(ROW | {"messages": TURNS}).count("<|im_end|>") == len(TURNS)
    assert template.sha256 is not None and len(template.sha256) == 64


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"formatting\.template: found chat, but .* brings no chat template"):
        Template("chat", tokenizer)


def test_a_conversation_that_the_chat_template_refuses_is_an_error_that_names_its_roles(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(ModelError, match=r"refuses a conversation \(no system\).* system, user, assistant"):
        Template("chat", chat_tokenizer).prompt(ROW | {"messages": TURNS})
