"""Other people's early stopping on the same clock: Ray Tune's schedulers, Optuna's pruners.

Their own classes decide. Around Tune's stands what its controller would do: trials that pause,
resume and stop, at once where a training diverges (Tune's ASHA would train on). Around Optuna's
stands a study in memory that is asked and told. Both get the configurations in the same order as
everybody else.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llp.simulation.clock import Assignment
from llp.simulation.own import LEAST_STEP
from llp.simulation.tasks import Task

METRIC, TIME = "loss", "step"


class _TuneTrial:
    """What Tune's schedulers look at of a trial."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"t{number:05d}"
        self.status = "PENDING"
        self.is_saving = False
        self.done_steps = 0

    def __repr__(self) -> str:
        return self.trial_id


class TuneContender:
    """A scheduler of Ray Tune.

    Args:
        task: What is searched.
        scheduler: Made for the task.
        rows: Configurations in the order in which they are suggested.
    """

    trains_diverged = False

    def __init__(self, task: Task, scheduler: Any, rows: Sequence[int]) -> None:
        self._task, self._scheduler, self._rows = task, scheduler, rows
        self._trials: list[_TuneTrial] = []
        self._of: dict[str, _TuneTrial] = {}
        self._stops: set[str] = set()

    def get_trials(self) -> list[_TuneTrial]:
        """All trials; asked by schedulers."""
        return self._trials

    def get_live_trials(self) -> list[_TuneTrial]:
        """Trials that have not ended; asked by schedulers."""
        return [trial for trial in self._trials if trial.status != "TERMINATED"]

    def stop_trial(self, trial: _TuneTrial) -> None:
        """Ends a paused trial; asked by schedulers."""
        trial.status = "TERMINATED"
        self._scheduler.on_trial_remove(self, trial)

    def next(self) -> Assignment | Literal["wait", "done"]:
        """A trial that may go on, or a new one."""
        chosen = next(
            (t for t in [self._scheduler.choose_trial_to_run(self)] if t is not None), None
        )
        if chosen is None:
            if len(self._trials) == len(self._rows):
                running = any(t.status == "RUNNING" for t in self._trials)
                return "wait" if running else "done"
            chosen = _TuneTrial(len(self._trials))
            self._trials.append(chosen)
            self._of[chosen.trial_id] = chosen
            self._scheduler.on_trial_add(self, chosen)
        chosen.status = "RUNNING"
        row = self._rows[self._trials.index(chosen)]
        return Assignment(int(row), chosen.done_steps, self._task.num_steps - 1, chosen.trial_id)

    def report(self, assignment: Assignment, step: int, value: float) -> bool:
        """Asks the scheduler what the trial should do."""
        trial = self._of[assignment.key]
        trial.done_steps = step + 1
        if value != value:
            self._stops.add(trial.trial_id)
            return True
        result = {TIME: step + 1, METRIC: value, "trial_id": trial.trial_id}
        if step + 1 == self._task.num_steps:
            trial.status = "TERMINATED"
            self._scheduler.on_trial_complete(self, trial, result)
            return False
        action = self._scheduler.on_trial_result(self, trial, result)
        if action == "CONTINUE":
            return False
        if action == "PAUSE":
            trial.status = "PAUSED"
        else:
            self._stops.add(trial.trial_id)
        return True

    def end(self, assignment: Assignment, outcome: Literal["completed", "stopped"]) -> None:
        """Tells the scheduler of a trial that was stopped."""
        trial = self._of[assignment.key]
        if trial.trial_id in self._stops:
            self._stops.discard(trial.trial_id)
            trial.status = "TERMINATED"
            with _known_gaps():
                self._scheduler.on_trial_remove(self, trial)


class _known_gaps:
    """Tune's HyperBand forgets a trial that it stopped itself; removing it again is a KeyError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is KeyError


def tune_asha(task: Task, rows: Sequence[int], factor: int, seed: int) -> TuneContender:
    """Tune's AsyncHyperBandScheduler with one bracket: ASHA that stops and never promotes."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    return TuneContender(
        task,
        AsyncHyperBandScheduler(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            max_t=task.num_steps,
            grace_period=LEAST_STEP,
            reduction_factor=factor,
        ),
        rows,
    )


