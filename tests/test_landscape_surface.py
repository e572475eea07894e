"""Lines and surfaces: the right values in the right cells, and nothing left behind."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from test_landscape_sharpness import (
    NOTHING,
    Quadratic,
    as_is,
    examples,
    relu_network,
    rescaled,
)
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import directions
from llp.landscape.evaluation import PointEvaluator, accuracy
from llp.landscape.interpolation import rows_to_evaluate
from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    same_bits,
    trainable,
)
from llp.landscape.passes import batch_losses
from llp.landscape.surfaces import axis


def given(model: nn.Module, *rows: Tensor) -> directions.Directions:
    return directions.make(model, torch.stack(rows))


class Scene(nn.Module):
    """A function of two weights that no reflection or exchange of the axes leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        x, y = self.theta
        return 2 * x + y**2 + 3 * y + 0.5 * x * y


def scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 2 * x + y**2 + 3 * y + 0.5 * x * y


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        return self.head(self.drop(functional.relu(self.second(x)).mean((2, 3))))


def conv_net(dtype: torch.dtype = torch.float32) -> ConvNet:
    torch.manual_seed(3)
    model = ConvNet().to(dtype)
    for inputs, _ in images(torch.float32, 12, 9):
        model(inputs.to(dtype))  # running statistics of its own
    return model


