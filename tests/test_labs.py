"""docs/labs.md is true: its recipes, keys and tests exist."""

import ast
import re
from pathlib import Path

import pytest

from alignment_pipeline.recipe import Recipe
from app.recipes import all_recipes

REPOSITORY = Path(__file__).parents[1]
LABS = (REPOSITORY / "docs" / "labs.md").read_text(encoding="utf-8")


def keys_of_recipes() -> set[str]:
    keys = set()
    for section, field in Recipe.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            keys |= {f"{section}.{name}" for name in getattr(kind, "model_fields", {})}
    return keys


def test_every_recipe_of_a_lab_is_shipped() -> None:
    named = set(re.findall(r"align (?:run|chat|score|results) (\w+)", LABS))
    assert named and named <= {recipe.name for recipe in all_recipes()}


def test_every_key_that_is_named_exists() -> None:
    sections = "|".join(Recipe.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)", LABS))
    assert len(named) > 15 and named <= keys_of_recipes()


DEFECTS = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", LABS, re.M)


def test_the_notebooks_defects_are_numbered_without_a_gap() -> None:
    assert [int(number) for number, _ in DEFECTS] == list(range(1, len(DEFECTS) + 1)) and len(DEFECTS) >= 8


@pytest.mark.parametrize(("number", "tests"), DEFECTS)
def test_the_tests_that_catch_a_defect_exist(number: str, tests: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+(?:::\w+)?)`", tests)
    assert named, f"defect {number} names no test"
    for path, name in named:
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        inside = tree.body
        for part in name.split("::"):
            found = [node for node in inside if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            assert found, f"defect {number}: {path} has no {name}"
            inside = found[0].body
