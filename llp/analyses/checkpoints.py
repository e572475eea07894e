"""Weights from files, of this package and of others, put into a network or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llp.errors import CheckpointError
from llp.training import checkpoint

_HOLDERS = ("model", "state_dict", "model_state_dict", "net", "weights")
"""Keys under which training scripts keep the weights."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What wrappers put in front of every name."""


def weights_in(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by name in what a checkpoint file holds.

    Raises:
        CheckpointError: There are none.
    """
    for holder in _HOLDERS:
        inner = state.get(holder)
        if isinstance(inner, Mapping) and _tensors(inner):
            return _tensors(inner)
    found = _tensors(state)
    if not found:
        raise CheckpointError(
            f"checkpoint {path} holds no weights: expected a state dict, alone or under one of "
            f"{', '.join(_HOLDERS)}; it has {', '.join(sorted(map(str, state))[:8]) or 'nothing'}"
        )
    return found


def fitted(
    model: nn.Module, weights: Mapping[str, Tensor], path: Path, network: str = ""
) -> dict[str, Tensor]:
    """`weights` under the names of `model`, wrappers' prefixes taken off.

    Args:
        model: Not changed.
        weights: Tensors by name.
        path: The file they are from, for the message.
        network: Its name, for the message.

    Raises:
        CheckpointError: They are those of another network; the message names the first tensor that
            differs.
    """
    wanted = model.state_dict()
    given = dict(weights)
    for _ in range(3):  # wrappers may be nested
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in given)), "")
        if not prefix or set(given) & set(wanted):
            break
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    faults = []
    for name, tensor in wanted.items():
        if name not in given:
            faults.append(f"{name} {_shape(tensor)} is missing in the file")
        elif given[name].shape != tensor.shape:
            faults.append(
                f"{name} is {_shape(given[name])} in the file and {_shape(tensor)} in the network"
            )
    faults += [
        f"{name} {_shape(given[name])} is only in the file" for name in given.keys() - wanted
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit the network {network or type(model).__name__}: "
            f"{faults[0]}{more};"
            " name its model and its options in the experiment"
        )
    return {name: given[name] for name in wanted}


def read(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint file; a folder of one file, or a wrong name, is said.

    Raises:
        CheckpointError: Missing, damaged, or more than plain tensors.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file")
    return checkpoint.load(path, sha256)


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
