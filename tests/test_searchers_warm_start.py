"""Warm start: best configurations first, results told on one scale, clear errors otherwise."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from study_runs import TINY, events, llp

from llp.cluster.searchers import aligned_values, tpe
from llp.driver import Study
from llp.errors import SpecError
from llp.pipeline import make_searcher
from llp.probing.rung_scale import on_lowest_rung
from llp.probing.state import SearchState
from llp.records import EarlierResult, JobEnd, to_plain
from llp.spec import load_spec
from llp.spec.domains import Choice, Fixed, LogUniform, Uniform
from llp.tracking.ledger import Ledger, load_study
from llp.tracking.mlflow_tracker import MlflowTracker, read_trials
from llp.warm_start import warm_start
from tests.make_study import make_events, write_study


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A finished study of another program: the made-up one, with its own search space."""
    return write_study(tmp_path_factory.mktemp("earlier") / "past", make_events())


def spec_for(folder: Path, earlier: Path | str, *overrides: str, space: dict):
    """An experiment with this search space that starts from `earlier`."""
    file = folder / "tiny.yaml"
    text = TINY.replace(
        "searcher: {name: tpe, num_startup_trials: 4}",
        f"searcher: {{name: tpe, num_startup_trials: 4, warm_start: {{studies: ['{earlier}']}}}}",
    )
    file.write_text(text)
    spec = load_spec(file, overrides=list(overrides))
    return spec.model_copy(update={"search_space": space})


def fitting_space(earlier: Path, **changes):
    """A space in which every configuration of the study lies."""
    trials = [t.trial.hyperparameters for t in load_study(earlier).trials]
    names = sorted({name for values in trials for name in values})
    space = {}
    for name in names:
        values = list(dict.fromkeys(t[name] for t in trials if name in t))
        numbers = all(isinstance(v, float) for v in values)
        if numbers:
            space[name] = Uniform(low=min(values) - 1, high=max(values) + 1)
        else:
            space[name] = Choice(values=values)
    return {**space, **changes}


def test_the_best_configurations_of_an_earlier_study_are_tried_first(tmp_path, earlier):
    spec = spec_for(tmp_path, earlier, space=fitting_space(earlier))
    found = warm_start(spec)
    past = load_study(earlier)
    verified: dict[str, list[float]] = {}
    for run in past.verifications:
        verified.setdefault(run.trial_id, []).append(run.validation_accuracy)
    order = sorted(verified, key=lambda name: -statistics.fmean(verified[name]))
    by_id = {t.trial.trial_id: dict(t.trial.hyperparameters) for t in past.trials}
    assert [dict(values) for values in found.first[: len(order)]] == [
        by_id[name] for name in order[:3]
    ]
    searcher = make_searcher(spec, found)
    assert [searcher.suggest(k) for k in range(len(found.first))] == [
        dict(values) for values in found.first
    ]
    random = make_searcher(
        spec.model_copy(update={"searcher": spec.searcher.model_copy(update={"name": "random"})}),
        found,
    )
    assert random.suggest(0) == dict(found.first[0])
    later = random.suggest(len(found.first))
    assert later not in [dict(values) for values in found.first]


def test_results_are_those_of_the_lowest_rung_and_not_comparable_on_other_data(tmp_path, earlier):
    space = fitting_space(earlier)  # without conditions: every trial needs every parameter
    found = warm_start(spec_for(tmp_path, earlier, space=space))
    past = load_study(earlier)
    told = {result.trial_id: result for result in found.earlier}
    for trial in past.trials:
        points = [p for c in trial.curves if c.rung == 1 for p in c.points]
        whole = points and points[-1].epoch == past.rungs[0].epochs
        whole = whole and set(trial.trial.hyperparameters) == set(space)
        name = trial.trial.trial_id
        if whole and np.isfinite(points[-1].validation_accuracy):
            assert told[name].value == points[-1].validation_accuracy
            assert not told[name].comparable
        else:
            assert name not in told
    assert len(told) >= 5


