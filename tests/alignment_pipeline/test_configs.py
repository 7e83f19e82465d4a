import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from alignment_pipeline import configs, decoding_configs
from alignment_pipeline.configs import (
    BaseModelConfig,
    DataConfig,
    PpoConfig,
    RewardClassifierConfig,
    RewardModelConfig,
    SftConfig,
    StageConfig,
)
from alignment_pipeline.decoding_configs import DecodingSweepConfig

SECTIONS = [
    section
    for module in (configs, decoding_configs)
    for _, section in inspect.getmembers(module, inspect.isclass)
    if issubclass(section, StageConfig) and section.__module__ == module.__name__
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_says_what_it_means(section: type[StageConfig]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_values_do_not_change_after_loading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SftConfig().batch_size = 1


def test_what_cannot_change_a_result_is_left_out_of_the_key() -> None:
    for config in (SftConfig, PpoConfig):
        assert config(checkpoint_every_s=1).keyed_values() == config(checkpoint_every_s=99).keyed_values()
        assert config(learning_rate=1e-3).keyed_values() != config(learning_rate=2e-3).keyed_values()
    for values in ({}, {"path": "a"}, {"hub_name": "a/b"}):
        for licensed in (DataConfig, BaseModelConfig, partial(RewardClassifierConfig, label="A")):
            assert licensed(**values, license="mit").keyed_values() == licensed(**values).keyed_values()


def test_an_input_file_counts_by_its_content_and_not_by_its_path() -> None:
    for config in (DataConfig, BaseModelConfig):
        assert config(path="a").keyed_values() == config(path="b").keyed_values()
        assert config(path="a").input_files() == {"source": Path("a")}
        assert config().input_files() == {}


def test_a_hub_name_counts_unless_a_file_wins_over_it() -> None:
    assert DataConfig(hub_name="a/b").keyed_values() != DataConfig(hub_name="a/c").keyed_values()
    assert DataConfig(path="a", hub_name="a/b").keyed_values() == DataConfig(path="a").keyed_values()


def test_a_classifier_counts_by_what_made_it() -> None:
    def keyed(**values: Any) -> dict[str, Any]:
        return RewardClassifierConfig(**{"label": "A", **values}).keyed_values()

    for given in ({"path": "a"}, {"hub_name": "a/b"}):
        assert keyed(**given, hidden_size=8, epochs=9) == keyed(**given)
        assert keyed(**given, label="B") != keyed(**given)
    assert keyed(hub_name="a/b") != keyed(hub_name="a/c")
    assert keyed(train_path="a", checkpoint_every_s=1) == keyed(train_path="b", hub_revision="unused")
    assert keyed(train_path="a", epochs=9) != keyed(train_path="a")
    assert RewardClassifierConfig(label="A", train_path="t").input_files() == {"train_path": Path("t")}
    assert RewardClassifierConfig(label="A", path="p").input_files() == {"source": Path("p")}


def test_a_reward_model_counts_by_what_it_starts_from() -> None:
    trunk = RewardModelConfig()
    assert RewardModelConfig(path="a").keyed_values() == RewardModelConfig(path="b").keyed_values()
    assert RewardModelConfig(hub_name="a/b").keyed_values() != RewardModelConfig(hub_name="a/c").keyed_values()
    assert RewardModelConfig(hub_revision="unused").keyed_values() == trunk.keyed_values()
    assert RewardModelConfig(max_tokens=9).keyed_values() != trunk.keyed_values()
    assert (
        RewardModelConfig(hub_name="a/b", license="mit").keyed_values()
        == RewardModelConfig(hub_name="a/b").keyed_values()
    )
    assert RewardModelConfig(path="a").input_files() == {"source": Path("a")}
    assert [config.is_given for config in (trunk, RewardModelConfig(path="a"))] == [False, True]


def test_the_text_field_and_the_bounds_of_a_texts_length_count() -> None:
    plain = DataConfig(path="a", text_field="text").keyed_values()
    assert plain != DataConfig(path="a").keyed_values()
    assert plain != DataConfig(path="a", text_field="text", min_chars=200).keyed_values()


def test_a_reward_function_counts_by_its_name_and_its_files_content() -> None:
    def of(reference: str | None) -> PpoConfig:
        return PpoConfig(reward_function=reference)

    assert of("a/rewards.py:f").keyed_values() == of("b/other.py:f").keyed_values()
    assert of("a/rewards.py:f").keyed_values() != of("a/rewards.py:g").keyed_values() != of(None).keyed_values()
    assert of("a/rewards.py:f").input_files() == {"reward_function": Path("a/rewards.py")}
    assert of(None).input_files() == {}
    assert "reward_function" not in of(None).keyed_values()


def test_a_boolean_in_a_list_is_no_number() -> None:
    with pytest.raises(ValidationError, match="found True \\(a boolean\\)"):
        DecodingSweepConfig(judge="gold_rule", temperatures=[0.5, True])


def test_which_policy_is_swept_counts_by_its_content() -> None:
    named = DecodingSweepConfig(judge="gold_rule", policy="sft_model")
    assert named.keyed_values() == DecodingSweepConfig(judge="gold_rule").keyed_values()
    assert DecodingSweepConfig(judge="gold_rule", top_ks=[3]).keyed_values() != named.keyed_values()
