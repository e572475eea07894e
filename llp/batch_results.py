"""Table and page of a batch from its ledger alone: no dataset, no Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llp.comparing.table import runs_table, write_parquet
from llp.errors import StudyError
from llp.reporting.batch_page import answer_text, write_batch_page
from llp.tracking.ledger import read_events

PAGE = "report.html"
TABLE = "runs.parquet"


@dataclass(frozen=True)
class BatchResult:
    """What came of a batch.

    Attributes:
        folder: Of the batch.
        page: The page.
        table: The parquet file, one row a training.
        answer: What the page says first.
        outcomes: Outcome -> number of full trainings that ended so, as the table has them.
    """

    folder: Path
    page: Path
    table: Path
    answer: str
    outcomes: Mapping[str, int]


def write_results(folder: Path, *, ending: bool = False) -> BatchResult:
    """Writes page and table of a batch from its ledger: no dataset, no Ray, no torch.

    Args:
        folder: Of the batch.
        ending: Its driver is about to write the last line, so the page is that of a finished batch.

    Raises:
        StudyError: There is no batch in `folder`.
        EnvironmentProblem: A file cannot be written.
    """
    events = list(read_events(folder))
    if not any(event["event"] == "batch" for event in events):
        raise StudyError(f"{folder} holds no batch")
    if ending:
        events.append({**events[-1], "event": "finished"})
    table = runs_table(events)
    parquet = write_parquet(table, folder / TABLE)
    page = write_batch_page(events, table, folder / PAGE)
    trained = table[table["kind"] != "candidate"]
    outcomes = {str(k): int(n) for k, n in trained["outcome"].value_counts().items()}
    return BatchResult(folder, page, parquet, answer_text(events, table), outcomes)
