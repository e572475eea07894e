"""Gauss-Newton, Fisher matrices, blocks and selections against dense matrices in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from curvature_cases import (
    NETWORKS,
    Data,
    data,
    dense_hessian,
    dense_jacobian,
    evaluated,
    network,
    whole,
)
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape.operators import Curvature

cross_entropy = functional.cross_entropy
ENGINES = ["retained", "rebuild", "forward"]


def dense(op: Curvature) -> Tensor:
    return op @ torch.eye(op.shape[0], dtype=op.dtype)


def softmax_curvature(model: nn.Module, batches: Data) -> Tensor:
    """`diag(p) - p p'` of each example `[N, C, C]`: the second derivative of cross-entropy."""
    with evaluated(model), torch.no_grad():
        p = model(whole(batches)[0]).softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def example_gradients(model: nn.Module, batches: Data) -> Tensor:
    """Gradient of each example's cross-entropy `[N, P]`, one backward pass each."""
    inputs, targets = whole(batches)
    rows = []
    with evaluated(model):
        for x, y in zip(inputs, targets, strict=True):
            loss = cross_entropy(model(x[None]), y[None])
            used = [p for p in model.parameters() if p.requires_grad]
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, used)]))
    return torch.stack(rows)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_is_the_jacobian_around_the_curvature_of_the_loss(
    name: str, engine: str
) -> None:
    model, batches = network(name), data(6, 3)
    op = landscape.gauss_newton(model, cross_entropy, batches, engine=engine)
    jacobian = dense_jacobian(model, batches)
    middle = softmax_curvature(model, batches)
    truth = torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / 9
    found = dense(op)
    assert (found - truth).abs().max() < 1e-10
    assert torch.linalg.eigvalsh((found + found.T) / 2).min() > -1e-12
    assert op.num_products == op.shape[0]


@pytest.mark.parametrize("loss", [cross_entropy, functional.mse_loss])
def test_gauss_newton_of_a_linear_model_is_its_hessian(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    batches = data(5, 2)
    if loss is functional.mse_loss:
        batches = [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, _ in batches]
    truth = dense_hessian(model, batches, loss)
    assert (dense(landscape.gauss_newton(model, loss, batches)) - truth).abs().max() < 1e-12
    curved = network("mlp")
    found = dense(landscape.gauss_newton(curved, cross_entropy, data(5, 2)))
    assert (found - dense_hessian(curved, data(5, 2))).abs().max() > 1e-3  # and not otherwise


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(name: str, engine: str) -> None:
    model, batches = network(name), data(6, 3)
    op = landscape.empirical_fisher(model, cross_entropy, batches, engine=engine)
    gradients = example_gradients(model, batches)
    found = dense(op)
    assert (found - gradients.T @ gradients / 9).abs().max() < 1e-10
    assert float(found.trace()) == pytest.approx(float((gradients**2).sum(1).mean()), rel=1e-12)
    summed = landscape.empirical_fisher(
        model, nn.CrossEntropyLoss(reduction="sum"), batches, engine=engine
    )
    assert torch.allclose(dense(summed), 9 * found, rtol=1e-10, atol=1e-12)


def test_trace_of_the_fisher_matrix_is_the_mean_squared_gradient_norm() -> None:
    # PyHessian#11 asks for tr(FIM) beside tr(H): the same call takes either operator.
    model, batches = network(), data(6, 3)
    op = landscape.empirical_fisher(model, cross_entropy, batches)
    estimate = landscape.trace(op, num_probes=400)
    truth = float((example_gradients(model, batches) ** 2).sum(1).mean())
    assert abs(estimate.value - truth) < 4 * estimate.standard_error


def gaussian_data() -> Data:
    generator = torch.Generator().manual_seed(3)
    return [(x, torch.randn(len(x), 3, generator=generator).double()) for x, _ in data(6, 3)]


def binary_data() -> Data:
    return [(x, functional.one_hot(y, 3).double()) for x, y in data(6, 3)]


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (cross_entropy, lambda: data(6, 3)),
        (functional.mse_loss, gaussian_data),
        (functional.binary_cross_entropy_with_logits, binary_data),
    ],
)
def test_monte_carlo_fisher_is_unbiased_for_gauss_newton(
    loss: Callable[..., Tensor], make: Callable[[], Data]
) -> None:
    model, batches = network(), make()
    truth = dense(landscape.gauss_newton(model, loss, batches))
    vector = torch.randn(len(truth), dtype=torch.float64)
    draws = torch.stack(
        [
            landscape.monte_carlo_fisher(model, loss, batches, seed=seed, num_samples=4) @ vector
            for seed in range(120)
        ]
    )
    error = draws.std(0) / 120**0.5
    z = ((draws.mean(0) - truth @ vector) / error.clamp_min(1e-12)).abs()
    assert z.max() < 5  # the largest of about 100 standard normal numbers
    assert z.mean() < 1.2  # of all of them: 0.8


