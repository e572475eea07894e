"""What is noted of the process and the machine."""

from __future__ import annotations

import subprocess
import sys

NOT_INSTALLED = """
import importlib.metadata as metadata

found = metadata.version
def version(name):
    if name in ("llp", "mlflow"):
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version

from llp import analysis
from llp.surroundings import describe_environment
for noted in (describe_environment("llp train"), analysis._environment("llp landscape")):
    print(noted["llp"], noted["torch"] != None, noted.get("mlflow"), noted["command"])
"""


def test_a_checkout_that_is_not_installed_notes_its_surroundings_all_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "0.0.0 True None llp train",
        "0.0.0 True None llp landscape",
    ], done.stderr
