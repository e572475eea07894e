"""Pictures of a landscape: right way round, the same in every form, honest about gaps."""

from __future__ import annotations

import html
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from landscape_results import MINIMUM, X, Y, asymmetric, make_results
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from llp.reporting.figures import paths, spectra, surfaces, tracking
from llp.reporting.landscape_page import read_results, write_landscape
from llp.reporting.landscape_sections import _confidence_reading
from llp.reporting.svg import drawing

EVIL = "<script>document.title='pwned'</script></script><img src=x onerror=x>\" ' {{7*7}} \u202e"


def random_surface(**changes: Any) -> surfaces.SurfaceData:
    plain, arrays = make_results()
    data = surfaces.surface_data(plain["values"], arrays, "surface/random")
    return replace(data, **changes)


def closest(x: float, y: float) -> tuple[float, float]:
    """The grid coordinates nearest to a point."""
    return float(X[np.abs(X - x).argmin()]), float(Y[np.abs(Y - y).argmin()])


def test_the_mesh_has_rows_along_y_and_is_turned_once() -> None:
    across, up, values = random_surface().mesh()
    assert values.shape == (len(Y), len(X))
    np.testing.assert_array_equal(across[0], X)
    np.testing.assert_array_equal(up[:, 0], Y)
    np.testing.assert_allclose(values, asymmetric(across, up), rtol=1e-15)


def test_heat_map_puts_every_value_at_its_coordinates() -> None:
    with drawing():
        axes = surfaces.heat_map(random_surface()).axes[0]
    image = axes.images[0]
    assert image.origin == "lower"
    left, right, bottom, top = image.get_extent()
    shown = np.asarray(image.get_array())
    rows, columns = shown.shape
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = bottom + (np.arange(rows) + 0.5) * (top - bottom) / rows
    np.testing.assert_allclose(x, X, atol=1e-12)
    np.testing.assert_allclose(y, Y, atol=1e-12)
    across, up = np.meshgrid(x, y)
    expected = np.log10(asymmetric(across, up))  # a range of 400 is shown by its logarithm
    np.testing.assert_allclose(shown, expected, atol=1e-9)


def test_every_contour_line_lies_where_the_function_has_its_level() -> None:
    with drawing():
        axes = surfaces.contour(random_surface()).axes[0]
    lines = axes.collections[0]
    found = 0
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        for x, y in path.vertices:
            assert np.log10(asymmetric(x, y)) == pytest.approx(level, abs=0.08)
            found += 1
    assert found > 100
    x, y = lines.get_paths()[0].vertices.mean(axis=0)
    assert closest(x, y) == MINIMUM


def test_relief_has_the_function_as_its_height() -> None:
    with drawing():
        axes: Any = surfaces.relief(random_surface()).axes[0]
    x, y, z = axes.collections[0]._faces.reshape(-1, 3).T
    np.testing.assert_allclose(z, np.log10(asymmetric(x, y)), atol=1e-9)
    lowest = int(np.argmin(z))
    assert (x[lowest], y[lowest]) == pytest.approx(MINIMUM)
    assert (x.min(), x.max(), y.min(), y.max()) == (-1, 1, -2, 2)


def test_in_the_finished_pixels_the_darkest_place_is_the_minimum() -> None:
    with drawing():
        figure = surfaces.heat_map(replace(random_surface(), has_base=False))
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(150)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[:, :, :3].astype(float)
        axes = figure.axes[0]
    dark = np.asarray(colormaps["viridis"](0.0)[:3]) * 255
    distance = np.abs(pixels - dark).sum(axis=2)
    height = pixels.shape[0]
    box = axes.get_window_extent()
    inside = np.zeros(distance.shape, dtype=bool)  # not the key beside it
    inside[height - int(box.y1) : height - int(box.y0), int(box.x0) : int(box.x1)] = True
    rows, columns = np.nonzero((distance <= 3) & inside)
    assert len(rows) > 20
    x, y = axes.transData.inverted().transform((columns.mean() + 0.5, height - rows.mean() - 0.5))
    assert x == pytest.approx(MINIMUM[0], abs=0.05)
    assert y == pytest.approx(MINIMUM[1], abs=0.12)


def test_two_dimensional_pictures_share_their_axes() -> None:
    data = random_surface()
    with drawing():
        made = [surfaces.heat_map(data), surfaces.contour(data), surfaces.heat_map(data, "metric")]
        frames = [(f.axes[0].get_position().bounds, f.axes[0].axis()) for f in made]
    assert frames[0] == frames[1] == frames[2]


