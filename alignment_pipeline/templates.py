"""How a row becomes the prompt that a model reads, and its responses what the model is to write after it.

Belongs here: the three templates and where a template needs the tokenizer. `prompts` knows what makes two prompts the
same, which does not depend on the template.

A prompt ends where a token ends, and so a response in the `human_assistant` template begins with its space: GPT-2 and
its like have the space in the word's token.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment_pipeline.configs import TemplateName
from alignment_pipeline.errors import ModelError
from alignment_pipeline.prompts import format_prompt

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}


@dataclass(frozen=True)
class Template:
    """A template, with the tokenizer where its name is `chat`.

    Attributes:
        name: `instruction`: the header, instruction, input and `### Response:`. `human_assistant`: the dialogues of
            HH-RLHF (arXiv 2204.05862). `chat`: the chat template that the tokenizer brings.
        tokenizer: transformers' tokenizer.
    """

    name: TemplateName
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.name == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                "formatting.template: found chat, but the base model's tokenizer brings no chat template; expected a "
                "model tuned to chat, or instruction or human_assistant."
            )

    @property
    def response_start(self) -> str:
        """What stands before every response."""
        return " " if self.name == "human_assistant" else ""

    @property
    def sha256(self) -> str | None:
        """Hash of the tokenizer's chat template; None where it is not used."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest() if self.name == "chat" else None

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row: of its `instruction` and `input`, or of its `messages` where it has some.

        Raises:
            ModelError: The chat template refuses the conversation.
        """
        if self.name == "instruction":
            return format_prompt(row["instruction"], row["input"])
        messages: Sequence[Message] = row.get("messages") or [{"role": "user", "content": _with_input(row)}]
        if self.name == "human_assistant":
            return "".join(_SPEAKERS[each["role"]] + each["content"] for each in messages) + "\n\nAssistant:"
        try:
            # A template that knows no enable_thinking ignores it; Qwen3's then leaves room for no thoughts.
            prompt: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # jinja's errors and whatever a template raises
            raise ModelError(
                f"formatting.template: the base model's chat template refuses a conversation ({error}); expected one "
                "that takes the roles "
                f"{', '.join(dict.fromkeys(each['role'] for each in messages))}."
            ) from error
        return prompt


def _with_input(row: Mapping[str, str]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
