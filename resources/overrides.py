"""A run's overrides as other people are told them: a file by its name, since where it lay is of no use elsewhere.

Belongs here: taking `key=value` apart and putting it together again; applying overrides is in
`alignment_pipeline.recipe`.
"""

import math
from pathlib import Path
from typing import Any

import yaml

from alignment_pipeline.recipe import PATH_KEYS


def without_folders(override: str) -> str:
    """The override with its files' names alone, at any depth of its value; as it is if it names no file."""
    key, _, text = override.partition("=")
    value = yaml.safe_load(text)
    named = _named(key.rpartition(".")[2], value)
    return override if named == value else f"{key}={_spell(named)}"


def names_files(override: str) -> bool:
    """Whether a file is named anywhere in the override."""
    key, _, text = override.partition("=")
    return _holds_file(key.rpartition(".")[2], yaml.safe_load(text))


def file_override(key: str, path: str, function: str | None = None) -> str:
    """The override that names a file, or a function in it, without the file's folder."""
    name = Path(path).name
    return f"{key}={_spell(f'{name}:{function}' if function else name)}"


def _named(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _named(str(inner), each) for inner, each in value.items()}
    return Path(value).name if _holds_file(key, value) else value


def _holds_file(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_file(str(inner), each) for inner, each in value.items())
    return key in PATH_KEYS and isinstance(value, str)


def _spell(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip()
