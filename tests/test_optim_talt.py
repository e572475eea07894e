"""TALT: off is its base bit by bit, the rest of the gradient is kept, ravines and plains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llp import optim
from llp.optim import talt as module
from llp.optim import talt_gradients, talt_parts
from llp.optim.talt import Talt
from llp.optim.wrapper import as_matrix, like_matrix

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def network(seed: int = 0) -> tuple[nn.Sequential, Callable[[], None]]:
    """Some shapes, and a function that puts new gradients in place."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(640, 5))
    generator = torch.Generator().manual_seed(seed)

    def gradients() -> None:
        data = torch.randn(8, 3, 8, 8, generator=generator)
        target = torch.randint(0, 5, (8,), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(data), target).backward()

    return model, gradients


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("base", BASES)
def test_off_it_is_its_base_bit_by_bit(base: str) -> None:
    ends = []
    for wrapped in (True, False):
        model, gradients = network()
        optimizer = BASES[base](model.parameters())
        if wrapped:
            optimizer = Talt(optimizer, smoothing_factor=0.0, valley_strength=0.0, min_size=2)
        for _ in range(25):
            gradients()
            optimizer.step()
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_switched_on_it_is_not_its_base() -> None:
    ends = []
    for factor in (0.0, 0.5):
        model, gradients = network()
        base = BASES["sgd"](model.parameters())
        optimizer = Talt(base, smoothing_factor=factor, valley_strength=0.0, min_size=2)
        for _ in range(25):
            gradients()
            optimizer.step()
        ends.append(vector(model))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) > 1e-3


@pytest.mark.parametrize(
    ("dimension", "tall", "exact"),
    [(16, 0, {True, False}), (8, 2, {True, False}), (4, 2, {False}), (1000, 0, {True})],
)
def test_the_change_is_v_s_minus_one_v_transposed_and_the_rest_is_kept(
    dimension: int, tall: int, exact: set[bool]
) -> None:
    """Against V as a dense matrix, made of the projection and the directions."""
    model, gradients = network()
    optimizer = Talt(BASES["sgd"](model.parameters()), min_size=2, projection_dimension=dimension)
    for _ in range(9):
        gradients()
        optimizer.step()
    gradients()
    (statistics,) = optimizer._statistics
    before = [p.grad.clone() for p in model.parameters()]
    statistics.change(update=True)
    checked = 0
    parameters = list(model.parameters())
    assert len(statistics._tall) == tall
    for shape in statistics.shapes:
        projection = shape.down.matrix().double()
        for number in shape.numbers:
            row = statistics.numbers.index(number)
            raw = as_matrix(before[number]).double()
            changed = as_matrix(parameters[number].grad).double()
            basis = statistics.basis[row, : shape.down.dimension].double()
            v = projection.T @ torch.diag(shape.down.bucket_sizes.double() ** -0.5) @ basis
            used = v.norm(dim=0) > 0.5
            v, s = v[:, used], 1 + statistics.extra[row][used].double()
            assert torch.allclose(v.T @ v, torch.eye(v.shape[1]).double(), atol=1e-4)
            expected = raw + v @ torch.diag(s - 1) @ v.T @ raw
            assert torch.allclose(changed, expected, atol=1e-5 * float(raw.norm()))
            rest = torch.eye(len(v)).double() - v @ v.T
            assert torch.allclose(rest @ changed, rest @ raw, atol=1e-5 * float(raw.norm()))
            checked += int(bool((s != 1).any()))
    assert checked >= 4  # of 6 tensors; the directions were used
    assert {shape.down.exact for shape in statistics.shapes} == exact


