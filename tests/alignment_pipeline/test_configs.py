import inspect
from pathlib import Path

import pytest
from pydantic import ValidationError

from alignment_pipeline import configs
from alignment_pipeline.configs import BaseModelConfig, DataConfig, PpoConfig, SftConfig, StageConfig

SECTIONS = [section for _, section in inspect.getmembers(configs, inspect.isclass) if issubclass(section, StageConfig)]


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


def test_an_input_file_counts_by_its_content_and_not_by_its_path() -> None:
    for config in (DataConfig, BaseModelConfig):
        assert config(path="a").keyed_values() == config(path="b").keyed_values()
        assert config(path="a").input_files() == {"source": Path("a")}
        assert config().input_files() == {}


def test_a_hub_name_counts_unless_a_file_wins_over_it() -> None:
    assert DataConfig(hub_name="a/b").keyed_values() != DataConfig(hub_name="a/c").keyed_values()
    assert DataConfig(path="a", hub_name="a/b").keyed_values() == DataConfig(path="a").keyed_values()
