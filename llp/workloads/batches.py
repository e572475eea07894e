"""Batches of normalised images on the training device.

Where the images of a job fit, they live there as one tensor and a batch is an index into it: as
ready-made floats when they are few (`FLOAT_BYTES`), else as uint8 that is normalised per batch.
uint8 images that do not fit stay in host memory, and images in files go through torch's DataLoader.
All four ways give the same numbers in the same order.

The order of the examples and every augmentation draw are pure functions of (seed, epoch, batch):
nothing is carried from one epoch to the next and torch's global generator is not touched, so a
resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llp.workloads.images import FileImages, Indices, Pixels, Split

Augmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]

FLOAT_BYTES = 64 * 2**20
"""Up to this size the images of a job are kept as normalised floats."""

_FREE_SHARE = 0.25
_ORDER_STREAM, _AUGMENTATION_STREAM = 1, 2


def fits(split: Split, device: torch.device | str) -> bool:
    """Whether the images of `split` may live on `device`.

    True when their bytes (as stored: one per uint8 pixel) are at most a quarter of the memory that
    is free there now, which leaves room for the network and for three more trials like this one.
    For images in files the bytes are those of the decoded images.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(split.images.nbytes) <= _FREE_SHARE * free


class Batches:
    """The batches of one job, epoch after epoch.

    >>> import numpy as np
    >>> split = Split(np.zeros((5, 1, 8, 8), dtype=np.uint8), np.arange(5))
    >>> batches = Batches(split, batch_size=2, mean=(0.0,), std=(1.0,))
    >>> [labels.tolist() for images, labels in batches.epoch(0)]
    [[0, 1], [2, 3, 4]]

    The images that come out are float32 [B, C, H, W], normalised to `(x / 255 - mean) / std` (float
    splits: `(x - mean) / std`) and then augmented; labels are int64 [B]. Do not write to them: they
    may be a view of the stored images.

    A last batch of a single example is joined to the batch before it, because batch norm cannot
    train on one example: every example is used once per epoch all the same.
    """

    def __init__(
        self,
        split: Split,
        indices: Indices | Sequence[int] | None = None,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Sequence[Augmentation] = (),
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        channels_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        """Prepares the images of `split` at `indices` (default: all of them).

        Args:
            split: The images.
            indices: Which of them, in the order of an unshuffled epoch.
            batch_size: Examples per batch.
            mean: Per channel, see `ImageData.mean`.
            std: Per channel, see `ImageData.std`.
            shuffle: A new order every epoch.
            seed: Of order and augmentation.
            augmentation: Functions of (images, generator), applied in this order.
            device: Where the batches are wanted.
            drop_last: Leave out a last batch that is not full, unless it is the only one.
            channels_last: Images in torch's channels_last memory format.
            num_workers: Processes that decode images in files; 0 decodes in this one.

        Raises:
            ValueError: There are no examples, or `batch_size` is below 1.
        """
        chosen = np.array(range(len(split)) if indices is None else indices, dtype=np.int64)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if len(chosen) == 0:
            raise ValueError("there are no examples to make batches of")
        self.num_examples = len(chosen)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._shuffle, self._seed, self._augmentation = shuffle, seed, tuple(augmentation)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._bounds = _bounds(len(chosen), batch_size, drop_last)
        self._source = _source(split, chosen, _Normalise(mean, std, self.device), num_workers)
        self._generator = torch.Generator(self.device)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._bounds)

    @property
    def samples_per_epoch(self) -> int:
        """Examples that one epoch goes through."""
        return self._bounds[-1][1]

    def order(self, epoch: int) -> Indices | None:
        """Positions within `indices` in the order of `epoch`; None for the order as given."""
        if not self._shuffle:
            return None
        seeds = np.random.SeedSequence([self._seed, _ORDER_STREAM, epoch])
        return np.random.Generator(np.random.PCG64(seeds)).permutation(self.num_examples)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, from batch number `start` on."""
        bounds = self._bounds[start:]
        batches = self._source(self.order(epoch), bounds)
        if self._augmentation:
            seeds = np.random.SeedSequence([self._seed, _AUGMENTATION_STREAM, epoch])
            draws = seeds.generate_state(len(self._bounds), np.uint64) >> np.uint64(1)
            batches = self._augmented(batches, draws[start:])
        for images, labels in batches:
            yield images.contiguous(memory_format=self._format), labels

    def _augmented(self, batches: Iterator[Batch], seeds: NDArray[np.uint64]) -> Iterator[Batch]:
        for (images, labels), seed in zip(batches, seeds.tolist(), strict=True):
            self._generator.manual_seed(seed)
            for augment in self._augmentation:
                images = augment(images, self._generator)
            yield images, labels


def fixed_batches(
    split: Split,
    indices: Indices | Sequence[int] | None,
    batch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """The unaugmented batches of `split` at `indices`, in that order, held on `device`.

    What landscape measurements run on: the same tensors every time they are asked for.
    """
    batches = Batches(split, indices, batch_size=batch_size, mean=mean, std=std, device=device)
    return list(batches.epoch(0))


def _bounds(count: int, batch_size: int, drop_last: bool) -> list[tuple[int, int]]:
    """Where each batch starts and stops in the epoch's order."""
    stops = list(range(batch_size, count + 1, batch_size)) or [count]
    rest = count - stops[-1]
    if rest == 1 and batch_size > 1 and not drop_last:
        stops[-1] = count
    elif rest and not drop_last:
        stops.append(count)
    return list(itertools.pairwise([0, *stops]))


