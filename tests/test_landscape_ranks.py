"""Ranks of weights, features and Jacobians, their fall over depth, and units that stopped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_landscape_sharpness import examples, relu_network
from test_landscape_surface import Attention, conv_net, images, seeded, tokens
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import keys
from llp.landscape.jacobian import partial_jacobian
from llp.landscape.parameters import same_bits
from llp.landscape.ranks import collect_features, gini


def of_values(*values: float, rows: int = 9, columns: int = 7) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double()).Q
    return left[:, : len(values)] * torch.tensor(values).double() @ right[: len(values)]


def test_ranks_follow_from_the_singular_values() -> None:
    values = np.array([4.0, 2.0, 1.0, 0.5, 0.03, 1e-9])
    found = landscape.matrix_ranks(of_values(*values), name="layer")
    shares = values / values.sum()
    assert found.matrix == 6
    assert found.numerical == 4  # 0.03 is below one per cent of 4
    assert found.effective == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-8)
    assert found.approximate == 4  # 16 + 4 + 1 of 21.2509 is 98.8 %
    assert found.l1 == 4  # 7.5 of 7.53
    assert found.stable == pytest.approx((values**2).sum() / 16)
    assert found.nuclear == pytest.approx(values.sum())
    assert found.singular_values[:5] == pytest.approx(values[:5])
    padded = np.append(values, 0.0)
    pairs = np.abs(padded[:, None] - padded[None, :]).sum()
    assert found.gini == pytest.approx(pairs / (2 * 7**2 * padded.mean()))
    assert (found.num_rows, found.num_columns, found.name) == (9, 7, "layer")


def test_matrix_rank_counts_from_the_rounding_error_of_the_dtype() -> None:
    matrix = of_values(1.0, 1e-4, 1e-10)
    assert landscape.matrix_ranks(matrix).matrix == 3
    single = landscape.matrix_ranks(matrix.float())
    assert single.matrix == int(torch.linalg.matrix_rank(matrix.float())) == 2
    assert single.tolerance == pytest.approx(9 * torch.finfo(torch.float32).eps, rel=1e-3)


def test_equal_values_have_full_rank_and_a_zero_matrix_none() -> None:
    full = landscape.matrix_ranks(3 * torch.eye(5))
    assert (full.matrix, full.numerical, full.approximate, full.l1) == (5, 5, 5, 5)
    assert full.effective == pytest.approx(5)
    assert full.stable == pytest.approx(5)
    assert full.gini == pytest.approx(0)
    none = landscape.matrix_ranks(torch.zeros(4, 3))
    assert (none.matrix, none.numerical, none.approximate, none.l1) == (0, 0, 0, 0)
    assert (none.effective, none.stable, none.nuclear, none.gini) == (0, 0, 0, 0)
    single = landscape.matrix_ranks(torch.ones(6, 4))
    assert (single.matrix, single.numerical, single.approximate) == (1, 1, 1)
    assert single.effective == pytest.approx(1, abs=1e-6)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="head: has entries that are not finite"):
        landscape.matrix_ranks(torch.full((2, 2), torch.inf), name="head")
    with pytest.raises(ValueError, match=r"expected a matrix, not shape \(2,\)"):
        landscape.matrix_ranks(torch.ones(2))


def test_weights_are_measured_as_outputs_by_everything_else() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 6)
    )
    model[3].weight.requires_grad_(False)
    found = landscape.weight_ranks(model)
    assert [each.name for each in found] == ["0.weight", "2.weight", "3.weight"]
    assert [(each.num_rows, each.num_columns) for each in found] == [(8, 27), (4, 32), (6, 4)]
    expected = torch.linalg.svdvals(model[0].weight.detach().double().reshape(8, 27))
    assert found[0].singular_values == pytest.approx(expected.numpy())
    across = model[2].weight.detach().double().transpose(0, 1).reshape(4, 32)
    assert found[1].singular_values == pytest.approx(torch.linalg.svdvals(across).numpy())


def test_tied_weights_count_once() -> None:
    names = [each.name for each in landscape.weight_ranks(seeded(Attention))]
    assert names.count("embedding.weight") == 1
    assert "head.weight" not in names


@pytest.mark.parametrize(
    ("spatial", "shape"), [("flatten", (11, 216)), ("channels", (396, 6)), ("mean", (11, 6))]
)
def test_features_are_those_of_the_layer(spatial: str, shape: tuple[int, int]) -> None:
    model, batches = conv_net().train(), images(torch.float32, 7, 4)
    before = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    found = collect_features(model, batches, ["norm"], spatial=spatial)["norm"]
    assert tuple(found.shape) == shape
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model.norm(model.first(inputs)) for inputs, _ in batches])
    expected = {
        "flatten": outputs.flatten(1),
        "channels": outputs.permute(0, 2, 3, 1).reshape(-1, 6),
        "mean": outputs.mean((2, 3)),
    }[spatial]
    assert torch.allclose(found, expected, atol=1e-5)
    ranks = landscape.feature_ranks(model, batches, layers=["norm"], spatial=spatial)
    values = torch.linalg.svdvals(expected.double()).numpy()
    assert ranks[0].singular_values == pytest.approx(values, abs=1e-4)
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert not model.norm._forward_hooks


def test_features_of_a_sequence_have_its_positions_apart() -> None:
    model, batches = seeded(Attention), tokens(6)
    rows = collect_features(model, batches, ["block.linear1"], spatial="channels")
    assert tuple(rows["block.linear1"].shape) == (30, 16)
    flat = collect_features(model, batches, ["block.linear1"])["block.linear1"]
    assert torch.allclose(flat.reshape(6, 16, 5).transpose(1, 2).reshape(30, 16), *rows.values())


def test_a_bottleneck_shows_in_the_features_behind_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3), nn.Linear(3, 16), nn.Linear(16, 5)
    )
    batches = [(torch.randn(64, 20), torch.zeros(64))]
    found = landscape.feature_ranks(model, batches)
    assert [each.name for each in found] == ["0", "2", "3", "4"]
    assert found[0].matrix == 16
    assert found[1].matrix == 3
    assert found[2].matrix <= 4  # three and the bias
    few = landscape.feature_ranks(model, batches, layers=["0"], max_rows=10)
    assert few[0].num_rows == 10


def test_unknown_and_unused_layers_are_named() -> None:
    model, batches = relu_network(), [(torch.randn(3, 5), torch.zeros(3))]
    with pytest.raises(ValueError, match="no module is called 'fc'"):
        landscape.feature_ranks(model, batches, layers=["fc"])
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ValueError, match="spare was not called"):
        landscape.feature_ranks(model, batches, layers=["spare"])


def test_rank_dynamics_by_hand() -> None:
    found = landscape.rank_dynamics([10.0, 8.0, 9.0, 3.0])
    assert found.drops.tolist() == [2.0, 0.0, 6.0]
    assert found.drop_centroid == pytest.approx((1 * 2 + 3 * 6) / 8)
    assert found.rank_centroid == pytest.approx((8 + 18 + 9) / 30)
    assert found.area == pytest.approx((9 + 8.5 + 6) / 30)
    assert found.drop_gini == pytest.approx(gini(np.array([2.0, 0.0, 6.0])))
    even = landscape.rank_dynamics([9.0, 6.0, 3.0])
    assert (even.drop_gini, even.drop_centroid) == (pytest.approx(0.0), 1.5)
    flat = landscape.rank_dynamics([4.0, 4.0, 4.0])
    assert (flat.area, flat.rank_centroid) == (1.0, 1.0)
    assert math.isnan(flat.drop_centroid)
    with pytest.raises(ValueError, match="at least 2 layers"):
        landscape.rank_dynamics([4.0])


def test_rank_dynamics_of_layers_start_from_what_the_first_could_have() -> None:
    ranks = landscape.weight_ranks(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)))
    found = landscape.rank_dynamics(ranks, "matrix")
    assert found.reference == 20
    assert found.ranks.tolist() == [20, 10]
    assert found.area == 0.75


@pytest.mark.parametrize("method", ["auto", "forward", "reverse", "sketch"])
def test_the_jacobian_rank_of_a_linear_network_is_that_of_its_matrix(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 6), nn.Linear(6, 25))
    product = model[2].weight.double() @ model[1].weight.double() @ model[0].weight.double()
    expected = torch.linalg.svdvals(product.detach())
    found = landscape.partial_jacobian_rank(model, torch.randn(40), method=method, chunk_size=7)
    assert found.rank == 6 == int(torch.linalg.matrix_rank(product))
    assert (found.num_inputs, found.num_outputs) == (40, 25)
    if method != "sketch":
        assert found.singular_values[:6] == pytest.approx(expected[:6].numpy(), rel=1e-10)
        assert found.singular_values[6:].max() < found.tolerance
        assert found.num_products == (40 if method == "forward" else 25)
    first = landscape.partial_jacobian_rank(model, torch.randn(40), layer="0", method=method)
    assert first.rank == 30
    assert next(model.parameters()).dtype == torch.float32


def test_a_sketch_needs_few_products_for_a_low_rank_of_a_large_jacobian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 5), nn.Tanh(), nn.Linear(5, 500))
    found = landscape.partial_jacobian_rank(model, torch.randn(600), method="sketch")
    assert (found.rank, found.num_products) == (5, 32)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.act = nn.Tanh()
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(3 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.conv(x))).flatten(1))


@pytest.mark.parametrize(
    "mode", ["all", "crop", "zero_padding", "strided_subsample", "interpolate"]
)
@pytest.mark.parametrize("layer", ["pool", ""])
def test_a_partial_jacobian_is_the_difference_quotient_of_its_patch(mode: str, layer: str) -> None:
    torch.manual_seed(0)
    model, example = Image(), torch.randn(2, 8, 8)
    jacobian = partial_jacobian(model, example, layer=layer, mode=mode, side=4)
    wide, point, step = Image().double(), example.double(), 1e-6
    wide.load_state_dict(model.state_dict())
    size = 128 if mode == "all" else 32

    def at(patch: Tensor) -> Tensor:
        if mode == "all":
            image = patch.reshape(2, 8, 8)
        elif mode == "interpolate":
            image = functional.interpolate(
                patch.reshape(1, 2, 4, 4), (8, 8), mode="bilinear", align_corners=False
            )[0]
        else:
            image = torch.zeros_like(point) if mode == "zero_padding" else point.clone()
            places = slice(0, 8, 2) if mode == "strided_subsample" else slice(2, 6)
            image[:, places, places] = patch.reshape(2, 4, 4)
        x = wide.pool(wide.act(wide.conv(image[None])))
        return (wide.head(x.flatten(1)) if not layer else x).detach().reshape(-1)

    if mode == "all":
        start = point.reshape(-1)
    elif mode == "interpolate":
        start = functional.interpolate(point[None], (4, 4), mode="bilinear").reshape(-1)
    else:
        places = slice(0, 8, 2) if mode == "strided_subsample" else slice(2, 6)
        start = point[:, places, places].reshape(-1)
    columns = []
    for index in range(size):
        unit = torch.zeros(size).double()
        unit[index] = step
        columns.append((at(start + unit) - at(start - unit)) / (2 * step))
    assert torch.allclose(jacobian, torch.stack(columns, 1), atol=1e-8)
    found = landscape.partial_jacobian_rank(model, example, layer=layer, mode=mode, side=4)
    assert found.rank == int(torch.linalg.matrix_rank(jacobian))
    assert found.num_inputs == size
    assert found.mode == mode


def test_a_patch_cannot_tell_apart_more_than_it_has() -> None:
    torch.manual_seed(0)
    model, example = Image(), torch.randn(2, 8, 8)
    ranks = [
        landscape.partial_jacobian_rank(model, example, layer="pool", mode="crop", side=side).rank
        for side in (1, 2, 4)
    ]
    assert ranks[0] <= 2 < ranks[1] <= 8 < ranks[2] <= 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "blur"}, "mode is one of"),
        ({"method": "exact"}, "method one of"),
        ({"mode": "crop", "side": 9}, "needs an example"),
        ({"layer": "body"}, "no module is called 'body'"),
    ],
)
def test_wrong_patches_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape.partial_jacobian_rank(Image(), torch.randn(2, 8, 8), **options)


class Mixed(nn.Module):
    """Modules, functions, methods, one module used twice, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = self.act(self.second(x))
        x = torch.tanh(self.third(x))
        return functional.leaky_relu(self.last(x)).sigmoid()


