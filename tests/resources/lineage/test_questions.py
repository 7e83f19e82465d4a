"""Questions to the index of a real home: `smoke` as it is, with another beta for DPO, and with data from a file."""

import csv
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from alignment_pipeline.errors import AlignmentError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.prompts import format_prompt, normalised
from alignment_pipeline.statistics import wilson_interval
from resources.artifact_store import ArtifactRef
from resources.lineage.index import Lineage
from resources.lineage.questions import diff, impact, why

Run = Callable[..., "subprocess.CompletedProcess[str]"]

MODELS = {"base_model", "sft_model", "reward_model", "ppo_policy", "dpo_policy"}
BAD_LINE = 7


@pytest.fixture(scope="module")
def home(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory, align: Run) -> Path:
    """A copy of the smoke home in which DPO was then run with another beta."""
    copy = tmp_path_factory.mktemp("asked") / "home"
    shutil.copytree(smoke_home, copy, ignore=shutil.ignore_patterns("dagster", "wandb"))
    done = align(copy, "run", "smoke", "--set", "dpo.beta=0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="module")
def lineage(home: Path) -> Lineage:
    return Lineage(home)


def runs(home: Path) -> list[str]:
    records = [json.loads(path.read_text()) for path in (home / "runs").glob("*.json")]
    return [record["run_id"] for record in sorted(records, key=lambda record: str(record["started_at"]))]


def folder(home: Path, asset: str) -> Path:
    current = json.loads((home / "current" / "smoke.json").read_text())
    return home / "artifacts" / ArtifactRef(**current[asset]).artifact_id


def test_a_win_rate_is_followed_to_its_examples_models_settings_and_rows(home: Path, lineage: Lineage) -> None:
    (row,) = [row for row in read_jsonl(folder(home, "comparison") / "table.jsonl") if row["policy"] == "ppo_policy"]
    answer = why(lineage, "smoke", "eval/win_rate", "ppo_policy")
    assert (answer["value"], answer["interval"]) == (row["win_rate"], [row["win_rate_low"], row["win_rate_high"]])
    counted = answer["examples"]
    assert counted["count"] == counted["won"] + counted["tied"] + counted["lost"] == row["prompts"]
    assert counted["recomputed"] == pytest.approx(row["win_rate"])
    by_asset = {made["asset"]: made for made in answer["artifacts"].values()}
    assert by_asset.keys() == MODELS - {"dpo_policy"} | {
        "comparison", "ppo_evaluation", "sft_evaluation", "instructions", "formatted_dataset", "sampled_responses",
        "preference_labels", "human_preferences", "preference_pairs",
    }  # fmt: skip
    manifest = json.loads((folder(home, "ppo_policy") / "manifest.json").read_text())
    ppo = by_asset["ppo_policy"]
    assert (ppo["config"], ppo["seed"], ppo["code_version"]) == (
        manifest["config"], manifest["seed"], manifest["code_version"],
    )  # fmt: skip
    assert ppo["packages"] == manifest["environment"]["packages"]
    assert ppo["git_commit"] == manifest["environment"]["git_commit"]
    train = [row["id"] for row in read_jsonl(folder(home, "formatted_dataset") / "train.jsonl")]
    (rows,) = by_asset["sft_model"]["rows"]
    assert (rows["kind"], rows["count"], rows["ids"]) == ("training_row", len(train), sorted(train)[:3])
    pairs = read_jsonl(folder(home, "preference_pairs") / "train.jsonl")
    (rows,) = by_asset["reward_model"]["rows"]
    assert (rows["kind"], rows["count"]) == ("preference_pair", len(pairs))


def test_a_change_is_followed_to_the_evaluations_on_both_sides_of_it(home: Path, lineage: Lineage) -> None:
    table = {row["policy"]: row for row in read_jsonl(folder(home, "comparison") / "table.jsonl")}
    for policy, evaluations in (
        ("sft_model", {"base_evaluation", "sft_evaluation"}),
        ("ppo_policy", {"sft_evaluation", "ppo_evaluation"}),
    ):
        answer = why(lineage, "smoke", "learned_change", policy)
        row = table[policy]
        assert answer["value"] == row["learned_change"]
        assert answer["interval"] == [row["learned_change_low"], row["learned_change_high"]]
        named = {made["asset"] for made in answer["artifacts"].values()}
        assert {asset for asset in named if asset.endswith("_evaluation")} == evaluations


def test_the_index_knows_how_an_evaluations_responses_were_decoded(lineage: Lineage) -> None:
    rows = lineage.query("SELECT DISTINCT temperature, decoding FROM evaluation_examples")
    assert rows == [{"temperature": 1.0, "decoding": "temperature 1, up to 24 tokens"}]


def test_all_ids_are_listed_on_request(home: Path, lineage: Lineage) -> None:
    answer = why(lineage, "smoke", "eval/token_accuracy", all_ids=True)
    made = answer["artifacts"][answer["artifact"]]
    train = [row["id"] for row in read_jsonl(folder(home, "formatted_dataset") / "train.jsonl")]
    assert made["asset"] == "sft_model" and made["rows"][0]["ids"] == sorted(train)


@pytest.mark.parametrize("metric", ["judge_score", "learned_score", "kl_nats", "mean_tokens", "eos_rate", "bleu"])
def test_means_over_examples_come_out_again_in_sql(metric: str, lineage: Lineage) -> None:
    answer = why(lineage, "smoke", metric, "dpo_policy")
    assert answer["metric"] == f"eval/{metric}" and answer["examples"]["count"] == 24
    if metric == "bleu":  # of the corpus, not a mean
        assert answer["examples"]["recomputed"] is None and answer["interval"] is None
    else:
        assert answer["examples"]["recomputed"] == pytest.approx(answer["value"])
        low, high = answer["interval"]
        assert low <= answer["value"] <= high


@pytest.mark.parametrize("metric", ["held_out_accuracy", "held_out_margin", "shuffled_prompt_accuracy"])
def test_means_over_held_out_pairs_come_out_again_in_sql(metric: str, lineage: Lineage) -> None:
    answer = why(lineage, "smoke", f"reward/{metric}")
    assert answer["policy"] == "reward_model" and answer["examples"]["count"] == 16
    assert answer["examples"]["recomputed"] == pytest.approx(answer["value"])
    low, high = answer["interval"]
    assert low <= answer["value"] <= high


def test_a_number_of_a_reward_model_that_is_no_mean_has_no_examples(lineage: Lineage) -> None:
    answer = why(lineage, "smoke", "reward/calibration_error")
    assert answer["examples"] is None and answer["interval"] is None


def test_an_earlier_run_is_asked_for_by_its_id(home: Path, lineage: Lineage) -> None:
    first, second = runs(home)
    old, new = (why(lineage, "smoke", "kl_nats", "dpo_policy", run=run) for run in (first, second))
    assert new["artifact"] == why(lineage, "smoke", "kl_nats", "dpo_policy")["artifact"] != old["artifact"]
    beta = {
        made["config"]["beta"] for answer in (old, new) for made in answer["artifacts"].values()
        if made["asset"] == "dpo_policy"
    }  # fmt: skip
    assert beta == {0.1, 0.2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smoke", "eval/win_rat"), "no metric 'eval/win_rat'; expected one of: .*eval/win_rate"),
        (("smoke", "eval/win_rate"), "known of base_model, dpo_policy, ppo_policy, sft_model. Choose one: --policy"),
        (("smoke", "eval/win_rate", "ppo"), "not known of 'ppo'; expected one of"),
        (("tiny", "eval/win_rate"), "No number of 'tiny' is current; expected a recipe that has been run: smoke."),
        (("smoke", "eval/win_rate", "ppo_policy", "nope"), "No number of 'smoke' is in run nope"),
    ],
)
def test_a_number_that_is_not_there_is_a_sentence(arguments: tuple[str, ...], message: str, lineage: Lineage) -> None:
    with pytest.raises(AlignmentError, match=message):
        why(lineage, *arguments)


