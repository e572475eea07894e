"""A study as four plain tables, for whoever wants to look at it with pandas, R or a spreadsheet.

- `trials`: one row per configuration, hyperparameters as `hyperparameters.<name>`.
- `curves`: one row per point of every learning curve of tier 1.
- `measurements`: one row per trial and tier-2 metric.
- `verifications`: one row per full training.

Columns are the fields of the records, with the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from llp.errors import EnvironmentProblem
from llp.records import (
    CurvePoint,
    GeneralizationScore,
    Measurement,
    SearchResult,
    TrialResult,
    Verification,
    to_plain,
)
from llp.tracking.files import disk_problem

Format = Literal["parquet", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "csv")


def export(result: SearchResult) -> dict[str, pd.DataFrame]:
    """The tables `trials`, `curves`, `measurements` and `verifications` of a study.

    Empty tables keep their columns, so that code written for a finished study also runs on one that
    has just begun.
    """
    scores = {score.trial_id: score for score in _scores(result)}
    return {
        "trials": _trials(result, scores),
        "curves": _table(
            (
                {"trial_id": curve.trial_id, **dataclasses.asdict(point)}
                for trial in result.trials
                for curve in trial.curves
                for point in curve.points
            ),
            ["trial_id", *_fields(CurvePoint)],
        ),
        "measurements": _table(
            (
                {"trial_id": profile.trial_id, **dataclasses.asdict(measurement)}
                for profile in result.profiles
                for measurement in profile.measurements
            ),
            ["trial_id", *_fields(Measurement)],
        ),
        "verifications": _table(
            (dataclasses.asdict(verification) for verification in result.verifications),
            _fields(Verification),
        ),
    }


def write_export(result: SearchResult, path: Path | str, format: Format = "parquet") -> list[Path]:
    """Writes the tables of `export` and returns the files.

    Args:
        result: The study.
        path: A folder, made when missing, which gets `trials.parquet`, `curves.parquet` and so on;
            or a file `NAME.csv` or `NAME.parquet` for the trials, beside which the others go as
            `NAME-curves.csv` and so on. A suffix wins over `format`.
        format: `parquet` or `csv`.

    Raises:
        EnvironmentProblem: The disk is full, or the place cannot be written.
        ValueError: Another format.
    """
    path = Path(path)
    prefix = ""
    for known in FORMATS:
        if path.suffix == f".{known}" and not path.is_dir():
            format, prefix, path = known, path.stem, path.parent
    if format not in FORMATS:
        raise ValueError(f"format is '{format}'; choose one of: {', '.join(FORMATS)}")
    written = []
    for name, table in export(result).items():
        stem = (prefix if name == "trials" else f"{prefix}-{name}") if prefix else name
        file = path / f"{stem}.{format}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if format == "csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
        except OSError as error:
            problem: EnvironmentProblem = disk_problem(error, file)
            raise problem from error
        written.append(file)
    return written


def _scores(result: SearchResult) -> Sequence[GeneralizationScore]:
    return result.score_report.scores if result.score_report else ()


def _trials(result: SearchResult, scores: Mapping[str, GeneralizationScore]) -> pd.DataFrame:
    names = sorted({name for trial in result.trials for name in trial.trial.hyperparameters})
    columns = ["trial_id", *(f"hyperparameters.{name}" for name in names), *_TRIAL_COLUMNS]
    rows = [_trial_row(trial, scores, winner=result.winner) for trial in result.trials]
    table = _table(rows, columns)
    for name in names:
        column = f"hyperparameters.{name}"
        table[column] = _uniform(row.get(column) for row in rows)
    return table


_TRIAL_COLUMNS = [
    "seed",
    "bracket",
    "outcome",
    "stopped_by",
    "failure",
    "rung",
    "data_fraction",
    "epoch",
    "validation_accuracy",
    "validation_loss",
    "score",
    "score_low",
    "score_high",
    "probability_best",
    "samples_seen",
    "seconds",
    "checkpoint",
    "winner",
]


def _trial_row(
    trial: TrialResult, scores: Mapping[str, GeneralizationScore], *, winner: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trial_id": trial.trial.trial_id,
        "seed": trial.trial.seed,
        "bracket": trial.trial.bracket,
        "outcome": trial.outcome,
        "stopped_by": trial.stopped_by,
        "failure": trial.failure,
        "samples_seen": trial.samples_seen,
        "seconds": trial.seconds,
        "checkpoint": trial.checkpoint.path if trial.checkpoint else None,
        "winner": trial.trial.trial_id == winner,
    }
    for name, value in trial.trial.hyperparameters.items():
        row[f"hyperparameters.{name}"] = value
    if trial.last is not None:
        for name in ("rung", "data_fraction", "epoch", "validation_accuracy", "validation_loss"):
            row[name] = getattr(trial.last, name)
    score = scores.get(trial.trial.trial_id)
    if score is not None:
        row["score"], row["probability_best"] = score.value, score.probability_best
        row["score_low"], row["score_high"] = score.interval.low, score.interval.high
    return row


def _fields(record: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


def _table(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame.from_records([dict(row) for row in rows], columns=columns)


def _uniform(values: Iterable[Any]) -> pd.Series[Any]:
    """A column of one type, as parquet needs it; inactive hyperparameters are missing."""
    found = [to_plain(value) for value in values]
    kinds = {type(value) for value in found if value is not None}
    if kinds == {bool}:
        return pd.Series(found, dtype="boolean")
    if kinds == {int}:
        return pd.Series(found, dtype="Int64")
    if kinds <= {int, float}:
        return pd.Series(found, dtype="float64")
    return pd.Series([None if value is None else str(value) for value in found], dtype="string")
