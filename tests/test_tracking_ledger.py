"""The ledger: every acknowledged event survives, nothing else does, and one driver writes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llp.errors import EnvironmentProblem, StudyError
from llp.records import Interval, Trial
from llp.tracking import ledger as ledger_module
from llp.tracking.ledger import (
    LEDGER_VERSION,
    Ledger,
    LedgerTail,
    check_same_spec,
    find_study,
    is_running,
    list_studies,
    load_study,
    read_events,
    study_header,
)
from tests.make_study import HOSTILE, RUNGS, make_events, make_spec, write_study

ROOT = Path(__file__).resolve().parent.parent
DIGEST = "a" * 64


def new_ledger(folder: Path) -> Ledger:
    return Ledger.create(
        folder,
        study_id=folder.name,
        spec=make_spec(),
        spec_digest=DIGEST,
        environment={},
        llp_version="0.1.0",
        rungs=RUNGS,
        num_train=1200,
        num_classes=10,
    )


def run_python(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_lines_are_numbered_dated_and_strict_json(tmp_path: Path) -> None:
    with new_ledger(tmp_path / "s") as ledger:
        written = ledger.append("x", value=math.nan, interval=Interval(0.0, math.inf))
        many = ledger.append_many([("y", {"n": 1}), ("y", {"n": 2})])
    raw = (tmp_path / "s" / "ledger.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in raw]
    assert [line["seq"] for line in lines] == [0, 1, 2, 3]
    assert [line["event"] for line in lines] == ["study", "x", "y", "y"]
    assert lines[0]["ledger_version"] == LEDGER_VERSION
    assert lines[1] == written
    assert lines[1]["value"] is None
    assert lines[1]["interval"]["high"] is None
    assert lines[2:] == many


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=25, deadline=None)
@given(payloads=st.lists(st.dictionaries(st.text(min_size=1), JSON, max_size=4), max_size=5))
def test_events_read_back_as_written(payloads: list[dict[str, Any]]) -> None:
    payloads = [{f"_{name}": value for name, value in payload.items()} for payload in payloads]

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, list):
            return [finite(item) for item in value]
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return value

    with tempfile.TemporaryDirectory() as folder:
        with new_ledger(Path(folder) / "s") as ledger:
            for payload in payloads:
                ledger.append_many([("e", payload)])
            assert ledger.events() == list(read_events(Path(folder) / "s"))
        events = list(read_events(Path(folder) / "s"))[1:]
    kept = [
        {key: value for key, value in event.items() if key not in {"seq", "time", "event"}}
        for event in events
    ]
    assert kept == [finite(payload) for payload in payloads]


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    name = HOSTILE + "\n\r\x85\ud800"
    with new_ledger(tmp_path / "s") as ledger:
        ledger.append("trial", trial=Trial("t000", {name: name}, seed=0))
        ledger.append("after")
    events = list(read_events(tmp_path / "s"))
    assert events[1]["trial"]["hyperparameters"] == {name: name}
    assert len(events) == 3


def test_payload_cannot_overwrite_the_number_of_a_line(tmp_path: Path) -> None:
    with new_ledger(tmp_path / "s") as ledger, pytest.raises(ValueError, match="seq"):
        ledger.append("x", seq=7)


def test_line_cut_at_any_byte_is_ignored_on_read_and_dropped_on_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "s"
    with new_ledger(folder) as ledger:
        ledger.append("trial", trial=Trial("t000", {"learning_rate": 0.1}, seed=0))
        ledger.append("last", text="é\U0001f600", number=1.5)
    path = folder / "ledger.jsonl"
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    expected = list(read_events(folder))[:-1]
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_events(folder)) == expected
        assert list(LedgerTail(folder)) == expected
        caplog.clear()
        with caplog.at_level(logging.WARNING), Ledger.open(folder) as ledger:
            assert path.read_bytes() == whole[:start]
            assert ledger.append("again")["seq"] == 2
        warned = [record for record in caplog.records if "unfinished" in record.message]
        assert len(warned) == (cut > start)
        assert [event["event"] for event in read_events(folder)] == ["study", "trial", "again"]


def test_file_of_zeros_after_a_power_cut_is_a_torn_line(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    new_ledger(folder).close()
    path = folder / "ledger.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 200_000)
    Ledger.open(folder).close()
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("line", "damage", "message"),
    [
        (2, lambda raw: raw[:10] + b"\n", "not a JSON line"),
        (2, lambda raw: b"", "event number 2 where 1 is expected"),
        (2, lambda raw: raw + raw, "event number 1 where 2 is expected"),
        (2, lambda raw: b"[1]\n", "not an event"),
        (2, lambda raw: b"\xff\xfe\n", "not a JSON line"),
        (1, lambda raw: raw.replace(b'"study"', b'"other"', 1), "first line is not the `study`"),
    ],
)
def test_damaged_line_is_named_with_file_and_line(
    tmp_path: Path, line: int, damage: Any, message: str
) -> None:
    folder = tmp_path / "s"
    with new_ledger(folder) as ledger:
        ledger.append("a")
        ledger.append("b")
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = damage(lines[line - 1])
    path.write_bytes(b"".join(lines))
    for read in (lambda: list(read_events(folder)), lambda: Ledger.open(folder)):
        with pytest.raises(StudyError, match=message) as caught:
            read()
        assert f"ledger.jsonl:{line + (message.endswith('2 is expected'))}:" in str(caught.value)
    assert not is_running(folder), "the lock must be given back after a refusal"
    assert path.read_bytes() == b"".join(lines), "a damaged ledger must be left as it is"


def test_newer_ledger_version_is_refused(tmp_path: Path) -> None:
    events = make_events(1)
    events[0]["ledger_version"] = LEDGER_VERSION + 1
    folder = write_study(tmp_path / "s", events)
    with pytest.raises(StudyError, match=r"newer llp.*upgrade"):
        load_study(folder)
    with pytest.raises(StudyError, match="newer llp"):
        Ledger.open(folder)


def test_create_refuses_a_folder_that_holds_a_study(tmp_path: Path) -> None:
    new_ledger(tmp_path / "s").close()
    with pytest.raises(StudyError, match=r"already holds a study.*llp resume s"):
        new_ledger(tmp_path / "s")


def test_study_killed_before_its_first_line_can_be_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "ledger.jsonl").write_bytes(b'{"seq":0,"time":1.0,"ev')
    with pytest.raises(StudyError, match="before its first line"):
        Ledger.open(folder)
    with new_ledger(folder) as ledger:
        assert len(ledger.events()) == 1


def test_other_spec_is_refused_with_both_digests(tmp_path: Path) -> None:
    new_ledger(tmp_path / "s").close()
    check_same_spec(tmp_path / "s", DIGEST)
    with pytest.raises(StudyError, match="another spec") as caught:
        check_same_spec(tmp_path / "s", "b" * 64)
    assert all(part in str(caught.value) for part in ("a" * 12, "b" * 12, "llp resume s"))


# -- the lock -----------------------------------------------------------------------------------

HOLD = """
import sys
from llp.tracking.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_second_driver_is_told_host_and_pid_and_can_go_on_after_kill_9(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    new_ledger(folder).close()
    assert load_study(folder).status == "interrupted"
    driver = run_python(HOLD, folder)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "open\n"
        with pytest.raises(StudyError) as caught:
            Ledger.open(folder)
        assert f"process {driver.pid} on host {os.uname().nodename}" in str(caught.value)
        assert load_study(folder).status == "running", "reading needs no lock"
        assert list_studies(tmp_path)[0].status == "running"
    finally:
        driver.kill()
        driver.communicate()
    assert load_study(folder).status == "interrupted"
    with Ledger.open(folder) as ledger:
        assert ledger.append("opened", host="h", pid=1, environment={})["seq"] == 1
        with pytest.raises(StudyError, match=f"process {os.getpid()} "):
            Ledger.open(folder)


def test_of_many_drivers_at_once_exactly_one_gets_the_study(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    new_ledger(folder).close()
    code = HOLD.replace("print", "ledger.append('opened', host='h', pid=0)\nprint")
    drivers = [run_python(code, folder) for _ in range(5)]
    try:
        losers = []
        for _ in range(3000):
            losers = [driver for driver in drivers if driver.poll() is not None]
            if len(losers) == 4:
                break
            threading.Event().wait(0.1)
        assert len(losers) == 4
        for loser in losers:
            assert "is already being run by" in loser.communicate()[1]
        assert [event["event"] for event in read_events(folder)] == ["study", "opened"]
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


def test_readers_never_see_half_an_event_while_a_driver_writes(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    ledger = new_ledger(folder)
    done = threading.Event()

    def write() -> None:
        for number in range(150):
            ledger.append("e", number=number, filler="x" * (number * 50))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    tail, seen = LedgerTail(folder), []
    while not done.is_set():
        events = list(read_events(folder))
        assert [event["seq"] for event in events] == list(range(len(events)))
        seen += list(tail)
    writer.join()
    seen += list(tail)
    ledger.close()
    assert seen == list(read_events(folder))
    assert len(seen) == 151


# -- a full disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_full_disk_is_one_message_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "s"
    ledger = new_ledger(folder)
    ledger.append("kept")
    before = ledger.path.read_bytes()
    real_write = os.write

    def full(descriptor: int, data: Any = b"") -> int:
        if failing == "write" and len(data) > 7:
            return real_write(descriptor, bytes(data)[:7])  # the last bytes there was room for
        raise OSError(errno.ENOSPC, "No space left on device")

    def short(descriptor: int, data: Any) -> int:
        monkeypatch.setattr(ledger_module.os, "write", lambda d, b: full(d))
        return full(descriptor, data)

    if failing == "write":
        monkeypatch.setattr(ledger_module.os, "write", short)
    else:
        monkeypatch.setattr(ledger_module.os, "fsync", full)
    with pytest.raises(EnvironmentProblem) as caught:
        ledger.append("lost", text="x" * 100)
    assert "disk full" in str(caught.value)
    assert "nothing lost, free space then `llp resume s`" in str(caught.value)
    assert caught.value.exit_code == 4
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    assert ledger.append("after")["seq"] == 2
    ledger.close()
    assert [event["event"] for event in read_events(folder)] == ["study", "kept", "after"]


def test_writes_refused_by_the_kernel_leave_whole_lines(tmp_path: Path) -> None:
    """A file size limit makes the kernel write short and then refuse, as a full disk does."""
    folder = tmp_path / "s"
    new_ledger(folder).close()
    code = """
import resource, sys
from llp.tracking.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
limit = ledger.path.stat().st_size + 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for number in range(100):
    ledger.append("e", filler="x" * 80)
"""
    driver = run_python(code, folder)
    _, said = driver.communicate()
    assert driver.returncode != 0
    assert "disk full" in said
    events = list(read_events(folder))
    assert (folder / "ledger.jsonl").read_bytes().endswith(b"\n")
    assert 2 < len(events) < 12
    with Ledger.open(folder) as ledger:
        assert ledger.append("after")["seq"] == len(events)


def test_folder_that_cannot_be_made_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        new_ledger(tmp_path / "file" / "s")


# -- finding studies ----------------------------------------------------------------------------


def test_studies_are_listed_with_their_state_even_when_damaged(tmp_path: Path) -> None:
    write_study(tmp_path / "done", make_events(8))
    write_study(tmp_path / "half", make_events(8, until="tier1"))
    write_study(tmp_path / "bad", make_events(2))
    (tmp_path / "bad" / "ledger.jsonl").write_text("nonsense\n")
    (tmp_path / "not-a-study").mkdir()
    found = {study.study_id: study for study in list_studies(tmp_path)}
    assert {name: study.status for name, study in found.items()} == {
        "done": "finished",
        "half": "interrupted",
        "bad": "damaged",
    }
    assert found["done"].winner == make_events(8)[-1]["winner"]
    assert found["half"].num_trials == 8
    assert "ledger.jsonl:1" in found["bad"].problem
    assert list_studies(tmp_path / "nowhere") == []


def test_unknown_study_names_the_nearest(tmp_path: Path) -> None:
    write_study(tmp_path / "digits-0123abcd", make_events(1))
    assert find_study(tmp_path, "digits-0123abcd") == tmp_path / "digits-0123abcd"
    assert find_study("/", str(tmp_path / "digits-0123abcd")) == tmp_path / "digits-0123abcd"
    with pytest.raises(StudyError, match="did you mean 'digits-0123abcd'"):
        find_study(tmp_path, "digits-0123abce")
    with pytest.raises(StudyError, match="none yet"):
        find_study(tmp_path / "nowhere", "x")
    with pytest.raises(StudyError, match="no study in"):
        study_header(tmp_path)
