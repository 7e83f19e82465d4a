"""How an index gets to a newer schema: sections that are added, views that are replaced, and when it is made anew."""

from collections.abc import Iterator

import duckdb
import pytest

from resources.lineage import schema

OLD = """-- preface
-- migration 1: tables
CREATE TABLE schema_sections (section VARCHAR PRIMARY KEY, sha256 VARCHAR NOT NULL);
CREATE TABLE things (name VARCHAR);
-- views
CREATE OR REPLACE VIEW seen AS SELECT name FROM things;
"""
WIDER = "-- migration 2: sizes\nALTER TABLE things ADD COLUMN size BIGINT;\n-- views"


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(":memory:") as opened:
        monkeypatch.setattr(schema, "SECTIONS", schema.read_sections(OLD))
        schema.create(opened)
        opened.execute("INSERT INTO things VALUES ('kept')")
        yield opened


def use(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(schema, "SECTIONS", schema.read_sections(text))


def test_the_real_file_has_its_sections() -> None:
    assert list(schema.SECTIONS) == ["1", "2", "3", "views"]
    with duckdb.connect(":memory:") as connection:
        schema.create(connection)
        assert schema.is_current(connection)


def test_every_table_and_view_of_the_real_file_is_described() -> None:
    for text in schema.SECTIONS.values():
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith(("CREATE TABLE", "CREATE OR REPLACE VIEW")) and "schema_sections" not in line:
                assert lines[number - 1].startswith("-- "), line


def test_a_new_section_is_applied_and_rows_stay(
    connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, OLD.replace("-- views", WIDER))
    assert not schema.is_current(connection)
    assert schema.migrate(connection)
    assert schema.is_current(connection)
    assert connection.execute("SELECT * FROM things").fetchall() == [("kept", None)]


def test_a_changed_view_is_replaced(connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OLD.replace("SELECT name FROM", "SELECT upper(name) AS name FROM"))
    assert schema.migrate(connection)
    assert connection.execute("SELECT * FROM seen").fetchall() == [("KEPT",)]


@pytest.mark.parametrize(
    "text",
    [
        OLD.replace("things (name VARCHAR)", "things (name VARCHAR, size BIGINT)"),  # an old section was changed
        OLD.replace("-- views", WIDER.replace("ALTER", "-- rebuild\nALTER")),  # filled from the home folder
        OLD.replace("migration 1", "migration 7"),  # the index knows a section that this code does not
    ],
)
def test_what_cannot_be_migrated_is_made_anew(
    text: str, connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, text)
    assert not schema.migrate(connection)


def test_an_index_without_sections_is_made_anew() -> None:
    with duckdb.connect(":memory:") as connection:
        assert not schema.is_current(connection)
        assert not schema.migrate(connection)
