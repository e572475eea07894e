"""Directions through weight space: lengths, angles, what stays, and where they come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import directions
from llp.landscape.normalization import filter_norms, moving, normalized
from llp.landscape.parameters import flatten, trainable, unflatten


class Shortcut(nn.Module):
    """A normalisation layer whose name does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.scale = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(self.conv(x) + self.downsample(x)).mean((2, 3)))


def network() -> Shortcut:
    torch.manual_seed(0)
    model = Shortcut()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales with values of their own
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def by_name(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return dict(zip(names, unflatten(vector, trainable(model)), strict=True))


@pytest.mark.parametrize("order", [1, 2])
def test_every_filter_of_a_random_direction_has_the_norm_of_the_weights_filter(order: int) -> None:
    model = network()
    for row in directions.random(model, order=order).vectors:
        for name, part in by_name(model, row).items():
            weight = model.get_parameter(name).detach()
            if weight.ndim < 2:
                assert not part.any(), name
                continue
            for filter_direction, filter_weight in zip(part, weight, strict=True):
                expected = float(filter_weight.flatten().norm(order))
                assert float(filter_direction.flatten().norm(order)) == pytest.approx(
                    expected, rel=1e-12
                )


def test_excluded_are_biases_and_normalisation_layers_by_type_not_by_name() -> None:
    model = network()
    row = by_name(model, directions.random(model).vectors[0])
    still = {name for name, part in row.items() if not part.any()}
    assert still == {
        "conv.bias", "downsample.0.bias", "downsample.1.weight", "downsample.1.bias",
        "scale.weight", "scale.bias", "head.bias",
    }  # fmt: skip
    only_biases = by_name(model, moving(model, exclude_normalization=False))
    assert only_biases["downsample.1.weight"].all()
    assert not only_biases["downsample.1.bias"].any()
    everything = moving(model, exclude_normalization=False, exclude_bias=False)
    assert everything.all()


def test_a_bias_that_moves_is_one_group_and_not_plus_or_minus_itself() -> None:
    model = network()
    row = directions.random(model, exclude_bias=False, exclude_normalization=False).vectors[0]
    bias, part = model.head.bias.detach(), by_name(model, row)["head.bias"]
    assert float(part.norm()) == pytest.approx(float(bias.norm()), rel=1e-12)
    assert not torch.allclose(part.abs(), bias.abs(), rtol=1e-3)


def test_normalised_directions_are_orthogonal_and_keep_their_filter_norms() -> None:
    model = network()
    found = directions.random(model, 3)
    unit = found.vectors / found.vectors.norm(dim=1, keepdim=True)
    assert float((unit @ unit.T - torch.eye(3)).abs().max()) == pytest.approx(
        found.cosine, abs=1e-15
    )
    assert found.cosine < 1e-8
    loose = directions.random(model, 3, orthogonal=False)
    assert loose.cosine > 1e-3
    weights = filter_norms(model, flatten(trainable(model)) * moving(model))
    for row in found.vectors:
        for got, wanted in zip(filter_norms(model, row), weights, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-12)


def test_cosine_that_cannot_be_removed_is_reported() -> None:
    """Every filter has one element, so normalised directions differ by signs alone."""
    torch.manual_seed(1)
    model = nn.Linear(1, 7, bias=False).double()
    found = directions.random(model)
    unit = found.vectors / found.vectors.norm(dim=1, keepdim=True)
    assert found.cosine == pytest.approx(abs(float(unit[0] @ unit[1])), abs=1e-15)
    assert found.cosine > 1e-6
    assert torch.allclose(found.vectors.abs(), model.weight.detach().abs().T.expand(2, -1))


def test_random_orthogonal_directions_are_orthogonal_although_long() -> None:
    """A projection that is not divided by the squared length leaves a cosine near 1."""
    model = nn.Linear(200, 50).double()
    found = directions.random(model, 3, normalization="none")
    rows = found.vectors
    assert float(rows.norm(dim=1).min()) > 50
    for first, second in ((0, 1), (0, 2), (1, 2)):
        cosine = rows[first] @ rows[second] / (rows[first].norm() * rows[second].norm())
        assert abs(float(cosine)) < 1e-9
    spread = rows.norm(dim=1)
    assert float(spread.max() / spread.min()) < 1.05


def test_random_entries_are_gaussian_with_mean_zero() -> None:
    model = nn.Linear(400, 250, bias=False)
    row = directions.random(model, 1, normalization="none").vectors[0].double()
    count = len(row)
    assert abs(float(row.mean())) < 4 / math.sqrt(count)
    assert float(row.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / count))
    assert float((row**4).mean()) == pytest.approx(3.0, abs=4 * math.sqrt(96 / count))


