"""A report matrix runs what is missing, leaves the finished alone, and draws from the folders."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from make_study import make_events
from study_runs import environment, events, killed_at, llp, signals_itself
from typer.testing import CliRunner

from llp import matrix
from llp.cli import app
from llp.errors import NoTrialSucceeded, SpecError, StudyError
from llp.spec import digest
from llp.spec.matrix import load_matrix
from llp.tracking.files import write_atomic
from llp.tracking.ledger import LEDGER_NAME, Ledger

TINY = """\
version: 1
name: tiny
base: digits
common:
  seed: 3
  model: {name: mlp, options: {depth: 1}}
  training: {epochs: 3}
  tier1: {scheduler: fifo, num_trials: 6, stop_rules: []}
  tier2: {top_k: 1, metrics: [sam_sharpness], refinements: [], num_examples: 64}
  verification: {top_k: 2, num_seeds: 2}
  resources: {num_cpus: 1, max_concurrent: 1}
  tracking: {mlflow: false}
configurations:
  tiny_10: {tier1: {data_fractions: [0.1]}}
  tiny_40: {tier1: {data_fractions: [0.4]}}
  tiny_multi: {tier1: {scheduler: asha, reduction_factor: 2, data_fractions: [0.1, 0.4]}}
"""
NAMES = ["tiny_10", "tiny_40", "tiny_multi"]
WITHOUT = """\
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "ray", "mlflow", "optuna") or (
            name == "sklearn.datasets"
        ):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Blocked())
