"""Laws of the order of samples."""

from collections import Counter

import pytest
import torch

from tidetable.training.data import BatchOrder, Dataset, step_generator


def dataset(*sizes):
    latents = [torch.zeros(3, size, size) for size in sizes]
    return Dataset(latents, [None] * len(latents))


def test_every_epoch_visits_every_sample_once():
    order = BatchOrder(dataset(*[4] * 12), batch_size=4, seed=3)
    for epoch in range(3):
        seen = [i for step in range(3 * epoch, 3 * epoch + 3) for i in order.indices(step)]
        assert sorted(seen) == list(range(12))


def test_epochs_and_seeds_differ():
    order, other = BatchOrder(dataset(*[4] * 12), 12, seed=3), BatchOrder(dataset(*[4] * 12), 12, seed=4)
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != other.indices(0)


def test_batches_never_mix_shapes_and_are_always_full():
    data = dataset(4, 8, 4, 8, 8, 4, 4)
    order = BatchOrder(data, batch_size=4, seed=0)
    for step in range(20):
        rows = order.indices(step)
        assert len(rows) == 4 and len({data.latents[i].shape for i in rows}) == 1


def test_a_group_smaller_than_the_batch_is_repeated_evenly():
    counts = Counter(BatchOrder(dataset(4, 4, 4), batch_size=7, seed=0).indices(0))
    assert sum(counts.values()) == 7 and max(counts.values()) - min(counts.values()) <= 1


def test_random_access_equals_sequential_access():
    sequential = BatchOrder(dataset(*[4] * 10), 3, seed=1)
    expected = [sequential.indices(step) for step in range(30)]
    assert [BatchOrder(dataset(*[4] * 10), 3, seed=1).indices(step) for step in reversed(range(30))] == expected[::-1]


def test_streams_steps_and_seeds_draw_differently():
    draws = {
        torch.rand(1, generator=step_generator(seed, step, stream)).item()
        for seed in range(5)
        for step in range(50)
        for stream in range(3)
    }
    assert len(draws) == 5 * 50 * 3


def test_mismatched_or_empty_data_is_refused():
    with pytest.raises(ValueError, match="2 latents but 1 conditionings"):
        Dataset([torch.zeros(3, 4, 4)] * 2, [None])
    with pytest.raises(ValueError, match="the data set is empty"):
        Dataset([], [])
