"""All pages of a report matrix: three documents and a text file a configuration, and the index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llp.reporting import formats
from llp.reporting.documents import STATUS, Document, head_links, state_sentence
from llp.reporting.html import page, write_page
from llp.reporting.index_page import document_rows, index_document, notes
from llp.reporting.log_page import MAX_LINES, log_phases, log_text
from llp.reporting.runs import DOCUMENTS, Entry, file_name
from llp.reporting.test_page import test_document
from llp.reporting.training_page import training_document

STYLE = "pages.css"


def write_matrix(
    entries: Sequence[Entry], folder: Path, *, name: str, title: str = "", file: str = ""
) -> list[Path]:
    """Writes every page and returns their paths, the index first.

    The same studies give the same bytes.

    Args:
        entries: The configurations, in the order of the definition.
        folder: Where the pages go; made when missing.
        name: Of the matrix.
        title: Heading of the index; made from the name when empty.
        file: The definition, named on the index.

    Raises:
        EnvironmentProblem: A file cannot be written.
    """
    written = []
    for entry in entries:
        for document, content in documents(entry).items():
            written.append(write_page(content, folder / file_name(entry, document)))
    index = index_html(entries, name=name, title=title, file=file)
    return [write_page(index, folder / "index.html"), *written]


def answer_text(entries: Sequence[Entry]) -> str:
    """What the index says first, for a terminal."""
    found = index_document(entries)
    return " ".join(filter(None, (found.headline, found.sure))).replace(formats.NBSP, " ")


def documents(entry: Entry) -> dict[str, str]:
    """The three pages of a configuration, and the log as `text`."""
    pages = {document: document_html(entry, document) for document, _ in DOCUMENTS}
    return {**pages, "text": log_text(entry)}


def document_html(entry: Entry, document: str) -> str:
    """One of the three pages of a configuration: `training`, `test` or `log`."""
    if document == "log":
        return _log(entry)
    made = training_document(entry) if document == "training" else test_document(entry, "")
    return _document(entry, document, made)


def index_html(entries: Sequence[Entry], *, name: str, title: str = "", file: str = "") -> str:
    """The index as HTML."""
    return page(
        "matrix.html",
        title=formats.short(title or f"Report matrix {name}", 200),
        extra_style=STYLE,
        kicker=f"report matrix {formats.short(name, 80)} · "
        f"{formats.plural(len(entries), 'configuration')} · {formats.short(file, 200)}",
        document=index_document(entries),
        rows=document_rows(entries),
        notes=notes(entries),
        documents=DOCUMENTS,
        file_name=file_name,
    )


def _document(entry: Entry, kind: str, document: Document) -> str:
    return page(
        "document.html",
        title=f"{formats.short(entry.name, 80)}: {dict(DOCUMENTS)[kind]}",
        extra_style=STYLE,
        kicker=_kicker(entry),
        links=head_links(entry, kind),
        state=state_sentence(entry) if entry.result is not None else "",
        document=document,
    )


def _log(entry: Entry) -> str:
    phases = log_phases(entry)
    shown = sum(len(phase.lines) for phase in phases)
    total = log_text(entry).count("\n") - 1
    return page(
        "log.html",
        title=f"{formats.short(entry.name, 80)}: training log",
        extra_style=STYLE,
        kicker=_kicker(entry),
        links=head_links(entry, "log"),
        state=state_sentence(entry),
        status=STATUS[entry.status],
        phases=phases,
        text_file=file_name(entry, "text"),
        omitted=total - shown if shown == MAX_LINES else 0,
    )


def _kicker(entry: Entry) -> str:
    names = []
    for section in ("dataset", "model"):
        part = entry.spec.get(section)
        if isinstance(part, dict):
            names.append(formats.short(part.get("name", ""), 60))
    return " · ".join([*names, f"the study {STATUS[entry.status]}"])
