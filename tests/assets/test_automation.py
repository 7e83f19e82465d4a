"""The schedule, the sensor and blocking checks, with real ticks and the runs that they request."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.stages import instructions as instructions_stage
from app.definitions import build_definitions
from app.recipes import find_recipe
from resources.artifact_store import ArtifactStore
from resources.dagster_resources import default_resources
from resources.feedback import FeedbackInbox
from resources.runs import RunRecords


@dataclass
class Place:
    """A home, its definitions and a Dagster instance."""

    home: Path
    definitions: dg.Definitions
    instance: dg.DagsterInstance

    def tick_of_sensor(self) -> Any:
        context = dg.build_sensor_context(
            instance=self.instance, repository_def=self.definitions.get_repository_def(),
            resources=default_resources(self.home),
        )  # fmt: skip
        with context:
            return self.definitions.resolve_sensor_def("smoke_feedback").evaluate_tick(context)

    def execute(self, job: str, request: dg.RunRequest, **tags: str) -> dg.ExecuteInProcessResult:
        """Run what was requested, tagged with its origin as Dagster's daemon does."""
        origin = {f"dagster/{name}": value for name, value in tags.items()}
        return self.definitions.resolve_job_def(job).execute_in_process(
            run_config=request.run_config, tags=request.tags | origin, instance=self.instance, raise_on_error=False
        )


def place(home: Path, *overrides: str) -> Place:
    definitions = build_definitions([find_recipe("smoke", overrides)], default_resources(home))
    return Place(home, definitions, dg.DagsterInstance.ephemeral())


