"""Two more simulated families for the benchmark of the score.

- *networks*: a grid of six hyperparameters whose effects mostly add up; validation after a short
  probe agrees with the result at a tau near .55, the noise of a training leaves .87, and eight
  measures of the network follow the hyperparameters.
- *unstable*: random search on residual networks. Beyond an edge of the effective learning rate a
  probe without warm-up collapses and the full training ends low; further on it diverges.
  Validation has a tau near .58, the noise of a training leaves .90.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import expit

from llp.scoring import Roles
from llp.scoring.ranks import Array

Made = tuple[pd.DataFrame, Roles, Array]

GRID = {
    "learning_rate": (0.001, 0.0032, 0.01, 0.032, 0.1),
    "width": (4, 8, 12, 16),
    "depth": (2, 3, 4, 5),
    "batch_size": (32, 64, 128, 256),
    "dropout": (0.0, 0.25, 0.5),
    "weight_decay": (0.0, 1e-4, 5e-4),
}
SIZES = (0.5, 1.0, 0.6, 0.3, 0.4, 0.2)
CURVED = ("learning_rate", "depth", "dropout")


def networks(
    num: int,
    rng: np.random.Generator,
    *,
    shift: np.random.Generator | None = None,
    common: int | None = None,
) -> Made:
    """A grid; `shift` draws the data set, default: `rng`.

    With `common`, a seed, data sets share four fifths of the variance of their effects.
    """
    task = shift or rng
    shared = np.random.default_rng(common) if common is not None else None

    def drawn() -> float:
        own = float(task.normal())
        if shared is None:
            return own
        return float(np.sqrt(0.8) * shared.normal() + np.sqrt(0.2) * own)

    columns = {name: rng.choice(levels, num) for name, levels in GRID.items()}
    place = {
        name: np.searchsorted(levels, columns[name]) / (len(levels) - 1) - 0.5
        for name, levels in GRID.items()
    }
    quality, bias = np.zeros(num), np.zeros(num)
    for name, size in zip(GRID, SIZES, strict=True):
        slope = abs(drawn()) + 0.3 if name == "width" else drawn()
        bend = task.uniform(0, 2.0 if name in CURVED else 0.3)
        middle = 0.3 * drawn() if name == "learning_rate" else 0.0
        quality += size * (0.5 * slope * place[name] - bend * (place[name] - middle) ** 2)
        bias += size * drawn() * place[name]
    for a, b in (("learning_rate", "batch_size"), ("width", "dropout"), ("depth", "learning_rate")):
        quality += 0.4 * drawn() * place[a] * place[b]
    expected = quality
    quality = quality + 0.06 * rng.normal(size=num)
    seen = quality + 0.5 * bias + 0.2 * rng.normal(size=num)
    chance = 0.1 + 0.75 * expit(0.4 + seen)
    table = pd.DataFrame(
        {
            **columns,
            "val_acc": rng.binomial(5000, chance) / 5000,
            "val_loss": -np.log(chance) * np.exp(0.1 * rng.normal(size=num)),
            "train_loss": np.exp(-seen + 0.2 * rng.normal(size=num)),
        }
    )
    measures = [f"measure_{k}" for k in range(8)]
    for name in measures:
        follows = sum((task.normal() * place[one] for one in GRID), np.zeros(num))
        follows = follows + 0.3 * task.normal() * quality
        table[name] = np.exp(follows + 0.2 * rng.normal(size=num))
    roles = Roles(
        tuple(GRID),
        {"val_acc": "higher", "val_loss": "lower", "train_loss": "lower"},
        dict.fromkeys(measures, "unknown"),
    )
    table.attrs["noise_free"] = expected.tolist()
    return table, roles, 0.1 + 0.8 * expit(1.2 + quality)


def unstable(num: int, rng: np.random.Generator) -> Made:
    """Random search with an edge of stability."""
    rate, decay = 10 ** rng.uniform(-3, 0.5, num), 10 ** rng.uniform(-5.5, -2, num)
    momentum = rng.choice([0.0, 0.8, 0.9, 0.95, 0.98], num)
    batch, warm = rng.choice([32, 64, 128, 256, 512], num), rng.choice([0, 1], num)
    optimum = -0.6 + 0.3 * rng.normal()
    edge = optimum + 0.8 + 0.2 * rng.normal()
    low, high, pull = rng.uniform([0.35, 0.3, 0.1], [0.6, 0.6, 0.2])

    step = np.log10(rate / (1 - momentum)) - 0.7 * np.log10(batch / 128)
    off = step - optimum
    quality = -np.where(off < 0, low, high) * off**2
    quality -= pull * (np.maximum(step + np.log10(decay), -6) - (optimum - 3.2)) ** 2
    over = step - edge + 0.25 * (np.log10(decay) + 3.5) - 0.4 * warm
    rough, gone = expit(8 * over), expit(8 * (over - 0.7))
    quality -= 0.5 * rough
    expected = 0.1 + (1 - gone) * 0.83 * expit(2.9 + quality)
    quality = quality + 0.07 * rng.normal(size=num)
    luck = rng.random(num)
    diverged = luck < gone

    seen = 0.8 * quality + 0.9 * np.minimum(off, 0) + 0.6 * rng.normal(size=num)
    seen = np.where((luck < rough) & (warm == 0), seen - rng.exponential(1.0, num), seen)
    chance = 0.1 + 0.8 * expit(seen + 0.6)
    chance = np.where(diverged & (rng.random(num) < 0.5), 0.1, chance)
    noise = rng.normal(size=(5, num))
    table = pd.DataFrame(
        {
            "learning_rate": rate,
            "momentum": momentum,
            "weight_decay": decay,
            "batch_size": batch,
            "warmup": warm,
            "val_acc": rng.binomial(5000, chance) / 5000,
            "val_loss": -np.log(np.maximum(chance - 0.02, 0.05)) * np.exp(0.05 * noise[0]),
            "train_loss": np.exp(-seen - 0.2 + 0.15 * noise[1]),
            "train_acc": np.clip(chance + 0.03, 0, 1),
            "sam_sharpness": np.exp(0.5 * off + 0.8 * rough + 0.4 * noise[2]),
            "gradient_norm": np.exp(0.4 * off + 0.6 * rough + 0.4 * noise[3]),
            "trace": np.exp(-0.6 * step + 0.5 * noise[4]),
        }
    )
    roles = Roles(
        ("learning_rate", "momentum", "weight_decay", "batch_size", "warmup"),
        {"val_acc": "higher", "val_loss": "lower", "train_loss": "lower", "train_acc": "higher"},
        {"sam_sharpness": "unknown", "gradient_norm": "unknown", "trace": "unknown"},
    )
    table.attrs["noise_free"] = expected.tolist()
    return table, roles, np.where(diverged, 0.1, 0.1 + 0.83 * expit(2.9 + quality))