def test_the_log_says_what_happened_to_the_gradients() -> None:
    """From the projections, which are exact for tensors of few rows and columns."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.zeros(6, 7))
    optimizer = Talt(torch.optim.SGD([weights], lr=0.1), min_size=2, update_interval=1)
    for _ in range(12):
        raw = torch.randn(6, 7) * torch.tensor([9.0, 1, 1, 1, 1, 1]).view(6, 1)
        weights.grad = raw.clone()
        optimizer.step()
    log, changed = optimizer.log(), weights.grad
    assert float(log["gradient_norm"][-1, 0]) == pytest.approx(float(raw.norm()), rel=1e-4)
    assert float(log["changed_norm"][-1, 0]) == pytest.approx(float(changed.norm()), rel=1e-4)
    cosine = float((raw * changed).sum() / raw.norm() / changed.norm())
    assert float(log["alignment"][-1, 0]) == pytest.approx(cosine, rel=1e-4)
    assert float(log["changed_norm"][-1, 0]) < 0.9 * float(log["gradient_norm"][-1, 0])
    largest = float(log["eigenvalues"][-1, 0].max())
    assert 200 < largest < 1500  # 7 columns of variance 81


def test_steep_directions_shrink_and_nothing_is_lost_or_blown_up() -> None:
    model, gradients = network()
    optimizer = Talt(BASES["sgd"](model.parameters()), min_size=2, smoothing_factor=1.0)
    for _ in range(40):
        gradients()
        optimizer.step()
    (statistics,) = optimizer._statistics
    extra = statistics.extra[:, :-1]
    assert bool((extra <= 0).all())
    assert bool((extra >= -1).all())
    assert float(extra.min()) < -0.3
    log = optimizer.log()
    ratio = log["changed_norm"] / log["gradient_norm"]
    assert float(ratio.min()) > 0.09  # the condition is bounded by 100
    assert float(ratio.max()) < 2.0
    assert float(log["alignment"].min()) > 0.3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tensors_become_matrices_and_back(layout: torch.memory_format) -> None:
    tensor = torch.arange(4 * 3 * 2 * 2.0).view(4, 3, 2, 2).contiguous(memory_format=layout)
    matrix = as_matrix(tensor)
    assert matrix.shape == (4, 12)
    assert matrix.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert torch.equal(matrix.sort(1).values, torch.arange(48.0).view(4, 12))
    assert torch.equal(like_matrix(matrix.clone(), tensor), tensor)
    for other in (torch.randn(5), torch.randn(1, 7), torch.randn(3, 4)):
        assert torch.equal(like_matrix(as_matrix(other).clone(), other), other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 4, 3, 3)[:, :2],
        torch.randn(6, 2, 3, 6)[..., ::2],
        torch.randn(6, 1, 1, 1).expand(6, 2, 3, 3),
        torch.randn(2, 6, 3, 3).transpose(0, 1),
        torch.randn(6, 2, 1, 1).to(memory_format=torch.channels_last),
    ],
    ids=["part", "every other", "repeated", "turned", "one by one"],
)
def test_any_layout_becomes_a_matrix_with_its_rows(tensor: torch.Tensor) -> None:
    matrix = as_matrix(tensor)
    rows = tensor.flatten(1)
    assert matrix.shape == rows.shape
    assert torch.equal(matrix.sort(1).values, rows.sort(1).values)
    assert torch.equal(like_matrix(matrix.clone(), tensor), tensor)


def test_a_gradient_that_is_no_matrix_in_memory_is_changed_all_the_same() -> None:
    changed = []
    for scattered in (False, True):
        weight = nn.Parameter(torch.zeros(6, 2, 3, 3))
        optimizer: Any = optim.build(
            "talt", [weight], learning_rate=0.1, weight_decay=0.0, min_size=2, update_interval=2
        )
        optimizer.seed = 0
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            gradient = torch.randn(6, 2, 3, 3, generator=generator)
            if scattered:
                gradient = torch.zeros(6, 2, 3, 6)[..., ::2].copy_(gradient)
            weight.grad = gradient
            raw = gradient.clone()
            optimizer.step()
        assert not torch.equal(weight.grad, raw)
        changed.append(weight.grad.clone())  # torch's SGD itself is wrong for such a gradient
    assert torch.allclose(*changed, rtol=1e-4, atol=1e-5)


# --- on surfaces made for it ------------------------------------------------------------------

RAVINE = torch.tensor([100.0, 1.0])
WIDE_RAVINE = torch.cat([torch.logspace(1.7, 2, 3), torch.linspace(0.5, 2, 17)])
RATES = [0.5, 0.9, 0.97, 1.2, 1.8]  # of 2 / largest curvature; from 1 on the base diverges


def steps_to_the_bottom(
    curvatures: Tensor, rate: float, talt: bool, limit: int = 500, **options: Any
) -> float:
    """Steps until the loss is a millionth; infinity when it never is."""
    weights = nn.Parameter(torch.ones(len(curvatures)))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weights], lr=rate)
    if talt:
        optimizer = Talt(optimizer, min_size=2, **options)
    first = float(curvatures.sum()) / 2
    for step in range(limit):
        loss = float((curvatures * weights.detach().square()).sum()) / 2
        if loss < 1e-6 * first:
            return step
        if not loss < 1e6 * first:
            break
        weights.grad = curvatures * weights.detach()
        optimizer.step()
    return math.inf


@pytest.mark.parametrize(("interval", "factor"), [(10, 0.85), (5, 0.7)])
@pytest.mark.parametrize("curvatures", [RAVINE, WIDE_RAVINE], ids=["2 dimensions", "20 dimensions"])
def test_in_a_ravine_it_is_faster_than_its_base_each_at_its_best_rate(
    curvatures: Tensor, interval: int, factor: float
) -> None:
    rates = [2 * share / float(curvatures.max()) for share in RATES]
    base = min(steps_to_the_bottom(curvatures, rate, talt=False) for rate in rates)
    talt = min(
        steps_to_the_bottom(curvatures, rate, talt=True, update_interval=interval)
        for rate in rates[2:]
    )
    assert talt < factor * base


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5])
def test_on_a_plain_it_is_not_slower_at_the_rates_that_descend(rate: float) -> None:
    plain = torch.ones(10)
    base = steps_to_the_bottom(plain, rate, talt=False)
    assert steps_to_the_bottom(plain, rate, talt=True) <= 1.05 * base + 1


def test_on_a_slope_it_is_its_base() -> None:
    ends = []
    for talt in (True, False):
        weights = nn.Parameter(torch.zeros(50))
        optimizer: torch.optim.Optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
        if talt:
            optimizer = Talt(optimizer, min_size=2)
        for _ in range(50):
            weights.grad = torch.linspace(-1, 1, 50)
            optimizer.step()
        ends.append(weights.detach().clone())
    assert torch.allclose(*ends, rtol=1e-4)


def ravine_run(**options: Any) -> Talt:
    weights = nn.Parameter(torch.ones(2))
    optimizer = Talt(torch.optim.SGD([weights], lr=0.0199), min_size=2, **options)
    for _ in range(60):
        weights.grad = RAVINE * weights.detach()
        optimizer.step()
    return optimizer


def test_a_ravine_gives_events_and_a_plain_none() -> None:
    events = ravine_run(smoothing_factor=0.0).events()
    assert len(events) >= 3
    assert all(event.tensor == 0 and 0 < event.strength <= 1 for event in events)
    assert all((event.step + 1) % 10 == 0 for event in events)
    weights = nn.Parameter(torch.ones(2))
    plain = Talt(torch.optim.SGD([weights], lr=0.1), min_size=2)
    for _ in range(60):
        weights.grad = weights.detach().clone()
        plain.step()
    assert plain.events() == []
    assert len(plain.log()["steps"]) == 6


def test_along_the_floor_the_gradient_grows_by_the_strength() -> None:
    optimizer = ravine_run(smoothing_factor=0.0, valley_strength=3.0)
    (statistics,) = optimizer._statistics
    floor = statistics.basis[0, :, -1]
    assert abs(float(floor[1])) > 0.99
    strength = optimizer.events()[-1].strength
    assert float(statistics.extra[0, -1]) == pytest.approx(3.0 * strength, rel=1e-5)


# --- what it keeps ----------------------------------------------------------------------------


def test_the_log_survives_a_saved_state_and_stays_in_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = ravine_run()
    fresh = Talt(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.0199), min_size=2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.events() == optimizer.events()
    assert torch.equal(fresh.log()["eigenvalues"], optimizer.log()["eigenvalues"])
    monkeypatch.setattr(module, "LOG_CAPACITY", 8)
    bounded = ravine_run(update_interval=1)
    steps = bounded.log()["steps"]
    assert len(steps) < 8
    assert len(set(torch.tensor(steps).diff().tolist())) == 1  # evenly thinned
    assert steps[-1] > 40


def test_a_state_of_other_tensors_is_refused() -> None:
    optimizer = ravine_run()
    other = Talt(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), min_size=2)
    with pytest.raises(ValueError, match="TALT is of other tensors"):
        other.load_state_dict(optimizer.state_dict())
    old = optimizer.state_dict()
    del old["wrapper"]["statistics"][0]["persistence"]["record"]
    with pytest.raises(ValueError, match="kept by another version"):
        ravine_run().load_state_dict(old)


def resnet20() -> nn.Module:
    from llp.workloads import models

    return models.build("resnet20", {}, channels=3, image_size=32, num_classes=10)


def test_it_takes_a_tenth_of_the_memory_of_parameters_and_base_on_resnet20() -> None:
    model = resnet20()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = Talt(base)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(12):  # past the first update
        optimizer.step()
    size = 4 * sum(p.numel() for p in model.parameters())
    held = sum(
        v.numel() * 4 for state in base.state.values() for v in state.values() if v is not None
    )
    memory = optimizer.memory()
    assert memory["bytes"] <= 0.10 * (size + held)
    assert memory["bytes_per_parameter"] == pytest.approx(4 * memory["bytes"] / size)
    assert memory["num_tensors"] >= 18
    state = optimizer.state_dict()["wrapper"]["statistics"][0]
    assert memory["bytes"] > 4 * (state["covariance"]["biased"].numel() + state["basis"].numel())


def tensors_in(thing: Any, found: dict[int, Tensor]) -> None:
    """Every tensor that `thing` holds on to, by the address of its memory."""
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, dict):
        tensors_in(list(thing.values()), found)
    elif isinstance(thing, list | tuple):
        for each in thing:
            tensors_in(each, found)
    elif type(thing).__module__.startswith("llp."):
        tensors_in(vars(thing), found)


@pytest.mark.parametrize("dimension", [4, 32])
def test_the_memory_it_tells_is_all_that_it_holds_on_to(dimension: int) -> None:
    model, _ = network()
    model.append(nn.Linear(5, 300))  # a tall one
    optimizer = Talt(BASES["sgd"](model.parameters()), min_size=2, projection_dimension=dimension)
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    held: dict[int, Tensor] = {}
    tensors_in(optimizer._statistics, held)
    for parameter in model.parameters():
        del held[parameter.untyped_storage().data_ptr()]
    held.pop(0, None)
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert optimizer.memory()["bytes"] == total


@pytest.mark.parametrize(
    ("shape", "most"),
    [((200_000,), 4.2), ((1, 20_000), 4.5), ((50_000, 2), 2.3), ((10, 4096), 0.5)],
)
def test_large_tensors_of_few_columns_or_rows_take_little_more_than_a_sign_each(
    shape: tuple[int, ...], most: float
) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Talt(torch.optim.SGD([weight], lr=0.1))
    for _ in range(12):
        weight.grad = torch.randn(shape)
        optimizer.step()
    assert optimizer.memory()["bytes_per_parameter"] < most


def test_where_a_shape_has_no_gradient_nothing_is_computed_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [(9, 6), (9, 6), (7, 6), (400, 6), (500, 3)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Talt(torch.optim.SGD(weights, lr=0.1), min_size=2, update_interval=2)
    read: list[tuple[int, ...]] = []
    matrices = talt_gradients.Gradients.matrices

    def watched(self: Any, first: int, last: int) -> list[Tensor]:
        read.extend(tuple(p.shape) for p in self.parameters[first:last])
        return matrices(self, first, last)

    monkeypatch.setattr(talt_gradients.Gradients, "matrices", watched)
    for step in range(8):
        for number, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape) if step < 4 or number in (1, 4) else None
        read.clear()
        kept = [w.detach().clone() for w in weights]
        optimizer.step()
        assert sorted(read) == sorted(shapes if step < 4 else [(9, 6), (9, 6), (500, 3)])
        changed = [not torch.equal(a, b) for a, b in zip(kept, weights, strict=True)]
        assert changed == [step < 4, True, step < 4, step < 4, True]


def test_a_sparse_gradient_goes_to_the_base_as_it_is() -> None:
    ends = []
    for talt in (True, False):
        torch.manual_seed(0)
        table, head = nn.Embedding(40, 6, sparse=True), nn.Linear(6, 5)
        parameters = [*table.parameters(), *head.parameters()]
        optimizer: Any = torch.optim.SGD(parameters, lr=0.1)
        if talt:
            optimizer = Talt(optimizer, min_size=2, update_interval=2)
        for step in range(8):
            optimizer.zero_grad()
            table(torch.tensor([step, 3, step + 20])).square().sum().backward()
            head.weight.grad = torch.randn(5, 6)
            optimizer.step()
        ends.append((table.weight.detach().clone(), head.weight.detach().clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_a_direction_that_has_not_converged_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for converged in (True, False):
        monkeypatch.setattr(
            talt_parts.Eigenpairs,
            "converged",
            lambda self, tolerance, so=converged: torch.full_like(self.values, so).bool(),
        )
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(12, 6))
        optimizer = Talt(torch.optim.SGD([weight], lr=0.1), min_size=2, update_interval=5)
        for _ in range(10):
            weight.grad = torch.randn(12, 6)
            optimizer.step()
        found.append(optimizer._statistics[0].extra[:, :-1])
    assert float(found[0].min()) < -0.05
    assert not found[1].any()


def test_under_a_default_of_float64_it_is_the_same() -> None:
    ends = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            weight = nn.Parameter(torch.zeros(40, 9, dtype=torch.float32))
            optimizer = Talt(torch.optim.SGD([weight], lr=0.1), min_size=2, update_interval=3)
            generator = torch.Generator().manual_seed(0)
            for _ in range(9):
                weight.grad = torch.randn(40, 9, generator=generator, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_small_tensors_go_to_the_base_as_they_are() -> None:
    model, gradients = network()
    optimizer = Talt(BASES["sgd"](model.parameters()), min_size=1000)
    for _ in range(10):
        gradients()
        optimizer.step()
    sizes = [p.numel() for p in model.parameters()]
    assert optimizer.log()["tensors"] == [k for k, size in enumerate(sizes) if size >= 1000]
    gradients()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    same = [torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True)]
    assert same == [size < 1000 for size in sizes]


def test_a_group_that_is_added_is_looked_at_too() -> None:
    one, two = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = Talt(torch.optim.SGD([one], lr=0.1, momentum=0.9), min_size=2)
    one.grad = torch.ones(8)
    optimizer.step()
    optimizer.add_param_group({"params": [two], "lr": 0.5})
    two.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.memory()["num_tensors"] == 2
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.1, 0.5]
    assert float(two.detach()[0]) == 0.5
