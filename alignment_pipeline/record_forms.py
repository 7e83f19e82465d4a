"""What a record of each form (`data.form`) has to hold: a parsed record in, an example or why there is none out.

Belongs here: columns, texts, dialogues and chat messages. Identity, duplicates and splits are in `stages.instructions`.

- instructions: {instruction, output} and, if there is one, {input}; or with `data.text_field` one plain text.
- preferences: {prompt, chosen, rejected} as texts; {chosen, rejected} as dialogues "\\n\\nHuman: …\\n\\nAssistant: …"
  with the prompt in both (Anthropic's hh-rlhf); or chosen and rejected as lists of {role, content}, which hold the
  prompt too or answer the prompt beside them, a text or a list of messages. A prompt beside sides that hold it has to
  be a copy.
- conversations: {messages}, or {prompt, completion} of messages or texts. The last message is the output.

Texts and messages are kept byte for byte. Of a dialogue each turn is kept without the white space around it, which
stands there to set turns apart.

A prompt is one user message, or an optional system message and then user and assistant in turn, ending with user. Of
more than one message the example has `messages`, and the instruction is their transcript.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from alignment_pipeline.configs import DataConfig
from alignment_pipeline.rows import shown, text_problem

Record = Mapping[str, Any]

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
"""Role of a message → its name in a transcript."""

_ROLES = {"Human": "user", "Assistant": "assistant"}
_DIALOGUE = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class Example(NamedTuple):
    """What a model can learn from.

    Attributes:
        instruction: The prompt; the transcript of several messages; empty for a plain text.
        input: What an instruction works on, or the empty text.
        output: The response; the chosen one of preference data; a plain text as a whole.
        rejected: The other response of preference data, else None.
        messages: The prompt's messages where they are more than one of the user, else None.
    """

    instruction: str
    input: str
    output: str
    rejected: str | None = None
    messages: list[Message] | None = None


class Answered(NamedTuple):
    """A prompt, as in `Example`, and responses to it."""

    instruction: str
    messages: list[Message] | None
    responses: list[str]


class Refused(NamedTuple):
    """Why a record cannot be used: the quarantine reason and what was found."""

    reason: str
    detail: str


class _Unusable(Exception):
    """Ends the reading of a record; the two arguments are those of `Refused`."""


def read_example(value: Any, config: DataConfig) -> Example | Refused:
    """The example that a parsed record holds, or the first reason why it cannot be used."""
    if not isinstance(value, dict):
        return Refused("wrong_type", shown(value))
    record = renamed(value, config.columns) if config.columns else value
    try:
        if config.text_field:
            example = _plain_text(record, config.text_field)
        elif config.form == "instructions":
            example = _instruction(record)
        elif config.form == "preferences":
            example = _preference(record)
        else:
            example = _conversation(record)
    except _Unusable as unusable:
        return Refused(*unusable.args)
    chars = len(example.instruction) + len(example.input) + len(example.output) + len(example.rejected or "")
    if chars > config.max_chars:
        return Refused("over_long", f"{chars} characters, {config.max_chars} allowed")
    if chars < config.min_chars:
        return Refused("too_short", f"{chars} characters, {config.min_chars} needed")
    return example


def read_pair(record: Record) -> Answered | Refused:
    """The prompt and both responses, chosen and rejected, of preference data; they may be the same."""
    try:
        return _pair(record)
    except _Unusable as unusable:
        return Refused(*unusable.args)


def read_prompt(prompt: Any) -> Answered | Refused:
    """A prompt that stands by itself, a text, a dialogue or messages, without a response."""
    try:
        return Answered(*_prompt_of(_given_prompt(prompt)), [])
    except _Unusable as unusable:
        return Refused(*unusable.args)


def is_dialogue(text: Any) -> bool:
    """Whether a text has turns, "\\n\\nHuman: …"."""
    return isinstance(text, str) and text.startswith(_DIALOGUE)


def renamed(record: Record, columns: Mapping[str, str | None]) -> Record:
    """A record with our names for its columns; one that is mapped to None is left out."""
    others = {name: value for name, value in record.items() if name not in columns}
    return others | {ours: record[theirs] for ours, theirs in columns.items() if theirs and theirs in record}


def _plain_text(record: Record, field: str) -> Example:
    _require(record, field)
    text = _text(field, record[field])
    _refuse_blank("text", text)
    return Example("", "", text)


def _instruction(record: Record) -> Example:
    _require(record, "instruction", "output")
    instruction, input, output = record["instruction"], record.get("input"), record["output"]
    input = "" if input is None else input
    are_texts = isinstance(instruction, str) and isinstance(input, str) and isinstance(output, str)
    # Most rows are good, so that three texts are looked at as one.
    if not are_texts or text_problem("", f"{instruction}{input}{output}"):
        for name, text in (("instruction", instruction), ("input", input), ("output", output)):
            _text(name, text)
    _refuse_blank("instruction", instruction)
    _refuse_blank("output", output)
    return Example(instruction, input, output)


def _preference(record: Record) -> Example:
    instruction, messages, (chosen, rejected) = _pair(record)
    _refuse_blank("chosen", chosen)
    _refuse_blank("rejected", rejected)
    if chosen == rejected:
        raise _Unusable("identical_pair", shown(chosen))
    return Example(instruction, "", chosen, rejected, messages)


def _pair(record: Record) -> Answered:
    _require(record, "chosen", "rejected")
    prompt, chosen = _answered("chosen", record)
    other_prompt, rejected = _answered("rejected", record)
    if prompt != other_prompt:
        first = next((i for i, pair in enumerate(zip(prompt, other_prompt, strict=False)) if pair[0] != pair[1]), None)
        counts = f"{len(prompt)} messages before chosen, {len(other_prompt)} before rejected"
        raise _Unusable("prompts_differ", counts if first is None else f"{counts}; the first to differ is {first + 1}")
    return Answered(*_prompt_of(prompt), [chosen, rejected])


def _conversation(record: Record) -> Example:
    if record.get("messages") is not None:
        prompt, output = _parted("messages", _messages("messages", record["messages"]))
    elif record.get("prompt") is None or record.get("completion") is None:
        raise _Unusable("missing_key", f"no messages, and not both prompt and completion among {shown(sorted(record))}")
    elif isinstance(completion := record["completion"], str):
        prompt, output = _given_prompt(record["prompt"]), _text("completion", completion)
    else:
        turns = _given_prompt(record["prompt"]) + _messages("completion", completion)
        prompt, output = _parted("completion", turns)
    instruction, messages = _prompt_of(prompt)
    _refuse_blank("output", output)
    return Example(instruction, "", output, None, messages)


def _answered(name: str, record: Record) -> tuple[list[Message], str]:
    """The prompt's messages and the response that one side of a preference holds."""
    side, given = record[name], record.get("prompt")
    if isinstance(side, str):
        _text(name, side)
        prompt = [] if given is None else _given_prompt(given)
        if side.startswith(_DIALOGUE):
            return _whole(name, _turns(side), [_stripped(turn) for turn in prompt])
        if given is None:
            raise _Unusable("missing_key", f"no prompt, and {name} is no dialogue from {_DIALOGUE!r} on: {shown(side)}")
        return prompt, side.strip() if is_dialogue(given) else side
    turns = _messages(name, side)
    if given is None and len(turns) == 1:
        raise _Unusable("missing_key", f"no prompt, and {name} is one message")
    prompt = [] if given is None else _given_prompt(given)
    return _parted(name, prompt + turns) if len(turns) == 1 else _whole(name, turns, prompt)


