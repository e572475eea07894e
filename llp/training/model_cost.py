"""What a network costs to use: its size and its latency, for searches with several objectives.

Both belong to the architecture and not to its weights, so each distinct model and its options are
built once. The latency is the median time of a forward pass of one image in evaluation mode, on the
device and with the precision given, after warm-up; it compares networks on one machine and says
little about another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

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
        """`parameters` (numbers in the network) and `latency` (seconds for one image)."""
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
        model = model.to(self._device).eval()
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
