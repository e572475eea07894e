"""What a network costs to use: its size, its latency and the operations of a forward pass.

For searches with several objectives, and for schedulers that count operations. All belong to the
architecture and not to its weights, so each distinct model and its options are built once. The
latency is the median time of a forward pass of one image in evaluation mode, on the device and with
the precision given, after warm-up; it compares networks on one machine and says little about
another. Operations are counted by `torch.utils.flop_counter`: matrix products and convolutions, a
multiplication and an addition as one; the same number on every machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llp.records import HyperparameterValue
from llp.spec.schema import Spec
from llp.training import loop
from llp.training.recipe import Recipe
from llp.workloads.images import ImageData

WARM_UP, PASSES = 5, 30


class ModelCosts:
    """Sizes and latencies of the networks of one search.

    Args:
        spec: The experiment.
        data: Its images: the shape of the input and the number of classes.
        device: Where the latency is measured.
    """

    def __init__(self, spec: Spec, data: ImageData, device: torch.device | str = "cpu") -> None:
        self._spec, self._data, self._device = spec, data, torch.device(device)
        self._known: dict[tuple[str, str], dict[str, float]] = {}

    def __call__(self, hyperparameters: Mapping[str, HyperparameterValue]) -> dict[str, float]:
        """`parameters` of the network, `latency` (seconds) and `operations` for one image."""
        recipe = Recipe.of(self._spec, hyperparameters)
        key = (recipe.model, repr(sorted(recipe.model_options.items())))
        if key not in self._known:
            self._known[key] = self._measure(recipe)
        return self._known[key]

    def _measure(self, recipe: Recipe) -> dict[str, float]:
        data = self._data
        with torch.random.fork_rng(devices=[]):
            model = recipe.build_model(
                channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
            )
        operations = _operations(model.eval(), data)
        model = model.to(self._device)
        image = torch.zeros(1, data.channels, data.image_size, data.image_size, device=self._device)
        seconds = []
        with torch.no_grad(), loop.autocast(self._device, recipe.precision):
            for number in range(WARM_UP + PASSES):
                started = time.perf_counter()
                model(image)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                if number >= WARM_UP:
                    seconds.append(time.perf_counter() - started)
        return {
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "latency": statistics.median(seconds),
            "operations": operations,
        }


def _operations(model: nn.Module, data: ImageData) -> float:
    image = torch.zeros(1, data.channels, data.image_size, data.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return float(counter.get_total_flops()) / 2
