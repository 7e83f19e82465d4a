import pytest

from alignment_pipeline.ppo.plan import microbatches, minibatches


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 12), (12, 1)])
def test_each_epoch_holds_every_row_once_in_minibatches_of_one_size(count: int, size: int) -> None:
    epochs = minibatches(count, size, epochs=3, seed=0)
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(count))
        assert {len(rows) for rows in epoch} == {size}


def test_epochs_differ_from_each_other_and_are_a_function_of_the_seed() -> None:
    epochs = minibatches(12, 4, epochs=3, seed=0)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert minibatches(12, 4, epochs=3, seed=0) == epochs
    assert minibatches(12, 4, epochs=3, seed=1) != epochs
    assert minibatches(12, 4, epochs=1, seed=0) == epochs[:1]


def test_microbatches_hold_rows_of_similar_length_shortest_first() -> None:
    lengths = [5, 1, 9, 3, 7, 3]
    parts = microbatches([4, 5, 0, 3, 2], lengths, 2)
    assert [part.tolist() for part in parts] == [[3, 5], [0, 4], [2]]


def test_a_minibatch_without_rows_has_no_microbatches() -> None:
    assert microbatches([], [4, 2], 3) == []
