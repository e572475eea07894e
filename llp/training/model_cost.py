"""What a network costs to use: its size, its latency and the operations of a forward pass.

Size and latency are for searches with several objectives, operations for schedulers that count
them; neither is measured for the other. All belong to the architecture and not to its weights, so
each distinct model and its options are looked at once. The
latency is the median time of a forward pass of one image in evaluation mode, on the device and with
the precision given, after warm-up; it compares networks on one machine and says little about
another. Operations are counted by `torch.utils.flop_counter`: matrix products and convolutions, a
multiplication and an addition as one; the same number on every machine. They are counted on the
CPU.
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
    """Sizes, latencies and operations of the networks of one search.

    Args:
        spec: The experiment.
        data: Its images: the shape of the input and the number of classes.
        device: Where the latency is measured.
    """

    def __init__(self, spec: Spec, data: ImageData, device: torch.device | str = "cpu") -> None:
        self._spec, self._data, self._device = spec, data, torch.device(device)
        self._known: dict[tuple[str, str], dict[str, float]] = {}
        self._operations: dict[tuple[str, str], float] = {}

    def __call__(self, hyperparameters: Mapping[str, HyperparameterValue]) -> dict[str, float]:
        """`parameters` of the network and `latency` (seconds) for one image.

        Raises:
            Exception: Whatever the network raises that cannot be built or run.
        """
        recipe = Recipe.of(self._spec, hyperparameters)
        key = _architecture(recipe)
        if key not in self._known:
            self._known[key] = self._measure(recipe)
        return self._known[key]

    def operations(self, hyperparameters: Mapping[str, HyperparameterValue]) -> float:
        """Multiply-adds of a forward pass of one image.

        Raises:
            Exception: Whatever the network raises that cannot be built, or run on the CPU.
        """
        recipe = Recipe.of(self._spec, hyperparameters)
        key = _architecture(recipe)
        if key not in self._operations:
            self._operations[key] = _count(self._build(recipe), self._data)
        return self._operations[key]

    def _build(self, recipe: Recipe) -> nn.Module:
        data = self._data
        with torch.random.fork_rng(devices=[]):
            model = recipe.build_model(
                channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
            )
        return model.eval()

    def _measure(self, recipe: Recipe) -> dict[str, float]:
        data, model = self._data, self._build(recipe).to(self._device)
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
        }


def _architecture(recipe: Recipe) -> tuple[str, str]:
    return recipe.model, repr(sorted(recipe.model_options.items()))


def _count(model: nn.Module, data: ImageData) -> float:
    image = torch.zeros(1, data.channels, data.image_size, data.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return float(counter.get_total_flops()) / 2
