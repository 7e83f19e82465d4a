"""What a run would do, said before it, on a home in which `smoke` was run."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment_pipeline.errors import DataError, MissingArtifactError
from alignment_pipeline.graph import build_graph
from app.recipes import find_recipe
from resources.artifact_store import ArtifactStore
from resources.forecast import Verdict, forecast
from resources.leakage import CHECK
from resources.runs import RunRecords

ALL = list(build_graph(find_recipe("smoke")))


def snapshot(home: Path) -> dict[str, tuple[int, str]]:
    """Every path below a home: when it was changed, and what it holds."""
    return {
        str(path.relative_to(home)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder",
        )
        for path in [home, *home.rglob("*")]
    }


def verdicts(home: Path, *overrides: str, assets: list[str] = ALL) -> dict[str, Verdict]:
    """The forecast by asset; that it leaves the home as it was is checked each time."""
    before = snapshot(home)
    found = forecast(home, find_recipe("smoke", overrides), assets)
    assert snapshot(home) == before
    assert [verdict.asset for verdict in found] == [asset for asset in ALL if asset in assets]
    return {verdict.asset: verdict for verdict in found}


def of_kind(found: dict[str, Verdict], kind: str) -> set[str]:
    return {asset for asset, verdict in found.items() if verdict.kind == kind}


def folder_of(home: Path, asset: str) -> Path:
    return ArtifactStore(home).path(RunRecords(home).current("smoke")[asset])


def test_what_is_current_is_reused(smoke_home: Path) -> None:
    current = RunRecords(smoke_home).current("smoke")
    assert list(verdicts(smoke_home).values()) == [Verdict(asset, "reuse", (), current[asset]) for asset in ALL]


def test_in_an_empty_home_everything_is_made_for_the_first_time_and_the_home_is_not_created(tmp_path: Path) -> None:
    found = forecast(tmp_path / "home", find_recipe("smoke"), ALL)
    assert found == [Verdict(asset, "compute", ("first time",)) for asset in ALL]
    assert not (tmp_path / "home").exists()


def test_what_reads_an_asset_that_is_made_anew_is_undecided_unless_it_differs_itself(smoke_home: Path) -> None:
    found = verdicts(smoke_home, "sampling.temperature=0.9", "ppo.kl_coef=0.2", "pairs.validation_fraction=0.2")
    assert {asset: found[asset].reasons for asset in of_kind(found, "compute")} == {
        "sampled_responses": ("sampling.temperature 1.0 → 0.9",),
        "preference_pairs": ("pairs.validation_fraction 0.15 → 0.2",),
        "ppo_policy": ("ppo.kl_coef 0.05 → 0.2",),
    }
    assert of_kind(found, "reuse") == {
        "instructions", "base_model", "formatted_dataset", "sft_model", "human_preferences",
    }  # fmt: skip
    assert found["dpo_policy"].reasons == (
        "reads preference_pairs, which is made anew",
        "reads reference_logprobs, which may be made anew",
        "reused if what it reads comes out the same",
    )


def test_a_selection_reads_what_is_current_and_says_what_is_missing(smoke_home: Path, tmp_path: Path) -> None:
    found = verdicts(smoke_home, "dpo.beta=0.2", assets=["dpo_evaluation", "comparison"])
    assert of_kind(found, "reuse") == {"dpo_evaluation", "comparison"}
    with pytest.raises(MissingArtifactError, match=r"formatted_dataset, dpo_policy, .*`align run smoke`"):
        forecast(tmp_path / "home", find_recipe("smoke"), ["dpo_evaluation"])


def test_waiting_votes_are_counted_and_not_taken_in(copy_of_home: Path) -> None:
    inbox = copy_of_home / "feedback" / "smoke" / "inbox"
    inbox.mkdir(parents=True, exist_ok=True)
    (inbox / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n{"n": 1}\n')
    found = verdicts(copy_of_home)
    assert found["human_preferences"].kind == "compute"
    waiting, journal = found["human_preferences"].reasons
    assert waiting == "2 votes wait in the inbox" and journal.startswith("feedback.journal e3b0c442 → ")
    assert found["preference_pairs"].kind == "undecided"
    assert (inbox / "a.jsonl").is_file()


def test_votes_that_the_journal_has_already_wait_for_nothing(copy_of_home: Path) -> None:
    inbox = copy_of_home / "feedback" / "smoke" / "inbox"
    (inbox / "empty.jsonl").write_text("\n")
    assert of_kind(verdicts(copy_of_home), "reuse") == set(ALL)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "rows.jsonl is missing"),
        (lambda path: path.write_text("cut"), "rows.jsonl holds 3 bytes, expected"),
    ],
)
def test_an_artifact_that_lost_a_file_is_made_again_and_the_file_is_named(
    copy_of_home: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(folder_of(copy_of_home, "instructions") / "rows.jsonl")
    found = verdicts(copy_of_home)
    (said,) = found["instructions"].reasons
    assert said.startswith(f"the earlier artifact's files are incomplete: {reason}")
    assert (of_kind(found, "compute"), len(of_kind(found, "undecided"))) == ({"instructions"}, len(ALL) - 1)


def test_an_incomplete_artifact_below_one_that_is_made_anew_is_certain_to_be_made(copy_of_home: Path) -> None:
    shutil.rmtree(folder_of(copy_of_home, "reference_logprobs"))
    next(folder_of(copy_of_home, "dpo_policy").rglob("*.safetensors")).unlink()
    found = verdicts(copy_of_home)
    assert found["reference_logprobs"].reasons == ("the previous artifact is gone",)
    assert of_kind(found, "compute") == {"reference_logprobs", "dpo_policy"}
    (said,) = found["dpo_policy"].reasons
    assert said.startswith("the earlier artifact's files are incomplete: ") and said.endswith("safetensors is missing")


def test_a_failed_blocking_check_stops_everything_that_reads_the_asset(copy_of_home: Path) -> None:
    path = folder_of(copy_of_home, "formatted_dataset") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["checks"][0]["passed"] = False
    path.write_text(json.dumps(manifest))
    found = verdicts(copy_of_home)
    assert of_kind(found, "reuse") == {"instructions", "base_model", "formatted_dataset"}
    assert of_kind(found, "blocked") == set(ALL) - of_kind(found, "reuse")
    name = manifest["checks"][0]["name"]
    assert found["sft_model"].reasons == (f"reads formatted_dataset, whose check {name} does not hold",)
    assert found["comparison"].reasons == ("reads base_evaluation, which is not made",)


def test_an_evaluation_of_before_the_leak_check_blocks_as_in_the_run(copy_of_home: Path) -> None:
    path = folder_of(copy_of_home, "dpo_evaluation") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["checks"] = [check for check in manifest["checks"] if check["name"] != CHECK]
    path.write_text(json.dumps(manifest))
    assert of_kind(verdicts(copy_of_home), "reuse") == set(ALL)
    example = (path.parent / "examples.jsonl").read_text().splitlines()[0]
    with (folder_of(copy_of_home, "preference_pairs") / "train.jsonl").open("a") as pairs:
        pairs.write(example + "\n")
    found = verdicts(copy_of_home, assets=["dpo_evaluation", "comparison"])
    assert found["comparison"].reasons == (f"reads dpo_evaluation, whose check {CHECK} does not hold",)


def test_a_missing_input_file_fails_as_the_run_would(smoke_home: Path, tmp_path: Path) -> None:
    overrides = ["data.world_rows=null", f"data.path={tmp_path / 'nope.jsonl'}", "evaluation.judge=reference_chrf"]
    with pytest.raises(DataError, match=r"data\.path: .*nope\.jsonl does not exist"):
        verdicts(smoke_home, *overrides)
