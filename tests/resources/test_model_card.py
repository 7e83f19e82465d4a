"""Model cards of the smoke recipe's policies: true, complete, the same twice, and readable by the hub's own classes."""

import dataclasses
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from alignment_pipeline.errors import MissingArtifactError
from alignment_pipeline.graph import build_graph
from alignment_pipeline.identity import file_sha256, read_jsonl
from alignment_pipeline.recipe import Recipe, load_recipe
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.home import REPOSITORY
from resources.model_card import model_card
from resources.policy_record import Made, PolicyRecord, as_json, gather
from resources.runs import RunRecords

SMOKE = REPOSITORY / "recipes" / "smoke.yaml"
POLICIES = ("base_model", "sft_model", "dpo_policy", "ppo_policy")
BEHIND_PPO = [
    "instructions", "base_model", "formatted_dataset", "sft_model", "sampled_responses", "preference_labels",
    "human_preferences", "preference_pairs", "reward_model", "ppo_policy",
]  # fmt: skip


def record_of(
    home: Path,
    policy: str = "ppo_policy",
    *overrides: str,
    recipe: Recipe | None = None,
    assets: dict[str, ArtifactRef] | None = None,
) -> PolicyRecord:
    recipe = recipe or load_recipe(SMOKE, overrides)
    return gather(ArtifactStore(home), recipe, policy, assets or RunRecords(home).current("smoke"), overrides)