def test_mlflow_tells_the_same_as_the_ledger(tmp_path, earlier):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(uri, "llp/past", earlier)
    tracker.write([e for e in events(earlier / "ledger.jsonl") if e["seq"] > 0])
    tracker.finish()
    tracker.close()
    name = load_study(earlier).study_id
    space = fitting_space(earlier)
    ledger = warm_start(spec_for(tmp_path, earlier, space=space))
    mlflow = warm_start(spec_for(tmp_path, f"mlflow:{uri}#{name}", space=space))
    assert mlflow.first == ledger.first
    assert {r.trial_id: (r.value, r.hyperparameters) for r in mlflow.earlier} == {
        r.trial_id: (r.value, r.hyperparameters)
        for r in ledger.earlier
        if r.trial_id in {m.trial_id for m in mlflow.earlier}
    }
    assert len(mlflow.earlier) >= len(ledger.earlier) - 1
    assert len(read_trials(uri, name)) == len(load_study(earlier).trials)
    for wrong, message in (
        (f"mlflow:{uri}#nothing", "has no study 'nothing'"),
        (f"mlflow:sqlite:///{tmp_path / 'none.db'}#x", "there is no MLflow database"),
        ("mlflow:nonsense", "is not of the form mlflow:URI#STUDY"),
    ):
        with pytest.raises(SpecError, match=message):
            warm_start(spec_for(tmp_path, wrong, space=space))


def test_what_does_not_fit_the_search_space_is_an_error_with_the_way_out(tmp_path, earlier):
    space = fitting_space(earlier)
    dropped = sorted(space)[0]
    without = {name: domain for name, domain in space.items() if name != dropped}
    with pytest.raises(SpecError, match=f"searched '{dropped}', which this search space does not"):
        warm_start(spec_for(tmp_path, earlier, space=without))
    ignored = spec_for(tmp_path, earlier, f"searcher.warm_start.ignore=[{dropped}]", space=without)
    assert all(dropped not in values for values in warm_start(ignored).first)
    more = {**space, "new": Uniform(low=0, high=1)}
    with pytest.raises(SpecError, match="'new' was not searched there"):
        warm_start(spec_for(tmp_path, earlier, space=more))
    fixed = warm_start(spec_for(tmp_path, earlier, space={**space, "new": Fixed(value=3)}))
    assert all(values["new"] == 3 for values in fixed.first)
    elsewhere = {**space, "learning_rate": LogUniform(low=1e5, high=1e6)}
    with pytest.raises(SpecError, match="'learning_rate' outside its domain"):
        warm_start(spec_for(tmp_path, earlier, space=elsewhere))
    with pytest.raises(SpecError, match="no study 'nowhere'"):
        warm_start(spec_for(tmp_path, "nowhere", space=space))


def test_a_warm_start_is_read_once_and_then_belongs_to_the_study(tmp_path, earlier):
    spec = spec_for(tmp_path, earlier, space=fitting_space(earlier))
    folder = tmp_path / "llp_studies" / "now"
    names = ("num_train", "num_validation", "num_test", "num_classes", "num_trials")
    header = {
        **dict.fromkeys(names, 1),
        "environment": {},
        "jobs_per_rung": {},
        **dict.fromkeys(("spec_digest", "llp_version"), "0"),
        "study_id": "now",
        "spec": spec.model_dump(mode="json"),
        "rungs": [],
        "dataset": {"name": "x", "digest": "d", "source": ""},
    }
    with Ledger.create(folder, **header) as ledger:
        first = warm_start(spec, Study(ledger))
    gone = spec_for(tmp_path, "moved-away", space=fitting_space(earlier))
    with Ledger.open(folder) as ledger:
        study = Study(ledger)
        again = warm_start(gone, study)
        assert sum(e["event"] == "warm_start" for e in study.history) == 1
    assert [dict(v) for v in again.first] == [dict(v) for v in first.first]
    assert again.earlier == first.earlier


def test_values_of_another_study_get_the_median_and_spread_of_this_one():
    generator = np.random.default_rng(0)
    there = generator.normal(0.4, 0.2, 40)
    own = list(generator.normal(0.9, 0.01, 30))
    results = [EarlierResult("s", f"t{k}", {}, v, False) for k, v in enumerate(there)]
    aligned = np.array(aligned_values(results, own))
    assert (np.argsort(aligned) == np.argsort(there)).all()

    def quartiles(values):
        return statistics.quantiles(values, n=4)

    assert quartiles(aligned)[1] == pytest.approx(quartiles(own)[1])
    assert quartiles(aligned)[2] - quartiles(aligned)[0] == pytest.approx(
        quartiles(own)[2] - quartiles(own)[0]
    )
    alone = [EarlierResult("s", "t0", {}, 0.3, False)]
    assert aligned_values(alone, own) == [pytest.approx(quartiles(own)[1])]


