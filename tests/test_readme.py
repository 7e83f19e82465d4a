"""The documentation is true: what README and docs name exists, and the commands they show are accepted."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from alignment_pipeline.graph import build_graph
from alignment_pipeline.recipe import validate_recipe
from app.cli import app
from app.recipes import all_recipes

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(program: str) -> list[list[str]]:
    """Every call of a program in the documents' indented or fenced code, as words; comments left out."""
    lines = [line for document in DOCUMENTS for line in document.read_text(encoding="utf-8").splitlines()]
    found = [re.match(rf"\s+(?:\S*/)?{program} (.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def parses(words: list[str]) -> None:
    """Let Typer parse a command without running it; it raises on an unknown command, option or missing argument."""
    group = get_command(app)
    name, command, rest = group.resolve_command(group.make_context("align", list(words), resilient_parsing=True), words)
    assert name is not None and command is not None
    command.make_context(name, list(rest)).close()


def test_the_documents_show_align_commands() -> None:
    assert len(commands("align")) >= 6


@pytest.mark.parametrize("words", commands("align"), ids=" ".join)
def test_every_align_command_shown_is_accepted_by_the_command_line(words: list[str]) -> None:
    parses(words)


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {words[0] for words in commands("make")}
    assert {"run", "test", "dev"} <= shown <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_local_link_and_picture_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_path_of_the_file_map_exists_and_every_package_is_in_it() -> None:
    table = README.split("## What is where")[1].split("##")[0]
    paths = [
        path for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for path in re.findall(r"`([^`]+)`", row)
    ]
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    packages = {path.parent.name + "/" for path in REPOSITORY.glob("*/__init__.py")}
    assert packages <= set(paths)


def test_the_recipe_table_lists_every_recipe() -> None:
    table = README.split("| recipe | what it is |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {recipe.name for recipe in all_recipes()}


def test_the_recipe_shown_is_valid() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    recipe = validate_recipe(yaml.safe_load(block[1]), source="README")
    assert {"sft_model", "reward_model", "dpo_policy", "ppo_policy", "comparison"} <= set(build_graph(recipe))


def test_every_environment_variable_documented_is_read_somewhere() -> None:
    table = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8").split("## The home folder")[0]
    variables = re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE)
    packages = ("resources", "app", "assets", "tests", ".ci")
    sources = "".join(
        path.read_text(encoding="utf-8")
        for package in packages
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix in (".py", "")
    )
    assert variables
    assert [variable for variable in variables if variable not in sources] == []


def test_the_queries_shown_in_the_operations_document_run(tmp_path: Path) -> None:
    from resources.lineage.index import Lineage

    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    queries = re.findall(r'lineage\.query\("([^"]+)"\)', text)
    assert queries
    for query in queries:
        assert Lineage(tmp_path).query(query) == []


def test_the_views_and_statements_shown_in_the_lineage_document_are_there(tmp_path: Path) -> None:
    from resources.lineage.index import Lineage

    text = (REPOSITORY / "docs" / "lineage.md").read_text(encoding="utf-8")
    lineage = Lineage(tmp_path)
    table = text.split("| view | answers |")[1].split("\n\n")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    views = lineage.query("SELECT view_name AS name FROM duckdb_views() WHERE NOT internal")
    assert named >= {view["name"] for view in views} - {"recipe_assets"}
    statements = [*re.findall(r"```sql\n(.*?)```", text, re.DOTALL), *re.findall(r'connection\.sql\("([^"]+)"\)', text)]
    assert len(statements) >= 2
    for statement in [*statements, *(f"SELECT * FROM {name}" for name in sorted(named))]:
        assert lineage.query(statement) == []


@pytest.mark.parametrize(
    "document", [REPOSITORY / "README.md", REPOSITORY / "docs" / "lineage.md"], ids=lambda path: path.name
)
def test_every_output_shown_is_of_a_command_that_is_accepted_and_was_filled_in(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- output: align (.*?) -->\n```\n(.*?)```", text, re.DOTALL)
    assert shown and len(shown) == text.count("<!-- output:")
    for command, output in shown:
        parses(shlex.split(command))
        assert output.strip(), command
