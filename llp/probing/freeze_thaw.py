"""Freeze-thaw: the next unit of budget goes where it is expected to gain most for its cost.

Trials are frozen after every rung; one is thawed at a time. Swersky et al., "Freeze-Thaw Bayesian
Optimization", 2014, is the idea; the posterior and the rule are our own. The *posterior* of every
trial's result at the top rung is in `rung_posteriors`. The *leader* has the best expected result.

- The lowest rung begins with `wave` new configurations.
- Of the trials that wait, other than the leader, the one with the largest *rate* goes up a rung:
  its expected improvement over the leader, by the whole posterior, over the cost of that rung.
- When no rate reaches `least_gain`, the leader goes up, until it has finished.
- After that a trial that has begun to climb goes on to the top, as long as it may improve on the
  best. When there is none, the next is the one with the largest expected improvement over the cost
  of all its rungs to come; a new configuration only when no started one promises anything.
- The search ends when the next job would not fit, with enough kept to bring a living trial up.

Cost is what a rung takes times the *price* of the configuration (`prices`): 1 for all with `cost:
samples`, the default, so that decisions do not depend on how fast a machine was.

The last rule but one is for sources where early ranks say little: rates by the next rung's cost
alone keep on comparing there and finish nothing. AlgoPerf, 7 workloads, 6 to 20 searches each,
regret over that of random search at the cost of 5 / 10 / 20 full trainings: so 7.2 / 2.0 / 1.6; by
the cost of all rungs to come 2.3 / 2.5 / 1.0; as it is 1.1 / 0.8 / 0.8; with the best forecast,
not the best rate, of the highest rung 1.2 / 0.9; with new configurations at their mean improvement
1.2 / 0.9 / 0.6. On TaskSet none of this changes what 3 full trainings find.

What was tried on TaskSet (priors fitted without the task, 12 searches on each of 6 tasks, mean
regret after 3.0 full trainings; random search's after 20 is .431): this rule .415; each trial by
itself, without the order on the rung, .427; `least_gain` 5 / 2 / 1 / 0.3 in place of 3 without
that order: .429 / .439 / .545 / .875; a wave of 22: .482 (`least_gain` was chosen on losses
alone). Knowledge gradient over cost for Gaussian posteriors, so that the leader is trained for
information, too: .432 at best, but two of six tasks were not matched by 4, because the few
configurations that take off late are outliers that no Gaussian has. Choosing the next new
configuration by a Gaussian process over the hyperparameters (an average over 48 length scales),
halving from 20 configurations: .514 where taking them as they come has .480, because what learns
fast is not what ends best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llp.errors import unknown
from llp.probing.budgets import Bracket, rung_sizes
from llp.probing.curve_prior import Prior
from llp.probing.prices import COSTS, prices
from llp.probing.promotion import DONE, WAIT, NewTrial, Scheduler, Step
from llp.probing.rung_posteriors import RungPosterior, rung_posterior
from llp.probing.standings import Standings
from llp.probing.state import SearchState
from llp.records import Decision


class Option(NamedTuple):
    """A trial that may be thawed.

    Attributes:
        rate: Expected improvement over the best forecast by what the next rung costs this trial,
            or, once a trial has finished, all rungs to the top.
        trial_id: Of the trial.
        rung: The last that it ended.
    """

    rate: float
    trial_id: str
    rung: int


@dataclass(frozen=True)
class FreezeThaw(Scheduler):
    """The largest expected improvement per cost goes on.

    Attributes:
        wave: New configurations before the first is thawed.
        least_gain: Expected improvement per full training, in units of what the leader is forecast
            to gain from the start of training, below which the leader is trained instead.
        budget: Cost of the whole search in jobs of the top rung; 0 is what successive halving of
            `num_trials` costs.
        cost: What a job costs: `samples`, or `seconds` or `operations` (multiply-adds), where
            configurations are dearer or cheaper than the average one by the sample.
        prior: Of learning curves, instead of the one that is shipped.
    """

    wave: int = 27
    least_gain: float = 3.0
    budget: float = 0.0
    cost: str = "samples"
    prior: Prior | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wave < 1:
            raise ValueError(f"wave must be at least 1, not {self.wave}")
        if not self.least_gain >= 0:
            raise ValueError(f"least_gain must be at least 0, not {self.least_gain:g}")
        if self.cost not in COSTS:
            raise ValueError(unknown("cost", self.cost, COSTS))
        least = sum(self.rung_costs())
        if self.budget and self.budget < least - 1e-9:
            raise ValueError(
                f"budget must be at least {least:.3g} jobs of the top rung, what one trial takes "
                f"to get there, not {self.budget:g}"
            )

    def total_budget(self) -> float:
        """Budget in jobs of the top rung."""
        if self.budget:
            return self.budget
        costs = self.rung_costs()
        sizes = rung_sizes(Bracket(1, self.num_trials), self.num_rungs, self.reduction_factor)
        return math.fsum(size * costs[rung - 1] for rung, size in sizes.items())

    def prices(self, state: SearchState) -> Mapping[str, float]:
        """Trial id -> price; whoever is missing has the mean price, 1."""
        memo, key = state.standings(self.max_failures).memo, (self, "prices")
        if key not in memo:
            memo[key] = prices(state, self.cost)
        return memo[key]  # type: ignore[return-value]

    def spent(self, state: SearchState) -> float:
        """Cost of all jobs that were given out, retries not counted."""
        costs, standings = self.rung_costs(), state.standings(self.max_failures)
        price = self.prices(state)
        if not price:
            promoted = [standings.rung(0, k + 1).num_promoted for k in range(1, self.num_rungs)]
            return len(state.trials) * costs[0] + math.fsum(
                num * cost for num, cost in zip(promoted, costs[1:], strict=True)
            )
        key = (self, "spent")
        if key not in standings.memo:
            begun = [*((trial_id, 1) for trial_id in state.trials), *state.promoted]
            standings.memo[key] = math.fsum(
                costs[rung - 1] * price.get(trial_id, 1.0) for trial_id, rung in begun
            )
        return standings.memo[key]  # type: ignore[return-value]

    def next_step(self, state: SearchState) -> Step:
        """What a free worker should do next."""
        retry = self._retry(state)
        if retry is not None:
            return retry
        standings, started = state.standings(self.max_failures), len(state.trials)
        wave = min(self.num_trials, self.wave)
        if started < wave and self._fits(state, 1):
            return NewTrial(0, 1, f"number {started + 1} of a wave of {wave}")
        key = (self, started)
        if key not in standings.memo:
            standings.memo[key] = self._choose(state, standings, started)
        chosen = standings.memo[key]
        if isinstance(chosen, NewTrial | Decision):
            return chosen
        if state.running:
            return WAIT
        if started < self.num_trials and self._fits(state, 1):
            return NewTrial(0, 1, f"number {started + 1}: no started trial can go on")
        return DONE

    def _fits(self, state: SearchState, rung: int, trial_id: str = "") -> bool:
        """Whether a job on `rung` leaves enough of the budget to bring some trial to the top."""
        standings, costs = state.standings(self.max_failures), self.rung_costs()
        reached = [k for k in range(2, self.num_rungs + 1) if standings.rung(0, k).num_promoted]
        highest, price = max([rung, *reached]), self.prices(state)
        needed, kept = costs[rung - 1], math.fsum(costs[highest:])
        if price:
            if rung > max([1, *reached]):
                return True  # this was kept for; prices may have changed since
            ahead = {name for name, k in state.promoted if k == highest} or {trial_id}
            needed *= price.get(trial_id, 1.0)
            kept *= min(price.get(name, 1.0) for name in ahead)
        return self.spent(state) + needed + kept <= self.total_budget() + 1e-9

    def _choose(
        self, state: SearchState, standings: Standings, started: int
    ) -> NewTrial | Decision | None:
        """Who goes on, or a new one; None when nothing can."""
        costs, price = self.rung_costs(), self.prices(state)
        found = self._posteriors(state, standings)
        if not found:
            return None
        newest = {trial_id: rung for rung, here in found.items() for trial_id in here.trial_ids}
        top = self.num_rungs
        newest = {  # without those that have died on the rung above
            trial_id: rung
            for trial_id, rung in newest.items()
            if rung == top or not standings.is_over(trial_id, rung + 1)
        }
        if not newest:
            return None
        means = {trial_id: found[rung].mean_of(trial_id) for trial_id, rung in newest.items()}
        best, finished = max(means.values()), any(rung == top for rung in newest.values())
        gains = {rung: here.improvement(best) for rung, here in found.items()}
        options = []
        for trial_id, rung in newest.items():
            open_ = rung < top and (trial_id, rung + 1) not in state.promoted
            if open_ and self._fits(state, rung + 1, trial_id):
                ahead = math.fsum(costs[rung:]) if finished else costs[rung]
                ahead *= price.get(trial_id, 1.0)
                gain = float(gains[rung][found[rung].place(trial_id)])
                options.append(Option(gain / ahead, trial_id, rung))
        if not options:
            return None
        unit = max(best - found[1].start, 1e-12)
        if finished:
            begun = [option for option in options if option.rung > 1 and option.rate > 0]
            highest = max((option.rung for option in begun), default=0)
            rivals = [option for option in begun if option.rung == highest] or options
            pick = max(rivals, key=lambda option: option.rate)
            if pick.rate <= 0 and started < self.num_trials and self._fits(state, 1):
                return NewTrial(0, 1, f"number {started + 1}: no other may beat {best:.4g}")
            why = "goes on" if begun else f"largest gain {pick.rate / unit:.3g} per full training"
            return self._thaw(pick, found[pick.rung], why, f", best {best:.4g}")
        leader = max(options, key=lambda option: means[option.trial_id])
        others = [option for option in options if option is not leader]
        pick = max(others, key=lambda option: option.rate, default=leader)
        about = f"gain {pick.rate / unit:.3g} per full training"
        if pick.rate < self.least_gain * unit:
            rest = f"; {pick.trial_id}: {about}" if pick is not leader else ""
            return self._thaw(leader, found[leader.rung], "leads", rest)
        return self._thaw(pick, found[pick.rung], f"largest {about}", f", best {best:.4g}")

    def _posteriors(self, state: SearchState, standings: Standings) -> dict[int, RungPosterior]:
        found = {}
        for rung in range(1, self.num_rungs + 1):
            here = rung_posterior(
                state, standings, rung, costs=self.rung_costs(), warm=self.warm, prior=self.prior
            )
            if here is not None:
                found[rung] = here
        return found

    def _thaw(self, option: Option, here: RungPosterior, why: str, rest: str) -> Decision:
        forecast = here.mean_of(option.trial_id)
        reason = f"{why}: forecast {forecast:.4g} at the top{rest}"
        interval = here.interval(option.trial_id)
        return Decision("promote", option.trial_id, option.rung + 1, reason, interval)