def test_every_activation_is_seen_however_it_is_called() -> None:
    torch.manual_seed(0)
    model = Mixed()
    found = landscape.unit_activity(model, [(torch.randn(9, 5), torch.zeros(9))])
    assert [(each.name, each.activation, each.num_units) for each in found] == [
        ("act", "relu", 4), ("act#2", "relu", 4), ("", "tanh", 3), ("#2", "leaky_relu", 2),
        ("#3", "sigmoid", 2),
    ]  # fmt: skip


def test_dead_saturated_and_dormant_units_are_counted_over_all_batches() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0], [0.0], [0.01]]))
        model[0].bias.copy_(torch.tensor([0.0, -1.0, 2.0, 0.02]))
        model[2].weight.zero_()
        model[2].weight[0, 0] = 9.0  # at its limit in the second batch only
        model[2].bias.copy_(torch.tensor([0.0, -9.0, 0.5]))
    # unit 0 is dead on the first batch and alive on the second; unit 1 is dead on both
    batches = [(torch.tensor([[-1.0], [-2.0]]), torch.zeros(2)), (torch.ones(1, 1), torch.zeros(1))]
    relu, tanh = landscape.unit_activity(model, batches)
    assert (relu.num_dead, relu.num_saturated, relu.num_dormant) == (1, 0, 2)
    assert relu.mean_size == pytest.approx([1 / 3, 0.0, 2.0, (0.01 + 0.0 + 0.03) / 3])
    assert relu.active_share == pytest.approx([1 / 3, 0.0, 1.0, 2 / 3])
    average = relu.mean_size.mean()
    assert relu.score == pytest.approx(relu.mean_size / average)
    assert relu.dormant_ratio == 0.5
    assert (tanh.num_dead, tanh.num_saturated) == (0, 1)


