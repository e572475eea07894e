"""Long tables of learning curves: what is no number or no direction is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llp.cli import app
from llp.curve_files import read_tables
from llp.errors import DataError


def written(path: Path, **columns: object) -> Path:
    frame = pd.DataFrame(
        {
            "task": "laws",
            "curve": np.repeat(np.arange(3), 12),
            "position": np.tile(np.arange(1, 13), 3),
            "value": np.linspace(1, 0.1, 36),
        }
    )
    frame.assign(**columns).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("column", ["value", "position", "schedule_remaining"])
def test_text_in_a_column_of_numbers_is_named(tmp_path: Path, column: str) -> None:
    path = written(tmp_path / "a.csv", **{column: ["0.5"] * 35 + ["high"]})
    with pytest.raises(DataError, match=f"a.csv: column {column} holds 'high', not a number"):
        read_tables([path])


@pytest.mark.parametrize(
    ("given", "sign"),
    [("no", 1), ("False", 1), (0, 1), (0.0, 1), ("yes", -1), ("TRUE", -1), (1, -1), (True, -1)],
)
def test_the_direction_is_what_the_word_says(tmp_path: Path, given: object, sign: int) -> None:
    (table,) = read_tables([written(tmp_path / "a.csv", higher_is_better=given)])
    assert table.values.ravel() == pytest.approx(sign * np.linspace(1, 0.1, 36))


def test_other_words_for_the_direction_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="higher_is_better holds 'up'; give one of true, false"):
        read_tables([written(tmp_path / "a.csv", higher_is_better="up")])


def test_a_fit_that_cannot_be_written_is_not_begun(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x.json", tmp_path):
        answer = CliRunner().invoke(app, ["curves", "fit", str(table), "--out", str(place)])
        assert answer.exit_code == 2
        assert "cannot write" in answer.stderr
