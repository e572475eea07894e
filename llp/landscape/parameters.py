"""A model's trainable parameters as one flat vector, and the contexts that give exact bits back.

Words: *P* is the number of trainable parameters; a *flat vector* `[P]` holds them in the order of
`model.parameters()`, tied parameters once and frozen ones not at all. The parameters of one model
must share one dtype and one device.
"""

from __future__ import annotations

import contextlib
import difflib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The distinct parameters of `model` that require gradients.

    Raises:
        ValueError: There are none, or they differ in dtype or device.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    kinds = {(parameter.dtype, parameter.device) for parameter in found}
    if len(kinds) > 1:
        raise ValueError(
            f"parameters must share one dtype and one device, not {sorted(map(str, kinds))}"
        )
    return found


Selection = Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which parameters: names of parameters or modules, or a predicate of name and owning module."""


def selected(model: nn.Module, parameters: Selection = None) -> dict[str, nn.Parameter]:
    """The trainable parameters that are meant, by name, in the order of `model.parameters()`.

    Args:
        model: Frozen parameters are left out; a tied parameter goes by its first name.
        parameters: None for all. Names: of parameters (`layer1.weight`) or of modules (`layer1`,
            which stands for all parameters inside). A predicate gets the full name of a parameter
            and the module that owns it, for example
            `lambda name, module: isinstance(module, nn.Conv2d)`.

    Raises:
        ValueError: A name does not exist or is frozen, nothing is left, or the trainable parameters
            differ in dtype or device.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> list(selected(model, ["2", "0.bias"]))
    ['0.bias', '2.weight', '2.bias']
    """
    trainable(model)
    names: dict[int, str] = {}
    wanted: set[int] = set()
    asked = {} if parameters is None or callable(parameters) else dict.fromkeys(parameters, 0)
    known: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for short, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            name = f"{path}.{short}" if path else short
            names.setdefault(id(parameter), name)
            ancestors = [name[:end] for end, letter in enumerate(name) if letter == "."]
            known.update(ancestors, [name])
            if parameters is None:
                meant = True
            elif callable(parameters):
                meant = bool(parameters(name, module))
            else:
                meant = False
                for part in [*ancestors, name]:
                    if part in asked:
                        asked[part] += 1
                        meant = True
            if meant:
                wanted.add(id(parameter))
    for name, count in asked.items():
        if count == 0:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no trainable parameter or module is called {name!r}{hint}")
    found = {
        names[id(parameter)]: parameter
        for parameter in model.parameters()
        if id(parameter) in wanted
    }
    if not found:
        raise ValueError("the selection leaves no trainable parameter")
    return found


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` as one new contiguous vector.

    >>> flatten([torch.ones(2, 1), torch.zeros(1)])
    tensor([1., 1., 0.])
    """
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the last dimension of `vector` with the shapes of `like`.

    A vector `[P]` gives tensors shaped as in `like`; a block `[K, P]` puts K in front of each.

    Raises:
        ValueError: The last dimension is not the number of elements in `like`.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.shape[-1] != sum(sizes):
        raise ValueError(f"expected {sum(sizes)} entries, got {vector.shape[-1]}")
    parts = torch.split(vector, sizes, dim=-1)
    return [
        part.reshape(*vector.shape[:-1], *tensor.shape)
        for part, tensor in zip(parts, like, strict=True)
    ]


@contextlib.contextmanager
def perturbed(model: nn.Module, vector: Tensor) -> Iterator[None]:
    """The model at theta + `vector` `[P]`; afterwards the very same parameter storage is back.

    The parameters are pointed at new storage instead of being added to and subtracted from, because
    (theta + v) - v is not theta in floating point.

    Raises:
        ValueError: `vector` does not have P entries.
    """
    parameters = trainable(model)
    steps = unflatten(vector, parameters)
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter, base, step in zip(parameters, kept, steps, strict=True):
            parameter.data = base + step.to(base)
        yield
    finally:
        for parameter, base in zip(parameters, kept, strict=True):
            parameter.data = base


@contextlib.contextmanager
def evaluation_state(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards everything is bit-identical to before, also on an error.

    Restored: every module's training flag, parameters, buffers (also replaced ones),
    `requires_grad`, `.grad`, and the random states of torch (CPU and CUDA), numpy and `random`.
    Parameters and buffers are written only where they changed, so that graphs kept by an operator
    stay valid. Costs one copy of the model's tensors.
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    kept = [_Kept(module) for module in modules]
    random_state = _random_state()
    try:
        model.eval()
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for state in kept:
            state.restore()
        _set_random_state(random_state)


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bfloat16 in float32 products, attention without fused kernels.

    TF32 errs by about 2 % in a Hessian product, and fused attention has no second derivative. The
    settings of the process are put back afterwards.
    """
    backends: list[Any] = [torch.backends.cuda.matmul]
    for library in (torch.backends.cudnn, torch.backends.mkldnn):
        names = ("matmul", "conv", "rnn")
        backends += [getattr(library, name) for name in names if hasattr(library, name)]
    switches = [(backend, backend.fp32_precision) for backend in backends]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        try:
            for backend, _ in switches:
                backend.fp32_precision = "ieee"
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for backend, value in switches:
                backend.fp32_precision = value


class _Kept:
    """References to and copies of what one module itself holds."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = {
            name: (parameter, parameter.requires_grad, _copy(parameter), parameter.grad)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self.grads = {
            name: _copy(parameter.grad)
            for name, (parameter, *_) in self.parameters.items()
            if parameter.grad is not None
        }
        self.buffers = dict(module._buffers)
        self.buffer_copies = {
            name: _copy(buffer) for name, buffer in self.buffers.items() if buffer is not None
        }

    def restore(self) -> None:
        for name, (parameter, requires_grad, copy, grad) in self.parameters.items():
            self.module._parameters[name] = parameter
            parameter.requires_grad_(requires_grad)
            _write_if_changed(parameter, copy)
            parameter.grad = grad
            if grad is not None:
                _write_if_changed(grad, self.grads[name])
        self.module._buffers.update(self.buffers)
        for name in set(self.module._buffers) - set(self.buffers):
            del self.module._buffers[name]
        for name, copy in self.buffer_copies.items():
            buffer = self.buffers[name]
            assert buffer is not None
            _write_if_changed(buffer, copy)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal to the bit (-0.0 and NaN told apart)."""
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    bits = _BITS[first.element_size()]
    return torch.equal(first.detach().view(bits), second.detach().view(bits))


def _write_if_changed(tensor: Tensor, copy: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != copy.shape:
            tensor.data = copy
        elif not same_bits(tensor, copy):
            tensor.copy_(copy)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])
