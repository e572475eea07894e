"""Local entropy: how much low-loss volume there is around the weights (Chaudhari et al. 2017).

`F = log E exp(-(L(theta + d) - L(theta)) / T)` over `d ~ N(0, 1 / gamma)`, that is the paper's
`log of the integral of exp(-L - gamma / 2 |theta' - theta|^2)` without the parts that do not depend
on the landscape. Near 0 is flat, very negative is sharp. At a minimum with Hessian `A` it is
`-1/2 log det(I + A / (gamma T))`.

By thermodynamic integration (Friel and Pettitt 2008) `F = -1/T` times the integral over b from 0 to
1 of `E_b[rise]`, where `E_b` is over the density `exp(-b rise / T - gamma / 2 |d|^2)`. That is
sampled by Langevin dynamics whose Gaussian part is solved exactly and whose steps are accepted or
refused (pCNL, Cotter et al. 2013, section 4): the corrected, full-batch form of SGLD, so that no
step size biases it. The standard error is over independent chains; the error of the quadrature over
b is not in it.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    perturbed,
    trainable,
)
from llp.landscape.passes import Batches, Estimate, LossFunction, value_and_gradient

_POWER = 4
"""Nodes are spread as `b = u^4`: the mean rise changes fastest where the loss counts least."""
_WANTED_ACCEPTANCE = 0.6


def local_entropy(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    gamma: float = 1e3,
    temperature: float = 1.0,
    num_chains: int = 4,
    num_nodes: int = 6,
    num_steps: int = 20,
    num_warmup: int = 10,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The local entropy of the weights; at most 0 at a minimum, and nearer to 0 the flatter.

    Costs `num_chains * num_nodes * (num_steps + num_warmup)` gradients.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        gamma: Inverse variance of the neighbourhood, > 0: its radius is about `sqrt(P / gamma)`.
        temperature: T, > 0.
        num_chains: Independent chains, at least 1; one alone has no standard error.
        num_nodes: Points of the quadrature, at least 2.
        num_steps: Steps that count at each of them, at least 1.
        num_warmup: Steps before, in which the step size settles.
        generator: CPU generator; default: seed 0.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not gamma > 0 or not temperature > 0:
        raise ValueError("gamma and temperature must be above 0")
    if min(num_chains, num_steps) < 1 or num_nodes < 2 or num_warmup < 0:
        raise ValueError("at least 1 chain, 2 nodes, 1 step and 0 warm-up steps are needed")
    started = time.perf_counter()
    generator = generator or torch.Generator().manual_seed(0)
    nodes, shares = _quadrature(num_nodes)
    with evaluation_state(model), exact_arithmetic(trainable(model)[0].device):
        chain = _Chain(model, loss_fn, batches, gamma, temperature, generator)
        found = []
        for _ in range(num_chains):
            chain.restart()
            means = [chain.mean_rise(node, num_steps, num_warmup) for node in nodes]
            found.append(-float(np.dot(shares, means)) / temperature)
    spread = float(np.std(found, ddof=1)) if num_chains > 1 else math.nan
    return Estimate(
        value=float(np.mean(found)),
        standard_error=spread / math.sqrt(num_chains),
        num_examples=chain.num_examples,
        num_gradients=chain.num_gradients,
        seconds=time.perf_counter() - started,
    )


def _quadrature(count: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1] for `b = u^4`, rising."""
    points, weights = np.polynomial.legendre.leggauss(count)
    u = (points + 1) / 2
    return (u**_POWER).tolist(), (weights / 2 * _POWER * u ** (_POWER - 1)).tolist()


class _Chain:
    """A position, and the rise of the loss and its gradient there."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        gamma: float,
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._batches = batches
        self._deviation = gamma**-0.5
        self._temperature = temperature
        self._generator = generator
        self._zero = torch.zeros_like(flatten(trainable(model)))
        self.num_gradients = 0
        self.num_examples = 0
        self._base, _ = self._look(self._zero)
        self._delta = 0.5

    def restart(self) -> None:
        """A new position, exact for b = 0."""
        self._position = self._noise() * self._deviation
        self._loss, self._slope = self._look(self._position)
        self._delta = 0.5

    def mean_rise(self, b: float, num_steps: int, num_warmup: int) -> float:
        """Mean rise of the loss at inverse temperature `b`, moving on from where the chain is."""
        total = 0.0
        for number in range(num_warmup + num_steps):
            accepted = self._step(b / self._temperature)
            if number < num_warmup:
                pull = accepted - _WANTED_ACCEPTANCE
                self._delta = min(1.9, self._delta * math.exp(pull / math.sqrt(number + 1)))
            else:
                total += self._loss - self._base
        return total / num_steps

    def _step(self, weight: float) -> float:
        """One proposal; the chance with which it was accepted.

        With the reference measure N(0, C), C = 1 / gamma, and potential `weight * loss`.
        """
        delta, variance = self._delta, self._deviation**2
        mean = ((2 - delta) * self._position - 2 * delta * variance * weight * self._slope) / (
            2 + delta
        )
        noise = self._noise() * (self._deviation * math.sqrt(8 * delta) / (2 + delta))
        proposal = mean + noise
        loss, slope = self._look(proposal)
        forward = self._rate(self._position, proposal, self._loss, self._slope, weight)
        back = self._rate(proposal, self._position, loss, slope, weight)
        ratio = forward - back
        chance = math.exp(min(0.0, ratio)) if math.isfinite(ratio) else 0.0
        if float(torch.rand((), generator=self._generator, dtype=torch.float64)) < chance:
            self._position, self._loss, self._slope = proposal, loss, slope
        return chance

    def _rate(self, u: Tensor, v: Tensor, loss: float, slope: Tensor, weight: float) -> float:
        """The function rho(u, v) of Cotter et al., section 4.3, for pCNL."""
        u, v, force = u.double(), v.double(), weight * slope.double()
        terms = (
            0.5 * ((v - u) @ force)
            + self._delta / 4 * ((u + v) @ force)
            + self._delta / 4 * self._deviation**2 * (force @ force)
        )
        return weight * loss + float(terms)

    def _look(self, position: Tensor) -> tuple[float, Tensor]:
        with perturbed(self._model, position):
            losses, slope = value_and_gradient(self._model, self._loss_fn, self._batches)
        self.num_gradients += 1
        self.num_examples = losses.num_examples
        return losses.mean, slope

    def _noise(self) -> Tensor:
        return torch.randn(len(self._zero), generator=self._generator).to(self._zero)
