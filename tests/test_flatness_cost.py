"""Tier 2 made cheap: what metrics share, what a budget chooses, new rows against oracles."""

from __future__ import annotations

import dataclasses
import math
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from make_study import make_events
from rich.console import Console
from test_flatness_profile import images, network, plain_context, run, spec, study
from torch.nn import functional

from llp import landscape, registry
from llp.flatness.budget import (
    ENOUGH_EXAMPLES,
    MIN_EXAMPLES,
    gradient_equivalents,
    plan_measurement,
)
from llp.flatness.metrics import GAINS
from llp.flatness.profile import FlatnessObjective, measure
from llp.landscape.parameters import flatten, trainable
from llp.pipeline import Plan
from llp.records import FlatnessProfile, Measurement, Rung
from llp.reporting.figures.flatness import flatness_data, flatness_summary
from llp.reporting.html import study_page
from llp.scoring.report import score_report
from llp.spec.schema import Tier2Spec
from llp.tracking.replay import result_from_events
from llp.views import show_plan
from tests.scoring_tables import result

ROWS = [row for row in registry.METRICS if row not in GAINS]
__all__ = ["images", "study"]  # fixtures


def test_sharing_costs_less_than_the_sum_of_metrics_alone_and_changes_no_value(images: Any) -> None:
    model = network(images)
    together = plain_context(model, images)
    profile = measure(together, ROWS, trial_id="t0")
    alone_total = 0.0
    for row in ROWS:
        single = plain_context(model, images)
        alone = measure(single, [row], trial_id="t0")
        num = single.num_examples
        cost = single.spent.gradient_equivalents * num
        alone_total += cost
        claimed = sum(profile[m.name].samples_alone for m in alone.measurements)
        assert claimed == pytest.approx(cost), row
        for found in alone.measurements:
            assert profile[found.name].value == pytest.approx(found.value, rel=1e-6), row
            assert profile[found.name].standard_error == pytest.approx(
                found.standard_error, rel=1e-5, nan_ok=True
            )
    spent = sum(m.samples for m in profile.measurements)
    assert profile.samples == round(spent)
    # SAM, ASAM and the norm share a gradient; noise and confidence the losses; the two traces their
    # products and the graph, the eigenvalues the graph.
    saved = 2 + 5 / 3 + (1 + 2 * 4) + 1
    assert (alone_total - spent) / together.num_examples == pytest.approx(saved)
    assert profile.samples < 0.85 * alone_total


def test_shared_signs_estimate_the_trace_and_the_adaptive_trace(images: Any) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    inputs, labels = torch.randn(40, 4), torch.arange(40) % 2
    context = plain_context(network(images), images)
    context.model, context.batches = model, [(inputs, labels)]
    context.options = Tier2Spec(num_probes=400)
    found = {m.name: m for m in measure(context, ROWS[-12:], trial_id="t").measurements}
    op = landscape.hessian(model, functional.cross_entropy, [(inputs, labels)])
    dense = op @ torch.eye(op.shape[0])
    weights = flatten(trainable(model))
    for name, truth in (
        ("hessian_trace", float(dense.trace())),
        ("adaptive_trace", float(dense.diagonal() @ weights**2)),
    ):
        assert abs(found[name].value - truth) < 4 * found[name].standard_error, name


def test_adaptive_metrics_ignore_layer_scales_and_others_do_not(images: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    inputs, labels = torch.randn(60, 6), torch.arange(60) % 3
    rows = ["asam_sharpness", "noise_sigma", "sam_sharpness"]

    def values() -> dict[str, float]:
        context = plain_context(network(images), images)
        context.model, context.batches = model, [(inputs, labels)]
        return {m.name: m.value for m in measure(context, rows, trial_id="t").measurements}

    before = values()
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[0].bias.mul_(5)
        model[2].weight.div_(5)
    after = values()
    for name in ("asam_sharpness", "noise_sigma"):
        assert after[name] == pytest.approx(before[name], rel=1e-3), name
    assert abs(after["sam_sharpness"] / before["sam_sharpness"] - 1) > 0.05


def test_noise_sigma_is_the_noise_at_which_the_loss_has_risen_by_the_asked_amount(
    images: Any,
) -> None:
    context = plain_context(network(images), images, rise=0.2)
    (found,) = measure(context, ["noise_sigma"], trial_id="t").measurements
    assert found.higher_is_better is True
    rise = landscape.sharpness.noise(
        context.model,
        context.loss_fn,
        context.batches,
        sigma=found.value,
        generator=context.generator("noise_sharpness"),
    )
    assert rise.value == pytest.approx(0.2, rel=0.11)


def test_confidence_features_agree_with_plain_numpy(images: Any) -> None:
    context = plain_context(network(images), images)
    rows = ["calibration_error", "mean_entropy", "confidence_gap"]
    found = {m.name: m for m in measure(context, rows, trial_id="t").measurements}
    assert context.spent.gradient_equivalents == pytest.approx(1 / 3), "one forward pass for all"
    model = context.model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in context.batches]).double().numpy()
    labels = torch.cat([y for _, y in context.batches]).numpy()
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    confidence, hit = shares.max(1), shares.argmax(1) == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert found["calibration_error"].value == pytest.approx(error, abs=1e-6)
    assert found["confidence_gap"].value == pytest.approx(float((confidence - hit).mean()))
    entropy = -(shares * np.log(shares)).sum(1)
    assert found["mean_entropy"].value == pytest.approx(float(entropy.mean()))
    assert found["mean_entropy"].standard_error == pytest.approx(
        float(entropy.std(ddof=1) / math.sqrt(len(entropy)))
    )
    assert 0 < found["calibration_error"].standard_error < 0.2