class _Source(Protocol):
    """Yields normalised batches on the device, for positions in the order given."""

    def __call__(
        self, order: Indices | None, bounds: Sequence[tuple[int, int]]
    ) -> Iterator[Batch]: ...


class _Normalise:
    """`(x / 255 - mean) / std` for uint8, `(x - mean) / std` for floats, moved to the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        means, deviations = torch.tensor(mean).double(), torch.tensor(std).double()
        self._scales = {True: 1 / (255 * deviations), False: 1 / deviations}
        self._scales = {k: v.float().view(1, -1, 1, 1).to(device) for k, v in self._scales.items()}
        self._offset = (-means / deviations).float().view(1, -1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        scale = self._scales[images.dtype == torch.uint8]
        moved = images.to(self.device, non_blocking=True)
        return moved.to(torch.float32, copy=True).mul_(scale).add_(self._offset)


def _source(split: Split, indices: Indices, normalise: _Normalise, num_workers: int) -> _Source:
    labels = torch.as_tensor(split.labels[indices], device=normalise.device)
    if isinstance(split.images, FileImages):
        return _Files(split.images.take(indices), labels, normalise, num_workers)
    device, images = normalise.device, split.images
    float_bytes = 4 * len(indices) * int(np.prod(images.shape[1:]))
    if float_bytes <= FLOAT_BYTES:
        return _Resident(normalise(_tensor(images[indices])), None, labels, None)
    if device.type == "cpu":  # the array itself is resident: share it, copy nothing
        return _Resident(_tensor(images), torch.as_tensor(indices), labels, normalise)
    chosen = images[indices]
    if fits(Split(chosen, split.labels[indices]), device):
        return _Resident(_tensor(chosen).to(device), None, labels, normalise)
    return _Host(chosen, labels, normalise)


class _Resident:
    """Images that are one tensor on the device."""

    def __init__(
        self,
        images: Tensor,
        indices: Tensor | None,
        labels: Tensor,
        normalise: _Normalise | None,
    ) -> None:
        self._images, self._indices, self._labels = images, indices, labels
        self._normalise = normalise

    def __call__(self, order: Indices | None, bounds: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        positions = None if order is None else torch.as_tensor(order, device=self._labels.device)
        for start, stop in bounds:
            where: Tensor | slice = (
                slice(start, stop) if positions is None else positions[start:stop]
            )
            rows = where if self._indices is None else self._indices[where]
            images = self._images[rows]
            yield (self._normalise(images) if self._normalise else images), self._labels[where]


class _Host:
    """Images that are too many for the device: gathered in host memory, moved batch by batch."""

    def __init__(self, images: Pixels, labels: Tensor, normalise: _Normalise) -> None:
        self._images, self._labels, self._normalise = images, labels, normalise

    def __call__(self, order: Indices | None, bounds: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        rows = np.arange(len(self._labels)) if order is None else order
        positions = torch.as_tensor(rows, device=self._labels.device)
        for start, stop in bounds:
            images = self._normalise(_tensor(self._images[rows[start:stop]]))
            yield images, self._labels[positions[start:stop]]


class _Files:
    """Images in files, decoded by torch's DataLoader."""

    def __init__(
        self, images: FileImages, labels: Tensor, normalise: _Normalise, num_workers: int
    ) -> None:
        self._images, self._labels, self._normalise = images, labels, normalise
        self._num_workers = num_workers

    def __call__(self, order: Indices | None, bounds: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        rows = np.arange(len(self._labels)) if order is None else order
        loader: DataLoader[Tensor] = DataLoader(
            _Decoded(self._images),
            batch_sampler=[rows[start:stop].tolist() for start, stop in bounds],
            num_workers=self._num_workers,
            collate_fn=_as_is,
            generator=torch.Generator(),  # else it draws from the global one
        )
        positions = torch.as_tensor(rows, device=self._labels.device)
        for (start, stop), images in zip(bounds, loader, strict=True):
            yield self._normalise(images), self._labels[positions[start:stop]]


class _Decoded(Dataset[Tensor]):
    def __init__(self, images: FileImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._images.decode([index]))[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A whole batch at once, which `DataLoader` prefers over one by one."""
        return torch.from_numpy(self._images.decode(indices))


def _as_is(batch: Any) -> Any:
    return batch


def _tensor(array: Pixels) -> Tensor:
    """A tensor on the memory of `array`. Nothing here writes to it, so read-only is welcome."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)