@pytest.mark.parametrize("engine", ENGINES)
def test_one_monte_carlo_fisher_is_one_matrix_however_it_is_batched(engine: str) -> None:
    model, together = network("relu_conv_bn"), data(9)
    apart = list(zip(together[0][0].split([4, 5]), together[0][1].split([4, 5]), strict=True))
    one, other = (
        landscape.monte_carlo_fisher(model, cross_entropy, d, seed=1, engine=engine)
        for d in (together, apart)
    )
    vector = torch.randn(one.shape[0], dtype=torch.float64)
    assert torch.allclose(one @ vector, other @ vector, rtol=1e-10, atol=1e-14)
    assert torch.equal(one @ vector, one @ vector)
    found = dense(one)
    assert (found - found.T).abs().max() < 1e-12


def test_a_loss_without_a_known_likelihood_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="give likelihood='categorical'"):
        landscape.monte_carlo_fisher(network(), lambda o, t: o.mean(), data(2))


OPERATORS = {
    "hessian": landscape.hessian,
    "gauss_newton": landscape.gauss_newton,
    "empirical_fisher": landscape.empirical_fisher,
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["mlp", "attention", "tied_and_frozen"])
def test_blocks_are_those_of_the_dense_matrix(name: str, kind: str) -> None:
    model, batches = network(name), data(5, 2)
    op = OPERATORS[kind](model, cross_entropy, batches)
    matrix = dense(op)
    ends = torch.tensor([0, *op.sizes().values()]).cumsum(0)
    for by in ("layer", "parameter"):
        masked = torch.zeros_like(matrix)
        for block in op.layers(by).values():
            places = torch.cat(
                [torch.arange(ends[op.names.index(n)], ends[op.names.index(n) + 1])
                 for n in block.names]
            )  # fmt: skip
            part = matrix[places][:, places]
            assert (block @ torch.eye(len(places), dtype=op.dtype) - part).abs().max() < 1e-12
            assert block.num_products == len(places)
            masked[places[:, None], places] = part
        whole_block = op.block_diagonal(by)
        found = whole_block @ torch.eye(op.shape[0], dtype=op.dtype)
        assert (found - masked).abs().max() < 1e-12


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_selection_is_the_matrix_of_the_selected_parameters(kind: str, engine: str) -> None:
    model, batches = network("relu_conv_bn"), data(5, 2)
    matrix = dense(OPERATORS[kind](model, cross_entropy, batches))
    sizes = [p.numel() for p in model.parameters()]
    starts = torch.tensor([0, *sizes]).cumsum(0)

    def places(numbers: list[int]) -> Tensor:
        return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in numbers])

    for chosen, numbers in (
        (["0"], [0, 1]),
        (["6.bias", "1.weight"], [2, 5]),
        (lambda _, module: isinstance(module, nn.Linear), [4, 5]),
    ):
        op = OPERATORS[kind](model, cross_entropy, batches, parameters=chosen, engine=engine)
        where = places(numbers)
        assert (dense(op) - matrix[where][:, where]).abs().max() < 1e-11


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_used_twice_is_given_back_between_products(kind: str, engine: str) -> None:
    model, batches = network("module_used_twice"), data(5, 2)
    weights = list(model.parameters())
    op = OPERATORS[kind](model, cross_entropy, batches, engine=engine)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    with op.session():
        first = op @ vector
        assert torch.equal(op @ vector, first)
        assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", OPERATORS)
