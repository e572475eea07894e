"""What a search takes from earlier studies, in words."""

from __future__ import annotations

from llp.records import EarlierStudies
from llp.reporting import formats


def about_earlier(found: EarlierStudies) -> list[str]:
    """Sentences for people, without full stops: what is taken, then what is left out and why.

    >>> about_earlier(EarlierStudies(("a",), {"b": "not finished"}, {"too wide": 2}, 3))
    ['3 first configurations from 1 study: a', 'left out b (not finished)', \
'2 configurations left out (2 too wide)']
    >>> about_earlier(EarlierStudies(()))
    ['0 first configurations from 0 studies']
    """
    studies = formats.plural(len(found.used), "study", "studies")
    what = formats.plural(found.num_first, "first configuration")
    if found.num_results:
        what += f" and {formats.plural(found.num_results, 'result')}"
    names = f": {formats.listed([*found.used])}" if found.used else ""
    lines = [f"{what} from {studies}{names}"]
    if found.left_out:
        why = [f"{name} ({reason})" for name, reason in found.left_out.items()]
        lines.append(f"left out {formats.listed(why)}")
    if found.skipped:
        reasons = ", ".join(f"{num} {formats.clean(why)}" for why, num in found.skipped.items())
        num = sum(found.skipped.values())
        lines.append(f"{formats.plural(num, 'configuration')} left out ({reasons})")
    return lines
