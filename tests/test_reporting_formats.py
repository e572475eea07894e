"""Numbers and text as shown, and YAML that a person can copy back."""

from __future__ import annotations

import doctest
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from llp.reporting import formats, palette, tables, yaml_text

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
    | st.sampled_from(["1e-3", "yes", "null", "0x10", "~", "- a", "a: b", "12:30", "#c", "", " x"])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("module", [formats, palette, yaml_text])
def test_docstring_examples_hold(module: object) -> None:
    outcome = doctest.testmod(module)  # type: ignore[arg-type]
    assert outcome.attempted > 0
    assert outcome.failed == 0


@given(st.dictionaries(st.text(max_size=8), TREES, max_size=4))
def test_yaml_text_reads_back_as_the_same_data(data: dict[str, object]) -> None:
    text = yaml_text.dump(data)
    assert YAML(typ="safe").load(text) == data
    assert not formats.UNPRINTABLE.search(text)


@pytest.mark.parametrize("value", [1e-5, 1e16, 3.5e-300, 0.1, -2.0])
def test_yaml_floats_stay_floats_in_yaml_1_1(value: float) -> None:
    reader = YAML(typ="safe")
    reader.version = (1, 1)  # type: ignore[assignment]
    read = reader.load(yaml_text.dump({"x": value}))["x"]
    assert isinstance(read, float)
    assert read == value


@given(st.text(max_size=60))
def test_cleaned_text_is_utf8_and_legal_xml(text: str) -> None:
    cleaned = formats.clean(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    allowed = {"\n", "\t"}
    assert all(ord(c) >= 0x20 or c in allowed for c in cleaned)
    assert formats.clean(cleaned) == cleaned


def test_lone_surrogates_and_direction_overrides_are_replaced() -> None:
    assert formats.clean("a\ud800b\u202ec\x00d") == "a\ufffdb\ufffdc\ufffdd"


def test_passwords_in_urls_are_hidden_and_plain_urls_kept() -> None:
    assert (
        formats.clean("postgresql://joe:pw@db/x http://h/p") == "postgresql://***@db/x http://h/p"
    )


def test_missing_numbers_are_dashes_everywhere() -> None:
    for write in (
        formats.number,
        formats.percent,
        formats.count,
        formats.signed,
        formats.duration,
        formats.points,
        formats.probability,
        formats.amount,
        formats.moment,
    ):
        assert write(math.nan) == formats.MISSING
        assert write(None) == formats.MISSING


def test_tables_sort_by_value_and_put_missing_last() -> None:
    frame = pd.DataFrame({"name": ["b", "a"], "x": [0.5, math.nan]})
    made = tables.table(
        frame,
        [
            tables.text("name", "name"),
            tables.Column("x", "x", formats.percent),
            tables.text("y", "y"),
        ],
    )
    assert [column.key for column in made.columns] == ["name", "x"]
    assert made.rows[0][1] == tables.Cell(formats.percent(0.5), "0.5")
    assert made.rows[1][1] == tables.Cell(formats.MISSING, "")


def test_long_tables_say_how_much_is_left_out() -> None:
    frame = pd.DataFrame({"x": range(12)})
    made = tables.table(frame, [tables.Column("x", "x")], limit=10)
    assert (len(made.rows), made.omitted) == (10, 2)