def made_from_a_file(home: Path, asset: str, path: str, **config: Any) -> None:
    """Make an artifact's manifest that of one which read a file or folder, as one set in the launchpad."""
    (file,) = (home / "artifacts" / asset).glob("*/*/manifest.json")
    manifest = json.loads(file.read_text())
    manifest["inputs"] = {"source": {"sha256": "ab" * 32, "path": path}}
    manifest["config"] |= config
    file.write_text(json.dumps(manifest))


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def with_config(record: PolicyRecord, asset: str, **values: Any) -> PolicyRecord:
    """The record as it would be if an artifact had been made with other settings."""
    made = record.lineage[asset]
    manifest = {**made.manifest, "config": {**made.manifest["config"], **values}}
    lineage = {**record.lineage, asset: Made(made.ref, manifest, made.manifest_sha256)}
    return dataclasses.replace(record, lineage=lineage)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_hubs_own_classes_read_the_metadata_back(smoke_home: Path, tmp_path: Path, policy: str) -> None:
    text = model_card(record_of(smoke_home, policy))
    card = ModelCard(text)
    assert str(card) == text
    assert (card.data.license, card.data.library_name) == ("unknown", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None and card.data.datasets is None  # neither is on the hub
    (tmp_path / "README.md").write_text(text)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata is not None
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == f"smoke-{policy}"
    (table,) = (smoke_home / "artifacts" / "comparison").glob("*/*/table.jsonl")
    row = next(row for row in read_jsonl(table) if row["policy"] == policy)
    found = {result.metric_type: result.metric_value for result in results}
    expected = {
        "win_rate": round(row["win_rate"], 3), "judge_score": round(row["judge_score"], 3),
        "learned_score": round(row["learned_score"], 2), "bleu": round(row["bleu"], 1),
        "kl_nats": round(row["kl_nats"], 2), "mean_tokens": round(row["mean_tokens"], 1),
        "eos_rate": round(row["eos_rate"], 3),
    }  # fmt: skip
    if policy == "sft_model":  # not compared to itself
        del expected["win_rate"], expected["kl_nats"]
    assert found == expected
    assert {(result.task_type, result.dataset_split) for result in results} == {("text-generation", "test")}


def test_names_on_the_hub_stand_in_the_metadata_and_in_the_text(smoke_home: Path) -> None:
    record = with_config(record_of(smoke_home), "base_model", hub_name="facebook/opt-350m", hub_revision="main")
    record = with_config(record, "instructions", hub_name="sahil2801/CodeAlpaca-20k", hub_split="train")
    text = model_card(dataclasses.replace(record, hub_commit="abc123", base_commit="def456"))
    card = ModelCard(text)
    assert card.data.base_model == "facebook/opt-350m" and card.data.datasets == ["sahil2801/CodeAlpaca-20k"]
    assert {result.dataset_type for result in card.data.eval_results} == {"sahil2801/CodeAlpaca-20k"}
    assert "The base model is `facebook/opt-350m` of the Hugging Face hub (revision `main`) at commit `def456`" in text
    assert "split `train` of the Hugging Face dataset `sahil2801/CodeAlpaca-20k` at commit `abc123`" in text


def test_the_same_artifacts_give_the_same_bytes_wherever_and_whenever(smoke_home: Path, copy_of_home: Path) -> None:
    runs = RunRecords(copy_of_home)
    runs.start("later", "smoke", "test", ["ppo_policy"])
    assert model_card(record_of(copy_of_home)) == model_card(record_of(smoke_home))
    assert as_json(record_of(copy_of_home)) == as_json(record_of(smoke_home))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_section_is_empty_and_no_folder_of_this_machine_is_named(smoke_home: Path, policy: str) -> None:
    text = model_card(record_of(smoke_home, policy))
    body = text.split("\n---\n", 1)[1]
    assert re.findall(r"^#+ [^\n]+\s+(?=#{1,2} |\Z)", body, re.MULTILINE) == []
    for wrong in (str(smoke_home), str(REPOSITORY), "None", "nan", "{", "\n\n\n"):
        assert wrong not in body


def test_every_ancestor_is_listed_with_what_identifies_it(smoke_home: Path) -> None:
    record = record_of(smoke_home)
    assert list(record.lineage) == BEHIND_PPO
    rows = [line for line in section(model_card(record), "What it was made from").splitlines() if line[:2] == "| "]
    for asset, line in zip(BEHIND_PPO, rows[2:], strict=True):
        (manifest,) = (smoke_home / "artifacts" / asset).glob("*/*/manifest.json")
        made = json.loads(manifest.read_text())
        where = manifest.parent.relative_to(smoke_home / "artifacts").as_posix()
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        assert cells == [asset, where, made["data_version"], str(made["seed"]), made["code_version"]]
        told = as_json(record)["artifacts"][asset]
        assert (told["key"], told["manifest_sha256"]) == (made["key"], file_sha256(manifest))
    assert list(record_of(smoke_home, "sft_model").lineage) == BEHIND_PPO[:4]
    assert "reward_model" not in record_of(smoke_home, "dpo_policy").lineage


def test_results_have_their_judge_their_prompts_and_their_intervals(smoke_home: Path) -> None:
    (table,) = (smoke_home / "artifacts" / "comparison").glob("*/*/table.jsonl")
    row = next(row for row in read_jsonl(table) if row["policy"] == "ppo_policy")
    text = section(model_card(record_of(smoke_home)), "Results")
    assert "answered 24 test prompts" in text and "The judge (gold score) is a rule" in text
    wins = f"| {row['win_rate']:.3f} | {row['win_rate_low']:.3f} to {row['win_rate_high']:.3f} |"
    assert f"| Win rate against `sft_model`, ties counted half {wins}" in text
    assert f"| Judge's score | {row['judge_score']:.3f} |" in text
    current = RunRecords(smoke_home).current("smoke")
    answers = read_jsonl(ArtifactStore(smoke_home).path(current["ppo_evaluation"]) / "examples.jsonl")
    tokens = [answer["tokens"] for answer in answers]
    half = 1.96 * statistics.stdev(tokens) / len(tokens) ** 0.5
    low, high = row["mean_tokens"] - half, row["mean_tokens"] + half
    assert high - low > 1
    assert f"| Length of a response, tokens | {row['mean_tokens']:.1f} | {low:.1f} to {high:.1f} |" in text
    assert f"| BLEU against the dataset's answers | {row['bleu']:.1f} | none |" in text


def test_checks_that_fail_are_limitations_and_those_of_other_policies_are_not(smoke_home: Path) -> None:
    record = record_of(smoke_home)
    failed = [check for check in record.checks if not check.passed]
    text = section(model_card(record), "Limitations")
    assert "ppo_policy_beats_sft_model" in {check.name for check in failed}  # of three updates nothing is learned
    assert not any("dpo_policy" in check.name for check in record.checks)
    for check in failed:
        assert f"- `{check.name}` (a check of `{check.asset}`) does not hold: {check.detail}" in text
    held = tuple(dataclasses.replace(check, passed=True) for check in record.checks)
    text = section(model_card(dataclasses.replace(record, checks=held)), "Limitations")
    assert (
        f"All checks of the artifacts behind this policy hold ({len(held)} of them)." in text and "does not" not in text
    )


def test_a_policy_without_an_evaluation_of_its_own_says_so(smoke_home: Path) -> None:
    current = RunRecords(smoke_home).current("smoke")
    alone = {"ppo_policy": current["ppo_policy"]}
    of_another = alone | {"ppo_evaluation": current["dpo_evaluation"], "comparison": current["comparison"]}
    for assets in (alone, of_another):
        card = ModelCard(model_card(record_of(smoke_home, assets=assets)))
        assert section(card.text, "Results") == "This policy has not been evaluated."
        assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    uncompared = {name: ref for name, ref in current.items() if name != "comparison"}
    measured = record_of(smoke_home, assets=uncompared).measured
    assert measured is not None and "win_rate" not in measured.metrics and "judge_score" in measured.metrics


def test_the_data_are_counted_from_the_source_to_what_was_trained_on(smoke_home: Path) -> None:
    (folder,) = (smoke_home / "artifacts" / "instructions").glob("*/*")
    summary = json.loads((folder / "summary.json").read_text())
    text = section(model_card(record_of(smoke_home)), "Data")
    assert f"Of {summary['rows_in']} rows, {summary['kept']} were kept and {summary['quarantined']} went" in text
    assert f"{summary['splits']['test']} of the kept ones are the test split" in text
    assert "built-in world" in text and json.loads((folder / "manifest.json").read_text())["data_version"] in text
    trained = json.loads(next((smoke_home / "artifacts" / "formatted_dataset").glob("*/*/manifest.json")).read_text())
    within = f"{trained['metrics']['data/train']:,.0f} rows within the length limits"
    assert f"The train split has {within}; fine-tuning and sampling read those only." in text
    assert f"pretrained on the texts of the train split's {summary['splits']['train']} rows, of whatever length" in text
    assert "PPO sampled 24 responses" in text
    assert "PPO" not in section(model_card(record_of(smoke_home, "dpo_policy")), "Data")


def test_no_pretraining_is_told_of_a_base_model_that_was_given(copy_of_home: Path) -> None:
    made_from_a_file(copy_of_home, "base_model", "/some/where/model")
    text = section(model_card(record_of(copy_of_home)), "Data")
    assert "fine-tuning and sampling read those only" in text and "pretrained" not in text


def test_rows_that_were_dropped_count_as_pretraining(smoke_home: Path) -> None:
    record = record_of(smoke_home)
    made = record.lineage["formatted_dataset"]
    manifest = {**made.manifest, "metrics": {**made.manifest["metrics"], "data/train": 7.0}}
    lineage = {**record.lineage, "formatted_dataset": Made(made.ref, manifest, made.manifest_sha256)}
    text = section(model_card(dataclasses.replace(record, lineage=lineage)), "Data")
    rows = record.lineage["instructions"].manifest["metrics"]["data/train"]
    assert "has 7 rows within" in text and f"train split's {rows:.0f} rows, of whatever length" in text


def test_usage_is_that_of_the_artifacts_whatever_the_recipe_says(smoke_home: Path) -> None:
    text = section(model_card(with_config(record_of(smoke_home), "instructions", text_field="text")), "How to use it")
    assert "The model continues a text" in text and "### Input" not in text
    other = load_recipe(SMOKE, ["evaluation.temperature=0.3", "evaluation.max_new_tokens=9"])
    text = section(model_card(record_of(smoke_home, recipe=other)), "How to use it")
    assert "max_new_tokens=24" in text and "0.3" not in text
    current = RunRecords(smoke_home).current("smoke")
    alone = record_of(smoke_home, recipe=other, assets={"ppo_policy": current["ppo_policy"]})
    assert "max_new_tokens=9, do_sample=True, temperature=0.3" in model_card(alone)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "max_new_tokens=24, do_sample=True, temperature=0.7, top_k=0, top_p=0.9"),
        ({"top_k": 20, "repetition_penalty": 1.2}, "do_sample=True, temperature=1, top_k=20, repetition_penalty=1.2"),
        ({"temperature": 0.0, "num_beams": 5}, "max_new_tokens=24, do_sample=False, num_beams=5"),
        ({"temperature": 0.0, "min_new_tokens": 8}, "max_new_tokens=24, do_sample=False, min_new_tokens=8"),
    ],
)
def test_usage_and_results_name_every_decoding_setting(
    smoke_home: Path, settings: dict[str, Any], options: str
) -> None:
    record = record_of(smoke_home)
    assert record.measured is not None
    made = record.measured.evaluation
    manifest = {**made.manifest, "config": {**made.manifest["config"], **settings}}
    measured = dataclasses.replace(record.measured, evaluation=dataclasses.replace(made, manifest=manifest))
    text = model_card(dataclasses.replace(record, measured=measured))
    assert f"{options})" in section(text, "How to use it") and f"{options}`" in section(text, "Results")


