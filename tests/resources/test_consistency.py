"""What a stage reads must belong together."""

import json
from pathlib import Path

import pytest

from alignment_pipeline.errors import StoreError
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.consistency import require_one_lineage


def publish(store: ArtifactStore, stage: str, content: str, **inputs: ArtifactRef) -> ArtifactRef:
    staging = store.new_staging()
    (staging / "data.json").write_text(json.dumps(content))
    entries = {name: ref.as_dict() for name, ref in inputs.items()} | {"journal": {"sha256": "0", "path": "j"}}
    return store.publish(staging, stage, content * 64, {"inputs": entries, "metrics": {}, "created_at": "2026-01-01"})


def test_a_policy_and_a_trunk_of_two_sft_models_are_refused_by_name(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    old, new = publish(store, "sft_model", "a"), publish(store, "sft_model", "b")
    policy = publish(store, "ppo_policy", "c", trunk=old)
    with pytest.raises(StoreError, match="sft_model and ppo_policy, which go back to different versions of sft_model"):
        require_one_lineage(store, "ppo_evaluation", {"sft_model": new, "ppo_policy": policy})
    require_one_lineage(store, "ppo_evaluation", {"sft_model": old, "ppo_policy": policy})


def test_a_disagreement_far_behind_is_found_too(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    rows = [publish(store, "instructions", letter) for letter in "ab"]
    sft = publish(store, "sft_model", "c", dataset=publish(store, "formatted_dataset", "d", instructions=rows[0]))
    newer = publish(store, "formatted_dataset", "e", instructions=rows[1])
    with pytest.raises(StoreError, match=r"different versions of (formatted_dataset|instructions)"):
        require_one_lineage(store, "sampled_responses", {"formatted_dataset": newer, "sft_model": sft})


def test_evaluations_of_several_policies_may_meet_but_not_of_several_trunks(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    trunks = [publish(store, "sft_model", letter) for letter in "ab"]
    of = {letter: publish(store, "evaluation", letter, trunk=trunks[0]) for letter in "cd"}
    require_one_lineage(store, "comparison", {"ppo_evaluation": of["c"], "dpo_evaluation": of["d"]})
    stray = publish(store, "evaluation", "e", trunk=trunks[1])
    with pytest.raises(StoreError, match="different versions of sft_model"):
        require_one_lineage(store, "comparison", {"ppo_evaluation": of["c"], "dpo_evaluation": stray})


def test_the_same_content_computed_twice_is_one_version(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    staged = []
    for key in ("a", "b"):
        staging = store.new_staging()
        (staging / "data.json").write_text('"same"')
        staged.append(store.publish(staging, "sft_model", key * 64, {"inputs": {}, "metrics": {}, "created_at": key}))
    policy = publish(store, "ppo_policy", "c", trunk=staged[0])
    require_one_lineage(store, "ppo_evaluation", {"sft_model": staged[1], "ppo_policy": policy})


def test_rows_that_came_from_two_sources_are_the_same_rows(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    rows = [publish(store, "instructions", letter) for letter in "ab"]
    datasets = []
    for key, source in zip("cd", rows, strict=True):
        staging = store.new_staging()
        (staging / "data.json").write_text('"same"')
        made = {"inputs": {"instructions": source.as_dict()}, "metrics": {}, "created_at": key}
        datasets.append(store.publish(staging, "formatted_dataset", key * 64, made))
    policy = publish(store, "dpo_policy", "e", pairs=publish(store, "preference_pairs", "f", dataset=datasets[0]))
    require_one_lineage(store, "dpo_evaluation", {"formatted_dataset": datasets[1], "dpo_policy": policy})
