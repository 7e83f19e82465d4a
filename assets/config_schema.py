"""The launchpad's form of a stage, derived from its section of the recipe: types, descriptions and values."""

import types
import typing
from typing import Annotated, Any, Literal, Union

import dagster as dg

from alignment_pipeline.configs import StageConfig


def launchpad_schema(config: StageConfig, seed: int) -> dict[str, dg.Field]:
    """Dagster config fields with the recipe's values as defaults, and the seed."""
    fields = {
        name: dg.Field(
            _dagster_type(field.annotation),
            default_value=getattr(config, name),
            description=field.description,
            is_required=False,
        )
        for name, field in type(config).model_fields.items()
    }
    seed_field = dg.Field(int, default_value=seed, description="Seed of every random choice.", is_required=False)
    return {"seed": seed_field, **fields}


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
