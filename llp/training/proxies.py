"""Training-free proxies: numbers about a network before its first step, to sort out candidates.

Each takes an untrained network, images and labels, and returns one number, larger is better, -inf
where it is not finite. They know the architecture and the initialisation only: configurations that
differ in their learning rate alone get the same number. Whether a proxy says anything about a
search is measured in that search: the page gives its rank correlation with the first rung.

`gradient_norm`: norm of the gradient of the loss (Abdelfattah et al., ICLR 2021, section 3.1).
`activation_diversity`: log det of the kernel that counts the rectifiers on whose state two images
agree (NASWOT; Mellor et al., ICML 2021, equation 2).
`jacobian_spectrum`: -sum(log(l + k) + 1 / (l + k)) over the eigenvalues l of the correlation matrix
of the input gradients of the images, k = 1e-5 (jacob_cov; Mellor et al., arXiv 2006.04647v1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import registry
from llp.records import HyperparameterValue
from llp.spec.schema import Spec
from llp.training.recipe import Recipe
from llp.workloads.batches import fixed_batches
from llp.workloads.images import ImageData
from llp.workloads.subsets import nested_order


def gradient_norm(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Euclidean norm of the gradient of the mean cross-entropy with respect to the weights."""
    loss = functional.cross_entropy(model(images), labels)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return _finite(math.sqrt(sum(float(g.double().pow(2).sum()) for g in found if g is not None)))


def activation_diversity(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Log determinant of the agreement of rectifier states between images, [N, N]."""
    agreement = torch.zeros(len(images), len(images), dtype=torch.float64)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        state = (output.detach() > 0).flatten(1).double()
        agreement.add_((state @ state.T + (1 - state) @ (1 - state).T).cpu())

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.GELU | nn.SiLU)
    ]
    if not handles:
        return -math.inf
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    sign, logarithm = torch.linalg.slogdet(agreement)
    return _finite(float(logarithm)) if sign > 0 else -math.inf


def jacobian_spectrum(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How different the input gradients of different images are."""
    inputs = images.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    rows = gradient.flatten(1).double()
    correlation = torch.corrcoef(rows).cpu()
    if not bool(torch.isfinite(correlation).all()):
        return -math.inf
    eigenvalues = torch.linalg.eigvalsh(correlation).clamp(min=0) + 1e-5
    return _finite(-float((eigenvalues.log() + 1 / eigenvalues).sum()))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


class ProxyScores:
    """A proxy of the configurations of one search, on the first training images.

    Args:
        spec: The experiment, with `searcher.proxy`.
        data: Its images.
    """

    def __init__(self, spec: Spec, data: ImageData) -> None:
        asked = spec.searcher.proxy
        assert asked is not None
        self._spec, self._data = spec, data
        self._score = registry.load("proxies", asked.name)
        order = nested_order(data.train.labels, seed=spec.seed)[: asked.num_examples]
        batches = fixed_batches(
            data.train, order, batch_size=len(order), mean=data.mean, std=data.std
        )
        self._images, self._labels = next(iter(batches))
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, hyperparameters: Mapping[str, HyperparameterValue]) -> float:
        """The proxy of a configuration; networks that are built alike are judged once."""
        recipe = Recipe.of(self._spec, hyperparameters)
        key = (recipe.model, repr(sorted(recipe.model_options.items())))
        if key not in self._known:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._spec.seed)
                model = recipe.build_model(
                    channels=self._data.channels,
                    image_size=self._data.image_size,
                    num_classes=self._data.num_classes,
                )
                self._known[key] = self._score(model.train(), self._images, self._labels)
        return self._known[key]
