"""What becomes of a Ray that does not start."""

from __future__ import annotations

import pytest
import ray

from llp.cluster.ray_tune import ray_session
from llp.errors import EnvironmentProblem


def test_a_ray_that_does_not_start_in_time_is_a_problem_of_the_environment(monkeypatch):
    def too_slow(**options):
        raise Exception("The current node timed out during startup.")  # as `ray._private.node` does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_slow)
    message = "cannot start Ray on this machine: The current"
    with pytest.raises(EnvironmentProblem, match=message), ray_session():
        pass
