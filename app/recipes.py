"""Where recipes are found: `recipes/` in the checkout, or the folder in `ALIGNMENT_RECIPES`."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from alignment_pipeline.errors import RecipeError
from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import Recipe, load_recipe
from resources.home import REPOSITORY


def recipes_folder() -> Path:
    """The folder whose YAML files are the recipes."""
    configured = os.environ.get("ALIGNMENT_RECIPES")
    return Path(configured).expanduser().resolve() if configured else REPOSITORY / "recipes"


def all_recipes() -> list[Recipe]:
    """Every recipe, by name.

    Raises:
        RecipeError: One of them is wrong, or there is none.
    """
    paths = sorted(recipes_folder().glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{recipes_folder()}: found no *.yaml, expected at least one recipe.")
    return [load_recipe(path) for path in paths]


def find_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: There is none, or it is wrong.
    """
    path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in recipes_folder().glob("*.yaml"))) or "none"
        raise RecipeError(f"There is no recipe {name!r} in {recipes_folder()}; expected one of: {known}.")
    return load_recipe(path, overrides)


def select_assets(recipe: Recipe, names: Collection[str]) -> tuple[str, ...]:
    """The named assets of a recipe, or all of them if none is named, parents before children.

    Raises:
        RecipeError: It has no such asset.
    """
    graph = build_graph(recipe)
    for name in names:
        if name not in graph:
            raise RecipeError(f"--select {name}: {recipe.name} has no such asset; expected one of: {', '.join(graph)}.")
    return tuple(asset for asset in graph if not names or asset in names)
