"""Why a computation is not the one before: what differs between two descriptions of it, in the recipe's own words.

A description is the part of a manifest that the key is made of (`config`, `seed`, `inputs`, `code_version`), with the
modules' own versions (`code`).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Description = Mapping[str, Any]


def differences(before: Description, after: Description, section: str, sources: Mapping[str, str]) -> list[str]:
    """What changed between two computations of a stage: configuration, seed, inputs, code.

    Args:
        before: A manifest.
        after: Another one, or a description of what would be computed.
        section: Recipe section that configures the stage.
        sources: Input name → asset that it is; an input without one goes by its own name.
    """
    return [
        *_config_differences(before["config"], after["config"], section),
        *([] if before["seed"] == after["seed"] else [f"seed {before['seed']} → {after['seed']}"]),
        *_input_differences(before["inputs"], after["inputs"], section, sources),
        *_code_differences(before, after),
    ]


def file_key(section: str, name: str) -> str:
    """The recipe's key of an input file: `data.path` for the file that the stage knows as `source`."""
    return f"{section}.{'path' if name == 'source' else name}"


def _config_differences(before: Mapping[str, Any], after: Mapping[str, Any], section: str) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        old, new = (_spell(values[name]) if name in values else "absent" for values in (before, after))
        if old != new:
            yield f"{section}.{name} {old} → {new}"


def _input_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], section: str, sources: Mapping[str, str]
) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        old, new = _version(before.get(name)), _version(after.get(name))
        if old != new:
            is_file = "sha256" in (after.get(name) or before[name])
            shown = file_key(section, name) if is_file else sources.get(name, name)
            yield f"{shown} {old or 'absent'} → {new or 'absent'}"


def _code_differences(before: Description, after: Description) -> Iterator[str]:
    if before["code_version"] == after["code_version"]:
        return
    if "code" not in before or "code" not in after:  # a manifest from before modules were named
        yield f"code {before['code_version'][:8]} → {after['code_version'][:8]}"
        return
    old, new = before["code"], after["code"]
    for module in sorted(old.keys() | new.keys()):
        if old.get(module) != new.get(module):
            change = "added" if module not in old else "removed" if module not in new else "changed"
            yield f"code: {module} {change}"


def _version(entry: Mapping[str, str] | None) -> str:
    return "" if entry is None else (entry.get("data_version") or entry["sha256"])[:8]


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
