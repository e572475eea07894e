"""The race over seeds on simulated normals: realised error, and trainings against a fixed design.

Three configurations with true means 0, -gap and -2 gap, in units of the standard deviation of one
training; half of the variance belongs to the seed and is common to all. The race may use 8 seeds
at an error rate of 5 %. The *fixed design* gives every configuration the same number of seeds and
takes the best mean when both paired t-tests against the others, each at half the error rate, say
so; the table has the smallest number that decides as often as the race (whoever chooses it must
know the gap), and the full 8. `wrong` is how often the true best was taken out, or not chosen by a
settled race; with gap 0 all are equally good and taking the first one out counts.

    python tests/benchmarks/racing.py [--quick] [--json FILE]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, finish, parser, print_table
from scipy.stats import norm, ttest_rel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llp.scoring.racing import RaceRules, race

SEEDS = tuple(range(8))
NAMES = ("a", "b", "c")
ERROR_RATE = 0.05
GAPS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def drawn(generator: np.random.Generator, gap: float, num_seeds: int) -> np.ndarray:
    """Accuracies [3, num_seeds] of configurations that lie `gap` apart."""
    common = generator.normal(0, math.sqrt(0.5), num_seeds)
    own = generator.normal(0, math.sqrt(0.5), (3, num_seeds))
    return np.array([0.0, -gap, -2 * gap])[:, None] + common + own


def raced(values: np.ndarray, margin: float) -> tuple[bool, bool, int]:
    """Whether the race was settled, whether it was wrong, and its full trainings."""
    rules = RaceRules(NAMES, SEEDS, error_rate=ERROR_RATE, margin=margin)
    table = {
        name: dict(zip(SEEDS, row, strict=True)) for name, row in zip(NAMES, values, strict=True)
    }
    looks = race(table, rules)
    spent = sum(at.num_seeds * len(at.out) for at in looks)
    spent += looks[-1].num_seeds * len(looks[-1].racing)
    wrong = any("a" in at.out for at in looks) or (
        looks[-1].settled and looks[-1].leader != "a" and margin == 0
    )
    return looks[-1].settled, wrong, spent


def decided(values: np.ndarray) -> bool:
    """Whether the fixed design separates its best from both others."""
    best = int(values.mean(axis=1).argmax())
    return all(
        ttest_rel(values[best], values[other], alternative="greater").pvalue < ERROR_RATE / 2
        for other in range(3)
        if other != best
    )


def main() -> None:
    """Simulates, prints."""
    chosen = parser(__doc__ or "").parse_args()
    num = 300 if chosen.quick else 2000
    figures: dict[str, Any] = {"simulations": num, "error_rate": ERROR_RATE}
    rows, bars = [], []
    for gap in GAPS:
        generator = np.random.default_rng(int(10 * gap))
        found = [raced(drawn(generator, gap, 8), 0.0) for _ in range(num)]
        settled, wrong, spent = (float(np.mean(column)) for column in zip(*found, strict=True))
        fixed = math.nan
        for seeds in range(2, 33):
            share = np.mean([decided(drawn(generator, gap, seeds)) for _ in range(num // 4)])
            if gap > 0 and share >= settled:
                fixed = 3.0 * seeds
                break
        rows.append([f"{gap:g}", f"{100 * settled:.1f}", f"{100 * wrong:.2f}", f"{spent:.1f}",
                     f"{fixed:g}", "24"])  # fmt: skip
        figures[f"gap {gap:g}"] = {
            "settled": settled,
            "wrong": wrong,
            "trainings": spent,
            "fixed_same_power": fixed,
        }
        limit = ERROR_RATE + float(norm.ppf(0.999)) * math.sqrt(ERROR_RATE * 0.95 / num)
        bars.append(Bar(f"gap {gap:g}: wrong, share", wrong, round(limit, 4)))
        if gap >= 2:
            bars.append(Bar(f"gap {gap:g}: trainings against 24", spent / 24, 0.8))
    generator = np.random.default_rng(1)
    alike = [raced(drawn(generator, 0.0, 8), 2.0) for _ in range(num)]
    figures["equal, margin 2"] = {
        "settled": float(np.mean([each[0] for each in alike])),
        "trainings": float(np.mean([each[2] for each in alike])),
    }
    print_table(
        "Race of three over at most 8 seeds, 5 % error rate",
        ["gap, sd", "settled, %", "wrong, %", "trainings", "fixed, same power", "fixed, all"],
        rows,
    )
    equal = figures["equal, margin 2"]
    print(
        f"\nthree equal ones with a margin of 2 sd: settled {100 * equal['settled']:.0f} %, "
        f"{equal['trainings']:.1f} trainings"
    )
    finish(figures, bars, chosen.json)


if __name__ == "__main__":
    main()