def images(dtype: torch.dtype, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 2, 6, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


class Attention(nn.Module):
    """Attention, layer normalisation, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens))).movedim(-1, 1)


def tokens(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randint(0, 7, (size, 5), generator=generator) for _ in range(2))
        for size in sizes
    ]


def test_a_quadratic_is_reproduced_in_every_cell() -> None:
    """Catches shifted rows, halved steps and turned axes."""
    model = Quadratic()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, generator=generator).double()
    found = landscape.surface(
        model, as_is, NOTHING, directions=given(model, first, second),
        extent=((-1.5, 0.5), 2.0), resolution=(9, 7),
    )  # fmt: skip
    assert found.x.tolist() == pytest.approx([-1.5 + 0.25 * i for i in range(9)])
    assert found.y.tolist() == pytest.approx([-2 + 4 / 6 * i for i in range(7)])
    theta = model.theta.detach()
    for (i, x), (j, y) in itertools.product(enumerate(found.x), enumerate(found.y)):
        point = theta + x * first + y * second
        expected = float(point @ model.matrix @ point / 2 + model.slope @ point)
        assert abs(float(found.loss[i, j]) - expected) < 1e-10
    assert found.exact.all()
    assert found.num_forwards == 1 + 63


def test_the_first_index_runs_along_the_first_direction() -> None:
    model = Scene()
    found = landscape.surface(
        model, as_is, NOTHING, directions=given(model, *torch.eye(2)), resolution=(5, 9)
    )
    assert found.loss.shape == (5, 9)
    assert found.loss == pytest.approx(scene(found.x[:, None], found.y[None, :]), abs=1e-14)
    across, along, height = found.mesh()
    assert height.shape == (9, 5)
    assert height == pytest.approx(scene(across, along), abs=1e-14)
    assert (across[0, -1], along[0, -1]) == (1.0, -1.0)


def test_a_line_has_the_lengths_it_is_asked_for() -> None:
    model = Scene()
    along_y = given(model, torch.tensor([0.0, 2.0]))
    half, whole = (
        landscape.line(model, as_is, NOTHING, direction=along_y, extent=extent, resolution=5)
        for extent in (0.5, 1.0)
    )
    assert half.loss == pytest.approx(scene(0 * half.x, 2 * half.x), abs=1e-14)
    assert whole.x[[0, -1]].tolist() == [-1.0, 1.0]
    assert whole.x.tolist() == (2 * half.x).tolist()
    assert whole.norm == 2.0
    part = landscape.line(model, as_is, NOTHING, direction=along_y, extent=(0.0, 3.0), resolution=4)
    assert part.x.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("resolution", [2, 3, 13, 25, 51])
def test_axes_are_symmetric_with_an_exact_zero_in_the_middle(resolution: int) -> None:
    points = axis(0.7, resolution)
    assert (points == -points[::-1]).all()
    assert (points[0], points[-1]) == (-0.7, 0.7)
    assert (0.0 in points) == bool(resolution % 2)
    assert np.diff(points) == pytest.approx(1.4 / (resolution - 1))


CASES = {
    "conv, float32": (conv_net, lambda: images(torch.float32, 7, 4)),
    "conv, float64": (
        lambda: conv_net(torch.float64),
        lambda: images(torch.float64, 7, 4),
    ),
    "conv, channels last": (
        lambda: conv_net().to(memory_format=torch.channels_last),
        lambda: images(torch.float32, 16, 3),
    ),
    "attention, tied weights": (lambda: seeded(Attention), lambda: tokens(6, 2)),
}


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("case", CASES)
def test_the_centre_is_the_models_own_loss_to_the_bit(case: str) -> None:
    model, batches = (make() for make in CASES[case])
    found = landscape.surface(model, functional.cross_entropy, batches, resolution=5, chunk_size=7)
    with evaluation_state(model), exact_arithmetic(torch.device("cpu")):
        expected = batch_losses(model, functional.cross_entropy, batches).mean
    assert float(found.loss[2, 2]) == found.base_loss == expected
    assert float(found.metric[2, 2]) == found.base_metric
    line = landscape.line(model, functional.cross_entropy, batches, resolution=3)
    assert float(line.loss[1]) == expected
    assert float(found.loss[0, 0]) != expected


@pytest.mark.parametrize("case", CASES)
def test_every_cell_is_the_loss_and_accuracy_of_the_moved_model(case: str) -> None:
    model, batches = (make() for make in CASES[case])
    plane = directions.random(model, exclude_bias=False, exclude_normalization=False)
    found = landscape.surface(
        model, functional.cross_entropy, batches, directions=plane, resolution=3
    )
    total = sum(len(targets) for _, targets in batches)
    for i, j in itertools.product(range(3), repeat=2):
        step = found.x[i] * plane.vectors[0] + found.y[j] * plane.vectors[1]
        loss = hits = 0.0
        with evaluation_state(model), torch.no_grad(), landscape.perturbed(model, step):
            for inputs, targets in batches:
                outputs = model(inputs)
                loss += float(functional.cross_entropy(outputs, targets)) * len(targets) / total
                right = (outputs.argmax(1) == targets).double().mean()
                hits += float(right) * len(targets) / total
        rel = 1e-5 if step.dtype == torch.float32 else 1e-12
        assert float(found.loss[i, j]) == pytest.approx(loss, rel=rel)
        assert float(found.metric[i, j]) == pytest.approx(hits, abs=1e-9)


def test_the_parameters_move_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A surface that never moves the model looks fine: it is perfectly flat."""
    model, seen = conv_net().train(), []
    batches = images(torch.float32, 5)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(flatten(trainable(model)))
        return functional.cross_entropy(outputs, targets)

    before = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    plane = directions.random(model)
    found = landscape.surface(model, loss, batches, directions=plane, resolution=3, strategy="loop")
    assert np.ptp(found.loss) > 1e-3
    base = flatten(trainable(model))
    moved = torch.stack(seen[-9:]) - base
    grid = torch.tensor([[x, y] for x in found.x for y in found.y], dtype=torch.float32)
    assert torch.allclose(moved, grid @ plane.vectors, atol=1e-6)
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"rho": 0.1}, {"strategy": "vmap"}])
def test_everything_is_put_back_when_the_loss_fails(options: dict[str, object]) -> None:
    model, batches, calls = conv_net().train(), images(torch.float32, 5), itertools.count()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 3:
            raise FloatingPointError("loss")
        return functional.cross_entropy(outputs, targets)

    before = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    chunk_size = 1 if "strategy" in options else 64
    if "strategy" in options:
        chunk_size = 2
    with pytest.raises(FloatingPointError):
        landscape.surface(model, loss, batches, resolution=3, chunk_size=chunk_size, **options)
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(module.training for module in model.modules())


def test_filter_normalised_surface_ignores_layer_scales_and_a_plain_one_does_not() -> None:
    model, batches = relu_network().double(), examples(20, 7)
    twin = rescaled(model)

    def both(normalization: directions.Normalization) -> list[np.ndarray]:
        return [
            landscape.surface(
                each, functional.cross_entropy, batches, resolution=5,
                directions=directions.random(each, normalization=normalization),
            ).loss
            for each in (model, twin)
        ]  # fmt: skip

    one, other = both("filter")
    assert one == pytest.approx(other, rel=1e-8)
    one, other = both("none")
    assert np.abs(one - other).max() > 0.05 * np.ptp(one)


