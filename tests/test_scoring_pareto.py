"""Pareto fronts and hypervolumes against brute force, and their way into report and MLflow."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_runs import TINY, events, llp

from llp.cluster.searchers import gp, tpe
from llp.errors import SpecError
from llp.objectives import fronts
from llp.pipeline import make_searcher
from llp.records import ParetoFront, from_plain, to_plain
from llp.reporting.html import study_page
from llp.scoring.pareto import front_of, hypervolume, pareto_front
from llp.spec import digest, load_spec
from llp.spec.domains import RandomSearch, Uniform
from llp.tracking.mlflow_rows import Rows
from llp.tracking.replay import result_from_events
from llp.tracking.rows import STUDY
from llp.training import model_cost
from llp.training.model_cost import ModelCosts
from llp.workloads import load
from tests.make_study import make_events

grids = st.integers(1, 4).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 4), min_size=m, max_size=m), min_size=1, max_size=12)
)


@given(grids)
@settings(max_examples=150, deadline=None)
def test_a_point_is_on_the_front_when_no_other_is_as_good_everywhere_and_better_somewhere(points):
    found = pareto_front(points)
    for i, mine in enumerate(points):
        beaten = any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in points
        )
        assert found[i] != beaten


@given(grids)
@settings(max_examples=150, deadline=None)
def test_the_hypervolume_is_the_number_of_dominated_unit_cells(points):
    m = len(points[0])
    cells = sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in itertools.product(range(5), repeat=m)
    )
    assert hypervolume(points, [5] * m) == pytest.approx(cells)


def test_the_hypervolume_agrees_with_optunas_and_never_falls():
    wfg = pytest.importorskip("optuna._hypervolume").compute_hypervolume
    generator = np.random.default_rng(0)
    for m in (2, 3, 4):
        points = generator.random((15, m))
        values = [hypervolume(points[:n], [1.1] * m) for n in range(1, 16)]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(wfg(points, np.full(m, 1.1)))
    assert hypervolume([[2.0, 2.0]], (1, 1)) == 0
    assert hypervolume(np.empty((0, 2)), (1, 1)) == 0


def test_missing_values_and_equal_objectives_do_no_harm():
    values = {
        "t000": {"error": 0.1, "parameters": 50.0},
        "t001": {"error": 0.2, "parameters": 10.0},
        "t002": {"error": 0.3, "parameters": 60.0},
        "t003": {"error": math.nan, "parameters": 1.0},
    }
    front = front_of(["error", "parameters"], values, rung=1)
    assert front.front == ("t000", "t001")
    # Scaled to the box: (0, 0.8) and (0.5, 0): 0.2 + 0.5 - 0.2 * 0.5.
    assert front.covered == pytest.approx(0.6)
    flat = front_of(["error", "samples"], {k: {**v, "samples": 7.0} for k, v in values.items()},
                    rung=1)  # fmt: skip
    assert flat.front == ("t000",)
    assert flat.covered == pytest.approx(1.0)
    nothing = front_of(["error", "samples"], {}, rung=0)
    assert nothing.front == ()
    assert math.isnan(nothing.covered)
    back = from_plain(ParetoFront, to_plain(front))
    assert (back.front, back.names, back.rung) == (front.front, front.names, front.rung)
    assert math.isnan(back.values["t003"]["error"])


def test_sizes_are_those_of_the_networks_and_each_is_measured_once(tmp_path, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("{width: 16, depth: 1}", "{depth: 1}").replace(
        "  momentum:", "  width: [8, 32]\n  momentum:"))  # fmt: skip
    spec = load_spec(file)
    data = load(spec.dataset, spec.seed)
    costs = ModelCosts(spec, data)
    inputs = data.channels * data.image_size**2
    for width in (8, 32):
        values = {"width": width, "learning_rate": 0.1, "momentum": 0.5}
        with monkeypatch.context() as patched:  # objectives count no operations
            patched.delattr(model_cost, "FlopCounterMode")
            found = costs(values)
        weights = inputs * width + width + width * data.num_classes + data.num_classes
        assert found["parameters"] == weights
        assert 0 < found["latency"] < 1
        with monkeypatch.context() as patched:  # and who counts them measures no latency
            patched.delattr(model_cost, "time")
            operations = costs.operations(values)
        assert operations == inputs * width + width * data.num_classes
        others = {"width": width, "learning_rate": 0.2, "momentum": 0.1}
        assert costs(others) is found
        assert costs.operations(others) is operations


def test_fronts_go_to_the_report_and_to_mlflow(tmp_path):
    log = make_events()
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    spec = load_spec(file, overrides=["objectives=[error,parameters]"])
    sizes = {e["trial"]["trial_id"]: 100.0 - k for k, e in enumerate(
        e for e in log if e["event"] == "trial")}  # fmt: skip
    by_values = {repr(sorted(e["trial"]["hyperparameters"].items())): e["trial"]["trial_id"]
                 for e in log if e["event"] == "trial"}  # fmt: skip
    result = result_from_events(log)
    found = fronts(
        spec, result, lambda h: {"parameters": sizes[by_values[repr(sorted(h.items()))]]}
    )
    assert [front.rung for front in found] == [1, 0]
    at_rung, full = found
    curve = next(
        c for t in result.trials for c in t.curves
        if c.rung == 1 and t.trial.trial_id == at_rung.front[0]
    )  # fmt: skip
    assert at_rung.values[at_rung.front[0]]["error"] == pytest.approx(
        1 - curve.points[-1].validation_accuracy
    )
    assert set(full.values) == {v.trial_id for v in result.verifications}
    lines = [
        {"event": "front", "front": to_plain(front), "time": log[-1]["time"], "seq": len(log)}
        for front in found
    ]
    with_fronts = [*log[:-1], *lines, log[-1]]
    page = study_page(result_from_events(with_fronts))
    assert "Several objectives" in page
    assert f"{len(at_rung.front)} configurations of" in page or len(at_rung.front) == 1
    rows = Rows()
    for event in with_fronts:
        rows.take(event)
    told = {name: value for name, value, _, _ in rows.rows[STUDY].metrics}
    assert told["objectives/hypervolume_share"] == pytest.approx(at_rung.covered)
    tags = {key: row.tags.get("llp.objectives_front") for key, row in rows.rows.items()}
    assert {key for key, tag in tags.items() if tag == "true"} == set(at_rung.front)


def test_objectives_are_checked(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    assert digest(load_spec(file)) != digest(
        load_spec(file, overrides=["objectives=[error,latency]"])
    )
    for wrong, message in (
        ("[error]", "one objective has no front"),
        ("[error,error]", "listed twice"),
        ("[error,lag]", "latency"),
    ):
        with pytest.raises(SpecError, match=message):
            load_spec(file, overrides=[f"objectives={wrong}"])


@pytest.mark.slow
def test_a_search_with_several_objectives_ends_with_fronts(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("{width: 16, depth: 1}", "{depth: 1}").replace(
        "  momentum:", "  width: [8, 32]\n  momentum:"))  # fmt: skip
    done = llp(
        "search", "tiny.yaml", "--study", "many", "--set", "objectives=[error,parameters]",
        "--set", "output.report=true", "--set", "tier1.num_trials=6", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = events(tmp_path / "llp_studies" / "many" / "ledger.jsonl")
    found = [e["front"] for e in log if e["event"] == "front"]
    assert [front["rung"] for front in found] == [1, 0]
    assert found[0]["front"]
    sizes = {v["parameters"] for v in found[0]["values"].values()}
    assert len(sizes) == 2
    assert "Several objectives" in (tmp_path / "llp_studies" / "many" / "report.html").read_text()


@pytest.mark.parametrize("build", [tpe, pytest.param(gp, marks=pytest.mark.slow)])
def test_a_searcher_with_objectives_covers_more_of_the_front_than_random_draws(build):
    """Error falls and cost rises with x; y only does harm: the front is y = 0, all x."""
    space = {"x": Uniform(low=0, high=1), "y": Uniform(low=0, high=1)}

    def values(drawn):
        return 0.2 + 0.6 * (1 - drawn["x"]) ** 2 + 0.2 * drawn["y"], drawn["x"] + drawn["y"]

    def covered(search, num=30) -> float:
        found = []
        for index in range(num):
            drawn = search.suggest(index)
            error, seconds = values(drawn)
            found.append((error, seconds))
            if hasattr(search, "tell"):
                failed = index % 7 == 6
                search.tell(index, None if failed else 1 - error, {"seconds": seconds})
        return hypervolume(found, (1.0, 2.0))

    options = {"num_startup_trials": 8, "objectives": ["error", "seconds"]}
    guided = [covered(build(space, (), seed=seed, **options)) for seed in range(3)]
    random = [covered(RandomSearch(space, (), seed)) for seed in range(20)]
    assert np.median(guided) > np.quantile(random, 0.75)
    again = build(space, (), seed=0, **options)
    assert covered(again) == guided[0]


def test_searchers_look_for_the_front_of_what_the_ledger_knows(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    spec = load_spec(file, overrides=["objectives=[error,seconds,latency]"])
    assert make_searcher(spec).objectives == ("error", "seconds")
    only = load_spec(file, overrides=["objectives=[error,latency]"])
    assert make_searcher(only).objectives == ()