def test_no_training_row_of_any_ancestor_shares_a_prompt_with_an_evaluation_row(home: Path, lineage: Lineage) -> None:
    """In SQL over the tables alone, not over the view that the product has for it, and in the texts."""
    examples = lineage.query("SELECT artifact_id, prompt_id, prompt FROM evaluation_examples ORDER BY ALL")
    drawn = random.Random(0).sample(examples, 40)
    trained = lineage.query("SELECT count(*) AS n FROM dataset_rows WHERE split = 'train'")[0]["n"]
    assert trained > 200 and len({example["artifact_id"] for example in drawn}) >= 4
    for example in drawn:
        shared = lineage.query(
            """
            WITH RECURSIVE family (id) AS (
                SELECT $artifact UNION SELECT input_artifact_id FROM artifact_inputs JOIN family ON artifact_id = id
            )
            SELECT artifact_id, row_id FROM dataset_rows JOIN family ON artifact_id = id
            WHERE split = 'train' AND prompt_id = $prompt
            UNION ALL
            SELECT artifact_id, pair_id FROM preference_pairs JOIN family ON artifact_id = id
            WHERE split = 'train' AND prompt_id = $prompt
            UNION ALL
            SELECT artifact_id, prompt_id FROM rollouts JOIN family ON artifact_id = id WHERE prompt_id = $prompt
            """,
            {"artifact": example["artifact_id"], "prompt": example["prompt_id"]},
        )
        assert shared == [], example
    texts = {normalised(example["prompt"]) for example in drawn}
    rows = lineage.query("SELECT instruction, input FROM dataset_rows WHERE split = 'train'")
    assert texts.isdisjoint(normalised(format_prompt(row["instruction"], row["input"])) for row in rows)
    assert lineage.query("SELECT * FROM leaked_prompts") == []


