"""`align run --explain` and `--dry-run`: what they say is what the run then does, on real runs of `smoke`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resources.artifact_store import ArtifactStore
from resources.home import REPOSITORY
from resources.runs import RunRecords

Run = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = {"reuse", "compute", "undecided", "blocked", "reused", "computed", "failed"}
OF_DPO = {"dpo_policy", "dpo_evaluation", "comparison"}


def said(done: "subprocess.CompletedProcess[str]") -> dict[str, tuple[str, str]]:
    """Asset → what is said of it, and why."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        asset, _, rest = line.partition(" ")
        word, _, why = rest.strip().partition(" ")
        if word in WORDS and not why.strip()[:1].isdigit():  # the display's own lines go on with a clock
            found[asset] = (word, why.strip())
    return found


def of(found: dict[str, tuple[str, str]], word: str) -> set[str]:
    return {asset for asset, (each, _) in found.items() if each == word}


def test_a_changed_dpo_learning_rate_makes_anew_what_depends_on_it_and_reverting_it_reuses_everything(
    copy_of_home: Path, align: Run
) -> None:
    change = ["--set", "dpo.learning_rate=2e-3"]
    before = said(align(copy_of_home, "run", "smoke", "--explain", "--dry-run", *change))
    assert before["dpo_policy"] == ("compute", "dpo.learning_rate 0.001 → 0.002")
    assert (of(before, "compute"), of(before, "undecided")) == ({"dpo_policy"}, {"dpo_evaluation", "comparison"})
    assert of(before, "reuse") == before.keys() - OF_DPO and len(before) == 18
    assert before["dpo_evaluation"][1] == (
        "reads dpo_policy, which is made anew; reused if what it reads comes out the same"
    )

    done = align(copy_of_home, "run", "smoke", "--explain", *change)
    after = said(done)
    assert (of(after, "computed"), of(after, "reused")) == (OF_DPO, of(before, "reuse"))
    assert after["dpo_policy"][1] == before["dpo_policy"][1]
    assert after["dpo_evaluation"][1].startswith("dpo_policy ") and " → " in after["dpo_evaluation"][1]
    assert all(after[asset][1] == before[asset][1] for asset in of(before, "reuse")), "the same artifacts"
    assert "because dpo.learning_rate 0.001 → 0.002" in done.stdout

    reverted = said(align(copy_of_home, "run", "smoke", "--dry-run"))
    assert of(reverted, "reuse") == reverted.keys()
    assert {asset for asset, (_, why) in reverted.items() if "not the current one" in why} == OF_DPO
    assert reverted["dpo_policy"][1].endswith("; not the current one: dpo.learning_rate 0.002 → 0.001")
    back = said(align(copy_of_home, "run", "smoke", "--explain"))
    assert of(back, "reused") == back.keys() and len(back) == 18