def test_the_base_point_is_marked_at_the_origin_and_only_where_it_is_the_model() -> None:
    with drawing():
        marks = surfaces.heat_map(random_surface()).axes[0].lines
        assert [(float(m.get_xdata()[0]), float(m.get_ydata()[0])) for m in marks] == [(0, 0)]
        assert not surfaces.heat_map(random_surface(has_base=False)).axes[0].lines


def test_a_cap_cuts_pictures_and_leaves_the_data_alone() -> None:
    data = random_surface(cap=3.0)
    assert data.mesh()[2].max() == 3.0
    assert data.loss.max() > 10
    assert data.mesh("metric")[2].max() == pytest.approx(random_surface().metric.max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cells_that_are_not_finite_are_left_blank(bad: float) -> None:
    loss = random_surface().loss.copy()
    loss[3, 4] = bad
    data = random_surface(loss=loss)
    with drawing():
        shown = np.asarray(surfaces.heat_map(data).axes[0].images[0].get_array())
        surfaces.contour(data)
        surfaces.relief(data)
    assert np.isnan(shown[4, 3])
    assert np.isnan(shown).sum() == 1


def test_a_flat_surface_and_one_without_a_finite_value_can_be_drawn() -> None:
    for value in (1.0, np.nan):
        data = random_surface(loss=np.full((25, 21), value), robust=None, metric=None)
        with drawing():
            assert len(surfaces.surface_pictures(data)) == 3


def test_losses_are_shown_by_their_logarithm_only_when_they_span_a_lot() -> None:
    narrow = surfaces.Scale(np.array([1.0, 2.0]))
    wide = surfaces.Scale(np.array([0.01, 2.0]))
    negative = surfaces.Scale(np.array([-1.0, 100.0]))
    assert (narrow.log, wide.log, negative.log) == (False, True, False)
    assert wide.text(wide.of(np.asarray(0.05)).item()) == "0.05"


def test_a_line_along_an_eigenvector_has_the_parabola_of_its_eigenvalue() -> None:
    plain, arrays = make_results()
    data = paths.line_data(plain["values"], arrays, "line/hessian")
    np.testing.assert_allclose(data["parabola"], data["loss"], atol=1e-12)  # it is a parabola


def test_gradient_predicts_the_loss_to_first_order() -> None:
    plain, arrays = make_results()
    data = paths.smoothness_data(plain["values"], arrays)
    np.testing.assert_allclose(data["loss"] - data["linear"], data["step"] ** 2, atol=1e-12)
    np.testing.assert_allclose(data["beta"], 7.0)


def test_the_path_is_drawn_where_its_coordinates_are() -> None:
    plain, arrays = make_results()
    data = paths.path_data(arrays)
    plane = surfaces.surface_data(plain["values"], arrays, "surface/trajectory")
    with drawing():
        axes = paths.path_pictures(data, plane, ("a", "b"))[0].figure.axes[0]
    base, path = axes.lines
    np.testing.assert_array_equal(base.get_xydata(), [[0, 0]])
    np.testing.assert_array_equal(path.get_xydata(), arrays["trajectory/coordinates"])
    said = " ".join(text.get_text() for text in axes.texts)
    assert "0: loss 2.3, off plane 0.8" in said
    assert "2: loss 0.5, off plane 0.4" in said


def test_density_is_drawn_on_a_logarithmic_axis_with_the_eigenvalues_marked() -> None:
    _, arrays = make_results()
    eigenvalues = spectra.eigenvalue_data(arrays)
    assert eigenvalues["value"].tolist() == [9.5, 4.0, -1.5]
    with drawing():
        density, ends = spectra.spectrum_pictures(spectra.density_data(arrays), eigenvalues)
    axes = density.figure.axes[0]
    assert axes.get_yscale() == "log"
    marks = [float(line.get_xdata()[0]) for line in axes.lines[1:]]
    assert marks == [9.5, 4.0, -1.5, 0.0]
    widths = [bar.get_width() for bar in ends.figure.axes[0].patches]
    assert widths == [9.5, 4.0, -1.5]


def test_tracked_curvature_keeps_its_numbers() -> None:
    plain, _ = make_results()
    data = tracking.curvature_data(plain["subject"]["observations"])
    assert data["epoch"].tolist() == [1, 2, 3]
    assert data["eigenvalue_1"].tolist() == [12.0] * 3
    assert "3 looks" in tracking.curvature_reading(data)
    with drawing():
        pictures = tracking.curvature_pictures(data)
    assert [picture.key for picture in pictures] == [
        "curvature-eigenvalues",
        "curvature-trace",
        "curvature-gradient",
    ]


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("page")
    plain, arrays = make_results()
    path = write_landscape(plain, arrays, folder)
    assert path == folder / "index.html"
    return folder, path.read_text()


def test_the_page_has_all_sections_and_loads_nothing(page: tuple[Path, str]) -> None:
    text = html.unescape(page[1])
    found = re.findall(r'<section id="([\w-]+)"', text)
    assert found == [
        "verdict",
        "surfaces",
        "lines",
        "trajectory",
        "spectrum",
        "sharpness",
        "connectivity",
        "ranks",
        "smoothness",
        "confidence",
        "jacobian",
        "training",
        "missing",
        "reproduce",
    ]
    assert "default-src 'none'" in text
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert attribute.startswith(("#", "data:")), attribute
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_says_the_numbers(page: tuple[Path, str]) -> None:
    _, text = page
    said = html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("\u00a0", " ")
    for words in (
        "256 train examples",
        "The largest eigenvalue is 9.5, the smallest −1.5",
        "Trace 30 ± 0.7",
        "95 % interval ± 1.5",
        "15.00 % of the eigenvalues lie below 0 by more than the width",
        "rises by 0.5 above the line",
        "1.2 times as long",
        "Of 20 units 1 dead, 0 saturated, 3 dormant",
        "the optimizer's state was not kept",
        "Expected calibration error 6.00 % ± 2.00 %: on average the network is too sure",
        "by 0.1 to 0.2; at the model itself by 0.1",
    ):
        assert words in said, words


def test_every_picture_is_a_file_in_both_kinds(page: tuple[Path, str]) -> None:
    folder, text = page
    files = sorted(path.name for path in (folder / "pictures").iterdir())
    names = {name.partition(".")[0] for name in files}
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    assert {"surface-random-heat", "surface-random-contour", "surface-random-relief"} <= names
    assert {"surface-random-robust", "trajectory-path", "spectrum-density", "units"} <= names
    for name in files:
        if name.endswith("png"):
            with Image.open(folder / "pictures" / name) as image:
                assert min(image.size) > 150
        else:
            ElementTree.parse(folder / "pictures" / name)
    assert text.count('class="plot"') == len(names)


def test_the_same_results_give_the_same_bytes(page: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = page
    plain, arrays = make_results()
    plain["parts"] = {"surface/random": plain["parts"]["surface/random"]}
    for name in ("one", "two"):
        write_landscape(plain, arrays, tmp_path / name)
    files = sorted(path for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 14
    for path in files:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes(), path
        first = folder / path.relative_to(tmp_path / "one")  # drawn after and before others
        assert path.suffix == ".html" or first.read_bytes() == path.read_bytes(), path


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain, arrays = make_results(EVIL)
    path = write_landscape(plain, arrays, tmp_path, pictures=())
    assert path is not None
    text = path.read_text()
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "\u202e" not in text
    assert "{{7*7}}" in text
    assert not (tmp_path / "pictures").exists()


def test_results_can_be_read_again(tmp_path: Path) -> None:
    plain, arrays = make_results()
    (tmp_path / "landscape.json").write_text(json.dumps(plain))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (tmp_path / "landscape.npz").write_bytes(buffer.getvalue())
    again, tensors = read_results(tmp_path)
    assert again == plain
    assert tensors.keys() == arrays.keys()


def test_a_page_of_almost_nothing_can_be_written(tmp_path: Path) -> None:
    plain, _ = make_results()
    bare = {**plain, "values": {}, "parts": {}, "rows": {}, "missing": {}}
    bare["subject"] = {**plain["subject"], "curve": [], "observations": []}
    path = write_landscape(bare, {}, tmp_path)
    assert path is not None
    assert re.findall(r'<section id="(\w+)"', path.read_text()) == ["verdict", "reproduce"]


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (math.nan, "Some outputs of the network are not finite, so how sure it is cannot be told."),
        (0.05, "on average the network is too sure"),
        (-0.05, "on average the network is not sure enough"),
        (0.0, "on average the network is as sure as it is right"),
    ],
)
def test_the_confidence_gap_is_read_also_where_there_is_none(gap: float, said: str) -> None:
    values = {"confidence/confidence_gap": gap, "confidence/accuracy": 0.5}
    reading = _confidence_reading(SimpleNamespace(number=lambda key: values.get(key, math.nan)))
    assert said in reading
    assert "accuracy" in reading
    assert "nan" not in reading