def leaks_after(home: Path, copy: Path, change: str) -> set[tuple[str, ...]]:
    """What the view of leaks holds in a copy of the index that was changed: leaking stage, kind, stage trained."""
    Lineage(home).sync()
    shutil.copyfile(home / "lineage.duckdb", copy)
    with duckdb.connect(str(copy)) as connection:
        connection.execute(change)
        found = connection.execute(
            "SELECT DISTINCT split_part(artifact_id, '/', 1), kind, split_part(trained_artifact_id, '/', 1) "
            "FROM leaked_prompts"
        )
        return set(found.fetchall())


def test_the_view_of_leaks_finds_one(home: Path, tmp_path: Path) -> None:
    change = (
        "UPDATE preference_pairs SET prompt_id = (SELECT min(prompt_id) FROM evaluation_examples) WHERE pair_id = "
        "(SELECT min(pair_id) FROM preference_pairs WHERE split = 'train') AND split = 'train'"
    )
    trained = {leak[1:] for leak in leaks_after(home, tmp_path / "leaky.duckdb", change)}
    assert trained == {("preference_pair", "reward_model"), ("preference_pair", "dpo_policy")}


def test_the_view_of_leaks_finds_a_held_out_pair_that_the_reward_model_was_trained_on(
    home: Path, tmp_path: Path
) -> None:
    change = (
        "UPDATE pair_scores SET prompt_id = (SELECT min(prompt_id) FROM training_rows WHERE kind = "
        "'preference_pair') WHERE pair_id = (SELECT min(pair_id) FROM pair_scores)"
    )
    found = leaks_after(home, tmp_path / "leaky.duckdb", change)
    assert found == {("reward_model", "preference_pair", "reward_model")}


def test_a_training_row_reaches_every_model_and_a_test_row_none(home: Path, lineage: Lineage) -> None:
    trained = read_jsonl(folder(home, "formatted_dataset") / "train.jsonl")
    paired = {pair["prompt_id"] for pair in read_jsonl(folder(home, "preference_pairs") / "train.jsonl")}
    row = next(row for row in trained if row["prompt_id"] in paired)
    answer = impact(lineage, row["id"])
    learned = {entry["artifact_id"]: entry for entry in answer["learned"]}
    assert {entry["stage"] for entry in learned.values()} == MODELS
    assert len(learned) == len(MODELS) + 1  # both DPO policies
    by_asset = {name: entry for entry in learned.values() for name in entry["assets"]}
    assert by_asset["smoke/sft_model"]["kinds"] == ["training_row"]
    assert by_asset["smoke/base_model"]["kinds"] == ["pretraining_row"]
    assert by_asset["smoke/dpo_policy"]["kinds"] == ["preference_pair"]
    assert any(through.startswith("sft_model/") for through in by_asset["smoke/ppo_policy"]["through"])
    assert {name for entry in answer["derived"] for name in entry["assets"]} >= {"smoke/comparison"}
    assert answer["asked"] == []

    asked = read_jsonl(folder(home, "ppo_evaluation") / "examples.jsonl")[0]
    answer = impact(lineage, asked["prompt_id"])
    assert answer["learned"] == answer["derived"] == []
    assert {row["split"] for row in answer["found"]} == {"test"}
    assert {name for entry in answer["asked"] for name in entry["assets"]} >= {"smoke/ppo_evaluation"}


