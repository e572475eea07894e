"""One curvature matrix over several devices of one host.

Every device has its own copy of the network and its own share of the batches. A product sends the
vector to all of them, lets each multiply its share in a thread of its own, and adds the results on
the first: one reduction of `[P]` (or `[P, K]`) per product. Shares are weighted by their examples,
so they may be uneven. Weights changed in the original are copied before the next product.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.engines import Plan
from llp.landscape.operators import Curvature, stamp
from llp.landscape.passes import Batches, LossFunction, iterate
from llp.landscape.products import BatchwiseCurvature, CurvatureOptions


class SeveralDevices(Curvature):
    """The weighted sum of operators on several devices; made with the option `devices`.

    Attributes:
        shares: The operator of each device.
    """

    def __init__(
        self,
        model: nn.Module,
        shares: Sequence[BatchwiseCurvature],
        weights: Sequence[float],
        parameters: Any,
    ) -> None:
        super().__init__(model, parameters)
        self.shares = list(shares)
        self._weights = list(weights)
        self._stamp = stamp(self.model)
        self._pool = ThreadPoolExecutor(len(self.shares))

    @property
    def num_examples(self) -> int:
        """Examples of all devices."""
        return sum(share.num_examples for share in self.shares)

    @property
    def plan(self) -> Plan | None:
        """Of the first device."""
        return self.shares[0].plan

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The evaluation state of every copy."""
        with contextlib.ExitStack() as stack:
            for share in self.shares:
                stack.enter_context(share.session())
            yield

    def release(self) -> None:
        """Frees the kept graphs of all devices."""
        for share in self.shares:
            share.release()

    def hint(self) -> Tensor:
        """The gradient over all devices."""
        with self.session():
            self._follow()
            return self._weighted([share.hint() for share in self.shares])

    def product(self, rows: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The weighted sum of the devices' products, on the first device."""
        self._follow()
        before = max(share.num_gradients for share in self.shares)

        def work(share: BatchwiseCurvature) -> Tensor:
            return share.product(rows.to(share.device, non_blocking=True), slots)

        if all(share.plan is not None and share.plan.engine != "forward" for share in self.shares):
            products = list(self._pool.map(work, self.shares))
        else:  # planning times the device; forward mode knows one thread at a time
            products = [work(share) for share in self.shares]
        self.num_gradients += max(share.num_gradients for share in self.shares) - before
        return self._weighted(products)

    def _weighted(self, parts: Sequence[Tensor]) -> Tensor:
        first = self.shares[0]
        weights = [1.0] * len(parts) if first.reduction == "sum" else self._weights
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total += part.to(first.device) * weight
        return total.to(self.device)

    def _follow(self) -> None:
        """Copies weights that changed since the last product."""
        now = stamp(self.model)
        if now == self._stamp:
            return
        state = self.model.state_dict()
        for share in self.shares:
            share.model.load_state_dict(state)
        self._stamp = now


def on_devices(
    kind: type[BatchwiseCurvature],
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    options: CurvatureOptions,
    further: Mapping[str, Any] | None = None,
) -> Curvature:
    """The operator `kind`, its batches dealt out where `options` name several devices.

    The batches are read once then and stay on the devices.

    Raises:
        ValueError: There is no device, or there are fewer batches than devices.
    """
    given: dict[str, Any] = {**options, **(further or {})}
    devices = given.pop("devices", None)
    if devices is None:
        return kind(model, loss_fn, batches, **given)
    places = [torch.device(device) for device in devices]
    if not places:
        raise ValueError("devices is empty")
    dealt: list[list[tuple[Any, Any]]] = [[] for _ in places]
    sizes = [0] * len(places)
    for inputs, targets, size in iterate(batches, torch.device("cpu")):
        number = sizes.index(min(sizes))
        dealt[number].append((inputs, targets))
        sizes[number] += size
    if min(sizes) == 0:
        raise ValueError(
            f"{sum(map(len, dealt))} batches cannot be dealt out over {len(places)} devices"
        )
    shares = []
    for number, (place, pairs) in enumerate(zip(places, dealt, strict=True)):
        own = [next(iterate([pair], place))[:2] for pair in pairs]
        loss = copy.deepcopy(loss_fn).to(place) if isinstance(loss_fn, nn.Module) else loss_fn
        seeds = {"seed": given["seed"] + number} if "seed" in given else {}
        shares.append(kind(copy.deepcopy(model).to(place), loss, own, **{**given, **seeds}))
    total = sum(sizes)
    return SeveralDevices(model, shares, [size / total for size in sizes], given.get("parameters"))
