"""The index's schema, from the sections of `schema.sql`, and how an index made by earlier code gets to it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import duckdb

_HEADING = re.compile(r"^-- (?:migration (\d+)\b.*|(views))$", re.MULTILINE)
_REBUILD = re.compile(r"^-- rebuild$", re.MULTILINE)
VIEWS = "views"


def read_sections(text: str) -> dict[str, str]:
    """Section name ("1", "2", ..., "views") → its SQL, in the order of the text."""
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {heading[1] or heading[2]: text[heading.end() : end] for heading, end in zip(headings, ends, strict=True)}


SECTIONS: Mapping[str, str] = read_sections((Path(__file__).parent / "schema.sql").read_text(encoding="utf-8"))


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """All tables and views in an empty database."""
    for section in SECTIONS:
        _apply(connection, section)


def is_current(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether a database has exactly this schema."""
    return _applied(connection) == {section: _sha256(section) for section in SECTIONS}


def migrate(connection: duckdb.DuckDBPyConnection) -> bool:
    """Apply the sections that a database lacks, in one transaction.

    Returns:
        Whether it has this schema now. False where the home folder has to be read again: the index is older than
        migrations, newer than this code, or lacks a section that fills what it adds.
    """
    applied = _applied(connection)
    missing = [section for section in SECTIONS if applied.get(section) != _sha256(section)]
    changed = [section for section in missing if section in applied and section != VIEWS]
    if not applied or changed or applied.keys() - SECTIONS.keys() or any(map(_rebuilds, missing)):
        return False
    connection.begin()
    for section in missing:
        _apply(connection, section)
    connection.commit()
    return True


def _apply(connection: duckdb.DuckDBPyConnection, section: str) -> None:
    connection.execute(SECTIONS[section])
    connection.execute("INSERT OR REPLACE INTO schema_sections VALUES (?, ?)", [section, _sha256(section)])


def _applied(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    try:
        return dict(connection.execute("SELECT section, sha256 FROM schema_sections").fetchall())
    except duckdb.CatalogException:
        return {}


def _sha256(section: str) -> str:
    return hashlib.sha256(SECTIONS[section].encode()).hexdigest()


def _rebuilds(section: str) -> bool:
    return bool(_REBUILD.search(SECTIONS[section]))
