"""Training-free proxies against closed forms, and the filter that uses them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from study_runs import TINY, events, llp
from torch import nn

from llp.errors import SpecError
from llp.proxy_filter import AUDIT_EVERY, ProxyFilter
from llp.records import ProxyScore, to_plain
from llp.reporting.html import study_page
from llp.reporting.proxy_exhibit import proxy_data
from llp.spec import load_spec
from llp.spec.domains import RandomSearch, Uniform
from llp.spec.schema import ProxySpec
from llp.tracking.replay import result_from_events
from llp.training.proxies import (
    ProxyScores,
    activation_diversity,
    gradient_norm,
    jacobian_spectrum,
)
from llp.workloads import load
from tests.make_study import make_events

IMAGES = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


def test_the_gradient_norm_of_a_linear_network_is_that_of_softmax_regression():
    model = linear()
    x = IMAGES.flatten(1).double().numpy()
    logits = x @ model[1].weight.detach().double().numpy().T + model[1].bias.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (p - np.eye(3)[LABELS.numpy()]) / len(x)
    expected = math.sqrt(((error.T @ x) ** 2).sum() + (error.sum(0) ** 2).sum())
    assert gradient_norm(model, IMAGES, LABELS) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_the_diversity_is_the_log_determinant_of_agreeing_rectifiers():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 3))
    states = (model[1](IMAGES.flatten(1)) > 0).numpy()
    kernel = np.array([[(a == b).sum() for b in states] for a in states], dtype=float)
    expected = np.linalg.slogdet(kernel)[1]
    assert activation_diversity(model, IMAGES, LABELS) == pytest.approx(expected)
    twice = torch.cat([IMAGES, IMAGES])  # the same image twice: a singular kernel
    assert activation_diversity(model, twice, LABELS) == -math.inf
    assert activation_diversity(linear(), IMAGES, LABELS) == -math.inf


def test_the_jacobian_of_a_linear_network_is_the_same_for_all_images():
    # All rows equal: the correlation matrix is all ones, its eigenvalues 6, 0, 0, 0, 0, 0.
    k = 1e-5
    expected = -(math.log(6 + k) + 1 / (6 + k)) - 5 * (math.log(k) + 1 / k)
    assert jacobian_spectrum(linear(), IMAGES, LABELS) == pytest.approx(expected, rel=1e-3)
    torch.manual_seed(3)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 3))
    assert jacobian_spectrum(deep, IMAGES, LABELS) > jacobian_spectrum(linear(), IMAGES, LABELS)


def test_the_filter_keeps_the_best_of_several_and_audits_every_third():
    search = RandomSearch({"x": Uniform(low=0, high=1)}, (), 0)
    asked = ProxySpec(name="gradient_norm", candidates=8)
    kept = ProxyFilter(search, lambda values: values["x"], asked)
    drawn = [kept.suggest(index)["x"] for index in range(300)]
    audits = [x for index, x in enumerate(drawn) if index % AUDIT_EVERY == 0]
    others = [x for index, x in enumerate(drawn) if index % AUDIT_EVERY]
    assert np.mean(audits) == pytest.approx(1 / 2, abs=0.09)
    assert np.mean(others) == pytest.approx(8 / 9, abs=0.03)  # mean of the largest of eight
    assert [kept.noted[index].filtered for index in range(4)] == [False, True, True, False]
    assert ProxyFilter(search, lambda values: values["x"], asked).suggest(7) == {"x": drawn[7]}
    assert kept.suggest(7) == {"x": drawn[7]}


@pytest.mark.parametrize("name", ["gradient_norm", "activation_diversity", "jacobian_spectrum"])
def test_every_proxy_tells_networks_apart_and_leaves_the_random_state_alone(tmp_path, name):
    file = tmp_path / "tiny.yaml"
    text = TINY.replace("tpe, num_startup_trials: 4", "random")
    text = text.replace("{width: 16, depth: 1}", "{depth: 1}")
    file.write_text(text.replace("  momentum:", "  width: [32, 64]\n  momentum:"))
    proxy = [f"searcher.proxy.name={name}", "searcher.proxy.num_examples=16"]
    spec = load_spec(file, overrides=proxy)
    scores = ProxyScores(spec, load(spec.dataset, spec.seed))
    before = torch.get_rng_state()
    found = [scores({"width": w, "learning_rate": 0.1, "momentum": 0.5}) for w in (32, 64)]
    assert all(map(math.isfinite, found))
    assert found[0] != found[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert scores({"width": 32, "learning_rate": 0.9, "momentum": 0.1}) == found[0]


def test_the_page_gives_the_rank_correlation_with_the_first_rung():
    log = make_events()
    generator = np.random.default_rng(0)
    lines = []
    for event in log:
        lines.append(event)
        if event["event"] == "trial":
            number = len(lines)
            said = ProxyScore("gradient_norm", float(generator.normal()), number % 2 == 0)
            trial_id = event["trial"]["trial_id"]
            line = {"event": "proxy", "trial_id": trial_id, "proxy": to_plain(said)}
            lines.append({**line, "time": event["time"], "seq": 0})
    result = result_from_events(lines)
    data = proxy_data(result)
    assert len(data) >= 8
    tau = kendalltau(data["proxy"], data["accuracy"]).statistic
    page = study_page(result)
    assert f"Kendall tau {tau:.2f}" in page
    assert "The filter without training" not in study_page(result_from_events(log))


def test_a_proxy_of_another_name_or_searcher_is_an_error(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    with pytest.raises(SpecError, match="a proxy filters random draws; with searcher 'tpe' drop"):
        load_spec(file, overrides=["searcher.proxy.name=gradient_norm"])
    with pytest.raises(SpecError, match="gradient_norm"):
        load_spec(file, overrides=["searcher.name=random", "searcher.proxy.name=gradient_norms"])


@pytest.mark.slow
def test_a_filtered_search_notes_what_the_proxy_said(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("tpe, num_startup_trials: 4", "random"))
    done = llp(
        "search", "tiny.yaml", "--study", "p", "--set", "searcher.proxy.name=gradient_norm",
        "--set", "tier1.num_trials=6", "--set", "verification.num_seeds=1", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = events(tmp_path / "llp_studies" / "p" / "ledger.jsonl")
    said = {e["trial_id"]: e["proxy"]["filtered"] for e in log if e["event"] == "proxy"}
    assert said == {f"t{k:03d}": k % AUDIT_EVERY != 0 for k in range(6)}