def test_a_release_is_among_what_a_row_reached(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    current = json.loads((copy / "current" / "smoke.json").read_text())
    (copy / "releases").mkdir(exist_ok=True)
    release = {"release_id": "v1", "recipe": "smoke", "asset": "dpo_policy", **current["dpo_policy"]}
    (copy / "releases" / "v1.json").write_text(json.dumps(release))
    row = read_jsonl(folder(copy, "formatted_dataset") / "train.jsonl")[0]
    learned = impact(Lineage(copy), row["id"])["learned"]
    assert [entry["assets"] for entry in learned if entry["releases"] == ["v1"]] == [["smoke/dpo_policy"]]


def test_pairs_name_the_model_that_sampled_them(home: Path, lineage: Lineage) -> None:
    sft = folder(home, "sft_model").relative_to(home / "artifacts").as_posix()
    found = lineage.query(
        "SELECT DISTINCT source, labeller, sampled_by FROM pairs_with_sampler "
        "WHERE artifact_id LIKE 'preference_pairs/%'"
    )
    assert found == [{"source": "sampled", "labeller": "reference_chrf", "sampled_by": sft}]


def test_two_runs_differ_in_what_was_changed_and_in_what_came_of_it(home: Path, lineage: Lineage) -> None:
    first, second = runs(home)
    answer = diff(lineage, first, second)
    found = {(entry["kind"], entry["name"], entry["a"], entry["b"]) for entry in answer["differences"]}
    assert {("override", "dpo.beta", None, "0.2"), ("config", "beta", "0.1", "0.2")} <= found
    assert {kind for kind, *_ in found} <= {"override", "config", "data", "environment"}  # a commit may lie between
    (beta,) = [entry for entry in answer["differences"] if entry["name"] == "beta"]
    assert beta["assets"] == ["dpo_policy"]
    assert {entry["asset"] for entry in answer["results"]} == {"dpo_policy", "dpo_evaluation", "comparison"}
    assert {entry["policy"] for entry in answer["metrics"]} == {"dpo_policy"}
    for entry in answer["metrics"]:
        if entry["metric"] in ("eval/kl_nats", "eval/learned_score"):
            numbers = [why(lineage, "smoke", entry["metric"], "dpo_policy", run)["value"] for run in (first, second)]
            assert [entry["a"], entry["b"]] == numbers
    backwards = diff(lineage, second, first)["metrics"]
    assert [(entry["b"], entry["a"]) for entry in backwards] == [(e["a"], e["b"]) for e in answer["metrics"]]
    assert diff(lineage, first, first) | {"runs": []} == {
        "runs": [], "differences": [], "results": [], "metrics": [],
    }  # fmt: skip


def test_plain_duckdb_answers_the_same(home: Path, lineage: Lineage) -> None:
    answer = why(lineage, "smoke", "eval/win_rate", "ppo_policy")
    with duckdb.connect(str(home / "lineage.duckdb"), read_only=True) as connection:
        number = connection.execute(
            "SELECT value FROM numbers WHERE recipe = 'smoke' AND run_id = 'current' AND metric = 'eval/win_rate' AND "
            "policy = 'ppo_policy'"
        ).fetchall()
        wins = connection.execute(
            "SELECT avg(win) FROM paired_examples WHERE artifact_id = ? AND policy = 'ppo_policy'", [answer["artifact"]]
        ).fetchall()
    assert number == [(answer["value"],)] and wins[0][0] == pytest.approx(answer["value"])


def test_a_csv_record_is_found_by_its_first_line_and_what_a_query_gave_by_its_id_only(
    copy_of_home: Path, tmp_path: Path, align: Run
) -> None:
    rows = read_jsonl(folder(copy_of_home, "instructions") / "rows.jsonl")[:120]
    data = tmp_path / "mine.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([row["instruction"] + "\n" + row["input"], row["output"]] for row in rows)
    columns = "data.columns={instruction: prompt, output: completion}"

    def ingest(*more: str) -> None:
        changed = (f"data.path={data}", "data.world_rows=null", "evaluation.judge=reference_chrf", columns, *more)
        settings = [argument for setting in changed for argument in ("--set", setting)]
        done = align(copy_of_home, "run", "smoke", *settings, "--select", "instructions")
        assert done.returncode == 0, done.stdout + done.stderr

    ingest("data.sql=SELECT * FROM source WHERE completion <> ''")
    lineage = Lineage(copy_of_home)
    (made,) = lineage.query("SELECT * FROM dataset_rows WHERE source <> 'world' AND source_line = 3")
    assert made["source"] == f"a query over {data}" and made["output"] == rows[2]["output"]
    with pytest.raises(AlignmentError, match=r"mine\.csv was read through data\.sql.*Ask by a row's id"):
        impact(lineage, f"{data}:3")
    assert [row["text"] for row in impact(lineage, made["row_id"])["found"]] == [rows[2]["output"]]
    ingest()
    (row,) = lineage.query(
        "SELECT source_line FROM dataset_rows WHERE source = ? AND instruction = ?",
        [str(data), rows[40]["instruction"] + "\n" + rows[40]["input"]],
    )
    (found,) = impact(lineage, f"{data}:{row['source_line']}")["found"]
    assert found["source"] == str(data) and found["text"] == rows[40]["output"]
    assert rows[40]["instruction"] in data.read_text(encoding="utf-8").splitlines()[row["source_line"] - 1]


def test_a_line_of_a_file_is_found_wherever_the_file_lies_now(copy_of_home: Path, tmp_path: Path, align: Run) -> None:
    rows = read_jsonl(folder(copy_of_home, "instructions") / "rows.jsonl")[:120]
    lines = [json.dumps({name: row[name] for name in ("instruction", "input", "output")}) for row in rows]
    lines[BAD_LINE - 1] = "not JSON"
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(lines) + "\n")
    changed = (f"data.path={data}", "data.world_rows=null", "evaluation.judge=reference_chrf")
    settings = [argument for setting in changed for argument in ("--set", setting)]
    done = align(copy_of_home, "run", "smoke", *settings, "--select", "instructions", "--select", "base_model")
    assert done.returncode == 0, done.stdout + done.stderr
    lineage = Lineage(copy_of_home)
    place = {
        row["source_line"]: row["split"] for row in lineage.query("SELECT * FROM dataset_rows WHERE source <> 'world'")
    }
    line = next(line for line, split in place.items() if split == "train")
    moved = data.rename(tmp_path / "renamed.jsonl")
    for named in (str(data), str(moved)):
        answer = impact(lineage, f"{named}:{line}")
        assert [row["text"] for row in answer["found"]] == [rows[line - 1]["output"]]
        assert {entry["stage"] for entry in answer["learned"]} >= {"base_model"}
    gone = impact(lineage, f"{data}:{line}")  # by the path that it had
    assert [row["text"] for row in gone["found"]] == [rows[line - 1]["output"]]
    refused = impact(lineage, f"{moved}:{BAD_LINE}")
    assert refused["found"] == [] and [entry["reason"] for entry in refused["quarantined"]] == ["invalid_json"]
    for nothing in (f"{moved}:9999", "0123456789abcdef"):
        with pytest.raises(AlignmentError, match="expected the id of a row, a pair or a prompt, or FILE:LINE"):
            impact(lineage, nothing)
    for other in ("elsewhere.jsonl", data.name, f"/elsewhere/{data.name}"):
        with pytest.raises(AlignmentError, match=f"No recipe has read its data from {other}; expected one of: {data}"):
            impact(lineage, f"{other}:{line}")
    data.write_text("a line in front\n" + moved.read_text())
    with pytest.raises(AlignmentError, match="was changed since a recipe has read it"):
        impact(lineage, f"{data}:{line}")


def test_a_run_of_an_evaluation_alone_still_knows_the_policy(copy_of_home: Path, align: Run) -> None:
    done = align(copy_of_home, "run", "smoke", "--select", "dpo_evaluation")
    assert done.returncode == 0
    run = runs(copy_of_home)[-1]
    lineage = Lineage(copy_of_home)
    part = why(lineage, "smoke", "judge_score", "dpo_policy", run=run)
    assert part["value"] == why(lineage, "smoke", "judge_score", "dpo_policy")["value"]


def test_a_rate_has_wilsons_interval(lineage: Lineage) -> None:
    answer = why(lineage, "smoke", "eos_rate", "dpo_policy")
    assert answer["interval"] == list(wilson_interval(answer["value"], 24))