@pytest.mark.parametrize(
    ("activation", "value", "saturated"),
    [
        (nn.Sigmoid(), 6.0, True), (nn.Sigmoid(), -6.0, True), (nn.Sigmoid(), 3.0, False),
        (nn.ELU(alpha=2.0), -8.0, True), (nn.ELU(alpha=2.0), -2.0, False),
        (nn.SELU(), -8.0, True), (nn.Hardtanh(-3, 3), 4.0, True), (nn.Hardtanh(-3, 3), 1.0, False),
        (nn.ReLU6(), 7.0, True), (nn.Softsign(), 300.0, True), (nn.GELU(), 50.0, False),
        (nn.LeakyReLU(), -5.0, False), (nn.ReLU(), -5.0, False),
    ],
)  # fmt: skip
def test_each_activation_has_its_limits(
    activation: nn.Module, value: float, saturated: bool
) -> None:
    model = nn.Sequential(nn.Linear(2, 3), activation)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(value)
    (found,) = landscape.unit_activity(model, [(torch.randn(4, 2), torch.zeros(4))])
    assert found.num_saturated == (3 if saturated else 0)
    assert found.num_dead == (3 if isinstance(activation, nn.ReLU) else 0)


def test_channels_and_positions_are_kept_apart_and_the_model_is_left_alone() -> None:
    model, batches = conv_net().train(), images(torch.float32, 7, 4)
    before = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    found = landscape.unit_activity(model, batches)
    assert [(each.activation, each.num_units) for each in found] == [("relu", 6), ("relu", 5)]
    model.eval()
    with torch.no_grad():
        outputs = torch.cat(
            [functional.relu(model.norm(model.first(inputs))) for inputs, _ in batches]
        )
    expected = outputs.abs().mean((0, 2, 3)).double().numpy()
    assert found[0].mean_size == pytest.approx(expected, rel=1e-5)
    model.train()
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    (feed_forward,) = landscape.unit_activity(seeded(Attention), tokens(6))
    assert (feed_forward.name, feed_forward.num_units) == ("block", 16)


