"""Complete batches straight from the store, in an order that depends on seed and epoch only."""

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
from covid_cls.io import Batch

SAMPLERS = ("shuffle", "balanced")


@dataclass(frozen=True)
class Features:
    """Outputs of the first `stage` stages of a network for the images of a store, as `RadiographDataset` takes them.

    Attributes:
        stage: Number of stages.
        train: One array per fixed augmented view of the training images.
        centre: The view that evaluation uses.
    """

    stage: int
    train: Sequence[NDArray[Any] | Tensor]
    centre: NDArray[Any] | Tensor


@dataclass(eq=False)
class RadiographDataset(Dataset[Batch]):
    """Images of a store, or features of them, with their class indices, one complete batch at a time.

    Positions 0 to N - 1 are the first view of each row, N to 2 N - 1 the second view, and so on.

    Attributes:
        views: Arrays over all M rows of a store, or tensors on a GPU. With stage 0 one array of images, uint8
            (M, S, S). Otherwise one or more views of the outputs of that stage, with channels last; uint16 contains
            the bits of bfloat16, which numpy does not have.
        rows: Rows of the store in this data set, shape (N,).
        labels: Their class indices, shape (N,).
        stage: Number of network stages that the views have passed.
    """

    views: Sequence[NDArray[Any] | Tensor]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    stage: int = 0

    def __len__(self) -> int:
        return len(self.views) * len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes get the path of a memory map. Pickle would copy its complete content.
        return self.__dict__ | {"views": [mapped_file(v) or v if isinstance(v, np.ndarray) else v for v in self.views]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        views = [np.load(v, mmap_mode="r") if isinstance(v, Path) else v for v in state["views"]]
        self.__dict__.update(state, views=views)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        """Return the batch of these positions.

        Its x is uint8 (n, 1, S, S) for images or (n, ...) for features; its index contains the rows of the store.
        """
        view, place = np.divmod(np.asarray(positions, dtype=np.int64), len(self.rows))
        rows = self.rows[place]
        if len(self.views) == 1:
            x = _take(self.views[0], rows)
        else:
            # Rows are read view by view, and then put into the order of the positions.
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
    """Copy an array to a GPU if it fits into half of the free memory; return it unchanged for any other device."""
    if device.type != "cuda" or array.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return array
    return as_tensor(np.array(array)).to(device)


def as_array(features: Tensor) -> NDArray[Any]:
    """Convert features (n, C, H, W) or (n, C) for `RadiographDataset`: channels last, bfloat16 as uint16."""
    # Channels last on disk, so that a batch read from there has the memory format that convolutions are fastest with.
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1)
    features = features.cpu().contiguous()
    return np.asarray((features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy())


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor that shares the memory of an array; uint16 becomes bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@dataclass(eq=False)
class EpochBatches(Sampler[list[int]]):
    """Training batches as lists of positions in a `RadiographDataset`; the order depends on (seed, epoch) only.

    Raises InputError if the sampler is unknown or the batches are too small for the processes.

    Attributes:
        labels: Class index of each training image.
        batch_size: Images per batch, over all processes.
        seed: Random seed of the order.
        sampler: "shuffle" shows every image once per epoch; "balanced" draws with replacement, so that each class has
            the same expected frequency.
        rank: Number of this process.
        world: Number of processes. Each takes its `share` of every batch.
        views: Number of views of each image. An epoch shows one of them, the next epoch another.
        epoch: Number of the epoch.
    """

    labels: NDArray[np.int64]
    batch_size: int
    seed: int
    sampler: str = "shuffle"
    rank: int = 0
    world: int = 1
    views: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InputError(f"data.sampler={self.sampler}: unknown; choose one of {listed(SAMPLERS)}")
        check_shares(self.batch_size, self.world)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        # A last batch of one image joins the batch before it, because batch norm cannot train on a single image.
        return max(1, full + (rest > 1))

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        if self.sampler == "balanced":
            weights = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=weights / weights.sum())
        else:
            order = random.permutation(len(self.labels))
        # Images alternate their views in step with the epoch, each from its own start, so that an epoch mixes views.
        positions = (order + len(order) * ((order + self.epoch) % self.views)).tolist()
        for number in range(len(self)):
            last = number == len(self) - 1
            batch = positions[number * self.batch_size : None if last else (number + 1) * self.batch_size]
            yield share(batch, self.rank, self.world)


@dataclass(eq=False)
class OrderedBatches(Sampler[list[int]]):
    """Evaluation batches: every position exactly once over all processes, in order and without padding."""

    size: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.size, self.batch_size):
            batch = list(range(start, min(start + self.batch_size, self.size)))
            yield share(batch, self.rank, self.world)


def share(batch: list[int], rank: int, world: int) -> list[int]:
    """Return the positions of a batch that process `rank` of `world` takes.

    Every position goes to one process. Shares differ by at most one image and contain at least two images, for batch
    norm, or none.
    """
    # Some processes get an empty share of a small batch. They still need it: all processes must make the same number
    # of steps, or the others wait for ever.
    sharers = min(world, max(1, len(batch) // 2))
    return batch[rank::sharers] if rank < sharers else []


def check_shares(batch_size: int, world: int) -> None:
    """Check that a full batch gives each of `world` processes at least two images.

    Raises:
        InputError: It does not.
    """
    if batch_size < 2 * world:
        raise InputError(
            f"data.batch_size={batch_size}: {world} processes share each batch, and batch norm needs at least 2 images "
            f"in each; set it to {2 * world} or more, or use fewer processes"
        )
