"""Links, the state they are made from, and the page they lead to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from llp.errors import EnvironmentProblem, TrackingError
from llp.tracking.links import (
    SyncState,
    compare_link,
    deep_link,
    default_uri,
    read_state,
    study_link,
    write_state,
)
from llp.tracking.ui import base_url, check_port, start_ui

ROOT = Path(__file__).resolve().parent.parent
STATE = SyncState("http://host:5000", "llp/x", "7", "x-1", "key", "parent", {"t000": "r0"}, 9)


def query(link: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(link.replace("/#/", "/")).query)


def test_deep_link_shows_the_trials_of_one_study_sorted_and_charted() -> None:
    link = deep_link("http://127.0.0.1:5000/", "7", "digits-0123abcd")
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?searchFilter=")
    assert query(link) == {
        "searchFilter": ["tags.`llp.study_id` = 'digits-0123abcd' and tags.`llp.kind` = 'trial'"],
        "orderByKey": ["metrics.`final/score`"],
        "orderByAsc": ["false"],
        "compareRunsMode": ["CHART"],
        "workflowType": ["machine_learning"],
    }


def test_quotes_in_a_name_cannot_end_the_filter() -> None:
    (found,) = query(deep_link("http://h", "1", 'it\'s "so" & #'))["searchFilter"]
    assert found.startswith('tags.`llp.study_id` = "it\'s so & #" and ')


def test_compare_link_lists_runs_and_experiment() -> None:
    link = compare_link("http://h", "7", ["a", "b"])
    found = query(link)
    assert json.loads(found["runs"][0]) == ["a", "b"]
    assert json.loads(unquote(found["experiments"][0])) == ["7"]


def test_state_reads_back_and_a_lost_or_torn_one_is_none(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow_sync.json"]
    text = (tmp_path / "mlflow_sync.json").read_text()
    for damaged in (text[:20], "[]", json.dumps({**STATE.__dict__, "later": 1})):
        (tmp_path / "mlflow_sync.json").write_text(damaged)
        assert read_state(tmp_path) is None
    with pytest.raises(TrackingError, match=r"mlflow_sync\.json"):
        write_state(tmp_path / "nowhere", STATE)


def test_study_link_needs_a_page_to_lead_to(tmp_path: Path) -> None:
    assert study_link(tmp_path) is None
    write_state(tmp_path, STATE)
    assert study_link(tmp_path) == deep_link("http://host:5000", "7", "x-1", study_key="key")
    write_state(tmp_path, SyncState(**{**STATE.__dict__, "uri": default_uri(tmp_path)}))
    assert study_link(tmp_path) is None
    assert str(study_link(tmp_path, "http://h")).startswith("http://h/#/experiments/7/")


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port} on 127.0.0.1") as caught:
            start_ui("sqlite:///x.db", port=port)
    assert "--port" in str(caught.value)
    check_port("127.0.0.1", port)
    with pytest.raises(EnvironmentProblem, match="port 70000"):
        check_port("127.0.0.1", 70000)


def test_server_uri_needs_no_page_of_ours() -> None:
    with pytest.raises(EnvironmentProblem, match="open it in a browser"):
        start_ui("http://mlflow.example:5000")
    assert base_url("0.0.0.0", 5000) == "http://127.0.0.1:5000"


@pytest.mark.slow
def test_page_that_does_not_come_up_says_why() -> None:
    with pytest.raises(EnvironmentProblem, match="did not start"):
        start_ui("nonsense://x", port=0)


def test_only_the_tracker_imports_mlflow() -> None:
    """A driver or command that prints a link must not pay seconds and 200 MB for it."""
    code = (
        "import sys, llp.tracking.ledger, llp.tracking.links, llp.tracking.shipper, "
        "llp.tracking.ui, llp.tracking.mlflow_rows\n"
        "print(sorted({'mlflow', 'torch', 'ray', 'pandas'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"
