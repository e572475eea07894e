"""The network whose landscape is looked at, and the parts that an analysis consists of.

`examples` are fixed, unaugmented and in eval mode for every analysis; only the training of a
connecting curve sees augmented ones.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp.records import CurvePoint, Observation
from llp.spec.landscape import LandscapeSpec

Array = np.ndarray[Any, Any]
Batch = tuple[Tensor, Tensor]
Scalar = float | int | str | bool | None
EvaluateChunks = Callable[[Callable[[Array], Array], Sequence[Array]], Iterable[tuple[int, Array]]]


@dataclass(frozen=True)
class Weights:
    """Weights on disk.

    Attributes:
        label: What they are: `epoch 3`, `t007-v1`.
        path: The file.
        epoch: Completed epochs, -1 where unknown.
    """

    label: str
    path: Path
    epoch: int = -1


@dataclass
class Subject:
    """A network and what is known of it.

    Attributes:
        title: What it is, for people: `t007 of digits-84c35e8d`.
        model: On its device, in eval mode; analyses leave it bit-identical.
        batches: Fixed examples that everything is measured on.
        device: Where both are.
        fresh: Makes a newly initialised network of the same kind from a seed.
        read: Reads weights as a state dict that fits the model.
        training: `training(count, batch_size, seed)`: re-iterable, augmented, shuffled batches.
        path: Earlier weights of the same training in order, the model itself last; empty where
            there are none.
        other: Weights of an independent training.
        optimizer: Makes the optimizer at the end of the training, with its state; None where that
            was not kept.
        facts: What a reader should know, in order.
        curve: Points of the training, where it was run here or by a study.
        observations: What callbacks measured during it.
        identity: What beside the weights and examples decides the results of a part.
    """

    title: str
    model: nn.Module
    batches: Sequence[Batch]
    device: torch.device
    fresh: Callable[[int], nn.Module]
    read: Callable[[Weights], Mapping[str, Tensor]]
    training: Callable[[int, int, int], Iterable[Batch]]
    path: tuple[Weights, ...] = ()
    other: Weights | None = None
    optimizer: Callable[[], torch.optim.Optimizer] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    observations: tuple[Observation, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def loss_fn(self) -> Callable[[Any, Any], Tensor]:
        """The plain mean cross-entropy, whatever smoothing the training used."""
        return functional.cross_entropy

    @property
    def num_examples(self) -> int:
        """Examples measured on."""
        return sum(len(targets) for _, targets in self.batches)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def digest(self) -> str:
        """sha256 of the weights, the buffers and the examples."""
        sha = hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode())
        for name, tensor in self.model.state_dict().items():
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(_bytes(tensor))
        for inputs, targets in self.batches:
            sha.update(f"{tuple(inputs.shape)}".encode() + _bytes(inputs) + _bytes(targets))
        return sha.hexdigest()


@dataclass(frozen=True)
class Finding:
    """What a part found.

    Attributes:
        numbers: Key -> number, text or None; the empty key stands for the part itself.
        arrays: Key -> array.
        rows: One mapping of numbers and texts for each layer, with its `name`.
        vectors: Arrays as long as the network's weights, that other parts need; kept in the part's
            own file and not in the results.
    """

    numbers: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Scalar]] = ()
    vectors: Mapping[str, Array] = field(default_factory=dict)


@dataclass
class Work:
    """What a part is given to work with.

    Attributes:
        subject: The network.
        spec: The settings.
        found: Findings of the parts it needs.
        evaluate_chunks: Spreads points of lines and planes, and counts them.
        progress: `progress(done, total)`.
        scratch: Folder for finished chunks, removed when the part is done.
    """

    subject: Subject
    spec: LandscapeSpec
    found: Mapping[str, Finding]
    evaluate_chunks: EvaluateChunks
    progress: Callable[[int, int], None]
    scratch: Path

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator that depends on the seed of the settings and on `name` only."""
        return torch.Generator().manual_seed(derived_seed(self.spec.seed, name))


@dataclass(frozen=True)
class Part:
    """Something that is computed, stored and computed again on its own.

    Attributes:
        name: Unique, and the start of the keys of its results: `surface/random`.
        analysis: The row of `registry.ANALYSES` it belongs to.
        settings: What determines its finding, beside the subject and the parts it needs.
        compute: Computes it.
        needs: Names of parts that must be there first.
        impossible: Why it cannot be computed for this subject; empty when it can.
    """

    name: str
    analysis: str
    settings: Mapping[str, Any]
    compute: Callable[[Work], Finding]
    needs: tuple[str, ...] = ()
    impossible: str = ""


def derived_seed(seed: int, name: str) -> int:
    """A seed for one purpose."""
    return zlib.crc32(f"{seed} {name}".encode())


class Epochs:
    """Re-iterable batches: every pass is the next epoch of a shuffled, augmented loader."""

    def __init__(self, epoch: Callable[[int], Iterator[Batch]]) -> None:
        self._epoch = epoch
        self._number = 0

    def __iter__(self) -> Iterator[Batch]:
        number, self._number = self._number, self._number + 1
        return self._epoch(number)


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
