"""What holds for the whole tree, whatever a module does."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("alignment_pipeline", "resources", "assets", "app")
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "wandb", "matplotlib"}
VENV_BIN = Path(sys.executable).parent


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def run_python(code: str, tmp_path: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120
    ).stdout


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [VENV_BIN / "lint-imports", "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_loading_the_code_location_imports_nothing_heavy_and_takes_packages_from_the_repository(tmp_path: Path) -> None:
    code = (
        "import json, sys, app.definitions as d; loaded = d.defs(); "
        f"names = {PACKAGES!r}; "
        "print(json.dumps({'modules': sorted(sys.modules), 'files': [sys.modules[n].__file__ for n in names], "
        "'assets': sorted({key.path[0] for key in loaded.resolve_all_asset_keys()})}))"
    )
    loaded: dict[str, Any] = json.loads(run_python(code, tmp_path).splitlines()[-1])
    assert HEAVY & set(loaded["modules"]) == set()
    assert [Path(file).parent for file in loaded["files"]] == [REPOSITORY / package for package in PACKAGES]
    assert loaded["assets"] == sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


def test_every_recipe_bears_the_name_of_its_file_and_its_whole_graph_is_defined() -> None:
    from alignment_pipeline.graph import build_graph
    from app.definitions import build_definitions
    from app.recipes import all_recipes

    recipes = all_recipes()
    defined = {tuple(key.path) for key in build_definitions(recipes).resolve_all_asset_keys()}
    assert defined == {(recipe.name, asset) for recipe in recipes for asset in build_graph(recipe)}


def test_dg_finds_the_definitions_sound() -> None:
    done = subprocess.run(
        [VENV_BIN / "dg", "check", "defs"], cwd=REPOSITORY, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workspace_file_and_dg_load_the_same_module_under_the_same_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    (location,) = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())["load_from"]
    assert location["python_module"] == {
        "module_name": project["code_location_target_module"],
        "location_name": project["code_location_name"],
    }


def test_every_module_that_the_forkserver_preloads_exists() -> None:
    """A name that has moved would be passed over in silence, and every step would pay for the import."""
    import importlib

    tree = ast.parse((REPOSITORY / "app" / "preload.py").read_text())
    (loop,) = [node for node in tree.body if isinstance(node, ast.For)]
    names = ast.literal_eval(loop.iter)
    assert {"torch", "transformers"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_no_file_of_the_project_names_a_path_of_one_machine() -> None:
    pattern = re.compile(rb"(?<![\w.])/(?:work|root|home/[a-z]\w*|Users)/\w")
    found = [str(path) for path in tracked_files() if pattern.search(path.read_bytes())]
    assert found == []


def forbidden_calls(source: str) -> list[str]:
    """Calls that run code out of a file: unpickling, torch.load without weights_only, remote model code, eval."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("trust_remote_code")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load") and "torch" in source:
            safe = any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            )
            found += [] if safe else ["torch.load"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "np.load", "numpy.load"):
            found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "m = A.from_pretrained(p, trust_remote_code=True)",
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "from torch import load\nload(p)",
        "eval(text)",
    ],
)
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert forbidden_calls(source)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_module_can_run_code_out_of_a_file(path: Path) -> None:
    assert forbidden_calls(path.read_text(encoding="utf-8")) == []


def test_no_module_is_left_out_of_the_checks() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in source_files()}
    assert [str(path) for path, text in texts.items() if re.search(r"ruff: noqa|mypy: ignore-errors", text)] == []
    assert [str(path) for path, text in texts.items() if len(text.splitlines()) > 500] == []
