"""A study that an older version began is known by the file it was started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_runs import TINY

from llp import pipeline
from llp.errors import StudyError
from llp.spec import digest, load_spec
from llp.tracking.ledger import Ledger


def test_a_setting_that_came_later_does_not_make_it_another_spec(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    spec = load_spec(tmp_path / "tiny.yaml", [f"output.root={tmp_path}"])
    stored = spec.model_dump(mode="json")
    del stored["training"]["label_smoothing"]
    with Ledger.create(tmp_path / "s", study_id="s", spec=stored, spec_digest="0" * 64):
        pass
    with pytest.raises(StudyError, match=r"s exists already.*llp resume s"):
        pipeline.search(spec, study_id="s")
    other = spec.model_copy(update={"seed": spec.seed + 1})
    assert digest(other) != digest(spec)
    with pytest.raises(StudyError, match="another spec"):
        pipeline.search(other, study_id="s")
