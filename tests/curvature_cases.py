"""Small networks, data, dense matrices and operators of known spectrum for the curvature tests."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Data = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Self-attention through `scaled_dot_product_attention`, which has fused CPU kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x.reshape(len(x), 4, 4))).chunk(3, -1)
        return self.out(functional.scaled_dot_product_attention(q, k, v).mean(1))


class Tied(nn.Module):
    """One weight used twice, one frozen layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 6)
        self.frozen = nn.Linear(6, 16)
        self.frozen.requires_grad_(False)
        self.second = nn.Linear(16, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        return self.out(torch.tanh(self.second(torch.tanh(self.frozen(x)))))


def twice(layer: nn.Module) -> nn.Module:
    """One module at two places."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), layer, nn.Tanh(), layer, nn.Linear(5, 3)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)),
    "relu_conv_bn": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    ),
    "strided_grouped_conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, dilation=1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "attention": Attention,
    "module_used_twice": lambda: twice(nn.Linear(5, 5)),
    "tied_and_frozen": Tied,
}


def network(name: str = "mlp", *, seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    stir_batch_norm(model)  # before the dtype: the same network in both precisions
    return model.to(dtype)


def stir_batch_norm(model: nn.Module) -> None:
    """Running statistics as after training, so that eval mode is not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)


def data(*sizes: int, dtype: torch.dtype = torch.float64) -> Data:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(sum(sizes), 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True))


def whole(batches: Data) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def by_vector(model: nn.Module, function: Callable[[dict[str, Tensor]], Tensor]) -> Any:
    """`function` of the parameters by name, as a function of the flat vector, and that vector."""
    values = named(model)
    shapes = [(name, value.shape, value.numel()) for name, value in values.items()]

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([size for *_, size in shapes])
        return function({n: part.reshape(s) for (n, s, _), part in zip(shapes, parts, strict=True)})

    return of_vector, torch.cat([value.flatten() for value in values.values()])


def dense_hessian(
    model: nn.Module, batches: Data, loss: Callable[..., Tensor] = functional.cross_entropy
) -> Tensor:
    """By `torch.func` on all examples at once, in eval mode.

    Column by column where a normalisation stands between layers: under `vmap`, torch 2.15's second
    derivative of layer norm is wrong (0.11 of 1.25 beside finite differences) and not symmetric.
    """
    model = copy.deepcopy(model)  # functional_call leaves a module that is used twice changed
    inputs, targets = whole(batches)
    function, vector = by_vector(
        model, lambda v: loss(torch.func.functional_call(model, v, (inputs,)), targets)
    )
    with evaluated(model):
        if not any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in model.modules()):
            return torch.func.hessian(function)(vector)
        slope = torch.func.grad(function)
        units = torch.eye(len(vector), dtype=vector.dtype)
        return torch.stack([torch.func.jvp(slope, (vector,), (unit,))[1] for unit in units])


def dense_jacobian(model: nn.Module, batches: Data) -> Tensor:
    """`[N, C, P]` of the outputs."""
    model = copy.deepcopy(model)
    inputs, _ = whole(batches)
    function, vector = by_vector(model, lambda v: torch.func.functional_call(model, v, (inputs,)))
    with evaluated(model):
        return torch.func.jacfwd(function)(vector)


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, attention without fused kernels."""
    training = model.training
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    model.train(training)


def operator(values: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random orthonormal basis."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.as_tensor(np.asarray(values, dtype=np.float64))
    size = len(diagonal)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (basis * diagonal @ basis.T).to(dtype)


def bulk(count: int = 200, scale: float = 0.5) -> list[float]:
    return list(np.random.default_rng(0).normal(0, scale, count))


class Counted:
    """A matrix that counts its products, like the operators of a network."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix, 0
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.count += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors


def by_magnitude(values: Any, k: int) -> np.ndarray:
    return np.array(sorted(values, key=lambda x: -abs(x))[:k])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
