"""A stage's code version: a hash of the source it depends on, so that nobody has to remember to raise a number.

The stage's module and every module of this package that it imports, directly or not, count by their syntax tree without
docstrings and comments. Left out are modules that cannot change a result: the configuration's declarations (resolved
values are in the key themselves) and what only reports.
"""

import ast
import functools
import hashlib
from pathlib import Path

_PACKAGE = "alignment_pipeline"
_ROOT = Path(__file__).parent.parent
_NOT_COUNTED = frozenset(f"{_PACKAGE}.{name}" for name in ("configs", "errors", "progress", "pacing", "plots", "stage"))


@functools.cache
def stage_code_version(stage: str) -> str:
    """First 16 hex digits of the hash over all source that the stage `alignment_pipeline.stages.<stage>` depends on."""
    modules = dependencies(f"{_PACKAGE}.stages.{stage}")
    return hashlib.sha256("\n".join(f"{name} {_syntax_digest(name)}" for name in modules).encode()).hexdigest()[:16]


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
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == _PACKAGE and _path(name) is not None}


@functools.cache
def _syntax_digest(module: str) -> str:
    tree = _WithoutDocstrings().visit(ast.parse(ast.unparse(_tree(module))))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops statements that are a text alone: docstrings, and the texts below constants and fields."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
