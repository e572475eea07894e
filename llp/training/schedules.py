"""Learning-rate schedules as pure functions: step -> multiplier of the peak learning rate.

Every job finishes its own schedule: `num_steps` is the number of optimizer steps of that job, so a
short rung is annealed as fully as a long one and their results compare. Step `t` (0-based) uses
`multiplier(t)`; a schedule that ends at zero has `multiplier(num_steps) == 0`, as torch's
schedulers have after their last step.

All of them share a linear warm-up over `w = round(warmup_fraction * num_steps)` steps,
`(t + 1) / (w + 1)`, which reaches 1 exactly at step `w` and never wastes a step at zero
(torch's `LinearLR(start_factor=1 / (w + 1), total_iters=w)`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llp import registry
from llp.errors import SpecError

ONE_CYCLE_RISE = 0.3
"""Share of the steps in which `one_cycle` rises: `pct_start` of torch's OneCycleLR."""


def multiplier(name: str, step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """The factor in [0, 1] on the peak learning rate at `step` of `num_steps`.

    Args:
        name: A row of `registry.SCHEDULES`.
        step: 0-based optimizer step, in [0, num_steps].
        num_steps: Optimizer steps of the whole job, at least 1.
        warmup_fraction: Share of the steps with linear warm-up, in [0, 1).

    Raises:
        SpecError: Unknown name.

    >>> [round(multiplier("cosine", t, num_steps=4, warmup_fraction=0.0), 3) for t in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return planned(name, num_steps=num_steps, warmup_fraction=warmup_fraction)(step)


def planned(name: str, *, num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """`multiplier` with everything but the step filled in: what a training loop calls each step.

    Raises:
        SpecError: Unknown name, `num_steps` below 1 or `warmup_fraction` outside [0, 1).
    """
    if num_steps < 1 or not 0 <= warmup_fraction < 1:
        raise SpecError(
            f"schedule '{name}' needs num_steps >= 1 and 0 <= warmup_fraction < 1, "
            f"not {num_steps} and {warmup_fraction}"
        )
    row = registry.load("schedules", name)

    def at(step: int) -> float:
        return float(row(step, num_steps=num_steps, warmup_fraction=warmup_fraction))

    return at


def constant(step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """1 after warm-up."""
    warmup_steps = _warmup_steps(num_steps, warmup_fraction)
    return (step + 1) / (warmup_steps + 1) if step < warmup_steps else 1.0


def cosine(step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """Half a cosine from 1 to 0 over the steps after warm-up.

    `(1 + cos(pi * (t - w) / (num_steps - w))) / 2`; Loshchilov & Hutter, 2017, equation 5 without
    restarts.
    """
    warmup_steps = _warmup_steps(num_steps, warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    share = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return (1.0 + math.cos(math.pi * min(share, 1.0))) / 2


def one_cycle(step: int, *, num_steps: int, warmup_fraction: float = ONE_CYCLE_RISE) -> float:
    """Linear up for 30 % of the steps, then half a cosine down to 0.

    After Smith & Topin, 2018; the rise replaces the warm-up, so `warmup_fraction` is not read.
    """
    return cosine(step, num_steps=num_steps, warmup_fraction=ONE_CYCLE_RISE)


def step(step: int, *, num_steps: int, warmup_fraction: float) -> float:
    """1 after warm-up, 1/10 from half of the steps on, 1/100 from three quarters on.

    The two drops are those of He et al., 2016, section 4.2 (at 32k and 48k of 64k iterations).
    """
    drops = int(2 * step >= num_steps) + int(4 * step >= 3 * num_steps)
    scale: float = (1.0, 0.1, 0.01)[drops]
    return scale * constant(step, num_steps=num_steps, warmup_fraction=warmup_fraction)


def _warmup_steps(num_steps: int, warmup_fraction: float) -> int:
    # At least one step is left for the schedule itself.
    return min(round(warmup_fraction * num_steps), num_steps - 1)


__all__ = ["ONE_CYCLE_RISE", "constant", "cosine", "multiplier", "one_cycle", "planned", "step"]