@pytest.mark.parametrize("comparable", [True, False])
def test_tpe_learns_from_earlier_results(comparable):
    """With 25 earlier results around an optimum, the first own suggestions lie near it."""
    space = {"x": Uniform(low=0, high=1), "name": Fixed(value="a")}
    earlier = [
        EarlierResult("s", f"t{k}", {"x": x, "name": "a"}, 0.5 - (x - 0.2) ** 2, comparable)
        for k, x in enumerate(np.linspace(0, 1, 25))
    ]

    def median_distance(results) -> float:
        distances = []
        for seed in range(6):
            search = tpe(space, (), seed=seed, num_startup_trials=5, earlier=results)
            for index in range(12):
                x = search.suggest(index)["x"]
                search.tell(index, 0.9 - (x - 0.2) ** 2)
                if (index >= 5) if not comparable else (index < 5):
                    distances.append(abs(x - 0.2))
        return statistics.median(distances)

    with_them, without = median_distance(earlier), median_distance([])
    assert with_them < 0.7 * without


def ended(state: SearchState, trial_id: str, rung: int, accuracy: float) -> None:
    job_id = f"{trial_id}-r{rung}"
    point = {
        "rung": rung, "data_fraction": 1.0, "epoch": 1, "samples_seen": 1, "train_loss": 0.1,
        "train_accuracy": 0.9, "validation_loss": 0.1, "validation_accuracy": accuracy,
        "seconds": 1.0, "learning_rate": 0.1,
    }  # fmt: skip
    state.apply({"event": "point", "job_id": job_id, "point": point})
    end = JobEnd(job_id, trial_id, "completed")
    state.apply({"event": "job_end", "kind": "probe", "rung": rung, "end": to_plain(end)})


def test_results_of_a_higher_rung_are_told_on_the_scale_of_the_lowest():
    state = SearchState()
    ended(state, "t000", 1, 0.50)
    ended(state, "t001", 1, 0.60)
    assert on_lowest_rung(state, "t001", 1) == 0.60
    ended(state, "t009", 3, 0.90)  # the first of a bracket that begins higher: no pair yet
    assert on_lowest_rung(state, "t009", 3) == pytest.approx(0.55)
    ended(state, "t000", 3, 0.80)
    ended(state, "t001", 3, 0.86)  # pairs: + 0.30 and + 0.26
    assert on_lowest_rung(state, "t009", 3) == pytest.approx(0.90 - 0.28)
    assert np.isnan(on_lowest_rung(state, "t777", 3))


@pytest.mark.slow
def test_a_search_starts_from_an_earlier_one_and_a_second_look_needs_no_earlier_study(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    small = ["--set", "tier1.num_trials=6", "--set", "verification.num_seeds=1"]
    assert llp("search", "tiny.yaml", "--study", "one", *small, folder=tmp_path).returncode == 0
    from_it = ["--set", "searcher.warm_start.studies=[one]", "--set", "seed=1"]
    done = llp("search", "tiny.yaml", "--study", "two", *small, *from_it, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [events(tmp_path / "llp_studies" / name / "ledger.jsonl") for name in ("one", "two")]
    winner = next(e["winner"] for e in logs[0] if e["event"] == "finished")
    trials = [
        {
            e["trial"]["trial_id"]: e["trial"]["hyperparameters"]
            for e in log
            if e["event"] == "trial"
        }
        for log in logs
    ]
    told = next(e for e in logs[1] if e["event"] == "warm_start")
    assert trials[1]["t000"] == trials[0][winner] == told["first"][0]
    assert all(result["comparable"] for result in told["earlier"])
    wrong = llp(
        "search", "tiny.yaml", "--study", "three", *small,
        "--set", "searcher.warm_start.studies=[oen]", folder=tmp_path,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "did you mean 'one'?" in wrong.stderr
    assert not (tmp_path / "llp_studies" / "three").exists()