def test_the_curvature_along_an_eigenvector_is_its_eigenvalue() -> None:
    model, batches = relu_network().double(), examples(20, 7)
    model = nn.Sequential(model[0], nn.Tanh(), model[4])
    op = landscape.hessian(model, functional.cross_entropy, batches)
    pairs = [
        landscape.top_eigenpairs(op, k=2, which=end, tolerance=1e-8)
        for end in ("largest", "smallest")
    ]
    plane = directions.hessian(model, pairs, signed=True)
    step = 1e-3
    found = landscape.surface(
        model, functional.cross_entropy, batches, directions=plane, extent=step, resolution=3
    )
    along_first = (found.loss[2, 1] - 2 * found.loss[1, 1] + found.loss[0, 1]) / step**2
    along_second = (found.loss[1, 2] - 2 * found.loss[1, 1] + found.loss[1, 0]) / step**2
    assert along_first == pytest.approx(plane.values[0], rel=1e-4)
    assert along_second == pytest.approx(plane.values[1], rel=1e-3)
    assert plane.values[0] > 0 > plane.values[1]


def test_no_metric_where_accuracy_means_nothing_and_any_other_on_request() -> None:
    model, batches = relu_network().double(), examples(9)
    regression = [(inputs, torch.zeros(len(inputs), 3).double()) for inputs, _ in batches]
    found = landscape.surface(model, functional.mse_loss, regression, resolution=3)
    assert found.metric is None
    assert math.isnan(found.base_metric)
    with pytest.raises(ValueError, match="has no metric"):
        found.mesh("metric")

    def top_two(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.topk(2).indices == targets[:, None]).any(1).double().mean()

    found = landscape.surface(
        model, functional.cross_entropy, batches, resolution=3, metric=top_two
    )
    plain = landscape.surface(model, functional.cross_entropy, batches, resolution=3)
    assert (found.metric >= plain.metric).all()
    assert found.metric.sum() > plain.metric.sum()


def test_losses_that_are_not_finite_stay_as_they_are_and_a_cap_is_only_for_pictures() -> None:
    class Cliff(Scene):
        def forward(self, _: Tensor) -> Tensor:
            x, y = self.theta
            return (x + 1).log() + 1 / (y + 1)  # -inf at x = -1, inf at y = -1, NaN below

    model = Cliff()
    found = landscape.surface(
        model, as_is, NOTHING, directions=given(model, *torch.eye(2)),
        extent=((-1.0, 1.0), (-1.0, 1.0)), resolution=5, loss_cap=1.2,
    )  # fmt: skip
    assert found.loss[0, 0] != found.loss[0, 0]  # -inf + inf
    assert (found.loss[0, 1:] == -np.inf).all()
    assert (found.loss[1:, 0] == np.inf).all()
    assert np.isfinite(found.loss[1:, 1:]).all()
    assert found.loss[1:, 1:].max() > 1.2
    assert found.mesh()[2][1:, 1:].max() == 1.2
    assert (found.mesh()[2][0, 1:] == 1.2).all()


@pytest.mark.parametrize("rho", [0.02, 0.5])
def test_the_robust_surface_is_never_below_the_plane(rho: float) -> None:
    model, batches = conv_net().train(), images(torch.float32, 8, 5)
    plane = landscape.surface(model, functional.cross_entropy, batches, resolution=5)
    for robust in ("ascent", "first_order"):
        found = landscape.surface(
            model, functional.cross_entropy, batches, resolution=5, rho=rho, robust=robust
        )
        assert (found.robust >= found.loss).all()
        assert (found.robust > found.loss).mean() > 0.5
        assert found.loss == pytest.approx(plane.loss, rel=1e-5)
        assert found.num_gradients == 25
    assert found.base_loss == plane.base_loss


