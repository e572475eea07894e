"""First configurations from a folder of finished studies: the portfolio, its surrogates, errors."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern
from study_runs import TINY

from llp.driver import Study
from llp.earlier_trials import trials_of
from llp.errors import SpecError
from llp.meta_start import encode, proposals
from llp.pipeline import make_searcher
from llp.probing.meta_learning import (
    LENGTHS,
    NOISES,
    PastStudy,
    normal_scores,
    portfolio,
    propose,
    surrogate_mean,
)
from llp.records import EarlierStudies, from_plain
from llp.spec import Spec, digest, load_spec, to_yaml
from llp.spec.domains import Choice, Fixed, Integer, LogUniform, Uniform
from llp.tracking.ledger import Ledger, load_study
from llp.warm_start import warm_start
from tests.make_study import make_events, write_study

SPACE = """\
search_space:
  learning_rate: {type: loguniform, low: 1e-3, high: 1}
  weight_decay: {type: loguniform, low: 1e-6, high: 1e-2}
  optimizer: [sgd, adamw]
  width: {type: integer, low: 8, high: 64}
  momentum: {type: uniform, low: 0.0, high: 0.99, when: {optimizer: sgd}}
"""


def experiment(folder: Path, warm: str, *overrides: str):
    """An experiment with the search space of the made-up studies and this `warm_start`."""
    start = TINY.index("search_space:")
    rest = TINY[start:].splitlines(keepends=True)[1:]
    after = next(k for k, line in enumerate(rest) if not line.startswith(" "))
    text = TINY[:start] + SPACE + "".join(rest[after:])
    text = text.replace(
        "searcher: {name: tpe, num_startup_trials: 4}", f"searcher: {{name: random, {warm}}}"
    ).replace("model: {name: mlp, options: {width: 16, depth: 1}}", "model: {name: simple_cnn}")
    file = folder / "tiny.yaml"
    file.write_text(text)
    return load_spec(file, overrides=list(overrides))


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """Three finished studies, one that was interrupted and one that is damaged."""
    folder = tmp_path_factory.mktemp("collection")
    for seed in range(3):
        name = f"past-{seed}"
        write_study(folder / name, make_events(14, seed, study_id=name))
    events = make_events(14, 7, study_id="cut")
    write_study(folder / "cut", events[: len(events) // 2])
    write_study(folder / "damaged", make_events(6, 8, study_id="damaged"))
    ledger = folder / "damaged" / "ledger.jsonl"
    ledger.write_text("no json\n" + ledger.read_text())
    return folder


@pytest.mark.parametrize("seed", range(5))
def test_a_portfolio_is_chosen_greedily_and_comes_near_the_best_set(seed):
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=(4, 9))
    weights = generator.dirichlet(np.ones(4))

    def worth(chosen) -> float:
        return float(weights @ expected[:, list(chosen)].max(axis=1))

    found = portfolio(expected, weights, 3)
    for place in range(len(found)):
        others = [worth([*found[:place], k]) for k in range(9) if k not in found[:place]]
        assert worth(found[: place + 1]) == pytest.approx(max(others))
    best = max(worth(chosen) for chosen in itertools.combinations(range(9), 3))
    start = worth(found[:1])
    assert worth(found) - start >= (1 - 1 / math.e) * (best - start) - 1e-12
    assert sorted(portfolio(expected, weights, 20)) == list(range(9))


def test_a_portfolio_covers_studies_that_disagree():
    """Alone, the compromise is best on average; of two, one for each study is better."""
    expected = np.array([[2.0, -2.0, 0.5, 1.9], [-2.0, 2.0, 0.5, -1.9]])
    assert portfolio(expected, np.array([0.5, 0.5]), 1) == [2]
    assert set(portfolio(expected, np.array([0.5, 0.5]), 3)) == {0, 1, 2}


def test_the_surrogate_is_the_gaussian_process_of_scikit_learn():
    generator = np.random.default_rng(3)
    known, at = generator.random((25, 4)), generator.random((10, 4))
    values = normal_scores(np.sin(3 * known[:, 0]) + known[:, 1] ** 2)
    fits = []
    for length, noise in itertools.product(LENGTHS, NOISES):
        # The variance of the function in closed form scales kernel and noise alike.
        shape = Matern(length * math.sqrt(4), nu=2.5)
        covariance = shape(known) + noise * np.eye(25)
        variance = float(values @ np.linalg.solve(covariance, values)) / 25
        process = GaussianProcessRegressor(
            ConstantKernel(variance) * shape, alpha=noise * variance, optimizer=None
        ).fit(known, values)
        fits.append((process.log_marginal_likelihood_value_, process))
    best = max(fits, key=lambda fit: fit[0])[1]
    np.testing.assert_allclose(surrogate_mean(known, values, at), best.predict(at), rtol=1e-6)


def test_only_the_order_within_a_study_counts():
    generator = np.random.default_rng(0)
    quality = generator.random(12)
    quality[3] = -np.inf
    changed = np.where(np.isfinite(quality), 100 * np.exp(3 * quality), -np.inf)
    assert (normal_scores(quality) == normal_scores(changed)).all()
    assert normal_scores(quality).argmin() == 3
    points, candidates = generator.random((12, 3)), generator.random((30, 3))
    assert propose([PastStudy(points, quality)], candidates, 4) == propose(
        [PastStudy(points, changed)], candidates, 4
    )
    with pytest.raises(ValueError, match="no studies"):
        propose([], candidates, 4)
    with pytest.raises(ValueError, match="fewer than 5 trials"):
        propose([PastStudy(points[:4], quality[:4])], candidates, 4)


def test_a_single_study_proposes_near_its_optimum_and_two_propose_near_both():
    generator = np.random.default_rng(1)
    candidates = generator.random((200, 2))
    optima = np.array([[0.2, 0.3], [0.8, 0.7]])
    studies = []
    for optimum in optima:
        points = generator.random((40, 2))
        studies.append(PastStudy(points, -((points - optimum) ** 2).sum(axis=1)))

    def distances(chosen) -> np.ndarray:
        return np.linalg.norm(candidates[chosen][:, None] - optima[None], axis=-1)

    assert distances(propose(studies[:1], candidates, 1))[0, 0] < 0.15
    assert (distances(propose(studies, candidates, 4)).min(axis=0) < 0.15).all()


def test_configurations_lie_in_the_unit_cube_on_their_domain_s_scale():
    space = {
        "rate": LogUniform(low=1e-4, high=1),
        "momentum": Uniform(low=0.5, high=0.9, when={"kind": "a"}),
        "width": Integer(low=8, high=128, log=True),
        "kind": Choice(values=["a", "b", "c"]),
        "constant": Fixed(value=3),
    }
    rows = [
        {"rate": 1e-2, "momentum": 0.9, "width": 32, "kind": "a", "constant": 3},
        {"rate": 1e-2, "width": 32, "kind": "c", "constant": 3},
    ]
    found = encode(space, rows)
    assert found.shape == (2, 6)
    assert sorted(found[0]) == pytest.approx(sorted([0.5, 1.0, 0.5, math.sqrt(0.5), 0, 0]))
    difference = np.sort(np.abs(found[0] - found[1]))  # momentum not active: the middle
    assert difference == pytest.approx(np.sort([0, 0.5, 0, math.sqrt(0.5), 0, math.sqrt(0.5)]))


def test_a_folder_of_studies_proposes_the_first_configurations(tmp_path, collection):
    warm = f"warm_start: {{meta: {{collection: '{collection}', count: 4}}}}"
    spec = experiment(tmp_path, warm)
    found = warm_start(spec)
    assert found.studies.used == ("past-0", "past-1", "past-2")
    left_out = {"cut": "not finished", "damaged": "its ledger cannot be read"}
    assert found.studies == EarlierStudies(found.studies.used, left_out, num_first=4)
    tried, standing = [], []
    for name in found.studies.used:
        past = [*trials_of(load_study(collection / name))]
        order = sorted(past, key=lambda trial: trial.rank)
        tried += [dict(trial.hyperparameters) for trial in past]
        standing += [place / (len(order) - 1) for place in map(order.index, past)]
    first = [dict(values) for values in found.first]
    assert len(first) == 4
    assert all(values in tried for values in first)
    # All are trials of these studies, and above the middle of their own.
    assert min(standing[tried.index(values)] for values in first) > 0.5
    searcher = make_searcher(spec, found)
    assert [searcher.suggest(k) for k in range(4)] == first
    plain = make_searcher(experiment(tmp_path, "num_startup_trials: 4"))
    assert searcher.suggest(4) == plain.suggest(4)  # only the first few draws are replaced
    assert proposals(spec) == proposals(spec)


def test_the_study_that_asks_is_not_among_those_it_looks_at(tmp_path, collection):
    folder = tmp_path / "all"
    shutil.copytree(collection, folder)
    warm = f"warm_start: {{meta: {{collection: '{folder}', count: 2}}}}"
    with Ledger.create(folder / "own", study_id="own", spec={}, spec_digest="d") as ledger:
        study = Study(ledger)
        found = warm_start(experiment(tmp_path, warm), study)
        assert set(found.studies.left_out) == {"cut", "damaged"}
        again = warm_start(experiment(tmp_path, warm), study)
        assert again == found
        assert from_plain(EarlierStudies, study.history[-1]["studies"]) == found.studies
    with_own = warm_start(experiment(tmp_path, warm))
    assert with_own.studies.left_out["own"] == "not finished"
    assert with_own.first == found.first


def test_more_first_configurations_than_trials_are_refused_where_they_were_asked_for(tmp_path):
    warm = f"warm_start: {{meta: {{collection: '{tmp_path}', count: 9}}}}"
    with pytest.raises(SpecError, match=r"9 configurations .* more than tier1.num_trials \(6\)"):
        experiment(tmp_path, warm, "tier1.num_trials=6")


def test_a_count_that_was_not_given_fits_the_trials_and_is_read_back_from_what_is_stored(tmp_path):
    unasked = f"warm_start: {{meta: {{collection: '{tmp_path}'}}}}"
    for num_trials, count in ((3, 3), (6, 5)):
        spec = experiment(tmp_path, unasked, f"tier1.num_trials={num_trials}")
        assert spec.searcher.warm_start.meta.count == count
        (tmp_path / "spec.yaml").write_text(to_yaml(spec))
        again = load_spec(tmp_path / "spec.yaml")
        assert again == Spec.model_validate(spec.model_dump(mode="json")) == spec
        assert digest(again) == digest(spec)


def test_named_studies_come_after_the_collection(tmp_path, collection):
    warm = (
        f"warm_start: {{meta: {{collection: '{collection}', count: 2}}, "
        f"studies: ['{collection / 'past-1'}'], num_configurations: 2}}"
    )
    found = warm_start(experiment(tmp_path, warm))
    alone = f"warm_start: {{meta: {{collection: '{collection}', count: 2}}}}"
    assert found.first[:2] == warm_start(experiment(tmp_path, alone)).first
    assert len(found.first) == 4
    assert {result.study for result in found.earlier} == {"past-1"}


def test_a_collection_that_is_of_no_use_is_an_error_with_its_line(tmp_path, collection):
    def warm(folder: Path) -> str:
        return f"warm_start: {{meta: {{collection: '{folder}'}}}}"

    (tmp_path / "empty").mkdir()
    cases = (
        (tmp_path / "nowhere", (), "there is no folder"),
        (tmp_path / "empty", (), "holds no study"),
        (collection, ("search_space.batch_size=[16,32]",), "'batch_size' was not"),
        (collection, ("search_space.learning_rate.low=0.999",), "fewer than 5 configurations"),
    )
    for folder, overrides, message in cases:
        spec = experiment(tmp_path, warm(folder), *overrides)
        with pytest.raises(SpecError) as raised:
            warm_start(spec)
        assert message in str(raised.value)
        assert "searcher.warm_start.meta.collection" in str(raised.value)
        line = (
            (tmp_path / "tiny.yaml")
            .read_text()
            .splitlines()
            .index(f"searcher: {{name: random, {warm(folder)}}}")
        )
        assert f"tiny.yaml:{line + 1}" in str(raised.value)
    with pytest.raises(SpecError, match="needs `studies`, a list of earlier ones, or `meta"):
        experiment(tmp_path, "warm_start: {num_configurations: 2}")
