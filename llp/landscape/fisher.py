"""The Fisher matrices as linear operators: second moments of gradients of single examples.

Both are `sum_n J_n' s_n s_n' J_n` with `s` the slope of an example's loss with respect to its
outputs:
- empirical Fisher: at the true target, so `sum_n g_n g_n'` (Kunstner et al. 2019, section 2). It is
  not the Fisher matrix.
- Monte-Carlo Fisher (Martens 2020, section 9): at targets drawn from the model's own prediction.
  Its expectation is the Gauss-Newton matrix, also where the loss is a multiple of the negative
  log-likelihood (a mean over classes or positions).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from llp.landscape.data import Batch
from llp.landscape.devices import on_devices
from llp.landscape.operators import Curvature
from llp.landscape.outputs import Form, OutputCurvature
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.products import CurvatureOptions

Likelihood = Literal["auto", "categorical", "gaussian", "bernoulli"]


class EmpiricalFisher(OutputCurvature):
    """The second moment of the examples' gradients; made by `empirical_fisher`."""

    def form(self, outputs: Tensor, batch: Batch) -> Form:
        """The outer product of the slopes at the true targets."""
        slopes = self.slopes(outputs, batch.targets, batch.size)
        return self.outer_form(slopes[None], self.share())


class MonteCarloFisher(OutputCurvature):
    """The second moment of gradients at drawn targets; made by `monte_carlo_fisher`."""

    draws = True

    def __init__(
        self,
        *arguments: Any,
        num_samples: int = 1,
        likelihood: Likelihood = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        self._num_samples = num_samples
        self._likelihood = likelihood_of(self._loss_fn) if likelihood == "auto" else likelihood
        self._seed = seed
        self._generator = torch.Generator()
        self.rewind()

    def rewind(self) -> None:
        """Every pass draws the same targets, example by example, however they are batched."""
        self._generator.manual_seed(self._seed)

    def form(self, outputs: Tensor, batch: Batch) -> Form:
        """The outer products of the slopes at drawn targets."""
        drawn = self._drawn(outputs, batch.targets)
        slopes = torch.stack([self.slopes(outputs, targets, batch.size) for targets in drawn])
        factor = self._factor(slopes, outputs, drawn)
        return self.outer_form(slopes, self.share() / self._num_samples / factor)

    def _factor(self, slopes: Tensor, outputs: Tensor, drawn: list[Tensor]) -> float:
        """How many times the negative log-likelihood the loss is.

        A mean over positions or classes is less than that of an example. The slope of the
        log-likelihood itself is the prediction less the drawn target.
        """
        if self._likelihood == "gaussian":  # the deviation has it already
            return 1.0
        if self._likelihood == "categorical":
            predicted = outputs.double().softmax(1)
            classes = outputs.shape[1]
            aims = [functional.one_hot(each, classes).movedim(-1, 1) for each in drawn]
        else:
            predicted, aims = outputs.double().sigmoid(), drawn
        plain = sum(float((predicted - aim).abs().sum()) for aim in aims)
        return float(slopes.double().abs().sum()) / plain if plain > 0 else 1.0

    def _drawn(self, outputs: Tensor, targets: Any) -> list[Tensor]:
        """Targets `[B, ...]`, one set per sample.

        Uniform numbers are drawn with the example as the first dimension, so that the stream does
        not depend on how examples are batched, and turned into targets by inversion.
        """
        size = len(outputs)
        entries = outputs[0].numel()
        if self._likelihood == "categorical":
            entries //= outputs.shape[1]
        uniform = torch.rand(
            size, self._num_samples, entries, generator=self._generator, dtype=torch.float64
        ).to(outputs.device)
        drawn = []
        for sample in uniform.unbind(1):
            if self._likelihood == "categorical":
                shape = (size, *outputs.shape[2:])
                edges = outputs.double().softmax(1).cumsum(1).movedim(1, -1).contiguous()
                heights = sample.reshape(*shape, 1).contiguous()
                labels = torch.searchsorted(edges, heights).squeeze(-1)
                drawn.append(labels.clamp_max(outputs.shape[1] - 1))
                continue
            numbers = sample.reshape(outputs.shape)
            if self._likelihood == "bernoulli":
                drawn.append((numbers < outputs.double().sigmoid()).to(outputs.dtype))
            else:
                noise = torch.special.ndtri(numbers.clamp(1e-15, 1 - 1e-15))
                scale = self._deviation(outputs, targets)
                drawn.append(outputs + (noise * scale).to(outputs.dtype))
        return drawn

    def _deviation(self, outputs: Tensor, targets: Any) -> Tensor:
        """The standard deviation of the Gaussian whose log-likelihood the loss is.

        `1 / sqrt(c)` for an example's loss `c / 2 |z - y|^2`; c is the loss's own second
        derivative.
        """
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss_fn(leaf, targets)
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), leaf)
        scale = 1 if self.reduction == "sum" else len(outputs)
        return (curvature.double() * scale).rsqrt()


def likelihood_of(loss_fn: LossFunction) -> Likelihood:
    """The distribution of targets that a known loss is the log-likelihood of.

    Raises:
        ValueError: The loss is not known.
    """
    if loss_fn is functional.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss):
        return "categorical"
    if loss_fn is functional.mse_loss or isinstance(loss_fn, nn.MSELoss):
        return "gaussian"
    known = functional.binary_cross_entropy_with_logits
    if loss_fn is known or isinstance(loss_fn, nn.BCEWithLogitsLoss):
        return "bernoulli"
    raise ValueError(
        "the likelihood behind this loss is not known; give likelihood='categorical' (logits, "
        "classes in dimension 1), 'gaussian' (squared error) or 'bernoulli' (logits)"
    )


def empirical_fisher(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    **options: Unpack[CurvatureOptions],
) -> Curvature:
    """The mean of `g g'` over the gradients `g` of the single examples' losses.

    Options as in `hessian`; the sum for a loss that is a sum. The loss must treat the examples of a
    batch independently, and the network must return one tensor whose first dimension is theirs.
    """
    return on_devices(EmpiricalFisher, model, loss_fn, batches, options)


def monte_carlo_fisher(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    num_samples: int = 1,
    likelihood: Likelihood = "auto",
    seed: int = 0,
    **options: Unpack[CurvatureOptions],
) -> Curvature:
    """The Fisher matrix with targets drawn from the model's own prediction.

    One operator is one draw: its products are those of one fixed matrix. Other options as in
    `hessian`; give each process of a group another seed.

    Args:
        model: Returns one tensor whose first dimension is the examples'.
        loss_fn: A log-likelihood, up to a factor.
        batches: Their targets are only used to find the scale of a Gaussian.
        num_samples: Targets drawn for each example.
        likelihood: What they are drawn from; `auto` for cross-entropy, squared error and binary
            cross-entropy with logits from `torch.nn`.
        seed: Of the draws.

    Raises:
        ValueError: The likelihood is not known, or `num_samples` is below 1.
    """
    drawing = {"num_samples": num_samples, "likelihood": likelihood, "seed": seed}
    return on_devices(MonteCarloFisher, model, loss_fn, batches, options, drawing)
