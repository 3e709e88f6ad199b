"""Whole batches straight from the store, in an order that only seed and epoch decide."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from covid_cls.errors import InputError, listed
from covid_cls.records import Batch

SAMPLERS = ("shuffle", "balanced")


class RadiographDataset(Dataset[Batch]):
    """Some rows of a store with their class indices, read a batch at a time.

    images: uint8 (M, S, S); rows: which of them, int64 (N,); labels: class index of each row, int64 (N,).
    """

    def __init__(self, images: NDArray[np.uint8], rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.images, self.rows, self.labels = images, rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        """The `Batch` of these positions: x uint8 (len(positions), 1, S, S), index = rows of the store."""
        rows = self.rows[positions]
        x = torch.from_numpy(self.images[rows]).unsqueeze(1)
        return Batch(x, torch.from_numpy(self.labels[positions]), torch.from_numpy(rows))


class EpochBatches(Sampler[list[int]]):
    """Training batches as lists of positions, drawn afresh each epoch from (seed, epoch) alone.

    sampler="shuffle": every position once. "balanced": with replacement, each class equally often on average.
    Across `world` processes each takes its own part, filled up from the front so that all take as many steps. A last
    batch of one image joins the batch before it: batch norm cannot train on one.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        batch_size: int,
        seed: int,
        sampler: str = "shuffle",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if sampler not in SAMPLERS:
            raise InputError(f"data.sampler={sampler}: unknown; one of {listed(SAMPLERS)}")
        self.labels, self.batch_size, self.seed, self.sampler = labels, batch_size, seed, sampler
        self.rank, self.world, self.epoch = rank, world, 0
        self._mine = -(-len(labels) // world)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of epoch number `epoch` next; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._mine, self.batch_size)
        return max(1, full + (rest > 1))

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        if self.sampler == "balanced":
            weights = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=weights / weights.sum())
        else:
            order = random.permutation(len(self.labels))
        mine = np.resize(order, self._mine * self.world)[self.rank :: self.world].tolist()
        for number in range(len(self)):
            last = number == len(self) - 1
            yield mine[number * self.batch_size : None if last else (number + 1) * self.batch_size]


class OrderedBatches(Sampler[list[int]]):
    """Evaluation batches: every position exactly once over all processes, in order, never padded."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.mine, self.batch_size = range(rank, size, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield list(self.mine[start : start + self.batch_size])
