"""A stage's code version: a hash of the source it depends on, so that nobody has to remember to raise a number.

The stage's module and every module of this package that it imports, directly or not, count by their syntax tree without
docstrings and comments. Left out are modules that cannot change a result: the configuration's declarations (resolved
values are in the key themselves) and what only reports.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_PACKAGE = "alignment_pipeline"
_ROOT = Path(__file__).parent.parent
_NOT_COUNTED = frozenset(
    f"{_PACKAGE}.{name}" for name in ("configs", "decoding_configs", "errors", "progress", "pacing", "plots", "stage")
)
_NOT_RUN = frozenset({"kind"})  # the u of u"text"


@functools.cache
def stage_code_version(stage: str) -> str:
    """First 16 hex digits of the hash over all source that the stage `alignment_pipeline.stages.<stage>` depends on."""
    return _short_digest("\n".join(f"{name} {version}" for name, version in stage_code(stage).items()))


@functools.cache
def stage_code(stage: str) -> Mapping[str, str]:
    """Module → its version, for each that the stage's code version counts, sorted; says which module a change is in."""
    modules = dependencies(f"{_PACKAGE}.stages.{stage}")
    return MappingProxyType({name: _module_version(name) for name in modules})


@functools.cache
def dependencies(module: str) -> tuple[str, ...]:
    """The module and all modules of this package it reaches by imports, sorted, those that do not count left out."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in seen and name not in _NOT_COUNTED:
            seen.add(name)
            pending.extend(_imports(name))
    return tuple(sorted(seen))


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    if path is None:
        raise ModuleNotFoundError(f"{module} is not a module of {_PACKAGE}")
    return ast.parse(path.read_text(encoding="utf-8"))


def _path(module: str) -> Path | None:
    base = _ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _imports(module: str) -> set[str]:
    found: set[str] = set()
    for node in _import_statements(_tree(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == _PACKAGE and _path(name) is not None}


def _import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports wherever statements stand; expressions, most of a tree, hold none and are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _import_statements(child)


@functools.cache
def _module_version(module: str) -> str:
    return _short_digest(repr(_shape(_tree(module))))


def _shape(node: Any) -> Any:
    """What Python runs of a syntax tree, as nested lists.

    Fields that are empty are left out, as newer versions of Python know more of them: the versions do not depend on it.
    """
    if isinstance(node, ast.AST):
        fields = ((name, _shape(value)) for name, value in ast.iter_fields(node) if name not in _NOT_RUN)
        return [type(node).__name__, *([name, shape] for name, shape in fields if shape not in (None, []))]
    if isinstance(node, list):
        return [_shape(item) for item in node if not _is_text_alone(item)]
    return None if node is None else repr(node)


def _is_text_alone(node: Any) -> bool:
    """Whether a statement is nothing but a text: a docstring, or the text below a constant or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