@pytest.mark.parametrize("samples", [100, 600, 1_500, 2_000, 20_000, 200_000, 2_000_000])
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("refinements", [[], ["swa_gain", "sam_gain"]])
def test_a_budget_keeps_the_prediction_within_its_share_and_uses_what_it_may(
    samples: int, budget: float, refinements: list[str]
) -> None:
    rung = Rung(1, 1.0, samples // 20, 20)
    options = Tier2Spec(refinements=refinements, budget=budget)
    planned = plan_measurement(options, rung)
    chosen = planned.options
    assert planned.samples <= planned.allowed == budget * rung.samples_seen
    assert chosen.num_examples <= min(1024, rung.num_examples)
    if (
        not planned.left_out
        and not refinements
        and chosen.num_examples < min(1024, rung.num_examples)
    ):
        assert planned.samples + gradient_equivalents(chosen) > planned.allowed - 1
    if chosen.num_probes > 2:
        assert chosen.num_examples >= min(ENOUGH_EXAMPLES, rung.num_examples)
    assert f"{chosen.num_examples} examples" in planned.note
    kept = [*chosen.metrics, *chosen.refinements]
    asked = [*options.metrics, *options.refinements]
    assert sorted([*kept, *planned.left_out]) == sorted(asked)
    assert all(name in planned.note for name in planned.left_out)
    for name in planned.left_out:  # nothing of it can come back
        more = {
            "metrics": [n for n in options.metrics if n in kept or n == name],
            "refinements": [n for n in options.refinements if n in kept or n == name],
        }
        assert name in plan_measurement(options.model_copy(update=more), rung).left_out


@pytest.mark.parametrize(
    ("samples", "budget"), [(600, 0.2), (1_500, 0.1), (3_000, 0.05), (5_000, 0.02)]
)
def test_cheap_metrics_are_kept_where_only_those_that_share_products_do_not_fit(
    samples: int, budget: float
) -> None:
    options = Tier2Spec(refinements=[], budget=budget)
    planned = plan_measurement(options, Rung(1, 1.0, samples // 20, 20))
    traces = ("hessian_eigenvalues", "noise_sigma", "adaptive_trace", "hessian_trace")
    assert planned.left_out == traces, "the two traces save nothing one by one"
    assert len(planned.options.metrics) == 7


def test_what_does_not_fit_even_at_its_least_is_left_out_and_nothing_that_fits() -> None:
    evidence = Tier2Spec(
        metrics=["sam_sharpness", "gradient_norm", "noise_sigma", "hessian_trace"], refinements=[]
    )
    short = Rung(1, 0.1, 125, 12)  # 1,500 samples: 11.7 gradients over 32 examples are 25 %
    planned = plan_measurement(evidence, short)
    assert planned.left_out == ("noise_sigma",), "16/3 gradients of them"
    assert planned.options.num_examples > MIN_EXAMPLES, "the others have what it left"
    assert plan_measurement(evidence, Rung(1, 0.1, 160, 12)).left_out == ()
    told = StringIO()
    spec_ = spec(**evidence.model_dump())
    plan = Plan((short,), {1: 4}, 4, 125, 50, 50, 10, 0, 0, 0, 1, planned.left_out)
    show_plan(plan, spec_, Console(file=told, width=100))
    assert "over tier2.budget: noise_sigma" in " ".join(told.getvalue().split())
    nothing = plan_measurement(evidence, Rung(1, 0.1, 10, 1))
    assert nothing.options.metrics == []
    assert nothing.samples == 0


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.2, 0.5])
def test_what_is_spent_keeps_to_the_budget_whatever_a_metric_takes(
    budget: float, images: Any, study: Any
) -> None:
    folder, job = study
    job = dataclasses.replace(job, rung=dataclasses.replace(job.rung, epochs=10))
    options = spec(budget=budget, refinements=[], metrics=ROWS, num_examples=200)
    profile, end = run(FlatnessObjective(options, images, folder), job)
    assert end.outcome == "completed", end.failure
    assert profile is not None
    # The levels that noise_sigma tries are not known beforehand: one of two pairs at most.
    assert end.samples_seen <= budget * job.rung.samples_seen + 4 / 3 * profile_examples(profile)
    done = {measurement.name.removesuffix("_1") for measurement in profile.measurements}
    for name in ROWS:
        known = name.replace("eigenvalues", "eigenvalue") in done
        assert known or name in profile.note, name


def profile_examples(profile: FlatnessProfile) -> int:
    return max((m.num_examples for m in profile.measurements), default=0)


def test_a_metric_is_not_begun_when_the_others_left_too_little(images: Any) -> None:
    context = plain_context(network(images), images)
    context.allowed = 10.9  # the trace takes 9, a gradient 1, a pass a third
    rows = ["hessian_trace", "noise_sigma", "gradient_norm", "sam_sharpness"]
    profile = measure(context, rows, trial_id="t0")
    assert [m.name for m in profile.measurements] == [
        "hessian_trace", "gradient_norm", "sam_sharpness",
    ]  # fmt: skip
    assert profile.note.endswith("too little of the budget: noise_sigma")
    assert context.spent.gradient_equivalents <= 10.9


def test_the_measured_cost_is_near_the_prediction_and_the_profile_says_what_was_chosen(
    images: Any, study: Any
) -> None:
    folder, job = study
    options = spec(budget=10.0, refinements=[], metrics=ROWS, num_probes=8)
    profile, end = run(FlatnessObjective(options, images, folder), job)
    assert profile is not None
    planned = plan_measurement(options.tier2, job.rung)
    assert profile.note == planned.note
    assert profile.samples == end.samples_seen
    assert profile["sam_sharpness"].num_examples == planned.options.num_examples
    assert 0.5 * planned.samples < end.samples_seen < 1.5 * planned.samples
    assert profile["sam_sharpness"].standard_error > 0, "several batches, however few examples"


def test_refinements_take_half_of_a_budget_at_most_where_they_can() -> None:
    rung = Rung(1, 1.0, 1000, 12)
    options = Tier2Spec(metrics=["gradient_norm"], refinement_epochs=4)
    assert plan_measurement(options, rung).options.refinement_epochs == 1, "2 are over half of it"
    longer = Rung(1, 1.0, 1000, 40)
    assert plan_measurement(options, longer).options.refinement_epochs == 4
    unlimited = plan_measurement(options.model_copy(update={"budget": 0}), rung)
    assert (unlimited.options.refinement_epochs, unlimited.note) == (4, "")


def test_a_metric_noisier_than_half_its_spread_is_dropped_and_named_in_the_score_report() -> None:
    trials = [result(f"t{i:03d}", [0.5, 0.5 + 0.03 * i]) for i in range(8)]
    profiles = [
        FlatnessProfile(
            f"t{i:03d}",
            (
                Measurement("steady", float(i), 0.1, False, 100, 1.0),
                Measurement("shaky", float(i), 4.0, False, 100, 1.0),
            ),
            1.0,
        )
        for i in range(8)
    ]
    report = score_report(trials, profiles)
    assert report.dropped == ("shaky",)
    assert "Too noisy to be used: shaky." in report.sentence
    assert score_report(trials, profiles[:0]).dropped == ()


def test_the_study_page_says_what_metrics_cost_with_the_others_and_alone() -> None:
    profiles = tuple(
        FlatnessProfile(
            f"t{i:03d}",
            (
                Measurement("first", 1.0 + i, 0.1, None, 50, 1.0, "", 120.0, 120.0),
                Measurement("second", 2.0 + i, 0.1, None, 50, 1.0, "", 30.0, 77.0),
            ),
            1.0,
            samples=150.0,
            note="budget 0.2 of 9,876 samples of the probe: 50 examples",
        )
        for i in range(4)
    )
    study = result_from_events(make_events(num_trials=6))
    found = dataclasses.replace(study, profiles=profiles)
    summary = flatness_summary(flatness_data(found)).set_index("metric")
    assert summary.loc["second", ["samples", "samples_alone"]].tolist() == [120.0, 308.0]
    page = study_page(found)
    assert "Chosen by the budget 0.2 of 9,876 samples of the probe: 50 examples." in page
    assert ">308<" in page
