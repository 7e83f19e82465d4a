import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment_pipeline import code_version
from alignment_pipeline.code_version import dependencies, stage_code, stage_code_version
from alignment_pipeline.stage import STAGE_FUNCTIONS

PACKAGE = Path(code_version.__file__).parent
CACHED = (code_version._tree, code_version._module_version, dependencies, stage_code, stage_code_version)


class Copy:
    """A copy of the package that can be edited; versions are computed from it."""

    def __init__(self, root: Path, before: dict[str, str]) -> None:
        self._root = root
        self._before = before

    def edit(self, module: str, old: str, new: str) -> None:
        path = self._root / "alignment_pipeline" / module
        text = path.read_text(encoding="utf-8")
        assert text.count(old) >= 1, f"{module} no longer holds {old!r}: choose another line to edit"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def append(self, module: str, text: str) -> None:
        path = self._root / "alignment_pipeline" / module
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")

    def versions(self) -> dict[str, str]:
        for cached in CACHED:
            cached.cache_clear()
        return {stage: stage_code_version(stage) for stage in STAGE_FUNCTIONS}

    def changed(self) -> set[str]:
        """Stages whose version differs from the unedited package's."""
        after = self.versions()
        return {stage for stage in after if after[stage] != self._before[stage]}


@pytest.fixture(scope="module")
def unedited() -> dict[str, str]:
    return {stage: stage_code_version(stage) for stage in STAGE_FUNCTIONS}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unedited: dict[str, str]) -> Iterator[Copy]:
    shutil.copytree(PACKAGE, tmp_path / "alignment_pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_version, "_ROOT", tmp_path)
    yield Copy(tmp_path, unedited)
    for cached in CACHED:
        cached.cache_clear()


def test_versions_are_short_differ_between_stages_and_do_not_depend_on_the_place(
    copy: Copy, unedited: dict[str, str]
) -> None:
    assert all(len(version) == 16 and int(version, 16) >= 0 for version in unedited.values())
    assert len(set(unedited.values())) == len(unedited)
    assert copy.versions() == unedited


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("sequences.py", '"""Prompts and responses as tensors', '"""Something else'),
        ("sequences.py", '    """Concatenate each prompt', '    """Words about each prompt'),
        ("identity.py", '"""Folder of an artifact that its data version', '"""Another sentence about the folder that'),
        ("sequences.py", "import torch\n", "import torch  # the library\n\n\n# A comment.\n"),
        ("stages/evaluation.py", "    config = spec.config\n", "\n    # Why.\n    config = (spec.config)\n"),
        ("ppo/trainer.py", 'def learning_rate_share(', '\n\n\ndef learning_rate_share('),
    ],
    ids=["module docstring", "function docstring", "constant's docstring", "comment", "brackets", "blank lines"],
)  # fmt: skip
def test_editing_what_python_does_not_run_changes_no_version(copy: Copy, module: str, old: str, new: str) -> None:
    copy.edit(module, old, new)
    assert copy.changed() == set()


def test_a_docstring_that_is_added_or_removed_changes_no_version(copy: Copy) -> None:
    copy.edit("stages/ppo_policy.py", "    rows = read_jsonl(", '    """The prompts."""\n    rows = read_jsonl(')
    seen = '    """Evenly spaced updates (from 0), the first and the last among them."""\n'
    copy.edit("ppo/rollout_table.py", seen, "")
    assert copy.changed() == set()


def test_editing_a_dependencys_code_changes_the_stages_that_reach_it_and_no_other(copy: Copy) -> None:
    copy.edit("ppo/losses.py", "0.5 * torch.maximum", "0.6 * torch.maximum")
    assert copy.changed() == {"ppo_policy"}


def test_the_module_that_was_edited_is_the_one_whose_version_differs(copy: Copy) -> None:
    before = dict(stage_code("ppo_policy"))
    assert tuple(before) == dependencies("alignment_pipeline.stages.ppo_policy")
    copy.edit("ppo/losses.py", "0.5 * torch.maximum", "0.6 * torch.maximum")
    copy.versions()
    after = stage_code("ppo_policy")
    assert [name for name in after if after[name] != before[name]] == ["alignment_pipeline.ppo.losses"]


def test_a_field_that_a_newer_python_adds_to_its_syntax_changes_no_version(
    copy: Copy, unedited: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "news"))
    monkeypatch.setattr(ast.FunctionDef, "news", [], raising=False)
    assert dict(ast.iter_fields(ast.parse("def f(): pass").body[0]))["news"] == []
    assert copy.versions() == unedited


def test_none_is_not_an_absent_value(copy: Copy) -> None:
    copy.append("stages/dpo_policy.py", "\n\nX = None\n")
    with_none = copy.versions()["dpo_policy"]
    copy.edit("stages/dpo_policy.py", "X = None\n", "X = ''\n")
    assert copy.versions()["dpo_policy"] != with_none


def test_a_dependency_of_a_dependency_counts(copy: Copy) -> None:
    assert "alignment_pipeline.ppo.advantages" in dependencies("alignment_pipeline.stages.ppo_policy")
    copy.edit("sequences.py", "lengths[row], row)", "-lengths[row], row)")
    changed = copy.changed()
    assert {"ppo_policy", "sampled_responses", "evaluation", "dpo_policy", "sft_model"} <= changed
    assert changed.isdisjoint({"instructions", "base_model", "formatted_dataset", "preference_pairs"})


def test_editing_a_stage_does_not_change_another(copy: Copy) -> None:
    copy.append("stages/dpo_policy.py", "\n\nX = 1\n")
    assert copy.changed() == {"dpo_policy"}


def test_a_string_that_is_code_counts(copy: Copy) -> None:
    copy.edit("stages/sft_model.py", '"eval/loss"', '"eval/other"')
    assert copy.changed() == {"sft_model"}


def test_a_new_import_brings_its_module_in(copy: Copy) -> None:
    assert "alignment_pipeline.ppo.losses" not in dependencies("alignment_pipeline.stages.dpo_policy")
    copy.append("stages/dpo_policy.py", "\n\ndef late():\n    from alignment_pipeline.ppo import losses\n")
    assert copy.changed() == {"dpo_policy"}
    assert "alignment_pipeline.ppo.losses" in dependencies("alignment_pipeline.stages.dpo_policy")


def test_what_only_declares_or_reports_does_not_count(copy: Copy) -> None:
    for module in (
        "configs.py",
        "decoding_configs.py",
        "errors.py",
        "progress.py",
        "pacing.py",
        "plots.py",
        "stage.py",
    ):
        copy.append(module, "\n\nX = 1\n")
    assert copy.changed() == set()


def test_a_stage_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"alignment_pipeline\.stages\.nonsense"):
        stage_code_version("nonsense")


def test_the_library_has_no_relative_import_which_the_version_would_miss() -> None:
    relative = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(line.startswith(("from .", "import .")) for line in path.read_text(encoding="utf-8").splitlines())
    ]
    assert relative == []
