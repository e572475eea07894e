"""The Hessian's spectrum: its density on a logarithmic scale, and the eigenvalues at its ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.pictures import Picture
from llp.reporting.svg import BARS, canvas, log_axis

Array = np.ndarray[Any, Any]
FLOOR = 1e-7
"""Densities below this share of the highest are not drawn."""


def eigenvalue_data(arrays: Mapping[str, Array]) -> pd.DataFrame:
    """One row an eigenvalue that was certified on its own, falling.

    Columns: `value`, `residual` (an eigenvalue lies within it) and `bound`, the sharper estimate,
    where there is one.
    """
    if "spectrum/ends" not in arrays:
        return pd.DataFrame({"value": [], "residual": [], "bound": []})
    values = arrays["spectrum/ends"]
    frame = pd.DataFrame(
        {
            "value": values,
            "residual": arrays["spectrum/ends_residuals"],
            "bound": arrays.get("spectrum/ends_bounds", np.full(len(values), np.nan)),
        }
    )
    return frame.sort_values("value", ascending=False, kind="stable").reset_index(drop=True)


def density_data(arrays: Mapping[str, Array]) -> pd.DataFrame:
    """Columns `eigenvalue` and `density` (of all eigenvalues, so that its area is 1)."""
    if "spectrum/density" not in arrays:
        return pd.DataFrame({"eigenvalue": [], "density": []})
    return pd.DataFrame(
        {"eigenvalue": arrays["spectrum/density_grid"], "density": arrays["spectrum/density"]}
    )


def clearly_negative(arrays: Mapping[str, Array], width: float) -> float:
    """Share of the eigenvalues below `-width`; NaN where there is no density.

    Eigenvalues near 0, which are most of them, fall on few nodes of the quadrature; whether such
    a node lies just below or just above 0 says nothing.
    """
    if "spectrum/nodes" not in arrays:
        return float("nan")
    nodes, weights = arrays["spectrum/nodes"], arrays["spectrum/weights"]
    return float((weights * (nodes < -width)).sum() / len(nodes))


def spectrum_pictures(density: pd.DataFrame, eigenvalues: pd.DataFrame) -> tuple[Picture, ...]:
    """The density with the ends marked, and the ends with their error bars."""
    made = []
    if len(density):
        figure, axes = canvas((BARS, 2.6), left=0.6, bottom=0.42)
        top = float(density["density"].max())
        shown = density["density"].clip(lower=top * FLOOR)
        axes.fill_between(
            density["eigenvalue"], shown, top * FLOOR, color=LIGHT["blue"], alpha=0.25, linewidth=0
        )
        axes.plot(density["eigenvalue"], shown, color=LIGHT["blue"], linewidth=1.2)
        log_axis(axes, "y", top * FLOOR, top * 3)
        for value in eigenvalues["value"]:
            axes.axvline(value, ymax=0.05, color=LIGHT["vermillion"], linewidth=1.3)
        axes.axvline(0.0, color=LIGHT["faint"], linewidth=0.6, linestyle=(0, (2, 2)))
        axes.set_title("spectral density of the Hessian")
        axes.set_xlabel("eigenvalue")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
        axes.grid(axis="y")
        low, high = density["eigenvalue"].min(), density["eigenvalue"].max()
        made.append(
            Picture(
                "spectrum-density",
                "Spectral density of the Hessian",
                f"Eigenvalues from {formats.number(low, 3)} to {formats.number(high, 3)}, density "
                "on a logarithmic scale; the ticks at the bottom are certified eigenvalues.",
                figure,
            )
        )
    if len(eigenvalues):
        figure, axes = canvas((BARS, 0.6 + 0.17 * len(eigenvalues)), left=0.5, bottom=0.4)
        rows = np.arange(len(eigenvalues))
        axes.barh(rows, eigenvalues["value"], color=LIGHT["blue"], height=0.62)
        axes.errorbar(
            eigenvalues["value"],
            rows,
            xerr=eigenvalues["residual"],
            fmt="none",
            ecolor=LIGHT["ink"],
            elinewidth=1.0,
            capsize=2,
        )
        axes.axvline(0.0, color=LIGHT["faint"], linewidth=0.7)
        axes.set_ylim(len(eigenvalues) - 0.4, -0.6)
        axes.set_yticks(rows, [str(i + 1) for i in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_title("eigenvalues with their residuals")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
        axes.grid(axis="x")
        made.append(
            Picture(
                "spectrum-eigenvalues",
                "Eigenvalues at the ends of the spectrum",
                f"{len(eigenvalues)} eigenvalues; the bars at their ends are residuals.",
                figure,
            )
        )
    return tuple(made)
