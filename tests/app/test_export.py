"""`align card` and `align export`: a folder that transformers loads without us, whole or not there."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.configs import BaseModelConfig
from alignment_pipeline.errors import AlignmentError, StoreError
from alignment_pipeline.identity import data_version
from alignment_pipeline.models import load_policy, load_tokenizer, weights_sha256
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.base_model import prepare_base_model
from app.export import card_of, export_policy
from resources.artifact_store import ArtifactStore
from resources.runs import RunRecords

Run = Callable[..., "subprocess.CompletedProcess[str]"]
FILES = {
    "README.md", "config.json", "generation_config.json", "lineage.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def home(smoke_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`smoke_home` as the home of this process; only read."""
    monkeypatch.setenv("ALIGNMENT_HOME", str(smoke_home))
    return smoke_home


def files_of(home: Path) -> dict[str, tuple[int, int]]:
    states = {str(path): path.stat() for path in home.rglob("*") if path.is_file()}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


@pytest.mark.parametrize("policy", ["ppo_policy", "sft_model"])
def test_transformers_loads_the_policy_itself(home: Path, tmp_path: Path, policy: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = files_of(home)
    folder = tmp_path / "new" / "policy"
    export_policy("smoke", policy, None, folder)
    assert files_of(home) == before  # a card and an export are no part of the store
    assert {path.name for path in folder.iterdir()} == FILES and [*folder.parent.iterdir()] == [folder]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    store, current = ArtifactStore(home), RunRecords(home).current("smoke")
    trunk = store.path(current["sft_model"])
    expected = load_policy(store.path(current[policy]), trunk)
    text = "### Instruction:\nAdd one to x.\n\n### Response:\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [load_tokenizer(trunk)(text)["input_ids"]]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        other = load_policy(store.path(current["base_model"]), trunk)
        assert not torch.allclose(model(ids).logits, other(ids).logits)
    lineage = json.loads((folder / "lineage.json").read_text())
    assert weights_sha256(model) == weights_sha256(expected) == lineage["weights_sha256"]
    assert lineage["artifacts"][policy]["data_version"] == current[policy].data_version
    assert (folder / "README.md").read_text() == card_of("smoke", policy, None)


def test_the_code_on_the_card_runs(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_policy("smoke", "ppo_policy", None, tmp_path / "policy")
    code = (tmp_path / "policy" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "top_k=0" in code and "max_new_tokens=24" in code
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(tmp_path / "policy")), names)
    assert 1 <= names["answer"].shape[1] - names["tokens"]["input_ids"].shape[1] <= 24
    assert names["tokenizer"].decode(names["tokens"]["input_ids"][0]) == names["prompt"]
    assert capsys.readouterr().out.strip()


def test_an_exported_policy_is_the_base_model_of_another_recipe(home: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "policy", tmp_path / "output"
    export_policy("smoke", "ppo_policy", None, folder)
    output.mkdir()
    spec = StageSpec(BaseModelConfig(path=str(folder)), {"source": folder}, output, tmp_path / "work", seed=0)
    prepare_base_model(spec, ProgressLog(tmp_path / "progress.jsonl"))
    lineage = json.loads((folder / "lineage.json").read_text())
    assert weights_sha256(load_policy(output, output)) == lineage["weights_sha256"]
    assert data_version(output)


def test_the_command_line_prints_the_card_and_writes_the_folder(smoke_home: Path, align: Run, tmp_path: Path) -> None:
    printed = align(smoke_home, "card", "smoke", "ppo_policy")
    assert printed.returncode == 0 and printed.stderr == "", printed.stderr
    (run,) = RunRecords(smoke_home).all()
    assert align(smoke_home, "card", "smoke", "ppo_policy", "--run", run["run_id"]).stdout == printed.stdout
    empty = tmp_path / "empty"
    empty.mkdir()
    done = align(smoke_home, "export", "smoke", "ppo_policy", str(empty))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert str(empty) in done.stdout.replace("\n", "")
    assert (empty / "README.md").read_text() == printed.stdout


class TestTheRunThatIsTold:
    @pytest.fixture
    def home(self, copy_of_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A home with a second, later run, which set something and reused all but made no DPO policy."""
        monkeypatch.setenv("ALIGNMENT_HOME", str(copy_of_home))
        runs = RunRecords(copy_of_home)
        made = {asset: ref for asset, ref in runs.current("smoke").items() if asset != "dpo_policy"}
        runs.start("second", "smoke", "test", list(made), ["data.license=mit", "dpo.batch_size=4"])
        for asset, ref in made.items():
            runs.record_asset("second", "smoke", asset, ref, reused=True)
        return copy_of_home

    def test_is_the_newest_that_made_the_current_policy(self, home: Path) -> None:
        assert "The licence of the data is `mit`." in card_of("smoke", "ppo_policy", None)
        assert "The licence of the data is `apache-2.0`." in card_of("smoke", "dpo_policy", None)

    def test_can_be_named(self, home: Path) -> None:
        first = RunRecords(home).all()[0]["run_id"]
        assert "The licence of the data is `apache-2.0`." in card_of("smoke", "ppo_policy", first)
        assert "align run smoke --set data.license=mit\n" in card_of("smoke", "ppo_policy", "second")

    def test_has_to_have_made_the_policy_and_to_be_of_the_recipe(self, home: Path) -> None:
        with pytest.raises(StoreError, match=r"Run second made no dpo_policy; it made: instructions, base_model"):
            card_of("smoke", "dpo_policy", "second")
        with pytest.raises(StoreError, match="Run second is of the recipe smoke, expected tiny"):
            card_of("tiny", "ppo_policy", "second")
        with pytest.raises(StoreError, match="There is no run 'third'"):
            card_of("smoke", "ppo_policy", "third")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (("smok", "ppo_policy"), "There is no recipe 'smok'"),
            (("smoke", "ppo"), "smoke has no policy 'ppo', expected one of: base_model, sft_model, "),
            (("tiny", "ppo_policy"), "ppo_policy of tiny has not been made yet. Run `align run tiny`."),
            (("smoke", "ppo_policy", "--run", "x"), "There is no run 'x'"),
        ],
    )
    def test_are_one_sentence(
        self, smoke_home: Path, align: Run, tmp_path: Path, arguments: tuple[str, ...], expected: str
    ) -> None:
        for command in (["card", *arguments], ["export", *arguments, str(tmp_path / "folder")]):
            done = align(smoke_home, *command)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("Error: ") and expected in done.stderr and done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_in_use_is_left_alone(self, home: Path, tmp_path: Path) -> None:
        used = tmp_path / "used"
        used.mkdir()
        (used / "mine.txt").write_text("mine")
        with pytest.raises(AlignmentError, match="is not empty, expected a new or an empty folder"):
            export_policy("smoke", "ppo_policy", None, used)
        with pytest.raises(AlignmentError, match="is a file, expected a new or an empty folder"):
            export_policy("smoke", "ppo_policy", None, used / "mine.txt")
        with pytest.raises(StoreError, match=r"cannot be written \(Not a directory\); nothing was exported"):
            export_policy("smoke", "ppo_policy", None, used / "mine.txt" / "below")
        assert [path.name for path in used.iterdir()] == ["mine.txt"] and (used / "mine.txt").read_text() == "mine"

    def test_weights_that_were_changed_are_not_exported(
        self, copy_of_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ALIGNMENT_HOME", str(copy_of_home))
        (weights,) = copy_of_home.glob("artifacts/ppo_policy/*/*/adapter/adapter_model.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(StoreError, match="was changed since it was published"):
            export_policy("smoke", "ppo_policy", None, tmp_path / "out" / "policy")
        assert not (tmp_path / "out").exists()

    def test_an_export_that_breaks_off_leaves_nothing(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def break_off(record: Any) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr("app.export.model_card", break_off)  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            export_policy("smoke", "ppo_policy", None, tmp_path / "policy")
        assert list(tmp_path.iterdir()) == []
