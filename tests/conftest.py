"""Shared fixtures. Tests that need real data look for `../shared` and are skipped by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example that takes long tells of the machine, not of the code.
settings.register_profile("llp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llp")


@pytest.fixture
def shared_data() -> Path:
    """The folder with CIFAR-10/100 parquet files beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real CIFAR files are not beside the checkout (../shared/data)")
    return folder
