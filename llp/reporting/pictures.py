"""A drawing that is wanted twice: inside a page, and as PNG and SVG files beside it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from llp.errors import EnvironmentProblem
from llp.reporting.palette import LIGHT
from llp.reporting.svg import embedded, rendered

PNG_DPI = 200


@dataclass(frozen=True)
class Picture:
    """A figure, made and used inside `svg.drawing()`.

    Attributes:
        key: Name of its files, and unique on the page: letters, digits and hyphens.
        title: What it shows.
        description: What a reader should see in it.
        figure: The drawing.
    """

    key: str
    title: str
    description: str
    figure: Figure

    @cached_property
    def svg(self) -> str:
        """The drawing as a whole SVG file without a background."""
        return rendered(self.figure)

    def inline(self) -> Markup:
        """The drawing as one `<svg>` element that follows the page's colours."""
        drawn = embedded(self.svg, key=self.key, title=self.title, description=self.description)
        return Markup(drawn)  # every text in it was escaped by matplotlib and ElementTree

    def save(self, folder: Path, kinds: Iterable[str]) -> list[Path]:
        """Writes `KEY.png` and `KEY.svg`, as asked for.

        Raises:
            EnvironmentProblem: A file cannot be written.
        """
        written = []
        for kind in kinds:
            path = folder / f"{self.key}.{kind}"
            content = self._on_paper() if kind == "svg" else self._pixels()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise EnvironmentProblem(
                    f"cannot write {path}: {error.strerror or error}"
                ) from error
            written.append(path)
        return written

    def _pixels(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(
            buffer, format="png", facecolor=LIGHT["page"], dpi=PNG_DPI, metadata={"Software": None}
        )
        return buffer.getvalue()

    def _on_paper(self) -> bytes:
        """The SVG with a background, for viewers that have a dark one of their own."""
        start = self.svg.index(">", self.svg.index("<svg ")) + 1
        paper = f'<rect width="100%" height="100%" fill="{LIGHT["page"]}"/>'
        return f"{self.svg[:start]}{paper}{self.svg[start:]}".encode()