def test_eigenvalues_of_a_layer_are_those_of_its_block(kind: str) -> None:
    # PyHessian#9 asks for curvature by layer.
    model, batches = network("mlp"), data(8, 3)
    op = OPERATORS[kind](model, cross_entropy, batches)
    block = op.layers()["3"]
    truth = torch.linalg.eigvalsh(block @ torch.eye(block.shape[0], dtype=op.dtype))
    found = landscape.top_eigenpairs(block, k=3, which="largest")
    assert found.values.tolist() == pytest.approx(truth.flip(0)[:3].tolist(), rel=1e-3)


def shuffling(batches: Data) -> object:
    class Loader:
        def __iter__(self):
            order = torch.randperm(len(batches)).tolist()
            return iter([batches[i] for i in (order if order[0] else order[::-1])])

        count = 0

    class Alternating(Loader):
        def __iter__(self):
            self.count += 1
            return iter(batches if self.count % 2 else batches[::-1])

    return Alternating()


@pytest.mark.parametrize("kind", [*OPERATORS, "monte_carlo_fisher"])
def test_a_loader_that_shuffles_is_caught(kind: str) -> None:
    model = network()
    op = getattr(landscape, kind)(model, cross_entropy, shuffling(data(4, 4)))
    with pytest.raises(landscape.NotRepeatableError, match="shuffles or augments"):
        op @ torch.randn(op.shape[0], dtype=torch.float64)


def test_a_network_that_draws_in_eval_mode_is_caught() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.randn_like(x))

    op = landscape.hessian(Noisy(), cross_entropy, data(4))
    with pytest.raises(landscape.NotRepeatableError, match="draws random numbers"):
        op @ torch.randn(op.shape[0], dtype=torch.float64)


def test_the_library_needs_neither_ray_nor_mlflow() -> None:
    import subprocess

    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from llp import landscape\n"
        "model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))\n"
        "loss_fn = nn.functional.cross_entropy\n"
        "batches = [(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0]))]\n"
        "op = landscape.hessian(model, loss_fn, batches)\n"
        "assert op.shape == (26, 26)\n"
        "assert (op @ torch.ones(26)).shape == (26,)\n"
        "assert (op @ torch.ones(26, 3)).shape == (26, 3)\n"
        "assert op.num_products == 4\n"
        "for which in ('magnitude', 'largest', 'smallest'):\n"
        "    top = landscape.top_eigenpairs(op, k=5, which=which, tolerance=1e-3)\n"
        "    assert top.vectors.shape == (26, 5) and len(top.values) == len(top.residuals) == 5\n"
        "    assert top.num_products > 0\n"
        "total = landscape.trace(op, relative_error=0.01)\n"
        "assert total.standard_error >= 0 and total.num_products > 0\n"
        "density = landscape.spectral_density(op, num_probes=8, num_steps=80)\n"
        "assert density.nodes.shape == density.weights.shape and density.num_probes == 8\n"
        "assert density.density(torch.linspace(-1, 1, 9)).shape == (9,)\n"
        "assert density.moments.shape == (5,)\n"
        "found = landscape.report(model, loss_fn, batches)\n"
        "assert abs(float(found.eigenpairs.values[0]) - float("
        "landscape.top_eigenpairs(op, k=1).values[0])) < 1e-3\n"
        "asam = landscape.sharpness.asam(model, loss_fn, batches, rho=0.5)\n"
        "assert asam.seconds > 0 and asam.value == asam.value and asam.standard_error is not None\n"
        "plane = landscape.directions.random(model)\n"
        "surface = landscape.surface(model, loss_fn, batches, directions=plane, extent=1.0, "
        "resolution=25)\n"
        "assert surface.loss.shape == (25, 25)\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('ray', 'mlflow', 'optuna')]\n"
        "assert not loaded, loaded\n"
        "own = {m.split('.')[1] for m in sys.modules if m.startswith('llp.')}\n"
        "assert own == {'landscape'}, own\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
