"""Loss Landscape Probing: good hyperparameters at a fraction of the cost, and the evidence.

The public names are loaded when they are first used, so that `import llp` (and `llp --help`) needs
neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llp.api import TwoTierProbing
    from llp.full_training import train
    from llp.pipeline import check, plan, resume, search
    from llp.spec import Spec, load_spec

try:
    __version__ = version("llp")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

_HOMES = {
    "TwoTierProbing": "llp.api",
    "check": "llp.pipeline",
    "plan": "llp.pipeline",
    "resume": "llp.pipeline",
    "search": "llp.pipeline",
    "train": "llp.full_training",
    "Spec": "llp.spec",
    "load_spec": "llp.spec",
}
__all__ = [
    "Spec",
    "TwoTierProbing",
    "__version__",
    "check",
    "load_spec",
    "plan",
    "resume",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llp' has no attribute '{name}'")
