"""Hessian products against the dense Hessian of `torch.func` in float64, by every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from curvature_cases import NETWORKS, data, dense_hessian, network, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from llp import landscape
from llp.landscape import engines
from llp.landscape.differentiable import TwiceDifferentiable
from llp.landscape.parameters import same_bits

ENGINES = ["retained", "rebuild", "forward"]
cross_entropy = functional.cross_entropy


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", NETWORKS)
def test_product_equals_dense_hessian_on_ragged_batches(name: str, engine: str) -> None:
    # Averaging the batches equally, as hessian-eigenthings does, is 46 % off on 16 + 4 examples.
    model, batches = network(name), data(16, 4, 7)
    op = landscape.hessian(model, cross_entropy, batches, engine=engine)
    truth = dense_hessian(model, batches)
    block = torch.randn(op.shape[0], 3, dtype=torch.float64)
    assert op.shape == tuple(truth.shape)
    assert (op @ block - truth @ block).abs().max() < 1e-10
    assert (op @ block[:, 0] - truth @ block[:, 0]).abs().max() < 1e-10
    assert op.num_products == 4
    assert op.num_examples == 27
    assert op.plan is not None
    assert op.plan.engine == (engine if engine != "auto" else "retained")


@pytest.mark.parametrize("engine", ENGINES)
def test_products_are_symmetric_and_linear(engine: str) -> None:
    op = landscape.hessian(network("attention"), cross_entropy, data(9, 3), engine=engine)
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    assert abs(float(u @ (op @ v) - v @ (op @ u))) < 1e-12
    assert (op @ (2 * u - 3 * v) - 2 * (op @ u) + 3 * (op @ v)).abs().max() < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_chunk_size_does_not_change_a_block_product(name: str, engine: str) -> None:
    model, batches = network(name), data(8, 5)
    one = landscape.hessian(model, cross_entropy, batches, engine=engine, chunk_size=1)
    many = landscape.hessian(model, cross_entropy, batches, engine=engine, chunk_size=4)
    block = torch.randn(one.shape[0], 6, dtype=torch.float64)
    assert torch.allclose(one @ block, many @ block, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["mean", "sum"]))
def test_how_examples_are_batched_does_not_matter(sizes: list[int], reduction: str) -> None:
    model, together = network(), data(sum(sizes))
    parts = list(zip(together[0][0].split(sizes), together[0][1].split(sizes), strict=True))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    once = landscape.hessian(model, loss, together)
    vector = torch.randn(once.shape[0], dtype=torch.float64)
    for budget in (None, 0):
        op = landscape.hessian(model, loss, parts, memory_budget=budget)
        assert (op @ vector - once @ vector).abs().max() < 1e-12 * sum(sizes)


def sums(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_summed_loss_is_recognised_and_gives_the_sum_of_hessians(engine: str) -> None:
    model, batches = network(), data(8, 3)
    mean = landscape.hessian(model, cross_entropy, batches, engine=engine)
    vector = torch.randn(mean.shape[0], dtype=torch.float64)
    expected = 11 * (mean @ vector)
    for loss in (sums, nn.CrossEntropyLoss(reduction="sum")):
        op = landscape.hessian(model, loss, batches, engine=engine)
        assert torch.allclose(op @ vector, expected, rtol=1e-10)
        assert op.reduction == "sum"
    # said otherwise, batches are weighted by size: 8/11 of a sum over 8 and 3/11 of one over 3
    said = landscape.hessian(model, sums, batches, engine=engine, reduction="mean")
    first, second = (landscape.hessian(model, sums, [batch]) @ vector for batch in batches)
    assert torch.allclose(said @ vector, 8 / 11 * first + 3 / 11 * second, rtol=1e-10)
    assert mean.reduction == "mean"


def test_a_loss_that_is_no_plain_mean_keeps_its_batches() -> None:
    # The mean over pairs inside a batch is another function when batches are put together.
    def contrastive(output: Tensor, _: Tensor) -> Tensor:
        return (output[:, None] - output[None]).pow(2).sum(-1).mean().log1p()

    model, batches = network(), data(4, 4, 2)
    op = landscape.hessian(model, contrastive, batches)
    parts = [
        size / 10 * dense_hessian(model, [batch], contrastive)
        for size, batch in zip((4, 4, 2), batches, strict=True)
    ]
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    assert (op @ vector - sum(parts) @ vector).abs().max() < 1e-10
    assert op.plan.fused_examples == 0
    plain = landscape.hessian(model, cross_entropy, batches)
    plain @ vector
    assert plain.plan.fused_examples >= 10


def test_inputs_may_be_nested() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.net(x["a"] + x["more"][0])

    torch.manual_seed(0)
    model, batches = Sum(), data(5, 3)
    nested = [({"a": 0.5 * x, "more": (0.5 * x,)}, y) for x, y in batches]
    op = landscape.hessian(model, cross_entropy, nested)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    assert (op @ vector - dense_hessian(model.net, batches) @ vector).abs().max() < 1e-10


def test_graphs_beyond_the_budget_are_rebuilt_with_the_same_result() -> None:
    model, batches = network(), data(6, 2)
    kept = landscape.hessian(model, cross_entropy, batches)
    rebuilt = landscape.hessian(model, cross_entropy, batches, engine="rebuild")
    auto = landscape.hessian(model, cross_entropy, batches, memory_budget=0)
    vector = torch.randn(kept.shape[0], dtype=torch.float64)
    for _ in range(3):
        assert torch.allclose(kept @ vector, rebuilt @ vector, rtol=1e-12)
        assert torch.allclose(kept @ vector, auto @ vector, rtol=1e-12)
    assert (kept.num_gradients, rebuilt.num_gradients, auto.num_gradients) == (1, 3, 3)
    assert kept.gradient_equivalents == 1 + 2 * 6
    assert auto.plan.engine in ("rebuild", "forward")
    assert set(auto.plan.seconds) == {"rebuild", "forward"}
    assert auto.plan.graph_bytes > 0 == auto.plan.memory_budget


def test_graph_bytes_are_those_that_autograd_saves() -> None:
    model, batches = network("relu_conv_bn"), data(6)
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.eval()
    parameters = list(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = cross_entropy(model(batches[0][0]), batches[0][1])
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    again = cross_entropy(model(batches[0][0]), batches[0][1])
    plain = [again, *torch.autograd.grad(again, parameters, create_graph=True)]
    found = engines.graph_bytes(plain, [*parameters, *model.buffers()])
    assert len(slopes) == len(parameters)
    assert found == sum(saved.values())


def test_a_product_with_a_kept_graph_takes_the_floor_of_two_gradients() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), *convolutions, nn.Flatten())
    batches = [(torch.randn(2, 1, 8, 8), torch.randn(2, 512))]
    op = landscape.hessian(model, functional.mse_loss, batches)
    vector = torch.randn(op.shape[0])
    op @ vector
    with FlopCounterMode(display=False) as one:
        loss = functional.mse_loss(model(batches[0][0]), batches[0][1])
        torch.autograd.grad(loss, list(model.parameters()))
    with FlopCounterMode(display=False) as two:
        op @ vector
    assert two.get_total_flops() / one.get_total_flops() < 2.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_differentiable_forms_have_the_values_of_the_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Conv2d(8, 4, (1, 3), dilation=(1, 2)),
        nn.AvgPool2d(2),
    ).to(dtype)
    model[1].running_mean.uniform_(-1, 1)
    model.eval()
    images = torch.randn(5, 3, 12, 12, dtype=dtype)

    def derivatives() -> list[Tensor]:
        parameters = list(model.parameters())
        outputs = model(images)
        outputs = outputs.view(len(outputs), -1)  # fails on a channels-last layout
        first = torch.autograd.grad(outputs.pow(3).sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum(s.pow(2).sum() for s in first), parameters)
        return [each.detach() for each in (outputs, *first, *second)]

    expected = derivatives()
    with TwiceDifferentiable():
        found = derivatives()
    bound = 1e-4 if dtype == torch.float32 else 1e-11
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() <= bound * one.abs().max()


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4), (4,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_blocks_are_what_pytorch_gives(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    model.double()[2].weight.requires_grad_(len(shape) != 3)
    parameters = [each for each in model.parameters() if each.requires_grad]
    inputs = torch.randn(*shape, dtype=torch.float64)

    def products(vectors: list[Tensor]) -> list[Tensor]:
        loss = model(inputs).pow(4).sum()
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(
            torch.autograd.grad(
                slopes,
                parameters,
                vectors,
                is_grads_batched=True,
                materialize_grads=True,
                allow_unused=True,
            )
        )

    vectors = [torch.randn(3, *each.shape, dtype=torch.float64) for each in parameters]
    expected = products(vectors)
    with TwiceDifferentiable():
        found = products(vectors)
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() <= 1e-11 * one.abs().max()


def test_float32_products_are_true_to_float64() -> None:
    model, batches = network("strided_grouped_conv"), data(16, 4)
    truth = dense_hessian(model, batches)
    op = landscape.hessian(
        network("strided_grouped_conv", dtype=torch.float32),
        cross_entropy,
        data(16, 4, dtype=torch.float32),
    )
    vector = torch.randn(op.shape[0])
    expected = truth @ vector.double()
    assert (op @ vector - expected).norm() < 1e-5 * expected.norm()


def test_operator_notices_weights_that_were_changed_in_place() -> None:
    model, batches = network(), data(6)
    op = landscape.hessian(model, cross_entropy, batches)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    before = op @ vector
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = op @ vector
    assert not torch.allclose(before, after, rtol=1e-2)
    assert (after - dense_hessian(model, batches) @ vector).abs().max() < 1e-10


def test_loss_that_is_linear_in_the_weights_has_a_zero_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    for chunk_size in (1, 2):
        op = landscape.hessian(
            model, lambda output, _: output.mean(), data(4), chunk_size=chunk_size
        )
        assert torch.equal(op @ torch.ones(17, 2).double(), torch.zeros(17, 2).double())


def penalised(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that holds on to the parameters themselves, beside the outputs."""
    weight, bias = model[1].weight, model[1].bias

    def loss(output: Tensor, _: Tensor) -> Tensor:
        return (weight**2).sum() / 2 + bias.sum() + 0 * output.sum()

    return loss


