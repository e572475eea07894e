from __future__ import annotations

import numpy as np
import pandas as pd

from llp.scoring import Roles, calibrate, score
from llp.scoring.twins import twins_sentence, without_twins
from tests.scoring_tables import simulate

ROLES = Roles(("h",), {"val": "higher"}, target="y")


def test_rows_are_twins_when_all_shared_columns_are_equal():
    first = pd.DataFrame({"h": [1, 2, 3], "val": [0.1, 0.2, np.nan], "y": [0.5, np.nan, 0.7]})
    other = pd.DataFrame(
        {
            "h": ["1", "2", "3", "3", "1"],
            "val": [0.1 + 1e-16, 0.2, None, 0.3, 0.1],
            "y": [0.5, np.nan, 0.7, 0.7, 0.6],
        }
    )
    assert without_twins(other, ROLES, [(first, ROLES)]).index.tolist() == [3, 4]
    lacking = other.drop(columns="h")
    roles = ROLES.present_in(lacking)
    assert without_twins(lacking, roles, [(first, ROLES)]).index.tolist() == [3, 4]


def test_rows_alike_within_one_table_stay_and_a_table_without_results_has_no_twins():
    table = pd.DataFrame({"h": [1, 1], "val": [0.1, 0.1], "y": [0.5, 0.5]})
    assert len(without_twins(table, ROLES, [])) == 2
    assert len(without_twins(table, ROLES, [(table.drop(columns="y"), ROLES)])) == 2


def test_the_history_of_a_table_cannot_give_noise_a_weight():
    for seed in range(3):
        table = simulate(seed, rows=40, finished=20, metrics=1)
        copies = [table.copy() for _ in range(3)]
        assert calibrate([table, *copies]).weights == calibrate(table).weights
        scores = score(table, history=copies)
        assert scores.calibration.num_finished == 20
        assert not scores.calibration.tier2_enters


def test_one_row_is_said_in_the_singular():
    assert twins_sentence(0) == ""
    assert twins_sentence(1) == " 1 row is in an earlier table already and counts once."