@pytest.mark.parametrize("shift", [0.0, 30.0])  # curved up and down, and only down
def test_the_robust_surface_of_a_quadratic_is_its_closed_form(shift: float) -> None:
    model, rho = Quadratic(), 3.0
    model.matrix -= shift * torch.eye(6)
    generator = torch.Generator().manual_seed(0)
    plane = given(model, *torch.randn(2, 6, generator=generator).double())
    options = {"directions": plane, "resolution": 4, "rho": rho}
    first = landscape.surface(model, as_is, NOTHING, robust="first_order", **options)
    step = landscape.surface(model, as_is, NOTHING, robust="ascent", **options)
    overshot = 0
    for i, j in itertools.product(range(4), repeat=2):
        point = model.theta.detach() + torch.tensor([first.x[i], first.y[j]]) @ plane.vectors
        gradient = model.matrix @ point + model.slope
        norm, loss = float(gradient.norm()), float(first.loss[i, j])
        assert float(first.robust[i, j]) == pytest.approx(loss + rho * norm, rel=1e-10)
        bend = float(gradient @ model.matrix @ gradient) / norm**2 * rho**2 / 2
        expected = loss + max(0.0, rho * norm + bend)
        assert float(step.robust[i, j]) == pytest.approx(expected, rel=1e-10)
        overshot += rho * norm + bend < 0
    assert (overshot > 0) == (shift > 0)


def test_batch_statistics_are_estimated_anew_at_every_point_when_asked() -> None:
    model, batches = conv_net(torch.float64), images(torch.float64, 8, 4)
    plane = directions.random(model)
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    found = landscape.surface(
        model, functional.cross_entropy, batches, directions=plane, resolution=3, statistics=whole
    )
    stale = landscape.surface(
        model, functional.cross_entropy, batches, directions=plane, resolution=3
    )
    assert np.abs(found.loss - stale.loss).max() > 1e-3
    step = found.x[0] * plane.vectors[0] + found.y[2] * plane.vectors[1]
    twin = conv_net(torch.float64).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter, part in zip(
            twin.parameters(), landscape.unflatten(step, list(twin.parameters())), strict=True
        ):
            parameter.add_(part)
        twin.norm.train()
        twin.norm.momentum = 1.0
        twin(whole[0][0])
        twin.norm.eval()
        expected = functional.cross_entropy(twin(whole[0][0]), whole[0][1])
    assert float(found.loss[0, 2]) == pytest.approx(float(expected), rel=1e-9)
    assert found.strategy == "alone"