@pytest.mark.parametrize("budget", [None, 0])
def test_a_loss_that_holds_the_parameters_is_not_given_to_forward_mode(budget: int | None) -> None:
    # functional_call replaces the network's parameters; the loss would not see the new ones.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    expected = torch.cat([torch.ones(16, 2), torch.zeros(1, 2)]).double()
    for chunk_size in (1, 2):
        op = landscape.hessian(
            model, penalised(model), data(4), chunk_size=chunk_size, memory_budget=budget
        )
        assert torch.equal(op @ torch.ones(17, 2).double(), expected)
    if budget == 0:
        assert op.plan.engine == "rebuild"
        assert "differs from the graph" in op.plan.note


def failing_after(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(count))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise FloatingPointError("loss")
        return cross_entropy(output, target)

    return loss


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_left_bit_identical(engine: str, fails: bool) -> None:
    model, batches = network("relu_conv_bn").train(), data(6, 3)
    model[1].eval()  # a flag of its own
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before = [tensor.detach().clone() for tensor in tensors]
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    loss = failing_after(3) if fails else cross_entropy
    op = landscape.hessian(model, loss, batches, engine=engine)
    block = torch.ones(op.shape[0], 2, dtype=torch.float64)
    if fails:
        with pytest.raises(FloatingPointError, match="loss"):
            op @ block
    else:
        op @ block
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(state, torch.get_rng_state())