from llp.cli import main
main()
"""


def write(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def made_up(folder: Path, found: matrix.Matrix, name: str, *, until: str = "") -> Path:
    """A study folder of configuration `name` with a made-up ledger of the right definition."""
    spec = found.configurations[name]
    study = folder / "llp_studies" / name
    header, *rest = make_events(**({"until": until} if until else {}))
    payload = {k: v for k, v in header.items() if k not in ("seq", "time", "event")}
    plain = spec.model_dump(mode="json")
    payload |= {"study_id": name, "spec": plain, "spec_digest": digest(spec)}
    with Ledger.create(study, **payload) as ledger:
        for event in rest:
            ledger.append(
                event["event"],
                **{k: v for k, v in event.items() if k not in ("seq", "time", "event")},
            )
    return study


def nobody_runs(*arguments: object) -> None:
    raise AssertionError("nothing should run")


@pytest.fixture
def found(tmp_path, monkeypatch) -> matrix.Matrix:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "_run_all", nobody_runs)
    return load_matrix(write(tmp_path))


def watch(name: str, number: int, total: int):
    raise AssertionError("nothing should be shown")


def test_finished_studies_are_left_alone(tmp_path, found):
    for name in NAMES:
        made_up(tmp_path, found, name)
    assert matrix.run(found, watch) == {}
    assert {study.status for study in matrix.look(found).values()} == {"finished"}
    pages, answer = matrix.write_pages(found)
    assert pages[0] == Path("reports/out/tiny/index.html")
    assert len(pages) == 13
    assert "Probing on" in answer


def test_only_what_is_not_finished_is_run_and_only_what_was_asked_for(tmp_path, found, monkeypatch):
    made_up(tmp_path, found, "tiny_10")
    made_up(tmp_path, found, "tiny_40", until="tier1")
    asked: list[list[str]] = []
    monkeypatch.setattr(matrix, "_run_all", lambda m, todo, *rest: asked.append(list(todo)))
    matrix.run(found, watch)
    matrix.run(found, watch, only=["tiny_multi", "tiny_10"])
    assert asked == [["tiny_40", "tiny_multi"], ["tiny_multi"]]
    with pytest.raises(SpecError, match="did you mean 'tiny_40'"):
        matrix.run(found, watch, only=["tiny_41"])


def test_a_study_of_another_definition_is_never_taken_for_this_one(tmp_path, found):
    study = made_up(tmp_path, found, "tiny_40")
    before = (study / LEDGER_NAME).read_bytes()
    other = load_matrix("tiny.yaml", ["tier1.num_trials=5", "training.epochs=9"])
    with pytest.raises(StudyError) as caught:
        matrix.run(other, watch)
    text = str(caught.value)
    assert "tiny_40" in text
    assert "tier1.num_trials (6 and 5)" in text
    assert "training.epochs (3 and 9)" in text
    assert "--render-only" in text
    assert (study / LEDGER_NAME).read_bytes() == before
    pages, _ = matrix.write_pages(other)
    assert "tier1.num_trials (6 and 5)" in pages[0].read_text(encoding="utf-8")


def test_what_does_not_change_results_is_no_other_definition(tmp_path, found):
    for name in NAMES:
        made_up(tmp_path, found, name)
    same = load_matrix("tiny.yaml", ["resources.num_cpus=2", "dataset.root=/x", "tracking.uri="])
    assert matrix.run(same, watch) == {}


def test_a_study_from_before_a_setting_existed_is_still_the_same_study(tmp_path, found):
    study = made_up(tmp_path, found, "tiny_10")
    first, rest = (study / LEDGER_NAME).read_text(encoding="utf-8").split("\n", 1)
    header = json.loads(first)
    del header["spec"]["training"]["label_smoothing"]
    header["spec_digest"] = "0" * 64
    (study / LEDGER_NAME).write_text(json.dumps(header) + "\n" + rest, encoding="utf-8")
    assert matrix.look(found)["tiny_10"].changed == ()
    assert matrix.run(found, watch, only=["tiny_10"]) == {}


def test_a_damaged_ledger_stops_a_run_and_is_shown_by_the_pages(tmp_path, found):
    study = made_up(tmp_path, found, "tiny_10")
    lines = (study / LEDGER_NAME).read_bytes().split(b"\n")
    lines[4] = b"{"
    (study / LEDGER_NAME).write_bytes(b"\n".join(lines))
    with pytest.raises(StudyError, match="damaged line"):
        matrix.run(found, watch)
    pages, _ = matrix.write_pages(found)
    assert "damaged" in pages[0].read_text(encoding="utf-8")


def test_a_study_that_another_driver_runs_or_that_failed_is_told_and_passed_over(
    tmp_path, found, monkeypatch
):
    made_up(tmp_path, found, "tiny_10", until="tier1")
    failed = made_up(tmp_path, found, "tiny_40", until="tier1")
    with Ledger.open(failed) as ledger:
        ledger.append("failed", reason="everything diverged")
    asked: list[str] = []
    monkeypatch.setattr(matrix, "_run_all", lambda m, todo, *rest: asked.extend(todo))
    held = subprocess.Popen(  # the lock is the process's: another process must hold it
        [
            sys.executable,
            "-c",
            "import sys\nfrom llp.tracking.ledger import Ledger\n"
            "ledger = Ledger.open(sys.argv[1])\nprint('held', flush=True)\nsys.stdin.read()",
            str(tmp_path / "llp_studies" / "tiny_10"),
        ],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert held.stdout.readline() == b"held\n"
        problems = matrix.run(found, watch)
    finally:
        held.kill()
        held.communicate()
    assert asked == ["tiny_multi"]
    assert isinstance(problems["tiny_10"], StudyError)
    assert isinstance(problems["tiny_40"], NoTrialSucceeded)
    assert "everything diverged" in str(problems["tiny_40"])


def test_an_option_of_a_matrix_is_refused_for_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "some_study", "--render-only"])
    assert done.exit_code == 2
    assert "report matrix" in done.stderr
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["report", "reports/cifar11.yaml"])
    assert done.exit_code == 2
    assert "did you mean 'reports/cifar10.yaml'" in done.stderr


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def ended(ledger: Path) -> list[str]:
    return [e["end"]["job_id"] for e in events(ledger) if e["event"] == "job_end"]


@pytest.mark.slow
def test_a_killed_matrix_goes_on_where_it_was_and_its_pages_need_the_folders_only(tmp_path):
    write(tmp_path)
    studies = tmp_path / "llp_studies"
    ledgers = {name: studies / name / LEDGER_NAME for name in NAMES}
    killed_at(ledgers["tiny_40"], 12, "report", "tiny.yaml", folder=tmp_path)
    first = ledgers["tiny_10"].read_bytes()
    before = ended(ledgers["tiny_40"])
    assert not ledgers["tiny_multi"].exists()

    shown = llp("report", "tiny.yaml", "--render-only", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "tiny_40: interrupted" in shown.stderr
    assert "tiny_multi: missing" in shown.stderr
    index = (tmp_path / "reports/out/tiny/index.html").read_text(encoding="utf-8")
    assert "interrupted" in index
    assert "missing" in index

    done = llp("report", "tiny.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["name"] for r in rows if r["event"] == "configuration"] == NAMES[1:]
    assert {c["status"] for c in rows[-1]["configurations"].values()} == {"finished"}
    assert ledgers["tiny_10"].read_bytes() == first
    after = ended(ledgers["tiny_40"])
    assert after[: len(before)] == before
    assert len(after) == len(set(after))
    assert len(rows[-1]["pages"]) == 13

    out = tmp_path / "reports" / "out" / "tiny"
    written = digests(out)
    assert max(path.stat().st_size for path in out.iterdir()) < 2_000_000
    again = subprocess.run(
        [sys.executable, "-c", WITHOUT, "report", "tiny.yaml", "--render-only", "--out", "o/p/q"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "o" / "p" / "q") == written  # as deep, so the links are the same
    same = llp("report", "tiny.yaml", "--render-only", "--quiet", folder=tmp_path)
    assert same.stdout.strip() == "reports/out/tiny/index.html"
    assert digests(out) == written

    # The same trial on the same images is the same training in two studies, to the bit.
    finals: dict[tuple[str, int], set[float]] = {}
    for name in ("tiny_40", "tiny_multi"):
        for event in events(ledgers[name]):
            if event["event"] == "point" and event["kind"] == "probe":
                point = event["point"]
                if point["data_fraction"] == 0.4 and point["epoch"] == 3:
                    finals.setdefault((event["trial_id"], 3), set()).add(point["validation_loss"])
    assert all(len(values) == 1 for values in finals.values())
    done = llp("report", "tiny.yaml", "--set", "training.epochs=4", folder=tmp_path)
    assert done.returncode == 4
    assert "training.epochs (3 and 4)" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_everything_and_names_the_command_that_goes_on(tmp_path):
    write(tmp_path)
    ledger = tmp_path / "llp_studies" / "tiny_40" / LEDGER_NAME
    words = ("llp.cli", "report", "tiny.yaml", "--only", "tiny_40")
    stopped = subprocess.run(
        signals_itself("SIGINT", f"ledger={ledger}", 12, *words),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    err = stopped.stderr
    assert stopped.returncode == 130, err
    assert events(ledger)[-1]["event"] != "finished"
    last = err.strip().splitlines()[-1]
    assert last.strip() == "llp report tiny.yaml --only tiny_40"
    done = llp(*last.split()[1:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny_10: missing" in done.stderr


@pytest.mark.slow
def test_a_configuration_in_which_everything_diverges_does_not_stop_the_others(tmp_path):
    text = TINY.replace("epochs: 3}", "epochs: 3}\n  search_space: {learning_rate: 1e30}").replace(
        "tiny_40: {tier1:", "tiny_40: {tier2: {top_k: 0}, tier1:"
    )
    write(tmp_path, text)
    done = llp("report", "tiny.yaml", "--quiet", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    for name in NAMES:
        assert f"{name}: no configuration produced a usable result" in done.stderr
    index = (tmp_path / "reports/out/tiny/index.html").read_text(encoding="utf-8")
    assert index.count(">failed<") == 3
    again = llp("report", "tiny.yaml", folder=tmp_path)
    assert again.returncode == 3
    assert "failed before" in again.stderr


def test_pages_are_replaced_whole(tmp_path, found):
    write_atomic(tmp_path / "note.txt", "kept")
    made_up(tmp_path, found, "tiny_10")
    matrix.write_pages(found, tmp_path)
    matrix.write_pages(found, tmp_path)
    assert (tmp_path / "note.txt").read_text() == "kept"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