class Calls:
    """A loader that counts how often it is read."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.count = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.count += 1
        return iter(self.batches)


def test_a_loader_is_read_once_for_a_chunk_of_points() -> None:
    model, loader = relu_network().double(), Calls(examples(9, 4))
    landscape.surface(model, functional.cross_entropy, loader, resolution=6, chunk_size=18)
    assert loader.count == 1 + 1 + 2  # for the metric, the base loss and two chunks


def test_chunk_size_changes_no_bit() -> None:
    model, batches = conv_net(), images(torch.float32, 7, 4)
    losses = [
        landscape.surface(
            model,
            functional.cross_entropy,
            batches,
            resolution=5,
            chunk_size=size,
            strategy="loop",
        ).loss
        for size in (1, 6, 25)
    ]
    assert (losses[0] == losses[1]).all()
    assert (losses[0] == losses[2]).all()


def test_chunks_may_be_evaluated_elsewhere_and_in_any_order() -> None:
    model, batches = conv_net(), images(torch.float32, 7, 4)
    sizes: list[int] = []

    def elsewhere(evaluate, chunks):
        copy = pickle.loads(pickle.dumps(evaluate))  # as another process gets it
        for index in reversed(range(len(chunks))):
            sizes.append(len(chunks[index]))
            yield index, copy(chunks[index])

    here = landscape.surface(
        model, functional.cross_entropy, batches, resolution=5, strategy="loop"
    )
    there = landscape.surface(
        model, functional.cross_entropy, batches, resolution=5, chunk_size=8,
        evaluate_chunks=elsewhere, strategy="loop",
    )  # fmt: skip
    assert sizes == [1, 8, 8, 8]
    assert (here.loss == there.loss).all()
    assert (here.metric == there.metric).all()
    assert (here.strategy, there.strategy) == ("loop", "outside")


def test_a_chunk_that_never_comes_back_is_noticed() -> None:
    model = Scene()

    def lossy(evaluate, chunks):
        yield 0, evaluate(chunks[0])

    def short(evaluate, chunks):
        yield 0, evaluate(chunks[0])[:2]

    for broken, message in ((lossy, "did not return 2 of 3 chunks"), (short, r"shape \(2, 3\)")):
        with pytest.raises(ValueError, match=message):
            landscape.surface(
                model, as_is, NOTHING, directions=given(model, *torch.eye(2)), resolution=3,
                chunk_size=3, evaluate_chunks=broken,
            )  # fmt: skip


def test_an_interrupted_surface_goes_on_with_the_chunks_that_are_missing(tmp_path) -> None:
    model, batches = conv_net(), images(torch.float32, 7, 4)
    asked: list[int] = []

    def until(limit: int):
        def evaluate_chunks(evaluate, chunks):
            for index, chunk in enumerate(chunks):
                if len(asked) == limit:
                    raise KeyboardInterrupt
                asked.append(len(chunk))
                yield index, evaluate(chunk)

        return evaluate_chunks

    def run(limit: int, **options: object) -> landscape.Surface:
        return landscape.surface(
            model, functional.cross_entropy, batches, resolution=5, chunk_size=5,
            store=landscape.FileStore(tmp_path), evaluate_chunks=until(limit), strategy="loop",
            **options,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(3)
    assert len(landscape.FileStore(tmp_path)) == 3
    found = run(99)
    assert len(asked) == 5
    plain = landscape.surface(
        model, functional.cross_entropy, batches, resolution=5, strategy="loop"
    )
    assert (found.loss == plain.loss).all()
    run(99)
    assert len(asked) == 5
    with torch.no_grad():
        model.head.bias += 0.5  # other weights: nothing of it fits any more
    run(99)
    assert len(asked) == 10
    run(99, metric=None)
    assert len(asked) == 15


def test_a_file_store_is_a_mapping_of_whole_files(tmp_path) -> None:
    store = landscape.FileStore(tmp_path / "chunks")
    store["one"] = np.arange(6.0).reshape(2, 3)
    assert store["one"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (list(store), len(store), "one" in store, "two" in store) == (["one"], 1, True, False)
    (store.folder / ".two.99.partial").write_bytes(b"half")
    assert list(store) == ["one"]
    with pytest.raises(KeyError):
        store["two"]
    with pytest.raises(ValueError, match="no slashes or dots"):
        store["../one"]
    del store["one"]
    assert not len(store)
    with pytest.raises(KeyError):
        del store["one"]


def test_interpolation_states_the_error_it_makes() -> None:
    model, batches = relu_network().double(), examples(20, 7)
    exact = landscape.surface(model, functional.cross_entropy, batches, resolution=25)
    found = landscape.surface(
        model, functional.cross_entropy, batches, resolution=25, coarse=9, num_held_out=60
    )
    evaluated = int(found.exact.sum())
    assert found.interpolation.num_evaluated == evaluated == 81 + 60
    assert found.num_forwards == 1 + evaluated
    assert (found.loss[found.exact] == exact.loss[found.exact]).all()
    assert (found.metric[found.exact] == exact.metric[found.exact]).all()
    error = np.abs(found.loss - exact.loss)[~found.exact]
    stated = found.interpolation
    assert stated.rms_error == pytest.approx(math.sqrt((error**2).mean()), rel=0.5)
    assert 0 < stated.max_error < 2 * error.max() < 6 * stated.max_error
    assert stated.max_relative == pytest.approx(stated.max_error / stated.value_range)
    assert stated.value_range == pytest.approx(np.ptp(exact.loss), rel=0.05)
    assert found.loss[12, 12] == found.base_loss


def test_interpolation_of_a_bicubic_is_exact_and_keeps_the_centre_off_the_coarse_grid() -> None:
    class Cubic(Scene):
        def forward(self, _: Tensor) -> Tensor:
            x, y = self.theta
            return x**3 - 2 * x**2 * y**3 + y**2 + 0.1 * x

    model = Cubic()
    found = landscape.surface(
        model, as_is, NOTHING, directions=given(model, *torch.eye(2)), resolution=11, coarse=6,
        num_held_out=5,
    )  # fmt: skip
    x, y = found.x[:, None], found.y[None, :]
    assert found.loss == pytest.approx(x**3 - 2 * x**2 * y**3 + y**2 + 0.1 * x, abs=1e-13)
    assert found.interpolation.max_error < 1e-13
    assert found.exact[5, 5]
    assert found.loss[5, 5] == found.base_loss


@pytest.mark.parametrize(
    ("num_rows", "count"), [(25, 11), (25, 4), (25, 24), (51, 17), (7, 7), (6, 4)]
)
def test_rows_crowd_at_the_border_and_none_comes_twice(num_rows: int, count: int) -> None:
    rows = rows_to_evaluate(num_rows, count)
    assert len(set(rows.tolist())) == count
    assert (rows[0], rows[-1]) == (0, num_rows - 1)
    gaps = np.diff(rows)
    assert (gaps > 0).all()
    if num_rows > 2 * count:
        assert gaps[0] < gaps[len(gaps) // 2]
    if num_rows % 2 and count % 2:
        assert num_rows // 2 in rows


def test_a_surface_with_holes_is_not_interpolated() -> None:
    class Cliff(Scene):
        def forward(self, _: Tensor) -> Tensor:
            return self.theta[0].log() + self.theta[1]

    model = Cliff()
    found = landscape.surface(
        model, as_is, NOTHING, directions=given(model, *torch.eye(2)), resolution=7, coarse=4,
        num_held_out=3,
    )  # fmt: skip
    assert found.interpolation is None
    assert found.exact.all()
    assert found.num_forwards > 49
    assert np.isnan(found.loss[:3]).all()
    assert (found.loss[3] == -np.inf).all()


def test_stacked_points_give_the_same_surface_and_the_same_centre() -> None:
    model, batches = conv_net(torch.float64), images(torch.float64, 7, 4)
    loop = landscape.surface(model, functional.cross_entropy, batches, resolution=5)
    stacked = landscape.surface(
        model, functional.cross_entropy, batches, resolution=5, strategy="vmap"
    )
    assert stacked.loss == pytest.approx(loop.loss, rel=1e-12)
    assert (stacked.metric == loop.metric).all()
    assert stacked.loss[2, 2] == stacked.base_loss == loop.base_loss
    assert stacked.strategy == "vmap 8"
    with pytest.raises(ValueError, match="vmap evaluates neither"):
        landscape.surface(model, functional.cross_entropy, batches, strategy="vmap", rho=0.1)


def test_channels_last_gives_the_same_surface_and_the_same_centre() -> None:
    model, batches = conv_net(), images(torch.float32, 7, 4)
    options = {"resolution": 5, "directions": directions.random(model)}
    loop = landscape.surface(model, functional.cross_entropy, batches, strategy="loop", **options)
    found = landscape.surface(model, functional.cross_entropy, batches, **options)
    assert (loop.strategy, found.strategy) == ("loop", "channels_last")
    assert found.loss == pytest.approx(loop.loss, rel=1e-5)
    assert found.loss[2, 2] == found.base_loss == loop.base_loss
    wide = landscape.surface(
        model.double(), functional.cross_entropy, images(torch.float64, 7), resolution=3
    )
    assert wide.strategy == "loop"


def test_a_model_that_cannot_run_with_channels_last_runs_as_it_is() -> None:
    class View(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.norm(self.first(x)))
            return self.head(self.second(x).view(len(x), -1)[:, :5])

    class Raw(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.norm(self.first(x)))
            return self.head(x.as_strided((len(x), 5), (5 * 36, 1)))

    for kind in (View, Raw):
        model, batches = seeded(kind), images(torch.float32, 7)
        found = landscape.surface(model, functional.cross_entropy, batches, resolution=3)
        assert found.strategy == "loop"
        assert found.loss[1, 1] == found.base_loss


def test_the_probe_takes_the_fastest_way_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, with the clock in our hands."""
    cost = {"loop": 3.0, "channels_last": 2.0, "vmap 4": 4.0, "vmap 16": 4.0}  # of a whole call
    asked: list[str] = []

    def timed(call) -> float:
        asked.append(call.args[1])
        assert len(call.func.__self__.batches) == 1  # a probe looks at one batch
        call()
        return cost[call.args[1]]

    monkeypatch.setattr("llp.landscape.evaluation._timed", timed)

    class Branching(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum().item() > 0 else 2 * y

    for kind, best in ((ConvNet, "vmap 16"), (Branching, "channels_last")):
        asked.clear()
        model, batches = seeded(kind), images(torch.float32, 7, 4)
        rows = directions.random(model).vectors
        evaluate = PointEvaluator(model, functional.cross_entropy, batches, rows)
        with evaluation_state(model):
            assert evaluate._fastest(list(cost)) == best
        assert asked == list(cost)
        assert evaluate.batches is batches
        assert ("vmap 4" in evaluate.probe_seconds) == (kind is ConvNet)


def test_frozen_parameters_stay_where_they_are() -> None:
    model, batches = conv_net(), images(torch.float32, 7)
    model.first.weight.requires_grad_(False)
    plane = directions.random(model)
    found = landscape.surface(
        model, functional.cross_entropy, batches, directions=plane, resolution=3
    )
    step = plane.vectors[0] + plane.vectors[1]
    with evaluation_state(model), landscape.perturbed(model, step):
        expected = batch_losses(model, functional.cross_entropy, batches).mean
    assert float(found.loss[2, 2]) == pytest.approx(expected, rel=1e-6)


def test_an_evaluator_refuses_coordinates_of_another_plane() -> None:
    model = Scene()
    evaluate = PointEvaluator(model, as_is, NOTHING, torch.eye(2).double())
    with pytest.raises(ValueError, match=r"expected coordinates \[m, 2\]"):
        evaluate(np.zeros((4, 3)))
    rows = evaluate(np.array([[0.5, -1.0]]))
    assert rows[0, 0] == pytest.approx(scene(np.float64(0.5), np.float64(-1.0)))
    assert np.isnan(rows[0, 1:]).all()


def test_accuracy_counts_positions_too() -> None:
    outputs = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])  # one example, two classes, two positions
    assert float(accuracy(outputs, torch.tensor([[0, 0]]))) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 1}, "resolution must be at least 2"),
        ({"extent": -1.0}, "extent must be a positive number"),
        ({"extent": (1.0, 0.0)}, "extent must be a positive number"),
        ({"coarse": 3}, "coarse must be at least 4"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"rho": -0.1}, "rho must not be negative"),
        ({"strategy": "fast"}, "strategy must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    model = Quadratic()
    plane = given(model, *torch.eye(6)[:2])
    with pytest.raises(ValueError, match=message):
        landscape.surface(model, as_is, NOTHING, directions=plane, **options)
    with pytest.raises(ValueError, match="a surface needs two directions"):
        landscape.surface(model, as_is, NOTHING, directions=given(model, torch.ones(6)))


@pytest.mark.parametrize("form", ["list", "tuple", "tensor", "arrays"])
def test_vectors_are_taken_as_they_are_and_a_quadratic_is_its_formula(form: str) -> None:
    model = Quadratic()
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).double() * 4
    axes = {
        "list": list(rows),
        "tuple": tuple(rows),
        "tensor": rows,
        "arrays": [row.numpy() for row in rows],
    }[form]
    found = landscape.surface(model, as_is, NOTHING, directions=axes, resolution=5)
    theta = model.theta.detach()
    for i, j in itertools.product(range(5), range(5)):
        point = theta + found.x[i] * rows[0] + found.y[j] * rows[1]
        expected = point @ model.matrix @ point / 2 + model.slope @ point
        assert found.loss[i, j] == pytest.approx(float(expected), rel=1e-10)
    along = landscape.line(model, as_is, NOTHING, direction=rows[0], resolution=5)
    assert along.loss == pytest.approx(found.loss[:, 2], rel=1e-10)


