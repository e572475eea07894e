"""Whether a training-free proxy ordered the trials as the first rung did."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Section, share
from llp.reporting.figures.ranks import kendall
from llp.reporting.study import points_on
from llp.reporting.tables import Column, table, text


def with_proxy(section: Section, result: SearchResult) -> Section:
    """`section` with the proxy behind its other exhibits, when there was one."""
    if not result.proxies:
        return section
    return replace(section, exhibits=(*section.exhibits, _exhibit(result)))


def proxy_data(result: SearchResult) -> pd.DataFrame:
    """One row a trial with both: `trial_id`, `proxy`, `accuracy` on its first rung, `drawn`."""
    rows = []
    for trial in result.trials:
        said = result.proxies.get(trial.trial.trial_id)
        first = min((curve.rung for curve in trial.curves if curve.points), default=0)
        points = points_on(trial, first)
        if said is None or not points or not math.isfinite(points[-1].validation_accuracy):
            continue
        rows.append(
            {
                "trial_id": trial.trial.trial_id,
                "proxy": said.value,
                "accuracy": points[-1].validation_accuracy,
                "drawn": "best of several" if said.filtered else "for comparison",
            }
        )
    return pd.DataFrame(rows, columns=["trial_id", "proxy", "accuracy", "drawn"])


def _exhibit(result: SearchResult) -> Exhibit:
    data = proxy_data(result)
    name = next(iter(result.proxies.values())).name.replace("_", " ")
    columns = (
        text("trial_id", "trial"),
        Column("proxy", name),
        share("accuracy", "accuracy, first rung"),
        text("drawn", "drawn"),
    )
    return Exhibit(
        key="proxy",
        title="The filter without training",
        reading=" ".join(
            [
                _agreement(data, name, "all trials"),
                _agreement(_audits(data), name, "draws that it did not select"),
            ]
        ),
        data=(Data("Proxy and result", table(data, columns), sortable=True),),
        note="Every third trial is drawn without the filter. A tau near 0 or below says that the "
        "filter is of no use here; it knows the architecture and not the learning rate.",
    )


def _audits(data: pd.DataFrame) -> pd.DataFrame:
    return data[data["drawn"] == "for comparison"]


def _agreement(data: pd.DataFrame, name: str, whom: str) -> str:
    tau, low, high = kendall(data["proxy"].tolist(), data["accuracy"].tolist())
    count = formats.plural(len(data), "trial")
    if not math.isfinite(tau):
        return f"Over {whom} ({count}) its agreement with the first rung cannot be told."
    interval = f", 90 % interval {low:.2f} to {high:.2f}" if math.isfinite(low) else ""
    return (
        f"Over {whom} ({count}), {name} orders them as the first rung does with Kendall tau "
        f"{tau:.2f}{interval}."
    )
