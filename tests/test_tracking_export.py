"""Exports hold every number of the study, in files that read back."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from llp.errors import EnvironmentProblem
from llp.tracking.export import FORMATS, Format, export, write_export
from llp.tracking.replay import result_from_events
from tests.make_study import HOSTILE, make_events

EVENTS = make_events(12)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_what_the_ledger_says(tmp_path: Path, format: Format) -> None:
    files = write_export(result_from_events(EVENTS), tmp_path / "out", format)
    assert [path.name for path in files] == [
        f"{name}.{format}" for name in ("trials", "curves", "measurements", "verifications")
    ]
    trials, curves, measurements, verifications = map(read, files)

    for event in EVENTS:
        if event["event"] == "trial":
            row = trials[trials.trial_id == event["trial"]["trial_id"]].iloc[0]
            for name, value in event["trial"]["hyperparameters"].items():
                assert row[f"hyperparameters.{name}"] == value
            if "momentum" not in event["trial"]["hyperparameters"]:
                assert pd.isna(row["hyperparameters.momentum"])
    assert list(trials[trials.winner].trial_id) == [EVENTS[-1]["winner"]]
    assert trials.outcome.value_counts().to_dict() == {
        "completed": 9, "diverged": 1, "failed": 1, "stopped": 1,
    }  # fmt: skip

    points = {
        (event["trial_id"], event["point"]["rung"], event["point"]["epoch"]): event["point"]
        for event in EVENTS
        if event["event"] == "point" and event["kind"] == "probe"
    }
    assert len(curves) == len(points)
    for row in curves.itertuples():
        accuracy = points[row.trial_id, row.rung, row.epoch]["validation_accuracy"]
        assert row.validation_accuracy == accuracy

    profiles = [event["profile"] for event in EVENTS if event["event"] == "profile"]
    flat = [(p["trial_id"], m["name"], m["value"]) for p in profiles for m in p["measurements"]]
    for (trial_id, name, value), row in zip(flat, measurements.itertuples(), strict=True):
        assert (row.trial_id, row.name) == (trial_id, name)
        assert row.value == value or (value is None and math.isnan(row.value))
    assert list(verifications.test_accuracy) == [
        event["verification"]["test_accuracy"]
        for event in EVENTS
        if event["event"] == "verification"
    ]


def test_study_that_has_just_begun_has_the_same_columns() -> None:
    begun, done = (export(result_from_events(events)) for events in (EVENTS[:2], EVENTS))
    for name, table in begun.items():
        assert len(table) == 0
        expected = [c for c in done[name].columns if not c.startswith("hyperparameters.")]
        assert list(table.columns) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_name_gives_the_trials_and_its_siblings_the_rest(
    tmp_path: Path, format: Format
) -> None:
    files = write_export(result_from_events(EVENTS), tmp_path / f"mine.{format}", "csv")
    assert files[0] == tmp_path / f"mine.{format}"
    assert files[1] == tmp_path / f"mine-curves.{format}"
    assert len(read(files[0])) == 12


def test_hyperparameter_of_mixed_types_and_hostile_names_survive_parquet(tmp_path: Path) -> None:
    events = make_events(8, hostile=HOSTILE)
    for number, event in enumerate(e for e in events if e["event"] == "trial"):
        event["trial"]["hyperparameters"]["mixed"] = [True, 3, 0.5, "word"][number % 4]
    files = write_export(result_from_events(events), tmp_path, "parquet")
    trials = pd.read_parquet(files[0])
    assert list(trials["hyperparameters.mixed"][:4]) == ["True", "3", "0.5", "word"]
    assert set(trials[f"hyperparameters.{HOSTILE}"]) == {HOSTILE, "tame"}


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*trials\.csv"):
        write_export(result_from_events(EVENTS), tmp_path / "file" / "out", "csv")
