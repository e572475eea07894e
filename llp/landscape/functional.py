"""A network called with other parameters than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(model: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """`model(*args)` with the parameters and buffers named in `values` replaced.

    Tied parameters are followed. `torch.func.functional_call` follows them too, but a module that
    is used twice it does not give back: it restores the second name to the replaced tensor.
    """
    given = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in values:
            given[id(tensor)] = values[name]
    places = {}
    for path, module in model.named_modules():  # each module once
        for short, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) in given:
                places[f"{path}.{short}" if path else short] = given[id(tensor)]
    return torch.func.functional_call(model, places, args, tie_weights=False)
