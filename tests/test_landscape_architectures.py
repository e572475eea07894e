"""Random small networks: every engine and matrix against the dense one, and nothing left behind."""

from __future__ import annotations

import torch
from curvature_cases import Attention, dense_hessian, stir_batch_norm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape.parameters import same_bits

ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus]


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Convolutions or attention or linear layers, with normalisation, frozen and tied weights."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["conv", "attention", "linear"]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    if kind == "attention":
        model: nn.Module = Attention()
    elif kind == "conv":
        channels = draw(st.sampled_from([1, 2, 4]))
        kernel, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
        # torch refuses to normalise the single number that would be left of an image otherwise.
        padding = 1 if (kernel, stride) == (3, 2) else draw(st.sampled_from([0, 1]))
        model = nn.Sequential(
            nn.Conv2d(
                1,
                channels,
                kernel,
                stride=stride,
                padding=padding,
                bias=draw(st.booleans()),
            ),
            draw(
                st.sampled_from(
                    [
                        nn.BatchNorm2d(channels),
                        nn.BatchNorm2d(channels, affine=False),
                        nn.GroupNorm(1, channels),
                        nn.Identity(),
                    ]
                )
            ),
            activation(),
            draw(st.sampled_from([nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2)])),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4 * channels, 3),
        )
    else:
        width = draw(st.integers(2, 5))
        layers = [nn.Flatten(), nn.Linear(16, width), nn.LayerNorm(width), activation()]
        again = nn.Linear(width, width)
        layers += [again, activation(), again] if draw(st.booleans()) else [again]  # tied
        model = nn.Sequential(*layers, nn.Linear(width, 3))
    stir_batch_norm(model)
    parameters = list(model.parameters())
    if draw(st.booleans()):
        parameters[draw(st.integers(0, len(parameters) - 1))].requires_grad_(False)
    return model.double().train(draw(st.booleans()))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_products_of_any_network_are_those_of_its_dense_hessian(
    model: nn.Module, sizes: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (
            torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]
    loss = functional.cross_entropy
    truth = dense_hessian(model, batches)
    vectors = torch.randn(len(truth), 3, generator=generator, dtype=torch.float64)

    def tensors() -> list[Tensor]:
        return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]

    before, flags = tensors(), [module.training for module in model.modules()]
    scale = max(1.0, float(truth.abs().max()))
    for engine in ("retained", "rebuild", "forward"):
        op = landscape.hessian(model, loss, batches, engine=engine)
        assert op.shape == tuple(truth.shape)
        assert (op @ vectors - truth @ vectors).abs().max() < 1e-9 * scale
        gauss = landscape.gauss_newton(model, loss, batches, engine=engine)
        images = gauss @ vectors
        assert (vectors * images).sum(0).min() > -1e-9 * scale  # positive semi-definite
    assert all(same_bits(a, b) for a, b in zip(before, tensors(), strict=True))
    assert flags == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 99))
def test_eigenvalues_and_trace_of_any_network(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (
            torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (5,), generator=generator),
        )
    ]
    truth = torch.linalg.eigvalsh(dense_hessian(model, batches))
    op = landscape.hessian(model, functional.cross_entropy, batches)
    pairs = landscape.top_eigenpairs(op, k=2, which="largest", confidence=0.99)
    assert pairs.converged
    scale = float(truth.abs().max())
    expected = truth.flip(0)[: len(pairs.values)]
    assert (pairs.values - expected).abs().max() < 2e-3 * scale + 1e-9
    estimate = landscape.trace(op, num_probes=40, generator=generator)
    error = abs(estimate.value - float(truth.sum()))
    assert error <= 6 * estimate.standard_error + 1e-9
