"""What a task of the built-in world is: a family of one-function tasks, and one member of it.

The shape of the data belongs here. The data is in `number_families`, `list_families` and `text_families`; the words of
a prompt are in `generate`; the judgement of a response is in `gold`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Values = tuple[tuple[str, int | str], ...]

# From 3 up: at 2 a task would also be "double", "square" or "even", with solutions its own family does not list.
NUMBERS = range(3, 51)
SIZES = range(2, 31)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
MARKS = tuple(",;:-_/|+*#")
WORDS = (
    "age", "apple", "blue", "book", "city", "code", "cost", "day", "fish", "gold",
    "home", "id", "key", "lake", "moon", "rain", "size", "sun", "team", "tree",
)  # fmt: skip


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that differ only in their parameters, such as "adds {n} to a number" for every n.

    Every text but the first three fields is a `str.format` template over the parameters.

    Attributes:
        name: Function name to use where the prompt asks for none.
        arguments: Arguments as typed source, such as `("xs: list[int]",)`.
        returns: Return type as source.
        accepted: Expressions that solve the task, the canonical one first.
        summary: One-line docstring.
        phrases: Ways to say the task, each continuing "a function that"; none is shared with another family.
        parameters: Name and domain of each parameter.
    """

    name: str
    arguments: tuple[str, ...]
    returns: str
    accepted: tuple[str, ...]
    summary: str
    phrases: tuple[str, ...]
    parameters: tuple[tuple[str, Sequence[int | str]], ...] = ()

    def settings(self) -> list[Values]:
        """Lists every assignment of values to the parameters; one empty assignment where there are none."""
        names = [name for name, _ in self.parameters]
        domains = [domain for _, domain in self.parameters]
        return [tuple(zip(names, values, strict=True)) for values in itertools.product(*domains)]


@dataclass(frozen=True)
class Task:
    """One task: a family, the values of its parameters and the name the function must have."""

    family: TaskFamily
    values: Values
    function_name: str

    @property
    def expressions(self) -> tuple[str, ...]:
        """The accepted expressions, the canonical one first."""
        return tuple(template.format(**dict(self.values)) for template in self.family.accepted)

    @property
    def summary(self) -> str:
        """The docstring of an ideal solution."""
        return self.family.summary.format(**dict(self.values))

    def source(self, expression: str, *, typed: bool, documented: bool, verbose: bool) -> str:
        """Writes the function that returns `expression`.

        Args:
            expression: One of `expressions`.
            typed: Annotate the arguments and the return.
            documented: Add the summary as a docstring.
            verbose: Bind the value to `result` before it is returned.
        """
        arguments = [argument if typed else argument.partition(":")[0] for argument in self.family.arguments]
        returns = f" -> {self.family.returns}" if typed else ""
        body = [f"result = {expression}", "return result"] if verbose else [f"return {expression}"]
        if documented:
            body.insert(0, f'"""{self.summary}"""')
        return "\n    ".join([f"def {self.function_name}({', '.join(arguments)}){returns}:", *body])