def test_hyperparameters_are_those_in_force_of_every_training_stage(smoke_home: Path) -> None:
    text = section(model_card(record_of(smoke_home)), "Hyperparameters")
    assert re.findall(r"^### (\w+)", text, re.MULTILINE) == ["base_model", "sft_model", "reward_model", "ppo_policy"]
    assert "| `kl_coef` | 0.05 |" in text and "| `lora_rank` | 4 |" in text and "score_clip" not in text
    full = model_card(with_config(record_of(smoke_home, "sft_model"), "sft_model", method="full"))
    assert "`lora_rank`" not in full


class TestLicences:
    def test_of_the_recipes_own_source(self, smoke_home: Path) -> None:
        text = section(model_card(record_of(smoke_home)), "Licences")
        assert "The licence of the data is `apache-2.0`." in text and "Nobody has stated a licence for this" in text
        assert "base model" not in text  # it was built from the data

    def test_are_not_those_of_a_source_that_was_set_in_its_place(self, smoke_home: Path) -> None:
        other = ("data.world_rows=null", "data.hub_name=a/b", "evaluation.judge=reference_chrf")
        assert record_of(smoke_home, "ppo_policy", *other).licences == {"data": None}
        more_rows = record_of(smoke_home, "ppo_policy", "data.world_rows=900")
        assert more_rows.licences == {"data": "apache-2.0"}

    def test_are_those_that_were_stated_with_the_source(self, copy_of_home: Path, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        made_from_a_file(copy_of_home, "instructions", str(rows), world_rows=None)
        other = ["data.world_rows=null", f"data.path={rows}", "evaluation.judge=reference_chrf"]
        other.append("labelling.method=reference_chrf")
        assert record_of(copy_of_home, "ppo_policy", *other).licences == {"data": None}
        assert record_of(copy_of_home, "ppo_policy", *other, "data.license=mit").licences == {"data": "mit"}

    def test_are_not_the_recipes_where_the_artifact_has_another_source(self, copy_of_home: Path) -> None:
        """As in the web UI's launchpad, whose values are in no run's overrides."""
        made_from_a_file(copy_of_home, "instructions", "/some/where/rows.jsonl", world_rows=None, text_field="text")
        made_from_a_file(copy_of_home, "base_model", "/some/where/model")
        record = record_of(copy_of_home)
        assert record.licences == {"data": None, "base_model": None}
        assert "The licence of the base model is not stated." in model_card(record)

    def test_stay_with_a_file_that_lies_elsewhere_now(self, copy_of_home: Path, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("{}")
        made_from_a_file(copy_of_home, "instructions", "/some/where/rows.jsonl", world_rows=None)
        (file,) = (copy_of_home / "artifacts" / "instructions").glob("*/*/manifest.json")
        own = tmp_path / "smoke.yaml"
        own.write_text(
            SMOKE.read_text().replace("world_rows: 300", "path: rows.jsonl").replace(": gold_rule", ": reference_chrf")
        )
        other = record_of(copy_of_home, recipe=load_recipe(own))
        assert other.licences == {"data": None} and "data.path=rows.jsonl" in other.overrides
        file.write_text(file.read_text().replace("ab" * 32, file_sha256(rows)))
        moved = record_of(copy_of_home, recipe=load_recipe(own))
        assert moved.licences == {"data": "apache-2.0"}
        assert "data.path=rows.jsonl" not in moved.overrides


class TestHowToMakeItAgain:
    def command(self, record: PolicyRecord) -> list[str]:
        words = shlex.split(section(model_card(record), "How to make it again").split("```")[1])
        assert words[:3] == ["align", "run", "smoke"]
        assert words[3::2] == ["--set"] * len(words[4::2])
        return words[4::2]

    def test_the_recipe_alone_where_nothing_was_set(self, smoke_home: Path) -> None:
        assert self.command(record_of(smoke_home)) == []

    def test_what_was_set_is_repeated_where_it_concerns_this_policy(self, smoke_home: Path) -> None:
        overrides = ["dpo.batch_size=4", "sft.checkpoint_every_s=9", "evaluation.batch_size=128"]
        assert self.command(record_of(smoke_home, "ppo_policy", *overrides)) == overrides[1:]
        without_dpo = ["dpo=null"]
        assert self.command(record_of(smoke_home, "ppo_policy", *without_dpo)) == without_dpo

    def test_files_are_named_without_their_folders(self, smoke_home: Path) -> None:
        record = record_of(smoke_home, "ppo_policy", "base_model.path=/some/where/model")
        assert "base_model.path=model" in record.overrides
        assert "Files are named without their folders" in model_card(record) and "/some/where" not in model_card(record)

    def test_files_in_a_section_set_as_a_whole_are_named_without_their_folders(self, smoke_home: Path) -> None:
        whole = "base_model={path: '/some/where/my model', license: mit}"
        record = record_of(smoke_home, "ppo_policy", whole, "feedback.max_chars=100")
        assert record.overrides[:2] == ("base_model={path: my model, license: mit}", "feedback.max_chars=100")
        assert "Files are named without their folders" in model_card(record)
        assert "/some" not in model_card(record) + json.dumps(as_json(record))
        assert "Files are named" not in model_card(record_of(smoke_home, "ppo_policy", "feedback={max_chars: 100}"))

    def test_files_that_were_set_in_the_launchpad_are_named(self, copy_of_home: Path) -> None:
        made_from_a_file(copy_of_home, "instructions", "/some/where/rows.jsonl", world_rows=None, text_field="text")
        made_from_a_file(copy_of_home, "base_model", "/some/where/model")
        record = record_of(copy_of_home)
        found = self.command(record)
        assert {"data.world_rows=null", 'data.text_field="text"', "data.path=rows.jsonl"} <= set(found)
        assert "base_model.path=model" in found
        assert "Files are named without their folders" in model_card(record)
        assert "/some" not in model_card(record) + json.dumps(as_json(record))

    def test_a_reward_function_is_named_with_its_file(self, copy_of_home: Path) -> None:
        (file,) = (copy_of_home / "artifacts" / "ppo_policy").glob("*/*/manifest.json")
        manifest = json.loads(file.read_text())
        manifest["inputs"]["reward_function"] = {"sha256": "ab" * 32, "path": "/some/where/rewards.py"}
        manifest["config"]["reward_function"] = "brevity"
        file.write_text(json.dumps(manifest))
        assert self.command(record_of(copy_of_home)) == ["ppo.reward_function=rewards.py:brevity"]

    def test_what_was_set_elsewhere_is_found_by_comparing_with_the_recipe(self, smoke_home: Path) -> None:
        """As in the web UI's launchpad, whose values are in no run's overrides."""
        changed = load_recipe(SMOKE, ["ppo.kl_coef=0.7", "seed=3", "sft.max_steps=99", "dpo.beta=0.9"])
        found = self.command(record_of(smoke_home, recipe=changed))
        assert found == ["sft.max_steps=6", "ppo.kl_coef=0.05", "seed=0"]
        asked = load_recipe(SMOKE, ["ppo.kl_coef=0.7", "seed=3", *found])
        node = build_graph(asked)["ppo_policy"]
        (manifest,) = (smoke_home / "artifacts" / "ppo_policy").glob("*/*/manifest.json")
        assert node.config.keyed_values() == json.loads(manifest.read_text())["config"] and asked.seed == 0


def test_what_was_made_elsewhere_is_named_in_the_environment(smoke_home: Path) -> None:
    record = record_of(smoke_home)
    text = section(model_card(record), "Environment")
    ours = record.itself.manifest["environment"]
    assert f"torch {ours['packages']['torch']}" in text and "`cpu`" in text and "Made with another" not in text
    made = record.lineage["sft_model"]
    manifest = {**made.manifest, "environment": {**ours, "git_commit": "0123abcd+", "device": "cuda:0"}}
    lineage = {**record.lineage, "sft_model": Made(made.ref, manifest, made.manifest_sha256)}
    other = section(model_card(dataclasses.replace(record, lineage=lineage)), "Environment")
    assert other.endswith("Made with another commit, device or library version: `sft_model`.")


def test_a_policy_that_is_not_there_is_an_error(smoke_home: Path) -> None:
    with pytest.raises(MissingArtifactError, match="smoke has no policy 'reward_model', expected one of: base_model,"):
        record_of(smoke_home, "reward_model")
    with pytest.raises(MissingArtifactError, match=r"ppo_policy of smoke has not been made yet\. Run `align"):
        record_of(smoke_home, assets={"sft_model": RunRecords(smoke_home).current("smoke")["sft_model"]})


def test_a_card_needs_no_index_and_no_weights(copy_of_home: Path, smoke_home: Path) -> None:
    for path in copy_of_home.glob("lineage.duckdb*"):
        path.unlink()
    for folder in copy_of_home.glob("artifacts/*/*/*/model"):
        shutil.rmtree(folder)
    assert model_card(record_of(copy_of_home)) == model_card(record_of(smoke_home))
