"""Kills at random moments: what is lost, repeated or decided otherwise.

`kill -9` of the driver, of a worker, and of a Ray node of a local cluster, twenty moments each, in
small searches that last several snapshots a job (`tests/kill_runs.py`). After each search:

- every job that ended did so once, and with one worker all outcomes are those of the search that
  was left in peace;
- no job did more than one snapshot interval again;
- with one worker (driver, worker) the sequence of decisions, the looks of the race and the winner
  are those of the search left in peace; with two nodes the ledger replays to its own decisions.

`--kinds driver worker node` chooses, `--moments` and `--seed` set the number of kills and their
times. Seconds are wall clock on a machine that does other things; nothing here is a speed.

    python tests/benchmarks/kills.py [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Bar, finish, machine, parser, print_table

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from kill_runs import (  # noqa: E402
    Killed,
    completed_twice,
    kill_driver,
    kill_node,
    kill_worker,
    redone,
    undisturbed,
)
from study_runs import events  # noqa: E402
from test_pipeline_resume import check_replay, decisions, outcomes  # noqa: E402

KINDS = {"driver": kill_driver, "worker": kill_worker, "node": kill_node}


def looks(log: list[dict[str, Any]]) -> list[Any]:
    """The looks of the race over seeds."""
    return [event["look"] for event in log if event["event"] == "race"]


def winner(log: list[dict[str, Any]]) -> list[Any]:
    """The winner and why."""
    return [(e["winner"], e["winner_reason"]) for e in log if e["event"] == "finished"]


def judge(kind: str, found: Killed, whole: Killed) -> dict[str, Any]:
    """What is wrong with a search that was killed."""
    same = None
    if kind != "node":
        same = (
            decisions(found.log) == decisions(whole.log)
            and outcomes(found.log) == outcomes(whole.log)
            and looks(found.log) == looks(whole.log)
            and winner(found.log) == winner(whole.log)
        )
    again = redone(found.folder)
    lost = set(outcomes(whole.log)) - set(outcomes(found.log)) if kind != "node" else set()
    return {
        "kills": len(found.lines),
        "at_lines": found.lines,
        "events": len(found.log),
        "completed_twice": completed_twice(found.log),
        "lost": sorted(lost),
        "redone": len(again),
        "most_redone_seconds": max((work for work, _ in again), default=0.0),
        "over_one_interval": sum(work > allowed for work, allowed in again),
        "same_as_undisturbed": same,
        "replayed_decisions": check_replay(found.log),
    }


def left_in_peace(folder: Path) -> Killed:
    """The search that nobody kills; made once for a kept folder."""
    study = folder / "llp_studies" / "whole"
    if (study / "ledger.jsonl").exists():
        log = events(study / "ledger.jsonl")
        if log[-1]["event"] == "finished":
            return Killed(study, [], 0, log)
        raise SystemExit(f"{folder} holds a search that did not end; remove it")
    folder.mkdir(parents=True)
    return undisturbed(folder, "whole")


def main() -> None:
    """Kills, judges, prints."""
    options = parser(__doc__ or "")
    options.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    options.add_argument("--moments", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--per-search", type=int, default=7, help="kills of one search at most")
    options.add_argument("--folder", type=Path, help="keep the searches here; goes on with them")
    chosen = options.parse_args()
    moments = 2 if chosen.quick else chosen.moments
    figures: dict[str, Any] = {"machine": machine(), "moments": moments}
    bars, rows = [], []
    with contextlib.ExitStack() as stack:
        root = chosen.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kr", dir="/tmp"))
        )
        whole = left_in_peace(root / "whole")
        figures["undisturbed_events"] = len(whole.log)
        for kind in chosen.kinds:
            chance = random.Random(f"{kind} {chosen.seed}")
            left, searches, started = moments, [], time.monotonic()
            while left > 0:
                folder = root / f"{kind}-{chosen.seed}-{len(searches)}"
                folder.mkdir(parents=True)
                found = KINDS[kind](folder, "cut", min(left, chosen.per_search), chance)
                searches.append(judge(kind, found, whole))
                left -= len(found.lines)
                print(f"{kind}: {moments - left} of {moments} kills, {searches[-1]}", flush=True)
            figures[kind] = searches
            kills = sum(each["kills"] for each in searches)
            twice = sum(len(each["completed_twice"]) + len(each["lost"]) for each in searches)
            over = sum(each["over_one_interval"] for each in searches)
            other = sum(each["same_as_undisturbed"] is False for each in searches)
            rows.append(
                [
                    kind,
                    str(kills),
                    str(len(searches)),
                    str(twice),
                    f"{max(each['most_redone_seconds'] for each in searches):.2f}",
                    str(over),
                    str(other) if kind != "node" else "-",
                    str(sum(each["replayed_decisions"] for each in searches)),
                    f"{time.monotonic() - started:.0f}",
                ]
            )
            bars += [
                Bar(f"{kind}: jobs lost or completed twice", twice, 0),
                Bar(f"{kind}: times that more than one interval was redone", over, 0),
                Bar(f"{kind}: kills", kills, moments, at_most=False),
            ]
            if kind != "node":
                bars.append(Bar(f"{kind}: searches that decided otherwise", other, 0))
    print_table(
        "Kills at random moments",
        ["killed", "kills", "searches", "lost or twice", "most redone, s", "over", "differ",
         "replayed", "seconds"],
        rows,
    )  # fmt: skip
    finish(figures, bars, chosen.json)


if __name__ == "__main__":
    main()