def test_directions_by_name() -> None:
    model, data = relu_network().double(), examples(4)
    named = landscape.surface(
        model, functional.cross_entropy, data, directions="random", resolution=3
    )
    made = landscape.surface(model, functional.cross_entropy, data, resolution=3)
    assert named.loss.tobytes() == made.loss.tobytes()
    for name in directions.MAKERS:
        assert callable(getattr(directions, name))
    for wrong, message in (
        ("hessain", "there are random, hessian, adam, between"),
        ("hessian", r"directions.hessian\(model, landscape.top_eigenpairs"),
        ([torch.ones(3), torch.ones(3)], r"not shape \(3,\)"),
        ([], "no direction"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape.surface(model, functional.cross_entropy, data, directions=wrong)
    with pytest.raises(TypeError, match="not int"):
        landscape.surface(model, functional.cross_entropy, data, directions=2)  # type: ignore[arg-type]


def test_records_are_plain_data() -> None:
    model, batches = relu_network().double(), examples(9)
    found = landscape.surface(
        model, functional.cross_entropy, batches, resolution=9, coarse=4, num_held_out=3
    )
    arrays, summary = found.to_arrays(), found.summary()
    assert set(arrays) == {"x", "y", "loss", "metric", "exact", "norms"}
    assert arrays["loss"].shape == (9, 9)
    assert summary["interpolation/num_held_out"] == 4  # three and the centre
    assert summary["robust"] is None
    assert summary["labels"] == "random 1, random 2"
    assert summary["base_loss"] == found.base_loss
