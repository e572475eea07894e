"""The Python API, as one of the origin projects offered it, on Tune underneath."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys

import pytest
import torch
from ray import cloudpickle
from torch import nn

from llp import TwoTierProbing, api
from llp.errors import NoTrialSucceeded, SpecError, StudyError
from llp.records import FlatnessProfile, Measurement, TrialResult
from llp.reporting.html import write_report
from llp.spec.schema import Tier2Spec
from llp.tracking.ledger import list_studies, load_study, study_header


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


TIER2 = Tier2Spec(
    top_k=2, metrics=["noise_sharpness"], refinements=[], num_examples=64, batch_size=32
)


def make(root, **changes):
    options = {"max_epochs": 5, "batch_size": 32, "tier2": TIER2, "root": root, **changes}
    return TwoTierProbing(
        CONFIGS, make_model, load_data, nn.functional.cross_entropy, make_optimizer, **options
    )


@pytest.fixture(scope="module")
def probing(tmp_path_factory):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    calls = []
    probing = make(tmp_path_factory.mktemp("studies"))
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


def test_a_study_from_python_is_finished_with_a_winner_and_says_where_it_comes_from(probing):
    assert study_header(probing.folder)["kind"] == "python"
    (listed,) = list_studies(probing.folder.parent)
    winner = {r.trial.trial_id: dict(r.trial.hyperparameters) for r in probing.results}
    assert listed.status == "finished"
    assert winner[listed.winner] == probing.select_best_configs()[0]
    result = load_study(probing.folder)
    assert "only probed" in result.winner_reason
    assert not (probing.folder / "ray").exists()
    page = write_report(result, probing.folder.parent / "page.html").read_text()
    assert "only probed" in page


def test_a_finished_study_is_read_and_not_run_again(probing, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("nothing is to run")

    monkeypatch.setattr(api, "run_jobs", refuse)
    again = make(probing.folder.parent)
    before = (probing.folder / "ledger.jsonl").read_bytes()
    found = again.run_successive_halving(min_resource=0.3, max_resource=0.9)
    assert found == again.results == probing.results
    assert again.select_best_configs(n=6) == probing.select_best_configs(n=6)
    assert (probing.folder / "ledger.jsonl").read_bytes() == before


@pytest.fixture
def without_ray(monkeypatch):
    """Runs jobs one after the other in this process."""

    def one_by_one(source, objective, **options):
        while (job := source.next_job()) != "done":
            reports = objective(job)
            while True:
                try:
                    source.on_report(job, next(reports))
                except StopIteration as stop:
                    source.on_end(job, stop.value)
                    break

    monkeypatch.setattr(api, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(api, "run_jobs", one_by_one)


def test_a_study_in_which_nothing_works_is_recorded_as_failed(without_ray, tmp_path):
    study = make(tmp_path)
    study.configs = [{"lr": 1e9, "width": 4}] * 2
    for _ in range(2):
        with pytest.raises(NoTrialSucceeded, match="no configuration produced a usable"):
            study.run_successive_halving(min_resource=0.3, max_resource=0.9)
        found = load_study(study.folder)
        assert (found.status, found.winner) == ("failed", None)
        assert "loss is" in found.winner_reason


def test_flatness_that_was_not_asked_for_before_is_measured_on_a_finished_study(
    without_ray, probing, tmp_path
):
    study = make(tmp_path)
    study.folder.mkdir()
    lines = (probing.folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"tier2"' in line and '"phase"' in line)
    finished = json.loads(lines[-1]) | {"seq": cut}
    (study.folder / "ledger.jsonl").write_text("".join(lines[:cut]) + json.dumps(finished) + "\n")
    shutil.copytree(probing.folder / "checkpoints", study.folder / "checkpoints")
    study.run_successive_halving(min_resource=0.3, max_resource=0.9, measure_flatness=False)
    assert not study.profiles
    with pytest.raises(SpecError, match="measure_flatness=True"):
        study.select_best_configs(criterion="sharpness")
    study.run_successive_halving(min_resource=0.3, max_resource=0.9)
    assert len(study.profiles) == 2
    assert load_study(study.folder).status == "finished"


def test_options_that_change_results_are_part_of_the_studys_identity(probing, tmp_path):
    names = {
        make(tmp_path, **changes).study_id
        for changes in ({}, {"tier2": Tier2Spec()}, {"schedule": "constant"}, {"max_epochs": 6})
    }
    assert len(names) == 4
    assert make(tmp_path).study_id == probing.study_id
    with pytest.raises(StudyError, match="give this one another study_id"):
        make(probing.folder.parent).run_successive_halving(0.9, 0.9, 3)
    with pytest.raises(StudyError, match="give this one another study_id"):
        make(probing.folder.parent).run_successive_halving(0.2, 0.9, 4)
    one_rung = make(tmp_path)
    header = one_rung._study({"reduction_factor": 3}, [])
    header.close()
    with pytest.raises(StudyError, match="other configurations, resources or options"):
        one_rung._study({"reduction_factor": 4}, [])


@pytest.mark.parametrize(
    ("low", "high", "factor", "expected"),
    [
        (0.1, 1.0, 3, [1 / 9, 1 / 3, 1.0]),
        (0.1, 1.0, 10, [0.1, 1.0]),
        (0.3, 0.9, 3, [0.3, 0.9]),
        (0.5, 1.0, 3, [1.0]),
        (1 / 27, 1.0, 3, [1 / 27, 1 / 9, 1 / 3, 1.0]),
    ],
)
def test_every_rung_has_the_reduction_factor_times_more(tmp_path, low, high, factor, expected):
    rungs = make(tmp_path)._rungs(low, high, factor, "data_fraction")
    assert [rung.data_fraction for rung in rungs] == pytest.approx(expected)
    assert [rung.num_examples for rung in rungs] == [round(300 * f) for f in expected]


def test_epochs_grow_by_the_reduction_factor_and_never_repeat(tmp_path):
    rungs = make(tmp_path)._rungs(0.1, 20, 3, "epochs")
    assert [rung.epochs for rung in rungs] == [2, 7, 20]
    assert {rung.data_fraction for rung in rungs} == {1.0}
    with pytest.raises(SpecError, match="reduction_factor must be"):
        make(tmp_path)._rungs(0.1, 1.0, 1, "data_fraction")


def test_sharpness_that_failed_comes_last_and_one_that_was_not_measured_is_named(probing, tmp_path):
    study = make(tmp_path)
    study.results = probing.results
    ids = [result.trial.trial_id for result in probing.results]

    def profile(trial_id, name, value):
        measurement = Measurement(name, value, 0.0, False, 64, 0.1)
        return FlatnessProfile(trial_id, (measurement,), 0.1)

    values = [math.nan, 0.3, math.inf, 0.1]
    study.profiles = tuple(
        profile(trial_id, "noise_sharpness", value)
        for trial_id, value in zip(ids, values, strict=False)
    )
    best = study.select_best_configs(n=4, criterion="sharpness")
    assert best == [CONFIGS[i] for i in (3, 1, 2, 0)]
    study.profiles = tuple(profile(trial_id, "sam_sharpness", 0.1) for trial_id in ids)
    with pytest.raises(SpecError, match="and not 'noise_sharpness'"):
        study.select_best_configs(criterion="sharpness")


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
    assert not list(probing.folder.glob("ray*"))


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