def test_a_network_without_known_activations_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear called no activation"):
        landscape.unit_activity(nn.Linear(2, 2), [(torch.ones(1, 2), torch.zeros(1))])


def test_sizes_of_weights_and_gradients() -> None:
    model, batches = relu_network().double(), examples(9, 4)
    found = {each.name: each for each in landscape.layer_sizes(
        model, functional.cross_entropy, batches
    )}  # fmt: skip
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    functional.cross_entropy(model(inputs), targets).backward()
    for name, parameter in model.named_parameters():
        assert found[name].gradient_norm == pytest.approx(float(parameter.grad.norm()), rel=1e-9)
        assert found[name].mean_absolute_weight == pytest.approx(
            float(parameter.detach().abs().mean())
        )


def test_older_names_stand_beside_ours() -> None:
    ranks = landscape.matrix_ranks(torch.eye(3), name="fc1")
    values = {
        **keys.under("ranks/fc1", ranks.summary()),
        "units/2/num_dead": 4,
        "rank_dynamics/effective/area": 0.5,
        "spectrum/trace": 7.0,
        "spectrum/eigenvalue_3": 1.5,
        "new": 1,
    }
    found = keys.with_aliases(values)
    assert found["fc1_effective_rank"] == ranks.effective
    assert found["fc1_l1_distribution_rank"] == ranks.l1
    assert found["layer_2_num_dead_units"] == 4
    assert found["effective_normalized_aurc"] == 0.5
    assert found["hessian_trace_estimate"] == found["hutchinson_trace"] == 7.0
    assert found["hessian_top_eig_3"] == 1.5
    assert keys.aliases_of("new") == ()
    assert all(found[key] == value for key, value in values.items())
    with pytest.raises(ValueError, match="already a key"):
        keys.with_aliases({"spectrum/trace": 1.0, "hutchinson_trace": 2.0})
