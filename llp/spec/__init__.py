"""What the user asked for: search space, experiment schema, loading with file:line errors. No Ray.

`load_spec` is the way in: a file, its overrides, all checks. `check` judges a `Spec` made in code.
"""

from __future__ import annotations

from llp.errors import Problem, SpecError
from llp.spec.checks import check, check_ladder
from llp.spec.constraints import satisfied
from llp.spec.digest import (
    checked_name,
    completed_digest,
    digest,
    json_schema,
    study_name,
    to_yaml,
)
from llp.spec.domains import GridSearch, RandomSearch, ordered
from llp.spec.loading import load_spec
from llp.spec.notes import notes
from llp.spec.schema import Spec
from llp.spec.template import init_template
from llp.spec.wording import render

__all__ = [
    "GridSearch",
    "Problem",
    "RandomSearch",
    "Spec",
    "SpecError",
    "check",
    "check_ladder",
    "checked_name",
    "completed_digest",
    "digest",
    "init_template",
    "json_schema",
    "load_spec",
    "notes",
    "ordered",
    "render",
    "satisfied",
    "study_name",
    "to_yaml",
]
