"""The nightly evaluation and the sensor that retrains on new votes; both are off until a person turns them on."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from alignment_pipeline.identity import file_sha256
from alignment_pipeline.recipe import Recipe
from assets.jobs import evaluation_job_name, retraining_job_name
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.dagster_resources import ArtifactStoreResource
from resources.feedback import FeedbackInbox
from resources.runs import RunRecords

NIGHTLY = "0 3 * * *"
SENSOR_INTERVAL_S = 30


def nightly_evaluation(recipe: Recipe) -> dg.ScheduleDefinition:
    """Evaluates the current policies every night; what has not changed is reused."""
    return dg.ScheduleDefinition(
        name=f"{recipe.name}_nightly_evaluation",
        job_name=evaluation_job_name(recipe),
        cron_schedule=NIGHTLY,
        description="Evaluate the current policies every night at 3; results that exist already are reused.",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )


def feedback_sensor(recipe: Recipe) -> dg.SensorDefinition:
    """Requests one retraining run for each new content of the recipe's feedback inbox."""

    @dg.sensor(
        name=f"{recipe.name}_feedback",
        job_name=retraining_job_name(recipe),
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=f"Retrains when votes lie in feedback/{recipe.name}/inbox; the same votes never request it twice.",
    )
    def on_new_votes(
        context: dg.SensorEvaluationContext, artifact_store: ArtifactStoreResource
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        home = artifact_store.folder()
        inbox = FeedbackInbox(home, recipe.name)
        pending = inbox.pending_digest() or _unlearned_journal(home, recipe, inbox)
        if pending is None:
            yield dg.SkipReason(f"No votes wait in feedback/{recipe.name}/inbox.")
        else:
            yield dg.RunRequest(run_key=pending)

    return on_new_votes


def _unlearned_journal(home: Path, recipe: Recipe, inbox: FeedbackInbox) -> str | None:
    """Names votes that a run took in and then failed on: the journal holds more than the current pairs were made of."""
    if not inbox.journal.is_file() or not inbox.journal.stat().st_size:
        return None
    journal = file_sha256(inbox.journal)
    current = RunRecords(home).current(recipe.name).get("preference_pairs")
    store = ArtifactStore(home)
    if current is not None and "human" in (inputs := store.manifest(current)["inputs"]):
        human = store.manifest(ArtifactRef(**inputs["human"]))
        if human["inputs"].get("journal", {}).get("sha256") == journal:
            return None
    return f"journal-{journal}"
