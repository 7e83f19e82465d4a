"""All families of the built-in world, in one tuple.

The data is in the three modules named by what the functions take: numbers, lists, texts and dicts.
"""

from alignment_pipeline.world.list_families import LIST_FAMILIES
from alignment_pipeline.world.number_families import NUMBER_FAMILIES
from alignment_pipeline.world.task import TaskFamily
from alignment_pipeline.world.text_families import TEXT_FAMILIES

FAMILIES: tuple[TaskFamily, ...] = NUMBER_FAMILIES + LIST_FAMILIES + TEXT_FAMILIES