def test_a_parent_that_is_made_anew_with_the_same_content_makes_nothing_below_it_anew(
    copy_of_home: Path, align: Run
) -> None:
    current = RunRecords(copy_of_home).current("smoke")
    shutil.rmtree(ArtifactStore(copy_of_home).path(current["reference_logprobs"]))
    change = ["--set", "data.max_chars=1999"]  # no row is that long
    before = said(align(copy_of_home, "run", "smoke", "--dry-run", *change))
    assert of(before, "compute") == {"instructions", "reference_logprobs"}
    assert of(before, "undecided") == before.keys() - {"instructions", "reference_logprobs"}
    after = said(align(copy_of_home, "run", "smoke", "--explain", *change))
    assert of(after, "computed") == {"instructions", "reference_logprobs"}
    made = RunRecords(copy_of_home).current("smoke")
    assert made["instructions"].key != current["instructions"].key
    assert {asset: ref.data_version for asset, ref in made.items()} == {
        asset: ref.data_version for asset, ref in current.items()
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code that can be edited."""
    copy = tmp_path / "checkout"
    for name in ("alignment_pipeline", "resources", "assets", "app", "recipes"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPOSITORY / "dagster.yaml", copy / "dagster.yaml")
    return copy


def edit(checkout: Path, module: str, old: str, new: str) -> None:
    path = checkout / "alignment_pipeline" / module
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{module} no longer holds {old!r}: choose another line to edit"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_edited_code_makes_anew_what_uses_it_and_names_the_module(
    copy_of_home: Path, checkout: Path, align: Run
) -> None:
    env = {"PYTHONPATH": str(checkout)}

    def run(*options: str) -> dict[str, tuple[str, str]]:
        return said(align(copy_of_home, "run", "smoke", *options, env=env))

    edit(checkout, "stages/dpo_policy.py", '"""', '"""Edited. ')
    edit(checkout, "ppo/losses.py", "import torch\n", "import torch  # a comment\n")
    edit(checkout, "ppo/losses.py", '    """', '    """Edited. ')
    untouched = run("--dry-run")
    assert of(untouched, "reuse") == untouched.keys() and len(untouched) == 18

    edit(checkout, "ppo/losses.py", "0.5 * torch.maximum", "0.6 * torch.maximum")
    before = run("--dry-run")
    assert before["ppo_policy"] == ("compute", "code: alignment_pipeline.ppo.losses changed")
    assert (of(before, "compute"), of(before, "undecided")) == ({"ppo_policy"}, {"ppo_evaluation", "comparison"})
    after = run("--explain")
    assert of(after, "computed") == {"ppo_policy", "ppo_evaluation", "comparison"}
    assert after["ppo_policy"][1] == before["ppo_policy"][1]

    edit(checkout, "stages/preference_labels.py", '"""', '"""Edited. ')
    edit(checkout, "stages/sft_model.py", '"eval/loss"', '"eval/other"')
    another = run("--dry-run")
    assert of(another, "compute") == {"sft_model"}
    assert another["sft_model"][1] == "code: alignment_pipeline.stages.sft_model changed"


def test_a_dry_run_leaves_the_home_as_it_was_and_imports_neither_dagster_nor_torch(
    copy_of_home: Path, tmp_path: Path
) -> None:
    def snapshot() -> dict[Path, tuple[int, bytes]]:
        paths = [copy_of_home, *copy_of_home.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}

    before = snapshot()
    code = (
        "import json, sys; from app.cli import app; "
        "app(['run', 'smoke', '--dry-run', '--set', 'dpo.beta=0.3', '--select', 'dpo_policy'], standalone_mode=False); "
        "print(json.dumps([name for name in ('torch', 'dagster', 'duckdb') if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    *lines, modules = done.stdout.splitlines()
    assert json.loads(modules) == []
    assert lines[1].split() == ["dpo_policy", "compute", "dpo.beta", "0.1", "→", "0.3"] and lines[2] == "compute 1."
    assert snapshot() == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--select", "nonsense"], "Error: --select nonsense: smoke has no such asset"),
        (["--select", "comparison"], "Error: base_evaluation, sft_evaluation, "),
        (["--set", "dpo.beta=x"], "dpo.beta: found 'x'"),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_refuses_in_one_sentence(
    tmp_path: Path, align: Run, options: list[str], error: str
) -> None:
    done = align(tmp_path / "home", "run", "smoke", "--dry-run", *options)
    assert done.returncode == 1 and error in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_failed_run_says_of_each_asset_what_became_of_it(tmp_path: Path, align: Run) -> None:
    refused: Any = align(tmp_path / "home", "run", "smoke", "--explain", "--select", "formatted_dataset",
                         "--select", "sft_model")  # fmt: skip
    assert refused.returncode == 1
    lines = [line.split() for line in refused.stdout.splitlines()]
    assert ["sft_model", "not", "made"] in lines
    (failed,) = [line for line in lines if line[:2] == ["formatted_dataset", "failed"] and line[2] != "0:00"]
    assert failed[2:4] == ["instructions,", "base_model"]
