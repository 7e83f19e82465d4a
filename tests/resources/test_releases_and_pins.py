"""Release records and pins: written once, read back, and what is wrong with them said."""

from pathlib import Path

import pytest

from alignment_pipeline.errors import StoreError
from resources.pins import Pins
from resources.releases import Release, Releases
from resources.runs import RunRecords


def release(release_id: str, released_at: str = "2026-01-01T00:00:00+00:00") -> Release:
    return Release(
        release_id, "tiny", "ppo_policy", "ppo_policy", "a" * 64, "b" * 64, released_at, "Ada", "the first one"
    )


def test_releases_are_read_back_oldest_first(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    assert releases.all() == []
    late, early = release("tiny-2", "2026-02-02"), release("tiny-10", "2026-01-01")
    for each in (late, early):
        releases.write(each)
    assert releases.all() == [early, late]
    assert early.ref.artifact_id == f"ppo_policy/{'a' * 20}/{'b' * 20}"


def test_a_release_is_written_once_and_its_id_is_a_name(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    releases.write(release("tiny-1"))
    with pytest.raises(StoreError, match=r"There is a release tiny-1 already .*Choose another id"):
        releases.write(release("tiny-1", "2027"))
    for bad in ("", "../tiny", ".hidden", "a b"):
        with pytest.raises(StoreError, match="expected letters, digits"):
            releases.write(release(bad))
    assert releases.all() == [release("tiny-1")]


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    for run_id in ("abc1", "abc2", "abd"):
        RunRecords(tmp_path).start(run_id, "smoke", "align", ["instructions"])
    return Pins(tmp_path)


def test_the_beginning_of_an_id_is_enough_where_only_one_begins_so(pins: Pins) -> None:
    assert pins.pin("abd") == pins.pin("abd") == "abd"
    assert pins.pin("abc2") == "abc2"
    with pytest.raises(StoreError, match=r"2 runs begin with 'abc': abc1, abc2\. Give more"):
        pins.pin("abc")
    with pytest.raises(StoreError, match=r"There is no run 'x'\. Expected the beginning of one of: abc1, abc2, abd"):
        pins.pin("x")
    assert list(pins.all()) == ["abd", "abc2"]


def test_a_pin_can_be_removed_and_only_where_there_is_one(pins: Pins) -> None:
    pins.pin("abd")
    with pytest.raises(StoreError, match=r"There is no pinned run 'abc1'\. Expected the beginning of one of: abd"):
        pins.unpin("abc1")
    assert pins.unpin("ab") == "abd"
    assert pins.all() == {}
    with pytest.raises(StoreError, match="There is no pinned run at all"):
        pins.unpin("ab")


def test_an_id_that_is_another_ones_beginning_is_meant_itself(tmp_path: Path) -> None:
    for run_id in ("a", "ab"):
        RunRecords(tmp_path).start(run_id, "smoke", "align", ["instructions"])
    assert Pins(tmp_path).pin("a") == "a"
