"""Prompts of the built-in world: how a task is put into words, read back, and drawn with a solution.

A prompt is an instruction, "<opener> <phrase>.", and an input that is empty or `Name: <function name>`. The phrases of
all families are distinct, so a prompt's text names one task and a response can be judged from the prompt alone.

The tasks are in `families`; the judgement of responses is in `gold`.
"""

import random
from dataclasses import dataclass
from functools import cache

from alignment_pipeline.world.families import FAMILIES
from alignment_pipeline.world.task import Task, TaskFamily, Values

OPENERS = (
    "Write a Python function that",
    "Write a function which",
    "Create a function which",
    "Create a Python function that",
    "Define a Python function that",
    "Define a function which",
    "Implement a function that",
    "Make a Python function that",
    "I need a function that",
    "Please write a function that",
)

# No builtin is here: a solution that calls `max` must not be named `max`.
FUNCTION_NAMES = (
    "shift", "solve", "apply_it", "run", "work", "handle", "process", "compute", "answer", "task",
    "step", "go", "change", "make", "build", "get", "find", "check", "test", "calc",
    "convert", "update", "transform", "fix", "move", "pick", "do_it", "main", "helper", "action",
    "call", "use", "try_it", "play", "start", "finish", "f", "g", "foo", "func",
)  # fmt: skip

NAME_PREFIX = "Name: "
NAMED_SHARE = 0.4
CANONICAL_SHARE = 0.85


@dataclass(frozen=True)
class Style:
    """How a solution is written, and the share of the generated rows that are written so."""

    share: float
    typed: bool = False
    documented: bool = False
    verbose: bool = False


# Only the fourth is ideal under the gold rule: a model that copies the mix has room to improve.
STYLES = (
    Style(share=0.30),
    Style(share=0.15, typed=True),
    Style(share=0.15, documented=True),
    Style(share=0.15, typed=True, documented=True),
    Style(share=0.15, verbose=True),
    Style(share=0.05, typed=True, verbose=True),
    Style(share=0.05, documented=True, verbose=True),
)


@cache
def _tasks_by_phrase() -> dict[str, tuple[TaskFamily, Values]]:
    return {
        phrase.format(**dict(values)): (family, values)
        for family in FAMILIES
        for values in family.settings()
        for phrase in family.phrases
    }


def count_instructions() -> int:
    """Counts the distinct instructions; each makes one prompt without a name and one with each function name."""
    return len(OPENERS) * len(_tasks_by_phrase())


def generate_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Draws rows with distinct prompts, families being equally likely until a small one is used up.

    The rows of a smaller count are the first rows of a larger one with the same seed.

    Args:
        count: Number of rows, at most `count_instructions()`: beyond it the share of prompts without a name could not
            be kept.
        seed: Seed of the draw; equal seeds give equal rows.

    Returns:
        Rows with the keys `instruction`, `input` and `output`; the output is correct under the gold rule.

    Raises:
        ValueError: If `count` is negative or more than there are instructions.
    """
    if not 0 <= count <= count_instructions():
        raise ValueError(
            f"count is {count}, but the built-in world has between 0 and {count_instructions()} rows to give; "
            "ask for fewer rows or add families"
        )
    rng = random.Random(seed)
    outputs: dict[tuple[str, str], str] = {}
    while len(outputs) < count:
        named = rng.random() < NAMED_SHARE
        prompt, task = _draw_prompt(rng, named)
        while prompt in outputs:
            prompt, task = _draw_prompt(rng, named)
        outputs[prompt] = _draw_solution(rng, task)
    return [
        {"instruction": instruction, "input": name_line, "output": output}
        for (instruction, name_line), output in outputs.items()
    ]


def _draw_prompt(rng: random.Random, named: bool) -> tuple[tuple[str, str], Task]:
    family = rng.choice(FAMILIES)
    values = tuple((name, rng.choice(domain)) for name, domain in family.parameters)
    phrase = rng.choice(family.phrases).format(**dict(values))
    instruction = f"{rng.choice(OPENERS)} {phrase}."
    if not named:
        return (instruction, ""), Task(family, values, family.name)
    function_name = rng.choice(FUNCTION_NAMES)
    return (instruction, NAME_PREFIX + function_name), Task(family, values, function_name)


def _draw_solution(rng: random.Random, task: Task) -> str:
    (style,) = rng.choices(STYLES, weights=[style.share for style in STYLES])
    canonical = rng.random() < CANONICAL_SHARE
    expression = task.expressions[0] if canonical else rng.choice(task.expressions)
    return task.source(expression, typed=style.typed, documented=style.documented, verbose=style.verbose)


def parse_task(instruction: str, input: str) -> Task | None:
    """Reads the task back from a prompt's text; whitespace around either part does not matter.

    Args:
        instruction: An opener, a phrase and a full stop.
        input: Empty, or the line that asks for a function name.

    Returns:
        The task, or None if the prompt is not one of the built-in world.
    """
    instruction, name_line = instruction.strip(), input.strip()
    opener = next((opener for opener in OPENERS if instruction.startswith(opener + " ")), None)
    if opener is None or not instruction.endswith("."):
        return None
    found = _tasks_by_phrase().get(instruction[len(opener) + 1 : -1])
    if found is None:
        return None
    family, values = found
    if not name_line:
        return Task(family, values, family.name)
    function_name = name_line.removeprefix(NAME_PREFIX)
    if function_name == name_line or function_name not in FUNCTION_NAMES:
        return None
    return Task(family, values, function_name)
