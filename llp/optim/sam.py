"""Sharpness-aware minimization: gradients taken at the worst point nearby.

SAM: the step from `theta` is made with the gradient at `theta + e`, where `e = rho g / |g|` and `g`
is the batch gradient at `theta`. Foret et al., "Sharpness-Aware Minimization for Efficiently
Improving Generalization", ICLR 2021, equations 2 and 3; rho = .05 is the paper's for CIFAR.

ASAM: `e = rho T^2 g / |T g|` with `T = diag(|theta| + eta)`, a ball in which every weight moves in
proportion to its size. Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for
Scale-Invariant Learning of Deep Neural Networks", ICML 2021, equation 12; rho = .5 and eta = .01
are theirs for CIFAR-10. With eta = 0 the loss at `theta + e` does not change when layers of a ReLU
network are rescaled against each other.

Norms are over all parameters together. A step costs two gradients of the same batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llp.optim import Parameters, around
from llp.optim.wrapper import Copies, Wrapper, put_back, total_norm

TINY = 1e-12
"""Added to the norm of the gradient, so that no gradient means no move."""


class SharpnessAware(Wrapper):
    """SAM around any optimizer. Weights come back bit-identical before `base` makes the step.

    Args:
        base: Makes the step from `theta` with the gradient at `theta + e`.
        rho: Radius, above 0; a parameter group may have a `rho` of its own.
        adaptive: ASAM instead of SAM.
        eta: Of ASAM: added to `|theta|`, at least 0.

    Raises:
        ValueError: A value out of range.
    """

    num_gradients = 2

    def __init__(
        self, base: Optimizer, *, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01
    ) -> None:
        if not 0 < rho < float("inf"):
            raise ValueError(f"rho must be finite and above 0, not {rho!r}")
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta must be finite and at least 0, not {eta!r}")
        super().__init__(base, {"rho": rho})
        self.adaptive, self.eta = adaptive, eta
        self._moved: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._copies = Copies()

    @torch.no_grad()
    def move(self) -> None:
        """Goes to `theta + e`."""
        if self._moved:
            raise RuntimeError("move() was called twice: a step of SAM takes two gradients")
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []  # changed in place: new ones come before the step
        counts = []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    parameters.append(parameter)
                    gradients.append(gradient)
            counts.append(len(parameters))
        if not parameters:
            return
        self._moved, self._saved = parameters, self._copies.of(parameters)
        scales: list[Tensor] = []
        if self.adaptive:
            scales = list(torch._foreach_abs(parameters))
            torch._foreach_add_(scales, self.eta)
            torch._foreach_mul_(gradients, scales)
        norm = total_norm(gradients) + TINY
        start = 0
        for group, stop in zip(self.param_groups, counts, strict=True):
            here, directions = parameters[start:stop], gradients[start:stop]
            if here:
                length = (group["rho"] / norm).to(here[0].device)
                torch._foreach_mul_(directions, length)
                if self.adaptive:
                    torch._foreach_addcmul_(here, directions, scales[start:stop])
                else:
                    torch._foreach_add_(here, directions)
            start = stop

    @torch.no_grad()
    def abandon(self) -> None:
        """Puts the weights back to `theta`."""
        put_back(self._moved, self._saved)
        self._moved, self._saved = [], []

    def _finish(self) -> None:
        if not self._moved and self.parameters_with_gradient():
            raise RuntimeError(
                "SAM needs two gradients for a step: call move() and compute the second before "
                "step(), or pass step() a closure"
            )
        self.abandon()
        self.base.step()


def sam(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    base: str = "sgd",
    rho: float = 0.05,
    **base_options: Any,
) -> Optimizer:
    """SAM around the optimizer `base`.

    Args:
        parameters: See `build`.
        learning_rate: Of `base`.
        weight_decay: Of `base`; it acts at `theta`.
        base: See `around`.
        rho: Radius of the ball, above 0.
        base_options: See `around`.

    Raises:
        ValueError: A value out of range.
        SpecError: `base` is unknown, or does not take what is given for it.
    """
    inner = around(
        base, parameters, learning_rate=learning_rate, weight_decay=weight_decay, **base_options
    )
    return SharpnessAware(inner, rho=rho)


def asam(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    base: str = "sgd",
    rho: float = 0.5,
    eta: float = 0.01,
    **base_options: Any,
) -> Optimizer:
    """ASAM around the optimizer `base`. Arguments as `sam`, with `eta` at least 0.

    Raises:
        ValueError: A value out of range.
        SpecError: `base` is unknown, or does not take what is given for it.
    """
    inner = around(
        base, parameters, learning_rate=learning_rate, weight_decay=weight_decay, **base_options
    )
    return SharpnessAware(inner, rho=rho, adaptive=True, eta=eta)
