"""Full trainings of the best few: a fixed number of seeds each, or a race over seeds.

In a race every look is a line in the ledger, written before the trainings that follow from it, so
that a search that was killed goes on with the same decisions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

from llp.driver import ListedSource, Study, full_training_seeds
from llp.errors import NoTrialSucceeded
from llp.protocols import Report
from llp.records import Job, JobEnd, RaceLook, StopDecision, from_plain
from llp.scoring.choose import choose_winner
from llp.scoring.racing import (
    MIN_SEEDS,
    Accuracies,
    RaceRules,
    accuracies_of,
    look,
    race_sentence,
)
from llp.scoring.targets import CORRUPTED, judged
from llp.spec import Spec
from llp.training.full import full_job

logger = logging.getLogger(__name__)


def race_rules(spec: Spec, entrants: Sequence[str], num_validation: int) -> RaceRules | None:
    """The rules of the race that `spec` asks for; None without a race or without a rival."""
    asked = spec.verification
    if not asked.race or len(entrants) < 2:
        return None
    return RaceRules(
        tuple(entrants),
        tuple(full_training_seeds(spec.seed, asked.max_seeds)),
        first_look=max(MIN_SEEDS, asked.num_seeds),
        error_rate=asked.error_rate,
        margin=asked.margin,
        num_validation=num_validation,
    )


def verification_source(
    spec: Spec, study: Study, chosen: Sequence[str]
) -> ListedSource | RaceSource:
    """Where the full trainings of the `chosen` trials, best first, come from."""
    rules = race_rules(spec, chosen, int(study.header["num_validation"]))
    if rules is not None:
        return RaceSource(spec, study, rules)
    return _trainings(spec, study, chosen, spec.verification.num_seeds)


def _trainings(spec: Spec, study: Study, chosen: Sequence[str], num_seeds: int) -> ListedSource:
    num_train = int(study.header["num_train"])
    jobs = [
        full_job(spec, study.state.trials[trial_id], number, seed=seed, num_train=num_train)
        for number, seed in enumerate(full_training_seeds(spec.seed, num_seeds))
        for trial_id in chosen
    ]
    return ListedSource(study, jobs, max_failures=spec.tier1.max_failures)


class RaceSource:
    """One more seed for all that are still in the race, until a look settles it.

    A look waits for all trainings that belong to it, so it does not depend on the number of workers
    nor on their order.
    """

    def __init__(self, spec: Spec, study: Study, rules: RaceRules) -> None:
        self.study = study
        self.rules = rules
        self._spec = spec
        self._racing: Sequence[str] = rules.entrants
        self._num_seeds = rules.first_look
        self._over = False
        self._recorded = {
            int(event["look"]["num_seeds"]): from_plain(RaceLook, event["look"])
            for event in study.history
            if event["event"] == "race"
        }
        self._listed = _trainings(spec, study, rules.entrants, rules.first_look)

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next full training; looks at the race whenever one is due."""
        while not self._over:
            job = self._listed.next_job()
            if job != "done":
                return job
            found = self._look()
            self._racing = found.racing
            self._num_seeds += 1
            self._over = found.settled or self._num_seeds > len(self.rules.seeds)
            if not self._over:
                self._listed = _trainings(self._spec, self.study, self._racing, self._num_seeds)
        return "done"

    def _look(self) -> RaceLook:
        found = look(self._accuracies(), self._racing, self._num_seeds, self.rules)
        before = self._recorded.get(self._num_seeds)
        if before is None:
            self.study.record("race", look=found)
            return found
        if (before.racing, before.settled) != (found.racing, found.settled):
            logger.warning("the race now decides %s, the ledger has %s", found, before)
        return before

    def _accuracies(self) -> Accuracies:
        corrupted = self._spec.verification.corrupted
        known = accuracies_of(judged(self.study.result().verifications, corrupted=corrupted))
        return {
            name: {seed: known.get(name, {}).get(seed, math.nan) for seed in self.rules.seeds}
            for name in self._racing
        }

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Records a report; never stops a job."""
        return self._listed.on_report(job, report)

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Records an end; a job that may be tried again goes back to the front of the list."""
        self._listed.on_end(job, end)


def choose_verified(spec: Spec, study: Study) -> tuple[str, str]:
    """The winner among the fully trained, and why.

    Raises:
        NoTrialSucceeded: No full training ended with a usable validation accuracy.
    """
    result = study.result()
    num_validation = int(study.header["num_validation"])
    corrupted = spec.verification.corrupted
    runs = judged(result.verifications, corrupted=corrupted)
    judged_by = CORRUPTED if corrupted else "validation accuracy"
    if not result.race:
        return choose_winner(
            runs,
            num_seeds=spec.verification.num_seeds,
            num_validation=num_validation,
            judged_by=judged_by,
        )
    first, last = result.race[0], result.race[-1]
    if not last.leader:
        raise NoTrialSucceeded("no full training ended with a usable validation accuracy")
    rules = race_rules(spec, (*first.racing, *first.out), num_validation)
    assert rules is not None
    return last.leader, race_sentence(result.race, accuracies_of(runs), rules, judged_by=judged_by)