def tune_hyperband(task: Task, rows: Sequence[int], factor: int, seed: int) -> TuneContender:
    """Tune's HyperBandScheduler, which pauses and resumes."""
    from ray.tune.schedulers import HyperBandScheduler

    logging.getLogger("ray.tune.schedulers.hyperband").setLevel(logging.ERROR)
    scheduler = HyperBandScheduler(
        time_attr=TIME, metric=METRIC, mode="min", max_t=task.num_steps, reduction_factor=factor
    )
    return TuneContender(task, scheduler, rows)


def tune_median(task: Task, rows: Sequence[int], factor: int, seed: int) -> TuneContender:
    """Tune's MedianStoppingRule."""
    from ray.tune.schedulers import MedianStoppingRule

    scheduler = MedianStoppingRule(
        time_attr=TIME, metric=METRIC, mode="min", grace_period=LEAST_STEP, min_samples_required=3
    )
    return TuneContender(task, scheduler, rows)


class OptunaContender:
    """A pruner of Optuna, in a study in memory.

    Args:
        task: What is searched.
        pruner: Asked after every step.
        rows: Configurations in the order in which they are suggested.
    """

    trains_diverged = False

    def __init__(self, task: Task, pruner: Any, rows: Sequence[int], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="minimize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed)
        )
        self._states = optuna.trial.TrialState
        self._task, self._rows, self._count = task, rows, itertools.count()
        self._trials: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def next(self) -> Assignment | Literal["wait", "done"]:
        """The next new trial: pruners never go back to one."""
        number = next(self._count)
        if number >= len(self._rows):
            return "done"
        key = str(number)
        self._trials[key] = self._study.ask()
        return Assignment(int(self._rows[number]), 0, self._task.num_steps - 1, key)

    def report(self, assignment: Assignment, step: int, value: float) -> bool:
        """Whether the pruner ends the trial."""
        trial = self._trials[assignment.key]
        trial.report(value, step + 1)
        self._last[assignment.key] = value
        return step + 1 < self._task.num_steps and bool(trial.should_prune())

    def end(self, assignment: Assignment, outcome: Literal["completed", "stopped"]) -> None:
        """Tells the study how the trial ended."""
        trial, value = self._trials.pop(assignment.key), self._last.pop(assignment.key)
        if outcome == "completed":
            self._study.tell(trial, value)
        elif value != value:
            self._study.tell(trial, state=self._states.FAIL)
        else:
            self._study.tell(trial, state=self._states.PRUNED)


def optuna_halving(task: Task, rows: Sequence[int], factor: int, seed: int) -> OptunaContender:
    """Optuna's SuccessiveHalvingPruner."""
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=LEAST_STEP, reduction_factor=factor
    )
    return OptunaContender(task, pruner, rows, seed)


def optuna_hyperband(task: Task, rows: Sequence[int], factor: int, seed: int) -> OptunaContender:
    """Optuna's HyperbandPruner."""
    import optuna

    pruner = optuna.pruners.HyperbandPruner(
        min_resource=LEAST_STEP, max_resource=task.num_steps, reduction_factor=factor
    )
    return OptunaContender(task, pruner, rows, seed)


def optuna_median(task: Task, rows: Sequence[int], factor: int, seed: int) -> OptunaContender:
    """Optuna's MedianPruner."""
    import optuna

    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=LEAST_STEP)
    return OptunaContender(task, pruner, rows, seed)


PEERS: dict[str, tuple[Callable[[Task, Sequence[int], int, int], Any], str]] = {
    "tune_asha": (tune_asha, "Ray Tune's AsyncHyperBandScheduler: stops, never promotes"),
    "tune_hyperband": (tune_hyperband, "Ray Tune's HyperBandScheduler: pauses and resumes"),
    "tune_median": (tune_median, "Ray Tune's MedianStoppingRule"),
    "optuna_halving": (optuna_halving, "Optuna's SuccessiveHalvingPruner"),
    "optuna_hyperband": (optuna_hyperband, "Optuna's HyperbandPruner"),
    "optuna_median": (optuna_median, "Optuna's MedianPruner"),
}
