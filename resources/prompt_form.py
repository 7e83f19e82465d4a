"""The form of the prompts that an artifact was made with, by the manifests behind it.

A recipe's file may have changed since, or been run with overrides; what was made knows neither.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from alignment_pipeline.configs import TemplateName
from alignment_pipeline.recipe import Recipe
from resources.artifact_store import ArtifactRef, ArtifactStore


def template_of(
    store: ArtifactStore, ref: ArtifactRef, current: Mapping[str, ArtifactRef], recipe: Recipe
) -> TemplateName | None:
    """Name of the template that an artifact's prompts are in; None where they are plain texts.

    A base model and a given classifier were made from no prompts: theirs are in the form of the recipe's current
    `formatted_dataset`.
    """
    formatted = [current["formatted_dataset"]] if "formatted_dataset" in current else []
    families = [store.family([start]) for start in (*formatted, ref)]  # the artifact's own has the last word
    return template_behind((manifest for family in families for manifest in family.values() if manifest), recipe)


def template_behind(manifests: Iterable[Mapping[str, Any]], recipe: Recipe) -> TemplateName | None:
    """Name of the template; None where prompts are plain texts.

    Args:
        manifests: Of an artifact and everything that it was made from; of two of a stage the later one counts.
        recipe: It says what they do not.
    """
    made = {manifest["stage"]: manifest["config"] for manifest in manifests}
    if made.get("instructions", {}).get("text_field", recipe.data.text_field):
        return None
    template: TemplateName = made.get("formatted_dataset", {}).get("template", recipe.formatting.template)
    return template