@pytest.fixture(scope="module")
def shared(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One copy of the filled home for the tests of this module that go on from each other."""
    home = tmp_path_factory.mktemp("automation") / "home"
    shutil.copytree(smoke_home, home, ignore=shutil.ignore_patterns("dagster", "wandb"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "disabled")
        yield place(home)


def materialized(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.asset_key.path[-1] for event in result.get_asset_materialization_events() if event.asset_key}


def test_the_nightly_tick_requests_a_run_that_evaluates_and_reuses_what_has_not_changed(shared: Place) -> None:
    schedule = shared.definitions.resolve_schedule_def("smoke_nightly_evaluation")
    with dg.build_schedule_context(
        instance=shared.instance, repository_def=shared.definitions.get_repository_def()
    ) as context:
        (request,) = schedule.evaluate_tick(context).run_requests or []
    before = RunRecords(shared.home).current("smoke")
    result = shared.execute(schedule.job_name, request, schedule_name=schedule.name)
    assert result.success
    assert materialized(result) == {
        "base_evaluation", "sft_evaluation", "ppo_evaluation", "dpo_evaluation", "comparison",
        "decoding_sweep",
    }  # fmt: skip
    record = RunRecords(shared.home).read(result.run_id)
    assert all(asset["reused"] for asset in record["assets"].values())
    assert (record["status"], record["started_by"]) == ("success", "schedule smoke_nightly_evaluation")
    assert RunRecords(shared.home).current("smoke") == before


def test_without_votes_the_sensor_skips_with_the_place_where_votes_are_awaited(shared: Place) -> None:
    tick = shared.tick_of_sensor()
    assert not tick.run_requests
    assert tick.skip_message == "No votes wait in feedback/smoke/inbox."


GOOD_VOTES, BAD_VOTES = 3, 4


def votes(home: Path) -> str:
    """Good votes on training prompts, and one of each bad kind; a held-out prompt would leak into the evaluation."""
    ref = RunRecords(home).current("smoke")["formatted_dataset"]
    folder = ArtifactStore(home).path(ref)
    prompts = [row["prompt"] for row in read_jsonl(folder / "train.jsonl")[:GOOD_VOTES]]
    held_out = read_jsonl(folder / "test.jsonl")[0]["prompt"]
    lines: list[Any] = [
        {"prompt": prompt, "chosen": f"return {n}", "rejected": "pass"} for n, prompt in enumerate(prompts)
    ]
    lines += [
        {"prompt": prompts[0], "chosen": "only this"},
        {"prompt": prompts[0], "chosen": "same", "rejected": "same"},
        {"prompt": held_out, "chosen": "a", "rejected": "b"},
    ]
    return "".join(json.dumps(line) + "\n" for line in lines) + "not json\n"


@pytest.fixture(scope="module")
def retrained(shared: Place) -> dg.ExecuteInProcessResult:
    """The run that the sensor requests for some votes."""
    inbox = FeedbackInbox(shared.home, "smoke")
    text = votes(shared.home)
    (inbox.inbox / "votes.jsonl").write_text(text)
    (request,) = shared.tick_of_sensor().run_requests
    (same,) = shared.tick_of_sensor().run_requests
    (inbox.inbox / "votes.jsonl").rename(inbox.inbox / "renamed.jsonl")
    (renamed,) = shared.tick_of_sensor().run_requests
    assert request.run_key and request.run_key == same.run_key == renamed.run_key
    (inbox.inbox / "more.jsonl").write_text("also not json\n")
    (other,) = shared.tick_of_sensor().run_requests
    assert other.run_key != request.run_key
    (inbox.inbox / "more.jsonl").unlink()
    return shared.execute("smoke_retraining", request, sensor_name="smoke_feedback")


def test_votes_request_one_run_that_trains_what_learns_from_them_and_samples_nothing_anew(
    shared: Place, retrained: dg.ExecuteInProcessResult
) -> None:
    assert retrained.success
    record = RunRecords(shared.home).read(retrained.run_id)
    assert record["started_by"] == "sensor smoke_feedback"
    made = {asset for asset, value in record["assets"].items() if not value["reused"]}
    assert {"human_preferences", "preference_pairs", "reward_model", "dpo_policy", "ppo_policy", "comparison"} <= made
    assert not materialized(retrained) & {
        "instructions", "base_model", "formatted_dataset", "sft_model", "sampled_responses", "preference_labels",
    }  # fmt: skip
    assert len(list((shared.home / "artifacts" / "sampled_responses").glob("*/*"))) == 1


def test_good_votes_become_pairs_and_bad_ones_lie_in_quarantine(
    shared: Place, retrained: dg.ExecuteInProcessResult
) -> None:
    store, made = ArtifactStore(shared.home), RunRecords(shared.home).of_run(retrained.run_id)
    folder = store.verify(made["human_preferences"])
    assert len(read_jsonl(folder / "pairs.jsonl")) == GOOD_VOTES
    assert {row["reason"] for row in read_jsonl(folder / "quarantine.jsonl")} == {
        "missing_key", "identical", "held_out_prompt", "invalid_json",
    }  # fmt: skip
    pairs = store.verify(made["preference_pairs"])
    sources = [row["source"] for split in ("train", "validation") for row in read_jsonl(pairs / f"{split}.jsonl")]
    assert sources.count("human") == GOOD_VOTES and len(sources) > GOOD_VOTES
    assert store.manifest(made["preference_pairs"])["metrics"]["pairs/human"] == GOOD_VOTES


def test_votes_that_were_taken_in_request_nothing_more(shared: Place, retrained: dg.ExecuteInProcessResult) -> None:
    tick = shared.tick_of_sensor()
    assert not tick.run_requests and tick.skip_message
    assert FeedbackInbox(shared.home, "smoke").pending() == []


def test_votes_whose_run_failed_after_taking_them_in_are_requested_once_more(copy_of_home: Path) -> None:
    here = place(copy_of_home)
    inbox = FeedbackInbox(copy_of_home, "smoke")
    inbox.inbox.mkdir(parents=True, exist_ok=True)
    (inbox.inbox / "votes.jsonl").write_text(
        json.dumps({"instruction": "Say hi.", "chosen": "hi", "rejected": "no", "labeller": "ana"}) + "\n"
    )
    inbox.take_in()  # and then the process dies
    (request,) = here.tick_of_sensor().run_requests
    assert request.run_key.startswith("journal-")


def leaky_source(folder: Path) -> Path:
    """Every prompt twice, with two answers."""
    path = folder / "leaky.jsonl"
    rows = [{"instruction": f"Task {n // 2}", "input": "", "output": f"answer {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_leak_stops_everything_downstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_row(texts: tuple[str, str, str], *arguments: Any) -> str:
        return ("train", "train", "validation", "test")[int(texts[2].split()[1]) % 4]

    monkeypatch.setattr(instructions_stage, "_split", by_row)
    leaky = place(
        tmp_path / "home", "data.world_rows=null", f"data.path={leaky_source(tmp_path)}",
        "evaluation.judge=reference_chrf",
    )  # fmt: skip
    result = leaky.execute("smoke", dg.RunRequest())
    assert not result.success
    failed = {
        (check.asset_key.path[-1], check.check_name)
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }
    assert failed == {("instructions", "splits_share_no_prompt")}
    assert materialized(result) == {"instructions"}
    assert RunRecords(leaky.home).current("smoke") == {}  # no later run can read it
    (record,) = RunRecords(leaky.home).all()
    assert (record["status"], record["assets"].keys()) == ("failed", {"instructions"})
