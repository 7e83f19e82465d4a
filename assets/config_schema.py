"""The launchpad's form of a stage, derived from its section of the recipe: types, descriptions and values."""

import types
import typing
from typing import Annotated, Any, Literal, Union

import dagster as dg

from alignment_pipeline.configs import StageConfig


def launchpad_schema(config: StageConfig, seed: int) -> dict[str, dg.Field]:
    """Dagster config fields with the recipe's values as defaults, and the seed."""
    values = as_written(config)
    fields = {
        name: dg.Field(
            _dagster_type(field.annotation),
            default_value=values[name],
            description=field.description,
            is_required=False,
        )
        for name, field in type(config).model_fields.items()
    }
    seed_field = dg.Field(int, default_value=seed, description="Seed of every random choice.", is_required=False)
    return {"seed": seed_field, **fields}


def as_written(config: StageConfig) -> dict[str, Any]:
    """A section's values; a hub name has its revision, as in recipes, so that another name does not keep it."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    if values.get("hub_name") and values.get("hub_revision"):
        values |= {"hub_name": f"{values['hub_name']}@{values['hub_revision']}", "hub_revision": None}
    return values


def _dagster_type(annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return str
    if origin is Annotated:
        return _dagster_type(arguments[0])
    if origin is list:
        return [_dagster_type(arguments[0])]
    if origin is dict:
        return {arguments[0]: _dagster_type(arguments[1])}
    if origin in (Union, types.UnionType):
        present = [argument for argument in arguments if argument is not type(None)]
        inner = _dagster_type(present[0]) if len(present) == 1 else dg.Any
        return dg.Noneable(inner) if type(None) in arguments else inner
    return annotation
