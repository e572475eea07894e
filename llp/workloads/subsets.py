"""Nested, class-balanced subsets of the training set.

One order of the examples is drawn once; the subset of size n is its first n entries, so a smaller
subset is always part of a larger one. Within every prefix each class c of size N_c has

    | count_c(n) - n N_c / N | <= 1 - 1 / (2 k - 2) < 1        (k classes, N examples)

which for equal classes means counts that differ by at most one. Such an order exists for any sizes:
R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), theorem 1; it is
found by giving each class's j-th example a window of positions and serving the earliest deadline
first: G. Steiner, S. Yeomans, "Level schedules for mixed-model, just-in-time processes", Management
Science 39 (1993), section 3. All arithmetic is in integers and draws come from PCG64, so the order
is the same on every machine.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from llp.workloads.images import Indices

_ORDER_STREAM, _VALIDATION_STREAM = 1, 2


def nested_order(labels: NDArray[np.integer], *, seed: int) -> Indices:
    """A permutation of the examples, each prefix of which holds every class in proportion.

    Args:
        labels: Class of each example, int [N].
        seed: Draws which examples of a class come first, and the order of classes among equals.

    Returns:
        Indices into `labels`, int64 [N].
    """
    return _order(np.asarray(labels), np.random.SeedSequence([seed, _ORDER_STREAM]))


def split_validation(
    labels: NDArray[np.integer], *, fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Train and validation indices, disjoint, together everything, both in ascending order.

    Validation gets `round(fraction * N)` examples in proportion to the classes, at least one, and
    never the last example of a class.

    Raises:
        ValueError: `fraction` is outside (0, 1) or there are fewer than two examples.
    """
    labels = np.asarray(labels)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction:g} is outside (0, 1)")
    if len(labels) < 2:
        raise ValueError(f"cannot split {len(labels)} example(s)")
    order = _order(labels, np.random.SeedSequence([seed, _VALIDATION_STREAM]))
    size = min(max(1, round(fraction * len(labels))), len(labels) - 1)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[:size]] = True
    for label in np.setdiff1d(labels, labels[~chosen]):  # classes that went to validation whole
        chosen[np.flatnonzero(labels == label)[0]] = False
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _order(labels: NDArray[np.integer], seeds: np.random.SeedSequence) -> Indices:
    if len(labels) == 0:
        return np.zeros(0, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(seeds))
    classes, positions = np.unique(labels, return_inverse=True)
    members = [generator.permutation(np.flatnonzero(positions == c)) for c in range(len(classes))]
    sizes = [len(m) for m in members]
    if len(set(sizes)) == 1:
        # Equal classes: one example of each per round, in a new order every round.
        rounds = np.stack(members, axis=1)
        return generator.permuted(rounds, axis=1).ravel().astype(np.int64)
    priority = generator.permutation(len(classes))
    sequence = _level_sequence(sizes, [int(p) for p in priority])
    taken = [0] * len(classes)
    order = np.empty(len(labels), dtype=np.int64)
    for position, c in enumerate(sequence):
        order[position] = members[c][taken[c]]
        taken[c] += 1
    return order


def _level_sequence(sizes: list[int], priority: list[int]) -> list[int]:
    """Class of each position: the j-th example of a class is placed within its window.

    With B = 1 - 1/(2k-2) the j-th example of class c may not come before position
    ceil((j - B) N / N_c), and must have come by position floor((j - 1 + B) N / N_c) + 1.
    """
    total, scale = sum(sizes), 2 * len(sizes) - 2
    slack = scale - 1  # B times scale

    def release(c: int, j: int) -> int:
        return max(1, -(-(j * scale - slack) * total // (sizes[c] * scale)))

    def deadline(c: int, j: int) -> int:
        return ((j - 1) * scale + slack) * total // (sizes[c] * scale) + 1

    waiting = [(release(c, 1), c, 1) for c in range(len(sizes))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int, int]] = []
    sequence = []
    for position in range(1, total + 1):
        while waiting and waiting[0][0] <= position:
            _, c, j = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(c, j), priority[c], c, j))
        _, _, c, j = heapq.heappop(ready)
        sequence.append(c)
        if j < sizes[c]:
            heapq.heappush(waiting, (release(c, j + 1), c, j + 1))
    return sequence
