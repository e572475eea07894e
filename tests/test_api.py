"""The Python API, as one of the origin projects offered it, on Tune underneath."""

from __future__ import annotations

import sys

import pytest
import torch
from ray import cloudpickle
from torch import nn

from llp import TwoTierProbing
from llp.errors import SpecError
from llp.records import TrialResult
from llp.spec.schema import Tier2Spec


def make_model(config):
    return nn.Sequential(
        nn.Linear(8, config["width"]),
        nn.BatchNorm1d(config["width"]),
        nn.ReLU(),
        nn.Linear(config["width"], 3),
    )


def load_data():
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 8, generator=generator)

    def draw(count):
        labels = torch.arange(count) % 3
        return centres[labels] + torch.randn(count, 8, generator=generator), labels

    return draw(300), draw(90)


def make_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)


CONFIGS = [{"lr": lr, "width": width} for lr in (1e-4, 0.05, 1e9) for width in (4, 16)]


@pytest.fixture(scope="module")
def probing(tmp_path_factory):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    calls = []
    probing = TwoTierProbing(
        CONFIGS,
        make_model,
        load_data,
        nn.functional.cross_entropy,
        make_optimizer,
        max_epochs=5,
        batch_size=32,
        tier2=Tier2Spec(
            top_k=2, metrics=["noise_sharpness"], refinements=[], num_examples=64, batch_size=32
        ),
        root=tmp_path_factory.mktemp("studies"),
    )
    probing.run_successive_halving(
        min_resource=0.3, max_resource=0.9, progress_callback=lambda *call: calls.append(call)
    )
    probing.calls = calls
    return probing


def test_every_configuration_has_a_result(probing):
    assert len(probing.results) == 6
    assert all(isinstance(result, TrialResult) for result in probing.results)
    assert [dict(r.trial.hyperparameters) for r in probing.results] == CONFIGS
    outcomes = {r.trial.hyperparameters["lr"]: r.outcome for r in probing.results}
    assert outcomes[1e9] == "diverged"


def test_the_best_configurations_are_the_ones_that_learn(probing):
    best = probing.select_best_configs(n=2, criterion="val_metric")
    assert {config["lr"] for config in best} == {0.05}
    assert len(probing.select_best_configs(n=2, criterion="sharpness")) == 2
    assert probing.select_best_configs(criterion="generalization_score")[0]["lr"] == 0.05


def test_progress_is_reported_with_phase_count_and_resource(probing):
    assert probing.calls[0] == ("tier1", 1, pytest.approx(0.3))
    assert probing.calls[-1][0] == "tier2"
    assert max(count for phase, count, _ in probing.calls if phase == "tier1") == 6 + 2


def test_training_with_sam_and_with_averaging_gives_usable_networks(probing):
    config = probing.select_best_configs()[0]
    plain = probing.train(config, epochs=4)
    sam = probing.train_with_sam(config, rho=0.1, epochs=4)
    regular, average = probing.train_with_swa(config, epochs=6, swa_start=4)
    for trained in (plain, sam, regular, average):
        assert trained.validation_accuracy > 0.6
        assert not trained.model.training
    weights = [t.model[0].weight for t in (plain, sam, regular, average)]
    assert torch.equal(weights[0], weights[2]), "the same training twice"
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])
    assert not torch.equal(regular.model[1].running_mean, average.model[1].running_mean)


def test_mistakes_are_named(probing, tmp_path):
    with pytest.raises(SpecError, match="did you mean 'sharpness'"):
        probing.select_best_configs(criterion="sharpnes")
    with pytest.raises(SpecError, match="swa_start"):
        probing.train_with_swa(CONFIGS[0], epochs=4, swa_start=4)
    fresh = TwoTierProbing(
        CONFIGS, make_model, load_data, nn.functional.cross_entropy, make_optimizer, root=tmp_path
    )
    with pytest.raises(SpecError, match="nothing has been probed"):
        fresh.select_best_configs()
    with pytest.raises(SpecError, match="min_resource"):
        fresh.run_successive_halving(min_resource=0.5, max_resource=0.1)
    with pytest.raises(SpecError, match="at least one configuration"):
        TwoTierProbing([], make_model, load_data, nn.functional.cross_entropy, make_optimizer)
