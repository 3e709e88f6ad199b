"""Batches of training and evaluation, and the data set that they index."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from covid_cls.data.dataset import EpochBatches, OrderedBatches, RadiographDataset, as_array, share
from covid_cls.errors import InputError
from covid_cls.io import Batch


def labels(size: int, classes: int = 3) -> np.ndarray:
    return np.arange(size, dtype=np.int64) % classes


def epoch(batches: EpochBatches, number: int) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


def flat(batches: list[list[int]]) -> list[int]:
    return [position for batch in batches for position in batch]


# training


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_the_order_depends_on_seed_and_epoch_only(sampler: str) -> None:
    first, second = (EpochBatches(labels(50), 8, seed=7, sampler=sampler) for _ in range(2))
    # The global state must not matter.
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    wanted = [epoch(first, number) for number in range(3)]
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    # Neither must earlier epochs.
    assert [epoch(second, number) for number in (2, 0, 1)] == [wanted[2], wanted[0], wanted[1]]
    assert list(second) == list(second)
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]
    assert epoch(EpochBatches(labels(50), 8, seed=8, sampler=sampler), 0) != wanted[0]


def test_epoch_and_seed_are_not_interchangeable() -> None:
    assert epoch(EpochBatches(labels(50), 8, seed=1), 2) != epoch(EpochBatches(labels(50), 8, seed=2), 1)


def test_batches_do_not_use_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(EpochBatches(labels(50), 8, seed=0, sampler="balanced"))
    assert torch.equal(torch.random.get_rng_state(), before)


# One image; one batch that is not full, that is full, or that is full and takes one more image; two batches likewise.
@pytest.mark.parametrize(
    ("size", "batch_size"), [(1, 8), (2, 8), (7, 8), (8, 8), (9, 8), (3, 2), (16, 8), (17, 8), (31, 8), (65, 3)]
)
def test_an_epoch_contains_each_image_once(size: int, batch_size: int) -> None:
    batches = EpochBatches(labels(size), batch_size, seed=0)
    for number in range(3):
        drawn = epoch(batches, number)
        assert sorted(flat(drawn)) == list(range(size))
        assert len(batches) == len(drawn)
        assert all(len(batch) == batch_size for batch in drawn[:-1])
        # Batch norm cannot train on a single image, so it joins the batch before it.
        assert len(drawn[-1]) == size if len(drawn) == 1 else 2 <= len(drawn[-1]) <= batch_size + 1


@pytest.mark.parametrize(("size", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (4, [4]), (1, [1])])
def test_sizes_of_batches(size: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in EpochBatches(labels(size), 4, seed=0)] == sizes


def test_the_balanced_sampler_draws_classes_equally_often() -> None:
    unequal = np.repeat([0, 1, 2], [20, 300, 680]).astype(np.int64)
    batches = EpochBatches(unequal, 50, seed=0, sampler="balanced")
    drawn = np.concatenate([flat(epoch(batches, number)) for number in range(20)])
    assert len(drawn) == 20 * 1000
    shares = np.bincount(unequal[drawn]) / len(drawn)
    # 4 standard deviations of a third of 20,000.
    assert shares == pytest.approx(np.full(3, 1 / 3), abs=0.0134)
    assert set(range(20)) <= set(drawn.tolist())
    # The images of a class are equally likely: each of 20 is drawn 333 times, within 5 standard deviations.
    assert np.bincount(drawn)[:20] == pytest.approx(np.full(20, 1000 / 3), abs=5 * 18.3)


def test_shuffle_keeps_class_frequencies() -> None:
    unequal = np.repeat([0, 1], [10, 90]).astype(np.int64)
    assert np.bincount(unequal[flat(list(EpochBatches(unequal, 8, seed=0)))]).tolist() == [10, 90]


@pytest.mark.parametrize(
    ("sampler", "views", "world"), [("shuffle", 1, 2), ("shuffle", 3, 3), ("balanced", 2, 5), ("balanced", 1, 2)]
)
def test_processes_share_the_batches_of_a_single_process(sampler: str, views: int, world: int) -> None:
    for size in (1, 2, 3, 9, 10, 11, 12, 13, 14, 50, 61):
        for batch_size in (2 * world, 2 * world + 1, 17):
            alone = EpochBatches(labels(size), batch_size, 0, sampler, views=views)
            ranks = [EpochBatches(labels(size), batch_size, 0, sampler, rank, world, views) for rank in range(world)]
            for number in range(2):
                complete, shares = epoch(alone, number), [epoch(rank, number) for rank in ranks]
                # Processes with different numbers of steps would wait for each other for ever.
                assert {len(complete), *map(len, ranks), *map(len, shares)} == {len(alone)}
                for batch, *parts in zip(complete, *shares, strict=True):
                    assert sorted(flat(parts)) == sorted(batch)
                    sizes = [len(part) for part in parts if part]
                    assert max(sizes) - min(sizes) <= 1
                    assert min(sizes) >= 2 or size == 1
                    # No more processes than necessary are without images.
                    assert len(sizes) == min(world, max(1, len(batch) // 2))


def test_a_small_batch_leaves_some_processes_without_images() -> None:
    assert [share([7, 5, 3], rank, 2) for rank in range(2)] == [[7, 5, 3], []]
    assert [share([7, 5, 3, 8], rank, 2) for rank in range(2)] == [[7, 3], [5, 8]]
    assert [share(list(range(5)), rank, 3) for rank in range(3)] == [[0, 2, 4], [1, 3], []]


@pytest.mark.parametrize(("batch_size", "world"), [(3, 2), (9, 5), (1, 1)])
def test_batches_too_small_for_the_processes_are_rejected(batch_size: int, world: int) -> None:
    message = rf"data\.batch_size={batch_size}: {world} processes share .* set it to {2 * world} or more, or use fewer"
    with pytest.raises(InputError, match=message):
        EpochBatches(labels(60), batch_size, 0, world=world)
    assert len(EpochBatches(labels(60), 2 * world, 0, world=world)) == -(-60 // (2 * world))


@pytest.mark.parametrize("sampler", ["", "random", "Shuffle"])
def test_an_unknown_sampler_is_rejected(sampler: str) -> None:
    with pytest.raises(InputError, match=rf"data\.sampler={sampler}: unknown; choose one of shuffle, balanced"):
        EpochBatches(labels(4), 2, 0, sampler)


# evaluation


@pytest.mark.parametrize(
    ("size", "batch_size", "world"),
    [(0, 7, 2), (1, 7, 4), (5, 1, 4), (5, 2, 3), (7, 7, 1), (101, 7, 1), (101, 7, 4), (101, 64, 2)],
)
def test_evaluation_contains_each_image_once_over_all_processes(size: int, batch_size: int, world: int) -> None:
    # DistributedSampler would pad 5 to 8 images over 4 processes, and 101 to 104.
    ranks = [OrderedBatches(size, batch_size, rank, world) for rank in range(world)]
    drawn = [list(rank) for rank in ranks]
    assert sorted(position for rank in drawn for position in flat(rank)) == list(range(size))
    for rank, batches in zip(ranks, drawn, strict=True):
        assert len(rank) == len(batches) == -(-size // batch_size)
        assert flat(batches) == sorted(flat(batches))
    if world == 1:
        assert all(len(batch) == batch_size for batch in drawn[0][:-1])


# the data set


def test_contents_of_a_batch() -> None:
    images = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
    # A store is opened read-only.
    images.setflags(write=False)
    rows = np.array([2, 3, 5, 9], np.int64)
    dataset = RadiographDataset([images], rows, np.array([0, 1, 2, 1], np.int64))
    assert len(dataset) == 4
    batch = dataset[[3, 0, 0]]
    assert isinstance(batch, Batch)
    assert (batch.x.shape, batch.x.dtype) == ((3, 1, 4, 4), torch.uint8)
    assert (batch.y.tolist(), batch.y.dtype) == ([1, 0, 0], torch.int64)
    assert (batch.index.tolist(), batch.index.dtype) == ([9, 2, 2], torch.int64)
    assert batch.stage == 0
    assert np.array_equal(batch.x[:, 0].numpy(), images[[9, 2, 2]])


@pytest.mark.parametrize(("views", "stage"), [(1, 0), (1, 4), (3, 4)])
def test_a_batch_without_images_keeps_its_shape(views: int, stage: int) -> None:
    arrays = [np.ones((5, 4, 4) if stage == 0 else (5, 2, 2, 6), np.float32) for _ in range(views)]
    batch = RadiographDataset(arrays, np.arange(5), np.zeros(5, np.int64), stage)[[]]
    assert batch.x.shape == ((0, 1, 4, 4) if stage == 0 else (0, 6, 2, 2))
    assert (batch.y.shape, batch.y.dtype, batch.index.shape) == ((0,), torch.int64, (0,))


def test_a_batch_is_a_copy() -> None:
    images = np.ones((3, 2, 2), np.uint8)
    dataset = RadiographDataset([images], np.arange(3), np.zeros(3, np.int64))
    batch = dataset[[0, 1]]
    batch.x.zero_()
    batch.index.add_(1)
    batch.y.add_(1)
    assert images.min() == 1
    assert dataset.rows.tolist() == [0, 1, 2]
    assert dataset.labels.tolist() == [0, 0, 0]


def test_positions_of_several_views() -> None:
    rows, labels_ = np.array([2, 0], np.int64), np.array([1, 0], np.int64)
    views = [np.arange(3 * 4, dtype=np.float32).reshape(3, 4) + 100 * k for k in range(3)]
    dataset = RadiographDataset(views, rows, labels_, stage=6)
    assert len(dataset) == 6
    # Third view of row 0, first of row 2, second of row 0, second of row 2.
    batch = dataset[[5, 0, 3, 2]]
    assert batch.x[:, 0].tolist() == [200, 8, 100, 108]
    assert (batch.index.tolist(), batch.y.tolist(), batch.stage) == ([0, 2, 0, 2], [0, 1, 0, 1], 6)


def test_features_are_channels_last_and_bfloat16_is_kept_exactly() -> None:
    features = torch.randn(5, 6, 2, 3).to(torch.bfloat16)
    array = as_array(features)
    assert (array.dtype, array.shape) == (np.uint16, (5, 2, 3, 6))
    batch = RadiographDataset([array], np.arange(5), np.zeros(5, np.int64), stage=4)[[3, 1]]
    assert torch.equal(batch.x, features[[3, 1]])
    assert batch.x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("views", [1, 2, 5])
def test_epochs_alternate_the_views(views: int) -> None:
    batches = EpochBatches(labels(11), 4, seed=0, views=views)
    shown = [flat(epoch(batches, number)) for number in range(views)]
    assert all(sorted(position % 11 for position in drawn) == list(range(11)) for drawn in shown)
    assert sorted(position for drawn in shown for position in drawn) == list(range(11 * views))
    if views > 1:
        # An epoch shows different views of different images.
        assert len({position // 11 for position in shown[0]}) > 1


def test_a_memory_map_is_pickled_as_its_path(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 64, 64), np.uint8)
    np.save(tmp_path / "images.npy", images)
    dataset = RadiographDataset([np.load(tmp_path / "images.npy", "r")], np.arange(40), np.zeros(40, np.int64))
    carried = pickle.dumps(dataset)
    assert len(carried) < 5000
    assert torch.equal(pickle.loads(carried)[[7, 3]].x, dataset[[7, 3]].x)
    in_memory = RadiographDataset([images], np.arange(40), np.zeros(40, np.int64))
    assert torch.equal(pickle.loads(pickle.dumps(in_memory))[[7, 3]].x, dataset[[7, 3]].x)
