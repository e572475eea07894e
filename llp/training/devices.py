"""Which device a command runs on."""

from __future__ import annotations

import torch

from llp.errors import EnvironmentProblem, SpecError


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        EnvironmentProblem: A GPU was asked for and there is none.
        SpecError: No such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"device '{name}': choose auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            raise EnvironmentProblem(
                f"device '{name}' was asked for and CUDA sees {count} GPUs; "
                "run `llp doctor`, or use --device cpu"
            )
    return device
