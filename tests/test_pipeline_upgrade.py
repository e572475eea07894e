"""A study that an older version began is known by the file it was started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_runs import TINY

from llp import pipeline
from llp.errors import StudyError
from llp.spec import Spec, digest, load_spec
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


def test_a_study_with_more_first_configurations_than_trials_can_go_on(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    warm = "searcher.warm_start={meta: {collection: /elsewhere, count: 5}}"
    stored = load_spec(tmp_path / "tiny.yaml", [warm]).model_dump(mode="json")
    for section, name in (("tier1", "num_trials"), ("tier2", "top_k"), ("verification", "top_k")):
        stored[section][name] = 3  # from when fewer trials than `count` were no error
    began_with = digest(Spec.model_validate(stored))
    with Ledger.create(tmp_path / "s", study_id="s", spec=stored, spec_digest=began_with):
        pass
    monkeypatch.setattr(pipeline, "_go_on", lambda spec, *rest: spec)
    plain = pipeline.resume(tmp_path / "s")
    assert plain.searcher.warm_start.meta.count == 5
    assert digest(plain) == began_with
    assert pipeline.resume(tmp_path / "s", overrides=["resources.num_cpus=7"]) == plain.model_copy(
        update={"resources": plain.resources.model_copy(update={"num_cpus": 7})}
    )


def test_a_study_whose_experiment_cannot_be_read_any_more_names_it_and_its_version(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    stored = load_spec(tmp_path / "tiny.yaml").model_dump(mode="json")
    stored["tier1"]["num_trials"] = -1
    kept = {"study_id": "s", "spec": stored, "spec_digest": "0" * 64, "llp_version": "0.0.7"}
    with Ledger.create(tmp_path / "s", **kept):
        pass
    with pytest.raises(StudyError) as raised:
        pipeline.resume(tmp_path / "s")
    for words in (str(tmp_path / "s"), "llp 0.0.7", "tier1.num_trials: must be at least 1"):
        assert words in str(raised.value)