@pytest.mark.parametrize("zero", ["filter", "layer", "everything but one"])
def test_zero_filters_get_a_zero_direction(zero: str) -> None:
    model = network()
    with torch.no_grad():
        if zero == "filter":
            model.conv.weight[2] = 0
        elif zero == "layer":
            model.conv.weight.zero_()
        else:
            for parameter in model.parameters():
                parameter.zero_()
            model.head.weight[0] = 1.0
    found = directions.random(model, exclude_bias=False, exclude_normalization=False)
    assert torch.isfinite(found.vectors).all()
    for row in found.vectors:
        part = by_name(model, row)["conv.weight"]
        assert not part[2].any()
        assert bool(part[0].any()) == (zero == "filter")


def test_normalisations_give_their_groups_the_weights_norms() -> None:
    model = network()
    weights, generator = flatten(trainable(model)), torch.Generator().manual_seed(3)
    draw = torch.randn(len(weights), generator=generator).double()
    whole = normalized(model, draw, "model", 1)
    assert float(whole.abs().sum()) == pytest.approx(float(weights.abs().sum()))
    for name, part in by_name(model, normalized(model, draw, "layer")).items():
        expected = float(model.get_parameter(name).detach().norm())
        assert float(part.norm()) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(normalized(model, draw, "weight"), draw * weights.abs())
    assert torch.equal(normalized(model, draw, "none"), draw)


def test_filters_of_a_grouped_transposed_convolution_are_its_output_channels() -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    row = directions.random(model, 1).vectors[0].reshape(model.weight.shape)
    for output in range(6):
        group, place = divmod(output, 3)
        inputs = slice(2 * group, 2 * group + 2)
        assert float(row[inputs, place].norm()) == pytest.approx(
            float(model.weight[inputs, place].detach().norm()), rel=1e-12
        )


def test_frozen_names_stay_and_unknown_ones_are_refused() -> None:
    model = network()
    row = by_name(model, directions.random(model, frozen=["downsample", "hea*"]).vectors[0])
    assert [name for name, part in row.items() if part.any()] == ["conv.weight"]
    with pytest.raises(ValueError, match=r"no trainable parameter is called 'convv'.*conv\.weight"):
        directions.random(model, frozen=["convv"])
    with pytest.raises(ValueError, match="no parameter is left"):
        directions.random(model, frozen=["*"])


def test_frozen_and_tied_parameters_are_not_in_the_vector() -> None:
    model = network()
    model.conv.weight.requires_grad_(False)
    model.extra = model.head
    found = directions.random(model)
    assert found.vectors.shape[1] == sum(p.numel() for p in trainable(model))
    assert "conv.weight" not in by_name(model, found.vectors[0])


def test_one_seed_gives_one_direction_and_leaves_the_global_state_alone() -> None:
    model = network()
    state = torch.get_rng_state()
    first = directions.random(model, seed=5)
    torch.manual_seed(99)
    second = directions.random(model, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, directions.random(model, seed=6).vectors)
    torch.set_rng_state(state)
    directions.random(model)
    assert torch.equal(torch.get_rng_state(), state)
    single = directions.random(network().float(), seed=5)
    assert torch.allclose(single.vectors.double(), first.vectors, rtol=1e-4, atol=1e-6)


