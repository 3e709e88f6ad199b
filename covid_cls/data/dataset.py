"""Whole batches straight from the store, in an order that only seed and epoch decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from covid_cls.data.store import mapped_file, read_rows
from covid_cls.errors import InputError, listed
from covid_cls.records import Batch

SAMPLERS = ("shuffle", "balanced")


@dataclass(frozen=True)
class Features:
    """What the leading `stage` stages of a network made of a store's images; arrays as `RadiographDataset` takes them.

    train: one array per fixed view of the training images; centre: of the view that evaluation uses.
    """

    stage: int
    train: Sequence[NDArray[Any] | Tensor]
    centre: NDArray[Any] | Tensor


class RadiographDataset(Dataset[Batch]):
    """Images of a store, or activations that the network made of them, with their class indices, a batch at a time.

    views: arrays over the rows of a store. One of uint8 (M, S, S) images; or, with `stage` > 0, one or more of the
    outputs of that stage, channels last: numpy has no bfloat16, so that uint16 stands for its bits. Tensors instead of
    arrays if they lie on a GPU. rows: which of them, int64 (N,); labels: class index of each, int64 (N,).

    Positions 0 to N - 1 are the first view of each row, N to 2 N - 1 the second, and so on.
    """

    def __init__(
        self,
        views: Sequence[NDArray[Any] | Tensor],
        rows: NDArray[np.int64],
        labels: NDArray[np.int64],
        stage: int = 0,
    ) -> None:
        self.views, self.rows, self.labels, self.stage = views, rows, labels, stage

    def __len__(self) -> int:
        return len(self.views) * len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: a memory map goes as its path, or pickle would carry all of its content."""
        return self.__dict__ | {"views": [mapped_file(v) or v if isinstance(v, np.ndarray) else v for v in self.views]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map again what was mapped."""
        views = [np.load(v, mmap_mode="r") if isinstance(v, Path) else v for v in state["views"]]
        self.__dict__.update(state, views=views)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        """The `Batch` of these positions: x uint8 (n, 1, S, S) or features (n, ...), index = rows of the store."""
        view, place = np.divmod(np.asarray(positions, dtype=np.int64), len(self.rows))
        rows = self.rows[place]
        if len(self.views) == 1:
            x = _take(self.views[0], rows)
        else:
            parts = [(np.flatnonzero(view == k), array) for k, array in enumerate(self.views)]
            back = torch.from_numpy(np.argsort(np.concatenate([where for where, _ in parts])))
            x = torch.cat([_take(array, rows[where]) for where, array in parts])[back]
        if self.stage == 0:
            x = x.unsqueeze(1)
        elif x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        return Batch(x, torch.from_numpy(self.labels[place]), torch.from_numpy(rows), self.stage)


def _take(array: NDArray[Any] | Tensor, rows: NDArray[np.int64]) -> Tensor:
    if isinstance(array, Tensor):
        return array[torch.from_numpy(rows).to(array.device)]
    return as_tensor(read_rows(array, rows))


def on_device(array: NDArray[Any], device: torch.device) -> NDArray[Any] | Tensor:
    """`array` as a tensor on `device` if that is a GPU and at most half of its free memory is filled; else as it is."""
    if device.type != "cuda" or array.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return array
    return as_tensor(np.array(array)).to(device)


def as_array(features: Tensor) -> NDArray[Any]:
    """Features (n, C, H, W) or (n, C) as `RadiographDataset` takes them: channels last, uint16 for bfloat16."""
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1)
    features = features.cpu().contiguous()
    return np.asarray((features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy())


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The tensor that shares `array`'s memory; uint16 stands for bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


class EpochBatches(Sampler[list[int]]):
    """Training batches as lists of positions, drawn afresh each epoch from (seed, epoch) alone.

    sampler="shuffle": every position once. "balanced": with replacement, each class equally often on average. With
    several `views` of each image, an epoch shows one of them, each in its turn; positions as in `RadiographDataset`.
    A last batch of one image joins the batch before it: batch norm cannot train on one. Of `world` processes each
    takes its part of every batch, see `share`, so that the batches are those of one process.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        batch_size: int,
        seed: int,
        sampler: str = "shuffle",
        rank: int = 0,
        world: int = 1,
        views: int = 1,
    ) -> None:
        if sampler not in SAMPLERS:
            raise InputError(f"data.sampler={sampler}: unknown; one of {listed(SAMPLERS)}")
        check_shares(batch_size, world)
        self.labels, self.batch_size, self.seed, self.sampler = labels, batch_size, seed, sampler
        self.rank, self.world, self.views, self.epoch = rank, world, views, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of epoch number `epoch` next; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return max(1, full + (rest > 1))

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        if self.sampler == "balanced":
            weights = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=weights / weights.sum())
        else:
            order = random.permutation(len(self.labels))
        positions = (order + len(order) * ((order + self.epoch) % self.views)).tolist()
        for number in range(len(self)):
            last = number == len(self) - 1
            batch = positions[number * self.batch_size : None if last else (number + 1) * self.batch_size]
            yield share(batch, self.rank, self.world)


class OrderedBatches(Sampler[list[int]]):
    """Evaluation batches: every position exactly once over all processes, in order, never padded."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.size, self.batch_size):
            batch = list(range(start, min(start + self.batch_size, self.size)))
            yield share(batch, self.rank, self.world)


def share(batch: list[int], rank: int, world: int) -> list[int]:
    """What process `rank` of `world` takes of a batch: every position goes to one of them.

    Shares differ by at most one image and hold at least two, for batch norm: of a batch smaller than 2 x `world` some
    processes take none. Theirs is an empty batch, for each must take as many steps or the others wait for ever.
    """
    sharers = min(world, max(1, len(batch) // 2))
    return batch[rank::sharers] if rank < sharers else []


def check_shares(batch_size: int, world: int) -> None:
    """InputError where whole batches leave some of `world` processes fewer than the two images of a `share`."""
    if batch_size < 2 * world:
        raise InputError(
            f"data.batch_size={batch_size}: {world} processes share each batch, and batch norm needs at least 2 images "
            f"in each; set it to {2 * world} or more, or use fewer processes"
        )