def _whole(name: str, turns: list[Message], prompt: list[Message]) -> tuple[list[Message], str]:
    """The prompt's messages and the response of a side that holds both; a prompt beside it has to be a copy."""
    own, response = _parted(name, turns)
    # A copy is all of the messages, or the user's text without a system message.
    if prompt and prompt != own and not (len(prompt) == 1 and prompt[0] in own):
        raise _Unusable("prompts_differ", f"prompt is not that of {name}: {shown(prompt[-1]['content'])}")
    return own, response


def _given_prompt(prompt: Any) -> list[Message]:
    """The messages of a prompt that stands by itself: a text, a dialogue, or messages already."""
    if not isinstance(prompt, str):
        return _messages("prompt", prompt)
    _text("prompt", prompt)
    if not prompt.startswith(_DIALOGUE):
        return [Message(role="user", content=prompt)]
    turns = _turns(prompt)
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _turns(dialogue: str) -> list[Message]:
    """The turns of a text "\\n\\nHuman: …\\n\\nAssistant: …", without the white space around each."""
    _, *parts = _TURN.split(dialogue)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [_stripped(Message(role=_ROLES[speaker], content=text)) for speaker, text in pairs]


def _stripped(turn: Message) -> Message:
    return Message(role=turn["role"], content=turn["content"].strip())


def _messages(name: str, value: Any) -> list[Message]:
    """Role and content of each message; what else a message holds is left."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _Unusable("wrong_type", f"{name}: {shown(value)}")
    turns = []
    for number, message in enumerate(value, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _SPEAKERS:
            raise _Unusable("bad_roles", f"{name}, message {number}: role {shown(role)}")
        turns.append(Message(role=role, content=_text(f"{name}, message {number}", content)))
    return turns


def _parted(name: str, turns: list[Message]) -> tuple[list[Message], str]:
    """All but the last message, and the text of the last, which has to be the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise _Unusable("no_response", f"{name} ends with {turns[-1]['role'] if turns else 'nothing'}, not assistant")
    return turns[:-1], turns[-1]["content"]


def _prompt_of(turns: list[Message]) -> tuple[str, list[Message] | None]:
    """The instruction, and the messages where they are more than it."""
    if not turns:
        raise _Unusable("empty_prompt", "no message before the response")
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) % 2 == 0 or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        detail = f"{' '.join(roles)}; expected user and assistant in turn, a system message before them at most"
        raise _Unusable("bad_roles", detail[:200])
    for turn in turns:
        if not turn["content"].strip():
            raise _Unusable("empty_prompt", f"{turn['role']}: {shown(turn['content'])}")
    if len(turns) == 1:
        return turns[0]["content"], None
    return "\n\n".join(f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns), turns


def _require(record: Record, *names: str) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        raise _Unusable("missing_key", f"no {' and no '.join(missing)} among {shown(sorted(record))}")


def _text(name: str, value: Any) -> str:
    problem = text_problem(name, value)
    if problem:
        raise _Unusable(*problem)
    return str(value)


def _refuse_blank(name: str, text: str) -> None:
    if not text.strip():
        raise _Unusable(f"empty_{name}", shown(text))
