"""Many simulated searches, side by side: every method on the same tasks, orders and budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llp import registry
from llp.errors import SpecError, nearest, unknown
from llp.probing.curve_prior import Prior
from llp.simulation.clock import Contender, Trace, run
from llp.simulation.own import OwnContender
from llp.simulation.peers import PEERS
from llp.simulation.tasks import Floats, Task

RANDOM = "random"
COLD = "_cold"
EAGER = "asha_eager"


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        budget: Full trainings of each search.
        workers: Of the virtual clock.
        trials: Configurations that a search may use, a random subset of the table's.
        seeds: Searches of each method on each task.
        reduction_factor: eta.
        points: Budgets at which regret is recorded, evenly spread.
        scheduler_options: Given to our schedulers that know them.
    """

    budget: float = 20.0
    workers: int = 1
    trials: int = 80
    seeds: int = 10
    reduction_factor: int = 3
    points: int = 200
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)

    def budgets(self) -> Floats:
        """[points], in full trainings."""
        return np.arange(1, self.points + 1) * self.budget / self.points


@dataclass(frozen=True)
class Outcome:
    """All searches of one method.

    Attributes:
        method: Name.
        regret: Task -> [num_seeds, num_points], of the best full training so far.
        partial: The same, of the best value so far.
        decisions: How often it was asked for work.
        cpu_seconds: Processor time of all searches, looking values up included.
        trials: Mean number of configurations started.
    """

    method: str
    regret: dict[str, Floats]
    partial: dict[str, Floats]
    decisions: int
    cpu_seconds: float
    trials: float


def methods() -> dict[str, str]:
    """Name -> what it is, of everything that can be simulated."""
    own = {name: row.summary for name, row in registry.entries("schedulers").items()}
    own[RANDOM] = own.pop("fifo")
    own[EAGER] = "ASHA as in its paper: promotes on incomplete rungs, before new trials"
    own |= {
        name + COLD: f"{about}; a promotion starts again"
        for name, about in own.items()
        if name != RANDOM
    }
    return own | {name: about for name, (_, about) in PEERS.items()}


def check_method(name: str) -> None:
    """That there is such a method.

    Raises:
        SpecError: There is not; the nearest is offered.
    """
    known = methods()
    if name != "fifo" and name not in known:
        close = nearest(name, known)
        hint = f"did you mean '{close}'?" if close else f"there are: {', '.join(known)}"
        raise SpecError(f"unknown scheduler '{name}'; {hint}")


def check_options(names: Sequence[str], given: Iterable[str]) -> None:
    """That at least one of the methods knows each of the scheduler options.

    Raises:
        SpecError: None does; the nearest is offered.
    """
    own = [name for name in names if name not in PEERS]
    known = {option for name in own for option in registry.options("schedulers", _row(name))}
    for option in given:
        if option not in known:
            if not known:
                raise SpecError(f"option '{option}': none of the chosen schedulers has options")
            raise SpecError(unknown("option of the chosen schedulers", option, known))


def capped(options: Options, tasks: Sequence[Task]) -> Options:
    """With no more budget than all trials of the largest task cost, trained fully."""
    most = max(min(options.trials, len(task.values)) for task in tasks)
    return replace(options, budget=min(options.budget, float(most)))


def contender(
    task: Task,
    name: str,
    rows: Sequence[int],
    seed: int,
    options: Options,
    prior: Prior | None = None,
) -> Contender:
    """A method, ready to search a task."""
    if name in PEERS:
        return PEERS[name][0](task, rows, options.reduction_factor, seed)  # type: ignore[no-any-return]
    warm = not name.endswith(COLD)
    base = name.removesuffix(COLD)
    row = _row(name)
    known = registry.options("schedulers", row)
    return OwnContender(
        task,
        row,
        rows,
        reduction_factor=options.reduction_factor,
        warm=warm,
        budget=options.budget,
        eager=base == EAGER,
        options={k: v for k, v in options.scheduler_options.items() if k in known}
        | ({"prior": prior} if "wave" in known else {}),
    )


def simulate(
    tasks: Sequence[Task],
    names: Sequence[str],
    options: Options,
    *,
    priors: Callable[[Task], Prior | None] = lambda task: None,
    on_search: Callable[[str, Task], None] = lambda name, task: None,
) -> list[Outcome]:
    """Every method on every task.

    Search number `s` on a task meets the same configurations in the same order with every method.

    Args:
        tasks: What to search.
        names: Methods, see `methods`.
        options: How.
        priors: The prior of learning curves for a task; None for the shipped one, which may know
            the task.
        on_search: Called before the searches of a method on a task.

    Raises:
        SpecError: An unknown method.
    """
    for name in names:
        check_method(name)
    found = []
    for name in names:
        regret, partial, decisions, started = {}, {}, 0, []
        begin = time.process_time()
        for task in tasks:
            on_search(name, task)
            prior = priors(task)
            traces = [_search(task, name, seed, options, prior) for seed in range(options.seeds)]
            budgets = options.budgets()
            regret[task.name] = np.stack([t.regret(task, budgets) for t in traces])
            partial[task.name] = np.stack([t.regret(task, budgets, partial=True) for t in traces])
            decisions += sum(trace.num_decisions for trace in traces)
            started += [len(set(trace.row)) for trace in traces]
        seconds = time.process_time() - begin
        found.append(Outcome(name, regret, partial, decisions, seconds, float(np.mean(started))))
    return found


def _row(name: str) -> str:
    """Which row of the registry's schedulers a method of ours is."""
    base = name.removesuffix(COLD)
    return {RANDOM: "fifo", EAGER: "asha"}.get(base, base)


def _search(task: Task, name: str, seed: int, options: Options, prior: Prior | None) -> Trace:
    rng = np.random.default_rng(seed)
    rows = [int(row) for row in rng.permutation(len(task.values))[: options.trials]]
    np.random.seed(seed)
    method = contender(task, name, rows, seed, options, prior)
    return run(task, method, budget=options.budget, workers=options.workers)