def test_kept_graph_survives_measurements_in_between() -> None:
    model, batches = network("relu_conv_bn"), data(6)
    op = landscape.hessian(model, cross_entropy, batches, engine="retained")
    vector = torch.ones(op.shape[0], dtype=torch.float64)
    first = op @ vector
    landscape.sharpness.sam(model, cross_entropy, batches)
    assert torch.equal(op @ vector, first)
    assert op.num_gradients == 1


def test_blocks_are_timed_once_and_the_choice_is_remembered() -> None:
    model, batches = network(), data(6)
    first = landscape.hessian(model, cross_entropy, batches)
    block = torch.randn(first.shape[0], 5, dtype=torch.float64)
    first @ block
    chosen = first.plan.chunk_size
    assert chosen in (1, 4, 5)
    assert {"1 columns", "4 columns", "5 columns"} == set(first.plan.seconds)
    second = landscape.hessian(model, cross_entropy, batches)
    assert torch.equal(second @ block, first @ block)
    assert second.plan.seconds == first.plan.seconds
    assert second.num_products == 5


def test_a_wrapped_or_compiled_network_is_measured_as_what_is_inside() -> None:
    model, batches = network(), data(6)
    op = landscape.hessian(model, cross_entropy, batches)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    expected = op @ vector
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert torch.equal(landscape.hessian(wrapped, cross_entropy, batches) @ vector, expected)
    model.compile(backend="aot_eager")  # whose graphs have no second derivative
    assert torch.equal(landscape.hessian(model, cross_entropy, batches) @ vector, expected)


