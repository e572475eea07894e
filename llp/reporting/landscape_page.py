"""The page of a loss landscape, with its pictures as files beside it.

Made from `landscape.json` and `landscape.npz` and from nothing else, so it can be made again from a
results folder.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llp.errors import StudyError
from llp.reporting import formats, html, yaml_text
from llp.reporting.landscape_found import Array, Found
from llp.reporting.landscape_sections import sections
from llp.reporting.svg import drawing

PICTURES = "pictures"


@dataclass(frozen=True)
class Head:
    """What stands at the top.

    Attributes:
        figure: The big number.
        headline: What it is, in one sentence.
        sure: What else is known, in one sentence.
        facts: `(label, value)` pairs.
    """

    figure: str
    headline: str
    sure: str
    facts: tuple[tuple[str, str], ...]


def write_landscape(
    plain: Mapping[str, Any],
    arrays: Mapping[str, Array],
    folder: Path,
    *,
    pictures: Sequence[str] = ("png", "svg"),
    page: bool = True,
) -> Path | None:
    """Writes `index.html` and the folder `pictures`, replacing those of before.

    The same results give the same bytes.

    Args:
        plain: As in `landscape.json`.
        arrays: As in `landscape.npz`.
        folder: Where the results are.
        pictures: Kinds of picture files, of `png` and `svg`; none for none.
        page: Write the page.

    Returns:
        The page; None when it was not asked for.

    Raises:
        EnvironmentProblem: A file cannot be written.
    """
    found = Found(plain, arrays)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    if not page and not pictures:
        return None
    with drawing():
        made = sections(found)
        for picture in found.pictures:
            picture.save(folder / PICTURES, pictures)
    if not page:
        return None
    environment = dict(plain["environment"])
    text = html.page(
        "landscape.html",
        title=formats.short(plain["subject"]["title"], 120),
        head=head(found),
        sections=made,
        missing=sorted(plain["missing"].items()),
        command=formats.clean(environment.pop("command", "") or ""),
        environment=[(key, formats.clean(value)) for key, value in environment.items()],
        pictures=bool(pictures),
        settings=yaml_text.dump(plain["settings"]),
    )
    return html.write_page(text, folder / "index.html")


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `landscape.json` and `landscape.npz` in a results folder hold.

    Raises:
        StudyError: They are missing or damaged.
    """
    try:
        plain = json.loads((folder / "landscape.json").read_bytes())
        content = io.BytesIO((folder / "landscape.npz").read_bytes())
        with np.load(content, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise StudyError(f"no landscape can be read in {folder}: {error}") from error
    return plain, arrays


def head(found: Found) -> Head:
    """The loss of the model and the numbers that say most about its surroundings."""
    base = next(
        (
            (found.number(f"{name}/base_loss"), found.number(f"{name}/base_metric"))
            for name in [*found.parts("surfaces"), *found.parts("lines")]
            if f"{name}/base_loss" in found.values
        ),
        (float("nan"), float("nan")),
    )
    subject = found.plain["subject"]
    top, trace = found.number("spectrum/largest"), found.number("spectrum/trace")
    said = []
    if np.isfinite(top):
        said.append(f"the largest Hessian eigenvalue is {formats.number(top, 3)}")
    if np.isfinite(trace):
        error = formats.number(found.number("spectrum/trace_standard_error"), 2)
        said.append(f"the trace {formats.number(trace, 3)} ± {error}")
    for name in found.parts("sharpness"):
        if found.values[f"{name}/measure"] == "sam":
            value = formats.number(found.values.get(name), 3)
            said.append(f"one SAM step raises the loss by {value}")
            break
    sure = "; ".join(said)
    figure = f"loss {formats.number(base[0])}" if np.isfinite(base[0]) else ""
    accuracy = f", accuracy {formats.percent(base[1])}" if np.isfinite(base[1]) else ""
    headline = f"on {subject['facts'].get('measured on', 'the measured examples')}{accuracy}"
    return Head(
        figure=figure,
        headline=headline[:1].upper() + headline[1:] + ".",
        sure=sure[:1].upper() + sure[1:] + "." if sure else "",
        facts=tuple((label.capitalize(), text) for label, text in subject["facts"].items()),
    )


__all__ = ["Head", "head", "read_results", "write_landscape"]
