"""Every row of the optimizer table lives through the same life cycle."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llp import optim, registry
from llp.errors import SpecError
from llp.optim.muon import BatchedMuon
from llp.optim.wrapper import gradients_per_step

ROWS = sorted(registry.OPTIMIZERS)
LEARNING_RATE = {"sgd": 0.02, "sam": 0.02, "asam": 0.02, "entropy_sgd": 0.02, "talt": 0.02}
OPTIONS: dict[str, dict[str, Any]] = {"talt": {"min_size": 2, "update_interval": 2}}
AROUND = ["asam", "entropy_sgd", "sam", "talt"]


def make(name: str, parameters: Any, weight_decay: float = 0.0, **options: Any) -> Any:
    rate = LEARNING_RATE.get(name, 0.05)
    options = {**OPTIONS.get(name, {}), **options}
    return optim.build(name, parameters, learning_rate=rate, weight_decay=weight_decay, **options)


def quadratic(seed: int = 0) -> tuple[nn.Parameter, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    matrix = basis @ torch.diag(torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0, 8.0])) @ basis.T
    weights = nn.Parameter(torch.randn(6, generator=generator))
    return weights, lambda: 0.5 * weights @ matrix @ weights


def run(optimizer: Any, loss: Callable[[], torch.Tensor], steps: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)


def network(seed: int = 0, autocast: bool = False) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 3, 6, 6, generator=generator)
    labels = (inputs.mean((1, 2, 3)) > 0).long() + 2 * (inputs[:, 0].mean((1, 2)) > 0).long()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.ReLU()
    )
    model.append(nn.Linear(12, 4))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return nn.functional.cross_entropy(model(inputs), labels)

    return model, loss


def weights_of(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("name", ROWS)
def test_descends_a_quadratic(name: str) -> None:
    weights, loss = quadratic()
    before = float(loss().detach())
    run(make(name, [weights]), loss, 300)
    assert float(loss().detach()) < 1e-2 * before


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ROWS)
def test_trains_a_network(name: str, autocast: bool) -> None:
    model, loss = network(autocast=autocast)
    before = float(loss().detach())
    rate = 0.1 if name in LEARNING_RATE else 0.01
    optimizer = optim.build(
        name, model.parameters(), learning_rate=rate, weight_decay=0.0, **OPTIONS.get(name, {})
    )
    run(optimizer, loss, 60)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float(loss().detach()) < 0.7 * before


@pytest.mark.parametrize("name", ROWS)
def test_same_start_gives_same_bits(name: str) -> None:
    ends = []
    for _ in range(2):
        model, loss = network()
        run(make(name, model.parameters(), weight_decay=0.01), loss, 20)
        ends.append(weights_of(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ROWS)
def test_the_global_generator_is_left_alone(name: str) -> None:
    model, loss = network()
    before = torch.get_rng_state()
    run(make(name, model.parameters()), loss, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("steps", [6, 7])  # TALT looks anew after every second one
def test_state_dict_carries_on_to_the_same_bits(name: str, steps: int) -> None:
    model, loss = network()
    optimizer = make(name, model.parameters(), weight_decay=0.01)
    run(optimizer, loss, steps)
    middle, file = weights_of(model), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    run(optimizer, loss, 7)

    again, loss_again = network()
    nn.utils.vector_to_parameters(middle, again.parameters())
    torch.manual_seed(99)  # what is random must come from the state
    fresh = make(name, again.parameters(), weight_decay=0.01)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    run(fresh, loss_again, 7)
    assert torch.equal(weights_of(again), weights_of(model))


@pytest.mark.parametrize("way", ["copy", "pickle"])
@pytest.mark.parametrize("name", ROWS)
def test_a_copy_with_its_network_carries_on_to_the_same_bits(name: str, way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))
    optimizer = make(name, model.parameters(), weight_decay=0.01)
    data = torch.randn(7, 6)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        torch.manual_seed(5)  # Entropy-SGD draws from the global generator
        run(optimizer, lambda: model(data).square().mean(), 4)
        return weights_of(model)

    go(model, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    both = (model, optimizer)
    twins = copy.deepcopy(both) if way == "copy" else pickle.loads(pickle.dumps(both))
    before = weights_of(model)
    moved = go(*twins)
    assert torch.equal(weights_of(model), before)  # the copy has weights of its own
    assert not torch.equal(moved, before)
    assert torch.equal(go(model, optimizer), moved)
    schedule.step()


@pytest.mark.parametrize("name", ROWS)
def test_a_schedule_of_torch_acts_on_it_also_after_loading_a_state(name: str) -> None:
    model, loss = network()
    optimizer = make(name, model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
    run(optimizer, loss, 1)
    moved = weights_of(model)
    schedule.step()  # to a rate of zero
    run(optimizer, loss, 2)
    assert torch.equal(weights_of(model), moved)


@pytest.mark.parametrize("name", ROWS)
def test_a_step_without_a_gradient_leaves_that_parameter_alone(name: str) -> None:
    always, sometimes = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = (
        make(name, [always, sometimes], momentum=0.0)
        if name == "sgd"
        else make(name, [always, sometimes])
    )
    both = lambda: always.square().sum() + sometimes.square().sum()  # noqa: E731
    run(optimizer, both, 3)
    kept, moved = sometimes.detach().clone(), always.detach().clone()
    run(optimizer, lambda: always.square().sum(), 2)
    assert torch.equal(sometimes, kept)
    assert not torch.equal(always, moved)
    run(optimizer, both, 2)
    assert not torch.equal(sometimes, kept)
    assert torch.isfinite(sometimes).all()


@pytest.mark.parametrize("name", ROWS)
def test_groups_keep_their_own_rate_and_decay(name: str) -> None:
    slow, fast = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": slow, "lr": 1e-4, "weight_decay": 0.0}, {"params": (p for p in [fast])}]
    optimizer = make(name, groups, weight_decay=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, LEARNING_RATE.get(name, 0.05)]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    run(optimizer, lambda: slow.square().sum() + fast.square().sum(), 1)
    assert 0 < float((1 - slow).max().detach()) < 0.1 * float((1 - fast).min().detach())


@pytest.mark.parametrize("name", ROWS)
def test_frozen_and_unused_parameters_stay_as_they_are(name: str) -> None:
    used = nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.ones(3))
    run(make(name, [used, frozen, unused], weight_decay=0.1), lambda: used.square().sum(), 3)
    assert not torch.equal(used, torch.ones(3))
    assert torch.equal(frozen, torch.ones(3))
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("name", ROWS)
def test_options_of_the_table_are_those_of_the_function(name: str) -> None:
    signature = inspect.signature(registry.load("optimizers", name)).parameters
    defaults = {
        key: parameter.default
        for key, parameter in signature.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in {"learning_rate", "weight_decay"}
    }
    options = registry.options("optimizers", name)
    if name in AROUND:  # the options of the base are handed on, None standing for its default
        handed_on = {key: value for key, value in options.items() if key not in defaults}
        assert set(handed_on) == {"momentum", "nesterov", "beta1", "beta2", "epsilon"}
        assert set(handed_on.values()) == {None}
        options = {key: value for key, value in options.items() if key in defaults}
    assert defaults == options


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, not 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and above 0, not -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and above 0, not nan"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, not -0.1"),
        ({"no_such_option": 1}, "unknown option 'no_such_option'"),
    ],
)
def test_bad_values_are_named(name: str, bad: dict[str, Any], words: str) -> None:
    arguments = {"learning_rate": 0.1, "weight_decay": 0.0, **bad}
    with pytest.raises(SpecError, match=words) as caught:
        optim.build(name, [nn.Parameter(torch.ones(1))], **arguments)
    assert f"optimizer '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sgd", {"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "Nesterov momentum requires a momentum"),
        ("adam", {"beta1": 1.5}, r"beta1 must be in \[0, 1\), not 1.5"),
        ("adamw", {"beta2": -0.1}, r"beta2 must be in \[0, 1\), not -0.1"),
        ("adamw", {"epsilon": 0.0}, "epsilon must be finite and above 0, not 0.0"),
        ("adam", {"momentun": 0.9}, "unknown option 'momentun'"),
        ("muon", {"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ("muon", {"newton_schulz_steps": 0}, r"newton_schulz_steps must be in \[1, 99\], not 0"),
        ("sam", {"rho": 0.0}, "rho must be finite and above 0, not 0.0"),
        ("sam", {"rho": math.nan}, "rho must be finite and above 0, not nan"),
        ("sam", {"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ("asam", {"eta": -0.1}, "eta must be finite and at least 0, not -0.1"),
        ("entropy_sgd", {"inner_steps": 0}, "inner_steps must be at least 1, not 0"),
        ("entropy_sgd", {"gamma": 0.0}, "gamma must be finite and above 0, not 0.0"),
        ("entropy_sgd", {"noise": -1.0}, "noise must be finite and at least 0, not -1.0"),
        ("entropy_sgd", {"mean_weight": 0.0}, "mean_weight must be above 0 and at most 1, not 0"),
        ("talt", {"smoothing_factor": 1.5}, r"smoothing_factor must be in \[0, 1\], not 1.5"),
        ("talt", {"valley_strength": -1.0}, "valley_strength must be finite and at least 0"),
        ("talt", {"projection_dimension": 1}, "projection_dimension must be at least 2, not 1"),
        ("talt", {"decay": 1.0}, r"decay must be in \[0, 1\), not 1.0"),
        ("talt", {"update_interval": 0}, "update_interval must be at least 1, not 0"),
        ("sam", {"base": "adamw", "momentum": 0.9}, "optimizer 'adamw': unknown option 'momentum'"),
        ("sam", {"base": "sdg"}, "did you mean 'sgd'"),
        ("talt", {"base": "sam"}, "base 'sam' takes several gradients a step itself"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make(name, [nn.Parameter(torch.ones(1))], **options)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(SpecError, match="no parameters to train"):
        make("sgd", nn.Flatten().parameters())


def test_unknown_optimizer_gets_the_nearest_name() -> None:
    with pytest.raises(SpecError, match="did you mean 'adamw'"):
        make("adamww", [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}, "sgd"),
        ("adam", {"beta1": 0.8}, "adam"),
        ("adamw", {"beta2": 0.95, "epsilon": 1e-6}, "adamw"),
    ],
)
def test_steps_follow_the_published_update(
    name: str, options: dict[str, Any], reference: str
) -> None:
    weights, loss = quadratic()
    expected = weights.detach().double().clone()
    optimizer = make(name, [weights], weight_decay=0.1, **options)
    rate = LEARNING_RATE.get(name, 0.05)
    mean, square = torch.zeros(6).double(), torch.zeros(6).double()
    for step in range(1, 6):
        optimizer.zero_grad()
        loss().backward()
        gradient = weights.grad.double()
        optimizer.step()
        if reference == "sgd":
            gradient = gradient + 0.1 * expected
            mean = 0.9 * mean + gradient if step > 1 else gradient
            expected = expected - rate * (gradient + 0.9 * mean)
            continue
        beta1, beta2 = options.get("beta1", 0.9), options.get("beta2", 0.999)
        if reference == "adam":
            gradient = gradient + 0.1 * expected
        else:
            expected = expected - rate * 0.1 * expected
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        root = (square / (1 - beta2**step)).sqrt() + options.get("epsilon", 1e-8)
        expected = expected - rate * mean / (1 - beta1**step) / root
    assert torch.allclose(weights.detach().double(), expected, atol=1e-5)


def test_weight_decay_acts_on_biases_too() -> None:
    layer = nn.Linear(2, 2)
    optimizer = make("sgd", layer.parameters(), weight_decay=0.5, momentum=0.0)
    before = layer.bias.detach().clone()
    optimizer.zero_grad()
    (0 * layer(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    assert torch.allclose(layer.bias.detach(), before * (1 - 0.5 * LEARNING_RATE["sgd"]))


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_which_rows_take_several_gradients(name: str) -> None:
    optimizer = make(name, [nn.Parameter(torch.ones(4, 3))])
    assert (gradients_per_step(optimizer)[0] > 1) == (name in registry.SEVERAL_GRADIENTS)


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw", "muon", "talt"])
@pytest.mark.parametrize("name", AROUND)
def test_any_optimizer_can_be_the_base(name: str, base: str) -> None:
    model, loss = network()
    before = float(loss().detach())
    rate = 0.1 if base in ("sgd", "talt") else 0.01
    options = {**OPTIONS.get(name, {}), "base": base}
    optimizer = optim.build(
        name, model.parameters(), learning_rate=rate, weight_decay=0.0, **options
    )
    run(optimizer, loss, 60)
    assert float(loss().detach()) < 0.7 * before


def test_the_options_of_the_base_reach_it() -> None:
    weights = nn.Parameter(torch.ones(3))
    sam = make("sam", [weights], momentum=0.3, nesterov=True)
    assert (sam.base.defaults["momentum"], sam.base.defaults["nesterov"]) == (0.3, True)
    talt = make("talt", [weights], base="adamw", beta1=0.7, epsilon=1e-4)
    assert (talt.base.defaults["betas"], talt.base.defaults["eps"]) == ((0.7, 0.999), 1e-4)


def test_a_state_of_another_kind_is_refused() -> None:
    weights = nn.Parameter(torch.ones(3))
    plain, sam, muon = (make(name, [weights]) for name in ("sgd", "sam", "muon"))
    with pytest.raises(ValueError, match="not of a SharpnessAware"):
        sam.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="not of Muon"):
        muon.load_state_dict(plain.state_dict())


def newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The iteration of Jordan et al. on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_muon_steps_follow_the_published_update() -> None:
    torch.manual_seed(3)
    hidden = nn.Conv2d(3, 6, 2, bias=False).to(memory_format=torch.channels_last).weight
    head, bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
    optimizer = optim.build(
        "muon", [hidden, head, bias], learning_rate=0.01, weight_decay=0.1, momentum=0.8
    )
    adamw = torch.optim.AdamW(
        [nn.Parameter(head.detach().clone()), nn.Parameter(bias.detach().clone())],
        lr=0.01,
        weight_decay=0.1,
    )
    expected, mean = hidden.detach().double().flatten(1).clone(), torch.zeros(6, 12).double()
    for step in range(4):
        torch.manual_seed(step)
        gradients = [torch.randn_like(p) for p in (hidden, head, bias)]
        for parameter, gradient in zip((hidden, head, bias), gradients, strict=True):
            parameter.grad = gradient.clone()
        for parameter, gradient in zip(adamw.param_groups[0]["params"], gradients[1:], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adamw.step()
        flat = gradients[0].double().flatten(1)
        mean = 0.8 * mean + 0.2 * flat
        direction = newton_schulz(0.2 * flat + 0.8 * mean)
        expected = (1 - 0.01 * 0.1) * expected - 0.01 * 0.2 * math.sqrt(12) * direction
    assert torch.allclose(hidden.detach().double().flatten(1), expected, atol=2e-3)
    for own, reference in zip((head, bias), adamw.param_groups[0]["params"], strict=True):
        assert torch.allclose(own, reference, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-2])  # down to the least norm that is divided by
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_in_batches_is_torchs_muon(nesterov: bool, scale: float) -> None:
    shapes = [(6, 12), (12, 6), (6, 12), (3, 12), (6, 12)]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    ends = []
    for kind in (torch.optim.Muon, BatchedMuon):
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = kind(weights, adjust_lr_fn="match_rms_adamw", **options)
        for step in range(5):
            for number, weight in enumerate(weights):
                gradient = torch.randn(weight.shape, generator=generator)
                weight.grad = None if (number, step) == (2, 3) else gradient * scale**number
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
        ends.append(weights)
    for expected, own in zip(*ends, strict=True):
        assert torch.allclose(expected, own, rtol=0, atol=1e-5)


def test_muon_refuses_other_scales_and_sparse_gradients() -> None:
    with pytest.raises(ValueError, match="adjust_lr_fn must be 'match_rms_adamw', not 'original'"):
        BatchedMuon([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="original")
    table = nn.Embedding(5, 3, sparse=True)
    groups = [{"params": table.parameters(), "use_muon": True}]
    optimizer = optim.build("muon", groups, learning_rate=0.01, weight_decay=0.0)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="Muon does not take sparse gradients"):
        optimizer.step()


def test_a_group_may_say_who_takes_it() -> None:
    first, last = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [first], "use_muon": False}, {"params": [last], "use_muon": True}]
    optimizer = optim.build("muon", groups, learning_rate=0.01, weight_decay=0.0)
    run(optimizer, lambda: (first.square() + last.square()).sum(), 1)
    assert set(optimizer.adamw.state) == {first}
    assert [p for p, _ in optimizer._pairs] == [last]
    with pytest.raises(NotImplementedError, match="all parameter groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