def test_fused_attention_is_replaced_by_its_differentiable_form() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    model = nn.Sequential(nn.Unflatten(1, (2, 8)), layer, nn.Flatten(), nn.Linear(16, 3)).double()
    batches = [(x.flatten(1), y) for x, y in data(4)]
    op = landscape.hessian(model, cross_entropy, batches)
    vector = torch.randn(op.shape[0], dtype=torch.float64)
    inputs, targets = whole(batches)

    def slope(sign: float) -> Tensor:
        with landscape.perturbed(model, sign * 1e-5 * vector):
            loss = cross_entropy(model.eval()(inputs), targets)
            return landscape.flatten(torch.autograd.grad(loss, list(model.parameters())))

    difference = (slope(1) - slope(-1)) / 2e-5
    assert (op @ vector - difference).norm() < 1e-6 * difference.norm()


def test_bad_batches_and_losses_are_refused_by_name() -> None:
    model = network()

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(2)

    vector = torch.ones(landscape.hessian(model, cross_entropy, data(2)).shape[0]).double()
    with pytest.raises(TypeError, match="can be read only once"):
        landscape.hessian(model, cross_entropy, once()) @ vector
    with pytest.raises(ValueError, match="batches is empty"):
        landscape.hessian(model, cross_entropy, []) @ vector
    with pytest.raises(ValueError, match="batch 2 is empty"):
        landscape.hessian(model, cross_entropy, [*data(2), *data(0)]) @ vector
    for bare in (data(2)[0], list(data(2)[0])):
        with pytest.raises(TypeError, match=r"give \[\(X, Y\)\]"):
            landscape.hessian(model, cross_entropy, bare) @ vector
    with pytest.raises(TypeError, match="a tensor or an array, not list"):
        landscape.hessian(model, cross_entropy, data(2)) @ [1.0]
    with pytest.raises(ValueError, match="must return a scalar"):
        landscape.hessian(
            model, lambda o, t: cross_entropy(o, t, reduction="none"), data(2)
        ) @ vector
    with pytest.raises(ValueError, match=r"not shape \(3,\)"):
        landscape.hessian(model, cross_entropy, data(2)) @ torch.ones(3)
    for options, message in (
        ({"engine": "fast"}, "engine must be one of auto, retained, rebuild, forward"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"reduction": "median"}, "reduction must be auto, mean or sum"),
        ({"parameters": ["3.weigth"]}, "did you mean '3.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape.hessian(model, cross_entropy, data(2), **options)


def test_an_array_is_taken_as_the_tensor_with_its_numbers() -> None:
    op = landscape.hessian(network(), cross_entropy, data(4))
    block = torch.randn(op.shape[0], 2, dtype=torch.float64)
    torch.testing.assert_close(op @ block.numpy(), op @ block)
    torch.testing.assert_close(op @ block[:, 0].numpy(), op @ block[:, 0])
