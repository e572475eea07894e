"""Numbers and strings as people read them; nothing here knows what a study is."""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

MISSING = "–"
NBSP = "\u00a0"  # between a number and its unit
UNPRINTABLE = re.compile(  # control, line-separator, text-direction and non-characters
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def clean(value: Any) -> str:
    """`value` as text that HTML, XML and UTF-8 can carry.

    Control characters, changes of text direction and lone surrogates become U+FFFD, and
    `user:password@` in a URL becomes `***@`.

    >>> clean("http://me:secret@host/x")
    'http://***@host/x'
    """
    text = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return _CREDENTIALS.sub("***@", UNPRINTABLE.sub("\ufffd", _whole_characters(text)))


def quoted(value: Any) -> str:
    r"""`value` as a double-quoted YAML and JSON string in which nothing unprintable is left.

    >>> quoted('a"b\x00')
    '"a\\"b\\u0000"'
    """
    text = _CREDENTIALS.sub("***@", _whole_characters(str(value)))
    return UNPRINTABLE.sub(
        lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False)
    )


def _whole_characters(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def short(value: Any, length: int = 18) -> str:
    """The first `length` characters of `value` on one line, with an ellipsis when cut.

    >>> short("a_rather_long_name", 10)
    'a_rather_…'
    """
    text = " ".join(clean(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (booleans are not)."""
    if value is None or isinstance(value, bool | str):
        return False
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def number(value: Any, digits: int = 4) -> str:
    """Four significant digits, without trailing zeros; other values as they are.

    >>> number(0.0312499), number(1e-7), number(True), number(None)
    ('0.03125', '1e-07', 'true', '–')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}g}".replace("-", "−", 1) if value < 0 else f"{value:.{digits}g}"


def signed(value: Any, digits: int = 2) -> str:
    """A number with its sign and fixed decimals.

    >>> signed(0.5), signed(-0.25)
    ('+0.50', '−0.25')
    """
    if not is_number(value):
        return MISSING
    return f"{value:+.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    """A whole number with thousands separators.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{round(value):,}".replace("-", "−") if is_number(value) else MISSING


def amount(value: Any) -> str:
    """A large count in three significant digits.

    >>> [amount(num).replace(NBSP, " ") for num in (999, 45_310, 1_234_567)]
    ['999', '45.3 thousand', '1.23 million']
    """
    if not is_number(value):
        return MISSING
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if abs(value) >= size:
            unit = min(size, 1e3) if word == "thousand" else size
            return f"{value / unit:.3g}{NBSP}{word}"
    return count(value)


def percent(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage.

    >>> percent(0.9342).replace(NBSP, " ")
    '93.4 %'
    """
    if not is_number(value):
        return MISSING
    return f"{100 * value:.{digits}f}{NBSP}%".replace("-", "−")


def probability(value: Any) -> str:
    """A probability in percent, never rounded to certainty.

    >>> [probability(p).replace(NBSP, " ") for p in (0.42, 0.0001, 0.999)]
    ['42 %', '< 1 %', '> 99 %']
    """
    if not is_number(value):
        return MISSING
    if 0 < value < 0.01:
        return f"<{NBSP}1{NBSP}%"
    if 0.99 < value < 1:
        return f">{NBSP}99{NBSP}%"
    return f"{100 * value:.0f}{NBSP}%"


def points(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as percentage points without the unit.

    >>> points(0.0034, 2)
    '0.34'
    """
    return f"{100 * value:.{digits}f}".replace("-", "−") if is_number(value) else MISSING


def duration(seconds: Any) -> str:
    """Seconds in the two largest fitting units.

    >>> [duration(s).replace(NBSP, " ") for s in (4.21, 192, 7_500, 100_000)]
    ['4.2 s', '3 min 12 s', '2 h 5 min', '1 d 3 h']
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{NBSP}s"
    total = round(seconds)
    for size, word, smaller, small_word in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if total >= size:
            rest = total % size // smaller
            more = f"{NBSP}{rest}{NBSP}{small_word}" if rest else ""
            return f"{total // size}{NBSP}{word}{more}"
    raise AssertionError("unreachable: at least 60 seconds")


def moment(unix_time: Any) -> str:
    """A Unix time as UTC, to the minute.

    >>> moment(0)
    '1970-01-01 00:00 UTC'
    """
    if not is_number(unix_time) or not 0 <= unix_time < 253_402_300_800:
        return MISSING
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))


def plural(num: int, noun: str, several: str = "") -> str:
    """`num` with its noun, of which `several` is the plural where that takes more than an s.

    >>> plural(1, "trial"), plural(3, "trial"), plural(2, "study", "studies")
    ('1 trial', '3 trials', '2 studies')
    """
    return f"{num:,} {noun if num == 1 else several or noun + 's'}"


def listed(names: list[str], most: int = 6) -> str:
    """Names joined in a sentence, cut after `most`.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    names = [clean(name) for name in names]
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
