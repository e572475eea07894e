"""One page of a report matrix as plain parts; `templates/document.html` draws it."""

from __future__ import annotations

from dataclasses import dataclass

from llp.reporting import formats
from llp.reporting.exhibits import Section
from llp.reporting.provenance import Provenance
from llp.reporting.runs import DOCUMENTS, Entry, file_name

STATUS = {
    "missing": "has not been run",
    "running": "was still running when this page was written",
    "interrupted": "was interrupted and can be resumed",
    "finished": "finished",
    "failed": "failed",
    "damaged": "cannot be read",
}


@dataclass(frozen=True)
class Document:
    """A page.

    Attributes:
        figure: The big number, empty when there is none.
        headline: The answer in one sentence.
        sure: How sure, in one sentence.
        facts: `(label, value)` pairs.
        yaml: A configuration to copy; empty for none.
        yaml_title: What it is.
        yaml_note: How it is used.
        sections: With figures and tables.
        provenance: How to get the same again; None leaves the section out.
    """

    figure: str = ""
    headline: str = ""
    sure: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    yaml: str = ""
    yaml_title: str = ""
    yaml_note: str = "In an experiment file these fixed values take the place of the search space."
    sections: tuple[Section, ...] = ()
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Link:
    """A link in the head of a page; without `target` it is where the reader is."""

    label: str
    target: str = ""


def status_document(entry: Entry, document: str) -> Document:
    """The page of a configuration of which there is nothing to show, saying why."""
    names = dict(DOCUMENTS)
    return Document(
        headline=f"There is no {names[document]}: the study of {formats.clean(entry.name)} "
        f"{STATUS[entry.status]}.",
        sure=state_sentence(entry),
    )


def state_sentence(entry: Entry) -> str:
    """What is the matter with the study of a configuration; empty when all is well."""
    parts = []
    if entry.status == "missing":
        parts.append("The command that writes these pages runs what is missing.")
    if entry.status == "interrupted":
        parts.append("The study was interrupted; the command that writes these pages goes on.")
    if entry.status == "running":
        parts.append("The study was still running: these are its results so far.")
    if entry.status == "failed" and entry.result is not None:
        parts.append(f"The study failed: {formats.clean(entry.result.winner_reason)}")
    if entry.note:
        parts.append(formats.clean(entry.note))
    if entry.changed:
        parts.append(
            "It was run with another definition than the file holds now; then and now: "
            f"{formats.listed(list(entry.changed), 6)}."
        )
    return " ".join(parts)


def head_links(entry: Entry, here: str) -> tuple[Link, ...]:
    """Links from one page of a configuration to the index and to its other pages."""
    links = [Link("index", "index.html")]
    for document, name in DOCUMENTS:
        links.append(Link(name, "" if document == here else file_name(entry, document)))
    if entry.study_page:
        links.append(Link("the study's own page", entry.study_page))
    return tuple(links)
