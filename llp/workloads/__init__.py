"""Workloads: datasets in three splits, nested subsets, batches on the device, and networks."""

from llp.workloads.datasets import load
from llp.workloads.images import ImageData
from llp.workloads.models import build

__all__ = ["ImageData", "build", "load"]
