"""Points of a surface on Ray workers: all of them, once each, whoever dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from llp.cluster.landscape_points import MAX_LOSSES, RayPoints
from llp.cluster.ray_tune import ray_session
from llp.errors import EnvironmentProblem

Array = np.ndarray[Any, Any]


class Squares:
    """An evaluator that says where it ran, and may kill its process."""

    def __init__(self, folder: Path, deaths: int = 0) -> None:
        self.folder, self.deaths, self.driver = folder, deaths, os.getpid()

    def __call__(self, points: Array) -> Array:
        if os.getpid() != self.driver and points[0, 0] == 3.0:
            died = len(list(self.folder.iterdir()))
            if died < self.deaths:
                (self.folder / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        own = np.full(len(points), float(os.getpid()))
        return np.stack([(points**2).sum(1), own, own], axis=1)


CHUNKS = [np.full((2, 2), float(number)) for number in range(-5, 6)]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Any:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_session(num_cpus=2):
        yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
def test_every_chunk_comes_back_once_and_the_model_itself_is_evaluated_here(
    tmp_path: Path,
) -> None:
    found = list(RayPoints(2, cpus=1)(Squares(tmp_path), CHUNKS))
    assert sorted(number for number, _ in found) == list(range(11))
    pids = {}
    for number, values in found:
        np.testing.assert_array_equal(values[:, 0], (CHUNKS[number] ** 2).sum(1))
        pids[number] = int(values[0, 1])
        values[0, 0] = 1.0  # may be written to
    assert pids[5] == os.getpid()
    assert os.getpid() not in {pid for number, pid in pids.items() if number != 5}
    assert len(set(pids.values())) == 3


@pytest.mark.slow
def test_the_chunk_of_a_worker_that_dies_is_done_by_another(tmp_path: Path) -> None:
    found = dict(RayPoints(2)(Squares(tmp_path, deaths=2), CHUNKS))
    assert len(found) == 11
    np.testing.assert_array_equal(found[8][:, 0], [18.0, 18.0])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_workers_that_always_die_are_given_up_on(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=f"{MAX_LOSSES + 1} workers died"):
        list(RayPoints(1)(Squares(tmp_path, deaths=99), CHUNKS))


@pytest.mark.slow
def test_more_workers_than_fit_do_not_wait_for_each_other(tmp_path: Path) -> None:
    found = list(RayPoints(8, cpus=1)(Squares(tmp_path), CHUNKS))
    assert len(found) == 11


@pytest.mark.slow
def test_a_worker_that_can_never_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="asks for 64 CPUs"):
        list(RayPoints(1, cpus=64)(Squares(tmp_path), CHUNKS))
    with pytest.raises(EnvironmentProblem, match="1 GPUs, Ray has"):
        list(RayPoints(1, gpus=1)(Squares(tmp_path), CHUNKS))


@pytest.mark.slow
def test_one_chunk_around_the_model_needs_no_worker(tmp_path: Path) -> None:
    [(number, values)] = RayPoints(2)(Squares(tmp_path), [np.zeros((1, 2))])
    assert (number, values[0, 1]) == (0, os.getpid())
