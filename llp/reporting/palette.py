"""Colours of a page and its figures, by role, for light and for dark.

Series hues are those of Okabe and Ito ("Color Universal Design", 2008), which stay apart for all
common kinds of colour blindness; they are darkened on light paper and lightened on dark paper until
marks reach 3:1 against it (WCAG 2.2, 1.4.11). Text roles reach 4.5:1 (1.4.3). Colour is never the
only sign: figures add dashes, markers or hatches.

Figures are drawn in the light colours; `svg.inline` then replaces each by `var(--role)`.
"""

from __future__ import annotations

TEXT_ROLES = ("ink", "muted", "accent", "good", "bad")
SERIES = ("blue", "vermillion", "green", "purple", "orange", "sky")
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")

LIGHT: dict[str, str] = {
    "page": "#fdfcfa",
    "panel": "#f5f2ec",
    "ink": "#1d2125",
    "muted": "#575f67",
    "rule": "#d8d4cc",
    "faint": "#8d9399",
    "accent": "#00568a",
    "good": "#0a664b",
    "bad": "#a13a00",
    "blue": "#0072b2",
    "vermillion": "#cc5500",
    "green": "#008a64",
    "purple": "#b5618f",
    "orange": "#b37700",
    "sky": "#3c8dbc",
}

DARK: dict[str, str] = {
    "page": "#15181b",
    "panel": "#1e2226",
    "ink": "#e7e4de",
    "muted": "#a9b0b7",
    "rule": "#3b4147",
    "faint": "#7f878e",
    "accent": "#7fc3ee",
    "good": "#5fd0a5",
    "bad": "#ff9f6b",
    "blue": "#6db8f0",
    "vermillion": "#f2813a",
    "green": "#2cbd93",
    "purple": "#dc93be",
    "orange": "#e8b13a",
    "sky": "#4389b8",
}


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` in [0, 1] (WCAG 2.2, definition of relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, from 1 to 21 (WCAG 2.2, definition of contrast ratio).

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def css() -> str:
    """The roles as custom properties, for light, dark and print."""

    def block(colours: dict[str, str]) -> str:
        return ":root{" + "".join(f"--{role}:{value};" for role, value in colours.items()) + "}"

    return (
        block(LIGHT)
        + "@media screen and (prefers-color-scheme:dark){"
        + block(DARK)
        + "}@media print{"
        + block({**LIGHT, "page": "#ffffff", "panel": "#ffffff"})
        + "}"
    )
