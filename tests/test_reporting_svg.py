"""Figures as inline SVG: unique ids, no outside references, themable, readable colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llp.reporting import palette, svg

HOSTILE = '</title></svg><script>alert(1)</script>"onload="1 $x_{1}$ {{7*7}} \x00\u202e日本'


def draw(key: str, text: str = "plain") -> str:
    with svg.drawing():
        figure, axes = svg.canvas()
        axes.plot([0, 1, 2], [1, 3, 2], "o-", color=palette.LIGHT["blue"])
        green, page = palette.LIGHT["green"], palette.LIGHT["page"]
        axes.barh([0, 1], [1, 2], hatch="///", color=green, edgecolor=page)
        axes.set_title(text)
        axes.set_xlabel(text)
        axes.set_xticks([0, 1], [text, "b"])
        return svg.inline(figure, key=key, title=text, description=text)


@pytest.mark.parametrize("label", ["adamw", "mmmmmmmm", "sgd", "a label of thirty letters, wow"])
def test_a_label_has_room_inside_the_figure(label: str) -> None:
    with svg.drawing():
        figure, axes = svg.canvas(left=svg.label_width([label, "a"]))
        axes.set_yticks([0, 1], [label, "a"])
        FigureCanvasAgg(figure).draw()
        (text, _) = axes.get_yticklabels()
        assert 0 <= text.get_window_extent().x0 < 0.2 * figure.dpi


def test_two_drawings_on_one_page_share_no_id() -> None:
    ids = [re.findall(r'\bid="([^"]+)"', draw(key)) for key in ("first", "second")]
    assert all(ids)
    assert not set(ids[0]) & set(ids[1])
    assert all(name.startswith("first-") for name in ids[0])
    assert len(set(ids[0])) == len(ids[0])


def test_every_reference_points_inside_the_drawing() -> None:
    drawn = draw("a")
    ids = set(re.findall(r'\bid="([^"]+)"', drawn))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', drawn))
    assert references
    assert references <= ids
    assert "http" not in drawn
    assert "xlink" not in drawn


def test_same_drawing_gives_the_same_bytes() -> None:
    assert draw("a") == draw("a")


def test_hostile_text_stays_text() -> None:
    drawn = draw("a", HOSTILE)
    root = ElementTree.fromstring(drawn)
    assert "script" not in {element.tag for element in root.iter()}
    assert not [name for e in root.iter() for name in e.attrib if name.startswith("on")]
    title = root[0]
    assert title.tag == "title"
    assert "</title></svg><script>alert(1)</script>" in (title.text or "")
    assert "$x_{1}$" in drawn  # not read as mathematics
    assert "\x00" not in drawn


def test_colours_become_roles_so_that_dark_mode_can_change_them() -> None:
    drawn = draw("a")
    assert not re.search(r"#[0-9a-fA-F]{6}\b", drawn)
    assert {"ink", "muted", "blue", "green"} <= set(re.findall(r"var\(--(\w+)\)", drawn))


def test_palette_colours_are_told_apart_by_their_code() -> None:
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)
    assert palette.LIGHT.keys() == palette.DARK.keys()


def test_screen_readers_get_a_name_and_a_description() -> None:
    root = ElementTree.fromstring(draw("a"))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "plain. plain"
    assert root[0].text == "plain"
    assert "width" not in root.attrib  # scales with the page


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "panel"])
@pytest.mark.parametrize("role", palette.TEXT_ROLES)
def test_text_has_contrast_of_4_5_to_1(theme: dict[str, str], ground: str, role: str) -> None:
    assert palette.contrast(theme[role], theme[ground]) >= 4.5


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("role", [*palette.SERIES, "faint"])
def test_marks_have_contrast_of_3_to_1(theme: dict[str, str], role: str) -> None:
    assert palette.contrast(theme[role], theme["page"]) >= 3.0


def test_contrast_agrees_with_published_values() -> None:
    # WCAG's own examples: #777 on white is 4.48, #767676 is 4.54
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert palette.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw("a")
    assert dict(matplotlib.rcParams) == before


def test_users_matplotlib_settings_do_not_change_the_page() -> None:
    expected = draw("a")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw("a") == expected


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.78, 0.84), (0.861, 0.888), (0.9312, 0.9318)]
)
def test_percent_ticks_show_their_exact_value(low: float, high: float) -> None:
    with svg.drawing():
        figure, axes = svg.canvas()
        axes.set_ylim(low, high)
        svg.percent_axis(axes)
        figure.canvas.draw()
        ticks = axes.get_yticks()
        labels = [label.get_text() for label in axes.get_yticklabels()]
    shown = [float(label.removesuffix("%")) / 100 for label in labels]
    assert len(shown) >= 3
    assert shown == pytest.approx(ticks.tolist(), abs=1e-9)
