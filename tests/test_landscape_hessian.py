"""Hessian products against the dense Hessian of `torch.func` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape.parameters import same_bits

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
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        return self.out(torch.tanh(self.second(torch.tanh(self.frozen(x)))))


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
    "attention": Attention,
    "tied_and_frozen": Tied,
}


def network(name: str = "mlp") -> nn.Module:
    torch.manual_seed(1)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def data(*sizes: int) -> Data:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(sum(sizes), 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True))


def dense(model: nn.Module, batches: Data) -> Tensor:
    """The Hessian by `torch.func` on all examples at once, columns in the order of parameters."""
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = [(name, p.shape, p.numel()) for name, p in names.items()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([size for *_, size in shapes])
        values = {n: part.reshape(s) for (n, s, _), part in zip(shapes, parts, strict=True)}
        return functional.cross_entropy(
            torch.func.functional_call(model, values, (inputs,)), targets
        )

    training = model.training
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        matrix = torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in names.values()]))
    model.train(training)
    return matrix


@pytest.mark.parametrize("retain", [True, False, "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_product_equals_dense_hessian_on_ragged_batches(name: str, retain: bool | str) -> None:
    model, batches = network(name), data(16, 4, 7)
    op = landscape.hessian(model, functional.cross_entropy, batches, retain=retain)
    truth = dense(model, batches)
    block = torch.randn(op.shape[0], 3, dtype=torch.float64)
    assert op.shape == tuple(truth.shape)
    assert (op @ block - truth @ block).abs().max() < 1e-10
    assert (op @ block[:, 0] - truth @ block[:, 0]).abs().max() < 1e-10
    assert op.num_products == 4
    assert op.num_examples == 27


def test_products_are_symmetric_and_linear() -> None:
    op = landscape.hessian(network("attention"), functional.cross_entropy, data(9, 3))
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    assert abs(float(u @ (op @ v) - v @ (op @ u))) < 1e-12
    assert (op @ (2 * u - 3 * v) - 2 * (op @ u) + 3 * (op @ v)).abs().max() < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_chunk_size_does_not_change_a_block_product(name: str) -> None:
    model, batches = network(name), data(8, 5)
    one = landscape.hessian(model, functional.cross_entropy, batches)
    many = landscape.hessian(model, functional.cross_entropy, batches, chunk_size=4)
    block = torch.randn(one.shape[0], 6, dtype=torch.float64)
    assert torch.allclose(one @ block, many @ block, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_how_examples_are_batched_does_not_matter(sizes: list[int]) -> None:
    model = network()
    whole = data(sum(sizes))
    parts = list(zip(whole[0][0].split(sizes), whole[0][1].split(sizes), strict=True))
    loss = functional.cross_entropy
    vector = torch.randn(landscape.hessian(model, loss, whole).shape[0], dtype=torch.float64)
    expected = landscape.hessian(model, loss, whole) @ vector
    assert (landscape.hessian(model, loss, parts) @ vector - expected).abs().max() < 1e-12


def test_graphs_beyond_the_budget_are_rebuilt_with_the_same_result() -> None:
    model, batches = network(), data(6, 2)
    loss = functional.cross_entropy
    kept = landscape.hessian(model, loss, batches)
    rebuilt = landscape.hessian(model, loss, batches, memory_budget=0)
    vector = torch.randn(kept.shape[0], dtype=torch.float64)
    for _ in range(3):
        assert torch.allclose(kept @ vector, rebuilt @ vector, rtol=1e-12)
    assert (kept.num_gradients, rebuilt.num_gradients) == (1, 3)
    assert kept.gradient_equivalents == 1 + 2 * 3


def test_operator_notices_weights_that_were_changed_in_place() -> None:
    model, batches = network(), data(6)
    op = landscape.hessian(model, functional.cross_entropy, batches)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    before = op @ vector
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = op @ vector
    assert not torch.allclose(before, after, rtol=1e-2)
    assert (after - dense(model, batches) @ vector).abs().max() < 1e-10


def test_loss_that_is_linear_in_the_weights_has_a_zero_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    for chunk_size in (1, 2):
        op = landscape.hessian(
            model, lambda output, _: output.mean(), data(4), chunk_size=chunk_size
        )
        assert torch.equal(op @ torch.ones(17, 2).double(), torch.zeros(17, 2).double())


def test_bias_without_curvature_gets_zeros_beside_a_weight_with_curvature() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    batches = data(4)

    def loss(output: Tensor, _: Tensor) -> Tensor:
        return (model[1].weight ** 2).sum() / 2 + model[1].bias.sum() + 0 * output.sum()

    for chunk_size in (1, 2):
        op = landscape.hessian(model, loss, batches, chunk_size=chunk_size)
        expected = torch.cat([torch.ones(16, 2), torch.zeros(1, 2)]).double()
        assert torch.equal(op @ torch.ones(17, 2).double(), expected)


def failing_after(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(count))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise FloatingPointError("loss")
        return functional.cross_entropy(output, target)

    return loss


@pytest.mark.parametrize("retain", [True, False, "auto"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_left_bit_identical(retain: bool | str, fails: bool) -> None:
    model, batches = network("relu_conv_bn").train(), data(6, 3)
    functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before = [tensor.detach().clone() for tensor in tensors]
    state = torch.get_rng_state()
    loss = failing_after(1) if fails else functional.cross_entropy
    op = landscape.hessian(model, loss, batches, retain=retain)
    vector = torch.ones(op.shape[0], dtype=torch.float64)
    if fails:
        with pytest.raises(FloatingPointError, match="loss"):
            op @ vector
    else:
        op @ vector
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_kept_graph_survives_measurements_in_between() -> None:
    model, batches = network("relu_conv_bn"), data(6)
    op = landscape.hessian(model, functional.cross_entropy, batches, retain=True)
    vector = torch.ones(op.shape[0], dtype=torch.float64)
    first = op @ vector
    landscape.sharpness.sam(model, functional.cross_entropy, batches)
    assert torch.equal(op @ vector, first)
    assert op.num_gradients == 1


def test_bad_batches_and_losses_are_refused_by_name() -> None:
    model = network()
    loss = functional.cross_entropy

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(2)

    vector = torch.ones(landscape.hessian(model, loss, data(2)).shape[0], dtype=torch.float64)
    with pytest.raises(TypeError, match="can be read only once"):
        landscape.hessian(model, loss, once()) @ vector
    with pytest.raises(ValueError, match="batches is empty"):
        landscape.hessian(model, loss, []) @ vector
    with pytest.raises(ValueError, match="batch 2 is empty"):
        landscape.hessian(model, loss, [*data(2), *data(0)]) @ vector
    with pytest.raises(ValueError, match="must return a scalar"):
        landscape.hessian(model, lambda o, t: loss(o, t, reduction="none"), data(2)) @ vector
    with pytest.raises(ValueError, match=r"not shape \(3,\)"):
        landscape.hessian(model, loss, data(2)) @ torch.ones(3)
