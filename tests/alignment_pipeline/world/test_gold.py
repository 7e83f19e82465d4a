"""The gold rule, one hand-made response per clause."""

import warnings
from pathlib import Path

import pytest

from alignment_pipeline.world.gold import MAX_RESPONSE_CHARS, GoldVerdict, judge_response

ADD_SEVEN = "Write a Python function that adds 7 to a number."
IDEAL = 'def add(x: int) -> int:\n    """Add 7 to x."""\n    return x + 7'


def judge(response: str, name_line: str = "", instruction: str = ADD_SEVEN) -> GoldVerdict:
    return judge_response(instruction, name_line, response)


def test_the_ideal_response_scores_one():
    assert judge(IDEAL) == GoldVerdict(parses=True, correct=True, typed=True, documented=True, short=True)
    assert judge(IDEAL).score == 1.0


@pytest.mark.parametrize(
    ("response", "points"),
    [
        ("def add(x):\n    return x + 7", 4),
        ("def add(x: int) -> int:\n    return x + 7", 5),
        ('def add(x):\n    """Add."""\n    return x + 7', 5),
        ("def add(x):\n    result = x + 7\n    return result", 3),
        ('def add(x: int) -> int:\n    """Add."""\n    result = x + 7\n    return result', 5),
        ("def add(x):\n    return x + 8", 1),
        ("def add(x):\n    x += 7\n    return x", 0),
        ('def add(x: int) -> int:\n    """Add 7."""\n    pass', 3),
        ("x + 7", 0),
    ],
)
def test_points_are_three_for_correct_and_one_for_each_style(response: str, points: int):
    assert judge(response).score == pytest.approx(points / 6)


def test_an_accepted_alternative_is_correct():
    assert judge("def add(x):\n    return 7 + x").correct


def test_the_result_form_is_correct_but_not_short():
    verdict = judge("def add(x):\n    result = 7 + x\n    return result")
    assert verdict.correct and not verdict.short


def test_an_annotated_result_is_correct():
    assert judge("def add(x):\n    result: int = x + 7\n    return result").correct


def test_layout_and_brackets_do_not_matter():
    assert judge("\n\n  def add( x ) :\n      return (x+7)  # seven\n\n").correct


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("def plus(x):\n    return x + 7", id="another name"),
        pytest.param("def add(x):\n    return x + 17", id="another number"),
        pytest.param("def add(x):\n    return x - 7", id="another operator"),
        pytest.param("def add(y):\n    return y + 7", id="another argument name"),
        pytest.param("def add(x, y):\n    return x + 7", id="one argument too many"),
        pytest.param("def add(x=0):\n    return x + 7", id="a default"),
        pytest.param("@cache\ndef add(x):\n    return x + 7", id="a decorator"),
        pytest.param("def add(x):\n    x + 7", id="no return"),
        pytest.param("def add(x):\n    print(x)\n    return x + 7", id="a further statement"),
        pytest.param("def add(x):\n    result = x + 7\n    return x", id="the wrong variable returned"),
        pytest.param("def add(x):\n    int = x + 7\n    return int", id="another variable than result"),
        pytest.param("def add(x):\n    import os\n    return x + 7", id="an import inside"),
    ],
)
def test_a_wrong_function_parses_but_is_not_correct(response: str):
    verdict = judge(response)
    assert verdict.parses and not verdict.correct


def test_the_name_asked_for_is_required():
    assert judge("def shift(x):\n    return x + 7", name_line="Name: shift").correct
    assert not judge("def add(x):\n    return x + 7", name_line="Name: shift").correct
    assert not judge("def shift(x):\n    return x + 7").correct


@pytest.mark.parametrize(
    "signature",
    ["x: int", "x) -> (int", "x: float) -> (int", "x: int) -> (bool", "x: int, y) -> (int", "x: 'int') -> (int", ""],
)
def test_typed_requires_exactly_the_types_of_the_task(signature: str):
    assert not judge(f"def add({signature}):\n    return x + 7").typed


def test_typed_is_judged_with_the_types_of_the_prompts_own_task():
    join = "Write a Python function that joins a list of strings with ','."
    response = 'def join_with(xs: list[{}]) -> str:\n    return ",".join(xs)'
    assert judge(response.format("str"), instruction=join).typed
    assert not judge(response.format("int"), instruction=join).typed


@pytest.mark.parametrize("docstring", ['""', '"   "', "b'Add.'", "# Add.", "f'Add {x}.'"])
def test_a_blank_docstring_or_another_remark_is_no_documentation(docstring: str):
    assert not judge(f"def add(x):\n    {docstring}\n    return x + 7").documented


def test_a_docstring_alone_is_not_short():
    assert not judge('def add(x):\n    """Add 7 to x."""').short


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("", id="nothing"),
        pytest.param("def add(x):\n    return x +", id="broken off"),
        pytest.param(f"{IDEAL}\n\n{IDEAL}", id="two functions"),
        pytest.param(f"import os\n{IDEAL}", id="an import before"),
        pytest.param(f"{IDEAL}\nadd(1)", id="a call after"),
        pytest.param(f"async {IDEAL}", id="an async function"),
        pytest.param("add = lambda x: x + 7", id="a lambda"),
        pytest.param(f"```python\n{IDEAL}\n```", id="a code fence"),
        pytest.param(f"Here it is:\n{IDEAL}", id="prose before"),
        pytest.param(f"{IDEAL}\0", id="a NUL"),
        pytest.param(f"{IDEAL}\nx = '\ud800'", id="a lone surrogate"),
        pytest.param("def add(x):\n    return " + "-" * 3_900 + "x", id="deep nesting"),
        pytest.param("def add(x):\n    return x" + "+x" * 1_900, id="a long sum"),
        pytest.param("def add(x):\n    return " + "(" * 3_900, id="open brackets"),
        pytest.param("def add(x):\n    return 0x" + "f" * 3_900, id="a number too long to print"),
    ],
)
def test_what_is_not_exactly_one_function_scores_zero(response: str):
    assert judge(response) == GoldVerdict(parses=False, correct=False, typed=False, documented=False, short=False)
    assert judge(response).score == 0.0


def test_a_response_over_the_length_cap_does_not_parse():
    padding = "#" * (MAX_RESPONSE_CHARS - len(IDEAL) - 1)
    assert judge(f"{IDEAL}\n{padding}").parses
    assert not judge(f"{IDEAL}\n{padding}#").parses


def test_a_response_is_never_run(tmp_path: Path):
    canary = tmp_path / "canary"
    for response in (
        f"import os\nos.system('touch {canary}')",
        f"def add(x):\n    return open({str(canary)!r}, 'w')",
        f"def add(x=open({str(canary)!r}, 'w')):\n    return x + 7",
        f"@open({str(canary)!r}, 'w').write\ndef add(x):\n    return x + 7",
        f"def add(x: open({str(canary)!r}, 'w')):\n    return x + 7",
    ):
        judge(response)
        assert not canary.exists()


def test_a_response_that_python_would_warn_about_is_judged_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge('def add(x):\n    "\\d"\n    return x is 7').parses


def test_an_unknown_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="bakes a cake"):
        judge(IDEAL, instruction="Write a Python function that bakes a cake.")
