"""Entropy-SGD: steps down the local entropy of the loss, which prefers wide valleys.

The local entropy at `theta` is `F(theta) = log of the integral over x of exp(-f(x) - gamma/2
|theta - x|^2)`, and `-grad F = gamma (theta - E[x])` with `x` drawn from that density. The mean is
estimated by `L` steps of stochastic gradient Langevin dynamics, each on a batch of its own:

    x <- x - eta (grad f(x) + gamma (x - theta)) + sqrt(eta) noise N(0, I),   x = theta at first
    mu <- (1 - w) mu + w x,                                                   mu = theta at first

and the base optimizer then steps from `theta` with the gradient `gamma (theta - mu)`. Chaudhari et
al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", ICLR 2017, algorithm 1; eta = .1,
w = .25 and noise = 1e-4 as in the authors' code. *Scoping*: `gamma` grows by `1 + gamma_growth`
with every step, which narrows the valley looked at. It ends at `1 / eta`, where a Langevin step
forgets where it came from; twice that would blow up.

The authors' code leaves the factor `gamma` out of the gradient and calls `learning_rate` what here
is `learning_rate * gamma`. With `L = 5` the chain covers about `2.7 eta` times the gradient of the
loss, so `gamma = 3` makes gradients of the size that SGD has, and its learning rates fit.

The loss is that without the weight decay of `base`, which acts on `theta`. A step costs `L`
gradients of `L` batches: an epoch costs what it costs with SGD, and has `L` times fewer steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llp.optim import Parameters, around
from llp.optim.wrapper import Copies, Wrapper, put_back


class EntropySGD(Wrapper):
    """Entropy-SGD around any optimizer.

    Args:
        base: Steps from `theta` with the gradient `gamma (theta - mu)`.
        inner_steps: L, at least 1.
        gamma: Of the first step, above 0.
        gamma_growth: Relative growth of gamma from step to step, at least 0.
        inner_learning_rate: eta, above 0.
        noise: Standard deviation of the thermal noise, at least 0.
        mean_weight: w, in (0, 1].
        seed: Of the noise, which comes from a generator of its own.

    Raises:
        ValueError: A value out of range.
    """

    same_batch = False

    def __init__(
        self,
        base: Optimizer,
        *,
        inner_steps: int = 5,
        gamma: float = 3.0,
        gamma_growth: float = 1e-4,
        inner_learning_rate: float = 0.1,
        noise: float = 1e-4,
        mean_weight: float = 0.25,
        seed: int = 0,
    ) -> None:
        if inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, not {inner_steps!r}")
        for name, value in {"gamma": gamma, "inner_learning_rate": inner_learning_rate}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above 0, not {value!r}")
        for name, value in {"gamma_growth": gamma_growth, "noise": noise}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, not {value!r}")
        if not 0 < mean_weight <= 1:
            raise ValueError(f"mean_weight must be above 0 and at most 1, not {mean_weight!r}")
        super().__init__(base)
        self.num_gradients = int(inner_steps)
        self.first_gamma, self.gamma_growth = gamma, gamma_growth
        self.inner_learning_rate, self.noise = inner_learning_rate, noise
        self.mean_weight, self.seed = mean_weight, seed
        self.steps_done = 0
        self._generators: dict[str, torch.Generator] = {}
        self._copies = (Copies(), Copies())
        self._clear()

    def _clear(self) -> None:
        self._moving: list[Tensor] = []
        self._anchors: list[Tensor] = []
        self._means: list[Tensor] = []

    @property
    def gamma(self) -> float:
        """Of the step in progress: `min(gamma (1 + gamma_growth)^steps_done, 1 / eta)`."""
        most = 1 / self.inner_learning_rate
        growth = self.steps_done * math.log1p(self.gamma_growth)
        return most if growth > 700 else min(self.first_gamma * math.exp(growth), most)

    @torch.no_grad()
    def move(self) -> None:
        """One Langevin step with the gradients in place now."""
        if not self._moving:
            self._moving = self.parameters_with_gradient()
            self._anchors, self._means = (copies.of(self._moving) for copies in self._copies)
        if not self._moving:
            return
        eta, moving = self.inner_learning_rate, self._moving
        pull = torch._foreach_sub(moving, self._anchors)
        torch._foreach_mul_(pull, self.gamma)
        torch._foreach_add_(
            pull, [torch.zeros_like(p) if p.grad is None else p.grad for p in moving]
        )
        torch._foreach_add_(moving, pull, alpha=-eta)
        if self.noise > 0:
            torch._foreach_add_(moving, self._draw(moving), alpha=math.sqrt(eta) * self.noise)
        torch._foreach_lerp_(self._means, moving, self.mean_weight)

    def abandon(self) -> None:
        """Puts the weights back to `theta`."""
        with torch.no_grad():
            put_back(self._moving, self._anchors)
        self._clear()

    def _finish(self) -> None:
        self.move()  # the last gradient of the chain
        put_back(self._moving, self._anchors)
        gradients = torch._foreach_sub(self._anchors, self._means) if self._moving else ()
        for parameter, gradient in zip(self._moving, gradients, strict=True):
            parameter.grad = gradient.mul_(self.gamma)
        self._clear()
        self.base.step()
        self.steps_done += 1

    def _draw(self, like: list[Tensor]) -> list[Tensor]:
        """Standard normal numbers in the shapes of `like`, one draw per device."""
        drawn: dict[str, Tensor] = {}
        used: dict[str, int] = {}
        for tensor in like:
            device = str(tensor.device)
            used[device] = used.get(device, 0) + tensor.numel()
        for device, count in used.items():
            drawn[device] = torch.randn(count, device=device, generator=self._generator(device))
            used[device] = 0
        noise = []
        for tensor in like:
            device, count = str(tensor.device), tensor.numel()
            start = used[device]
            used[device] = start + count
            noise.append(drawn[device][start : start + count].view(tensor.shape))
        return noise

    def _generator(self, device: str) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def own_state(self) -> dict[str, Any]:
        """See `Wrapper.own_state`."""
        return {
            "steps_done": self.steps_done,
            "generators": {name: g.get_state() for name, g in self._generators.items()},
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """See `Wrapper.load_own_state`. Noise goes on only on the devices it was drawn on."""
        self.abandon()
        self.steps_done = state["steps_done"]
        for device, saved in state["generators"].items():
            if torch.device(device).type == "cpu" or torch.cuda.is_available():
                self._generator(device).set_state(saved.cpu())


def entropy_sgd(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    base: str = "sgd",
    inner_steps: int = 5,
    gamma: float = 3.0,
    gamma_growth: float = 1e-4,
    inner_learning_rate: float = 0.1,
    noise: float = 1e-4,
    mean_weight: float = 0.25,
    **base_options: Any,
) -> Optimizer:
    """Entropy-SGD around the optimizer `base`, its noise seeded by torch's initial seed.

    Args:
        parameters: See `build`.
        learning_rate: Of `base`.
        weight_decay: Of `base`; it acts on `theta`.
        base: See `around`.
        inner_steps: See `EntropySGD`, as the others.
        gamma: See `EntropySGD`.
        gamma_growth: See `EntropySGD`.
        inner_learning_rate: See `EntropySGD`.
        noise: See `EntropySGD`.
        mean_weight: See `EntropySGD`.
        base_options: See `around`.

    Raises:
        ValueError: A value out of range.
        SpecError: `base` is unknown, or does not take what is given for it.
    """
    inner = around(
        base, parameters, learning_rate=learning_rate, weight_decay=weight_decay, **base_options
    )
    return EntropySGD(
        inner,
        inner_steps=inner_steps,
        gamma=gamma,
        gamma_growth=gamma_growth,
        inner_learning_rate=inner_learning_rate,
        noise=noise,
        mean_weight=mean_weight,
        seed=torch.initial_seed() % 2**63,
    )
