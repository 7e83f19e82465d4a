"""Evaluated prompts against what everything behind the evaluation was trained on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.prompts import format_prompt
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.leakage import CHECK, leak_check, with_leak_check

EVALUATED = ["e1", "e2"]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "a home [of 1*]")  # DuckDB would take these characters for a pattern


def publish(
    store: ArtifactStore, stage: str, name: str, tables: dict[str, list[dict[str, Any]]], **inputs: ArtifactRef
) -> ArtifactRef:
    staging = store.new_staging()
    (staging / "summary.json").write_text(json.dumps(name))
    for path, rows in tables.items():
        write_jsonl(staging / path, rows)
    entries = {source: ref.as_dict() for source, ref in inputs.items()} | {"file": {"sha256": "0", "path": "f"}}
    return store.publish(staging, stage, name * 64, {"inputs": entries, "checks": [], "created_at": "2026"})


def prompts(*ids: str, **more: str) -> list[dict[str, str]]:
    """Rows with the columns of all tables; `more` puts others in their place."""
    return [
        {
            "prompt_id": prompt_id, "instruction": f"Say {prompt_id}.", "input": "", "output": "Yes.",
            "prompt": format_prompt(f"Say {prompt_id}.", ""), "reference": 'quoted "prompt_id":"e1"',
        } | more
        for prompt_id in ids
    ]  # fmt: skip


def family(
    store: ArtifactStore,
    rows: list[dict[str, str]] | None = None,
    train: str = "t",
    pair: str = "t",
    **pair_columns: str,
) -> dict[str, ArtifactRef]:
    """The inputs of an evaluation, with some ids where they should not be."""
    every = [*prompts("t", split="train"), *prompts("v", split="validation"), *prompts(*EVALUATED, split="test")]
    instructions = publish(store, "instructions", "a", {"rows.jsonl": rows or every})
    tables = {"train.jsonl": prompts(train), "test.jsonl": prompts(*EVALUATED)}
    dataset = publish(store, "formatted_dataset", "b", tables, instructions=instructions)
    trunk = publish(store, "sft_model", "c", {}, dataset=dataset)
    tables = {"train.jsonl": prompts(pair, **pair_columns), "validation.jsonl": prompts("v")}
    pairs = publish(store, "preference_pairs", "d", tables)
    reward = publish(store, "reward_model", "e", {}, pairs=pairs, trunk=trunk)
    return {"dataset": dataset, "policy": trunk, "trunk": trunk, "reward_model": reward}


def evaluation(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "examples.jsonl", prompts(*EVALUATED))
    return tmp_path


def test_prompts_of_other_splits_are_no_leak_and_what_was_compared_is_counted(
    store: ArtifactStore, tmp_path: Path
) -> None:
    check = leak_check(store, family(store), evaluation(tmp_path))
    assert (check.name, check.passed, check.blocking) == (CHECK, True, True)
    assert check.detail == "2 evaluated prompts; none is among the 1 training prompts of 3 ancestors."


@pytest.mark.parametrize(
    ("planted", "stage"),
    [
        ({"rows": prompts("e1", split="train")}, "instructions"),
        ({"train": "e1"}, "formatted_dataset"),
        ({"pair": "e1"}, "preference_pairs"),
    ],
)
def test_a_leak_is_found_in_any_ancestor_and_named(
    store: ArtifactStore, tmp_path: Path, planted: dict[str, Any], stage: str
) -> None:
    inputs = family(store, **planted)
    check = leak_check(store, inputs, evaluation(tmp_path))
    assert not check.passed and check.blocking
    (leaking,) = [ref for ref in store.family(inputs.values()) if ref.stage == stage]
    assert check.detail == f"1 of 2 evaluated prompts were trained on: e1 in {leaking.artifact_id}."


OTHER_FORM = " say  E1.\n"


@pytest.mark.parametrize(
    ("planted", "stage"),
    [
        ({"rows": prompts("other", instruction=OTHER_FORM, split="train")}, "instructions"),
        ({"pair": "other", "prompt": format_prompt(OTHER_FORM, "")}, "preference_pairs"),
    ],
)
def test_a_prompt_that_differs_in_case_and_spaces_only_is_the_same(
    store: ArtifactStore, tmp_path: Path, planted: dict[str, Any], stage: str
) -> None:
    inputs = family(store, **planted)
    check = leak_check(store, inputs, evaluation(tmp_path))
    (leaking,) = [ref for ref in store.family(inputs.values()) if ref.stage == stage]
    assert not check.passed
    assert check.detail == f"1 of 2 evaluated prompts were trained on: e1 in {leaking.artifact_id}."


def plain_text(text: str) -> list[dict[str, str]]:
    return prompts("whole", instruction="", output=text, split="train")


@pytest.mark.parametrize("space", ["", " "])
def test_a_plain_text_that_was_trained_on_whole_is_found_however_it_was_cut(
    store: ArtifactStore, tmp_path: Path, space: str
) -> None:
    inputs = family(store, rows=plain_text(f"the film{space}was fine"))
    write_jsonl(tmp_path / "examples.jsonl", prompts("cut", prompt="The film", reference="was fine"))
    assert not leak_check(store, inputs, tmp_path).passed


@pytest.mark.parametrize("text", ["The film was long", "The film"])
def test_a_plain_text_that_only_begins_as_an_evaluated_prompt_is_no_leak(
    store: ArtifactStore, tmp_path: Path, text: str
) -> None:
    inputs = family(store, rows=plain_text(text))
    write_jsonl(tmp_path / "examples.jsonl", prompts("cut", prompt="The film", reference="was fine"))
    assert leak_check(store, inputs, tmp_path).passed


def test_a_dataset_that_no_model_has_seen_is_no_leak(store: ArtifactStore, tmp_path: Path) -> None:
    inputs = family(store, train="e1")
    given = publish(store, "base_model", "f", {})
    check = leak_check(store, {"dataset": inputs["dataset"], "policy": given, "trunk": given}, evaluation(tmp_path))
    assert check.passed and check.detail.endswith("none is among the 0 training prompts of 0 ancestors.")


@pytest.mark.parametrize("damage", ["missing", "malformed", "without the column"])
def test_a_table_that_cannot_be_read_is_no_proof_of_innocence(
    store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    inputs = family(store)
    (pairs,) = [ref for ref in store.family(inputs.values()) if ref.stage == "preference_pairs"]
    table = store.path(pairs) / "train.jsonl"
    table.unlink()
    if damage == "malformed":
        table.write_text('{"prompt_id": "t"\n')
    if damage == "without the column":
        table.write_text('{"prompt_id": "t"}\n')
    with pytest.raises(StoreError, match=r"train\.jsonl .* nobody can tell"):
        leak_check(store, inputs, evaluation(tmp_path))


@pytest.mark.parametrize("stage", ["evaluation", "decoding_sweep"])
def test_an_evaluation_of_before_the_check_gets_it_when_it_is_read(store: ArtifactStore, stage: str) -> None:
    old = publish(store, stage, "g", {"examples.jsonl": prompts(*EVALUATED)}, **family(store, pair="e2"))
    assert store.manifest(old)["checks"] == []
    with pytest.raises(StoreError):
        with_leak_check(store, ArtifactRef("evaluation", "h" * 64, "0" * 64))
    (check,) = with_leak_check(store, old)["checks"]
    assert (check["name"], check["passed"], check["blocking"]) == (CHECK, False, True)
    (policy,) = [ref for ref in store.family([old]) if ref.stage == "sft_model"]
    assert with_leak_check(store, policy) == store.manifest(policy)


def test_a_true_run_compares_every_training_prompt(smoke_home: Path) -> None:
    store = ArtifactStore(smoke_home)
    rows = [ref for ref in store.all() if ref.stage == "instructions"]
    table = (store.path(rows[0]) / "rows.jsonl").read_text().splitlines()
    trained_on = {row["prompt_id"] for row in map(json.loads, table) if row["split"] == "train"}
    evaluations = [store.manifest(ref) for ref in store.all() if ref.stage == "evaluation"]
    assert len(evaluations) == 4
    for manifest in evaluations:
        (check,) = [check for check in manifest["checks"] if check["name"] == CHECK]
        assert check["passed"] and check["blocking"]
        assert re.fullmatch(
            rf"24 evaluated prompts; none is among the {len(trained_on)} training prompts of 3 ancestors\.",
            check["detail"],
        )
