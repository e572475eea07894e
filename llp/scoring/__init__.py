"""Scoring: one generalization score per trial, its uncertainty, and the evidence for its weights.

numpy, pandas, scipy and scikit-learn only; works on a plain table of trials.
"""

from llp.scoring.ablation import ablation
from llp.scoring.calibration import Calibration, calibrate
from llp.scoring.choose import choose_for_measurement, choose_for_verification, choose_winner
from llp.scoring.report import score_report
from llp.scoring.roles import Roles
from llp.scoring.score import Scores, score, verification_set
from llp.scoring.table import study_table

__all__ = [
    "Calibration",
    "Roles",
    "Scores",
    "ablation",
    "calibrate",
    "choose_for_measurement",
    "choose_for_verification",
    "choose_winner",
    "score",
    "score_report",
    "study_table",
    "verification_set",
]
