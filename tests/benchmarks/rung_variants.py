"""The ways to spend a rung's budget that `rungs.py` compares, and the slice of CIFAR-10.

A *variant* says how a configuration is trained on a rung. On the data axis rung k sees a nested
share of the images for as many epochs as a full training; on the epoch axis it sees all images for
that share of the epochs. So all variants pay the same on a rung. They differ in the schedule, in
what is judged and in what a promotion goes on from:

- `cosine`, cold: a fresh start on each rung, its own cosine to zero;
- `cosine`, warm: the annealed weights of the rung below, a fresh optimizer, a new cosine;
- `decay`: weights and optimizer of the rung below before they were annealed; a constant rate, then
  a linear decay to zero over a fifth of all steps so far, whose end is judged and thrown away;
- `ema`, `swa`: the same constant rate without a decay; an average of the weights is judged (the
  product's own `training.averaging`), and the raw weights go on.

On digits (48 configurations, 3 seeds, rungs of 1/15 and 1/5, 95 % intervals of the difference to
cold in brackets) nothing that resumes helped: tau on the second rung fell by .05 [-.18, .05] warm,
.10 [-.25, .02] with decay branches, .06 [-.17, .05] with EMA and .06 [-.19, .05] with SWA, and the
halving's regret rose from 0.77 to 1.05 points with each. So they are not options of the service.
Epochs instead of data gave .23 and .43 for .24 and .39. No warm-up: .19 and .32; 20 % of a probe's
steps instead of 5: .41 and .50. On 80 configurations and 2 seeds that is +.13 [.02, .24] and
+.08 [-.07, .24] at the same regret: hence `tier1.warmup_fraction`, and the default as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import harness


@dataclass(frozen=True)
class Variant:
    """One way to train a configuration on the rungs.

    Attributes:
        name: In tables.
        how: The schedule and what is judged.
        warmup: `training.warmup_fraction` of the first training of a configuration.
        axis: What a rung has less of.
        warm: With `cosine`: start from the weights of the rung below.
    """

    name: str
    how: Literal["cosine", "decay", "ema", "swa"]
    warmup: float
    axis: Literal["data", "epochs"] = "data"
    warm: bool = False


SHARED = harness.ROOT.parent / "shared" / "data"
DEFAULT = "cosine cold"
WARMUP = 0.05
VARIANTS = (
    Variant(DEFAULT, "cosine", WARMUP),
    Variant("cosine cold, no warm-up", "cosine", 0.0),
    Variant("cosine warm", "cosine", WARMUP, warm=True),
    Variant("decay branch", "decay", WARMUP),
    Variant("constant, EMA", "ema", WARMUP),
    Variant("epochs, cosine cold", "cosine", WARMUP, axis="epochs"),
    Variant("constant, SWA", "swa", WARMUP),
    Variant("epochs, EMA", "ema", WARMUP, axis="epochs"),
    Variant("cosine cold, warm-up 20 %", "cosine", 0.2),
    Variant("cosine warm, no warm-up", "cosine", 0.0, warm=True),
    Variant("decay branch, no warm-up", "decay", 0.0),
    Variant("constant, EMA, no warm-up", "ema", 0.0),
    Variant("epochs, cosine cold, no warm-up", "cosine", 0.0, axis="epochs"),
    Variant("constant, SWA, no warm-up", "swa", 0.0),
)
CIFAR = (
    f"dataset.root={SHARED}",
    "dataset.max_train_examples=1200",
    "dataset.validation_fraction=0.25",
    "resources.gpus_per_trial=0",
    "training.epochs=9",
    "search_space.width=[8]",
    "search_space.batch_size=[16, 32]",
)