def pairs_of(values: list[float], size: int) -> landscape.Eigenpairs:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, len(values), generator=generator).double()).Q
    found = torch.tensor(values, dtype=torch.float64)
    diagonal = basis @ torch.diag(found) @ basis.T
    return landscape.top_eigenpairs(diagonal, k=len(values))


def test_hessian_directions_are_the_unit_eigenvectors_asked_for() -> None:
    model = nn.Linear(6, 4).double()
    pairs = pairs_of([5.0, -4.0, 3.0, -1.0], 28)
    top = directions.hessian(model, pairs)
    assert top.values == pytest.approx((5.0, -4.0))
    assert torch.allclose(top.vectors.T, pairs.vectors[:, :2], rtol=1e-14)
    signed = directions.hessian(model, pairs, signed=True)
    assert signed.values == pytest.approx((5.0, -4.0))
    assert signed.kind == "hessian_signed"
    assert top.norms == pytest.approx((1.0, 1.0))
    positive = pairs_of([5.0, 3.0], 28)
    negative = pairs_of([-2.0, -0.5], 28)
    assert directions.hessian(model, [positive, negative], signed=True).values == pytest.approx(
        (5.0, -2.0)
    )
    with pytest.raises(ValueError, match="a positive and a negative eigenvalue"):
        directions.hessian(model, positive, signed=True)


def test_one_pair_found_from_both_ends_counts_once() -> None:
    model = nn.Linear(6, 4).double()
    pairs = pairs_of([5.0, -4.0, 3.0], 28)
    found = directions.hessian(model, [pairs, pairs], count=3)
    assert found.values == pytest.approx((5.0, -4.0, 3.0))
    with pytest.raises(ValueError, match="3 different ones were given"):
        directions.hessian(model, [pairs, pairs], count=4)


def test_adam_directions_are_the_optimizers_moments() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(8, 3, 4, 4).double(), torch.arange(8) % 5
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        before = flatten(trainable(model))
        optimizer.step()
    moments = [
        flatten([optimizer.state[p][key] for p in model.parameters()])
        for key in ("exp_avg", "exp_avg_sq")
    ]
    found = directions.adam(model, optimizer)
    for row, moment in zip(found.vectors, moments, strict=True):
        assert torch.allclose(row, moment / moment.norm(), rtol=1e-12)
    update = directions.adam(model, optimizer, axes=["update"]).vectors[0]
    step = flatten(trainable(model)) - before
    assert torch.allclose(update, step / step.norm(), rtol=1e-9)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD keeps no exp_avg"):
        directions.adam(model, plain)


def test_between_checkpoints_arrives_at_one() -> None:
    model, other = network(), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    aim = flatten(trainable(other))
    for given in (other, other.state_dict(), aim):
        found = directions.between(model, given)
        assert torch.allclose(flatten(trainable(model)) + found.vectors[0], aim, rtol=1e-14)
    state = other.state_dict()
    del state["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight is missing"):
        directions.between(model, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: directions.make(m, torch.ones(1, 3)), r"expected rows \[d, 169\]"),
        (lambda m: directions.make(m, torch.full((1, 169), torch.nan)), "not finite"),
        (lambda m: directions.make(m, torch.zeros(1, 169)), "direction 0 is zero"),
        (lambda m: directions.make(m, torch.ones(2, 169), orthogonal=True), "parallel"),
        (lambda m: directions.random(m, normalization="filters"), "normalization must be one of"),
        (lambda m: directions.random(m, order=3), "order must be 1 or 2"),
        (lambda m: directions.random(m, 0), "count must be at least 1"),
    ],
)
def test_wrong_directions_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(network())


def test_a_record_is_plain_data() -> None:
    found = directions.random(network())
    assert set(found.to_arrays()) == {"vectors", "norms"}
    assert found.to_arrays()["vectors"].dtype == "float64"
    summary = found.summary()
    assert summary["kind"] == "random"
    assert summary["labels"] == "random 1, random 2"
