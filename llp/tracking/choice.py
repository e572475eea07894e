"""Which trial a user means: an id, `winner`, or `best` so far."""

from __future__ import annotations

from llp.errors import StudyError, unknown
from llp.records import SearchResult


def find_trial(result: SearchResult, wanted: str) -> str:
    """The id of the trial called `wanted`: an id, `winner`, or `best` (so far).

    Raises:
        StudyError: There is none.
    """
    known = [trial.trial.trial_id for trial in result.trials]
    if wanted == "winner":
        if result.winner is None:
            raise StudyError(f"{result.study_id} has no winner yet; try `best`")
        return result.winner
    if wanted == "best":
        if result.winner is not None:
            return result.winner
        if result.score_report and result.score_report.scores:
            return result.score_report.scores[0].trial_id
        tops = {
            trial.trial.trial_id: trial.last.validation_accuracy
            for trial in result.trials
            if trial.last is not None and trial.outcome == "completed"
        }
        if not tops:
            raise StudyError(f"no trial of {result.study_id} has finished a rung yet")
        return max(tops, key=lambda trial_id: tops[trial_id])
    if wanted not in known:
        raise StudyError(
            f"{result.study_id}: {unknown('trial', wanted, [*known, 'best', 'winner'])}"
        )
    return wanted
