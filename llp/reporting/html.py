"""Pages as single HTML files that load nothing: style, script and figures are inside.

Every value from a study goes through jinja2's autoescape, figures through an XML serialiser, and
the content-security policy forbids the rest: no network, no images but embedded ones, and no script
but the table sorter, which is allowed by its hash. `page` and the partials in `templates/` are made
for more kinds of pages than the study report.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llp.errors import EnvironmentProblem
from llp.records import SearchResult
from llp.reporting import formats, palette
from llp.reporting.provenance import failure_groups, provenance
from llp.reporting.sections import cost_exhibit, study_sections
from llp.reporting.verdict import verdict


def write_report(result: SearchResult, path: Path) -> Path:
    """Writes the page of one study, whatever state the study is in.

    The same result gives the same bytes: nothing on the page depends on when or where it is made.

    Args:
        result: The study.
        path: The file to write or replace; its folder is made.

    Returns:
        `path`.

    Raises:
        EnvironmentProblem: The file cannot be written; an older one is left as it was.
    """
    return write_page(study_page(result), path)


def study_page(result: SearchResult) -> str:
    """The page of one study as HTML text."""
    return page(
        "study.html",
        title=formats.short(result.study_id, 120),
        study=result,
        verdict=verdict(result),
        cost=cost_exhibit(result),
        sections=study_sections(result),
        failures=failure_groups(result),
        provenance=provenance(result),
    )


def page(template: str, *, title: str, extra_style: str = "", **context: Any) -> str:
    """The template rendered inside the base page, with style, script and policy.

    Args:
        template: A file in `templates/` that extends `base.html`.
        title: Of the page.
        extra_style: A style sheet in `templates/` for this kind of page, beside the common one.
        **context: What the template needs.
    """
    script = _source("sort.js")
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            policy=content_security_policy(script),
            style=Markup(palette.css() + _source("style.css") + _source(extra_style)),
            script=Markup(script),
            **context,
        )
    )


def part(name: str, *arguments: Any) -> Markup:
    """What the macro `name` of `templates/parts.html` makes of its arguments."""
    return Markup(getattr(_environment().get_template("parts.html").module, name)(*arguments))


def content_security_policy(script: str) -> str:
    """A policy that allows inline style, embedded images and exactly this inline script."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def write_page(html: str, path: Path) -> Path:
    """Writes `html` to `path` in one step: readers see the old file or the whole new one.

    Raises:
        EnvironmentProblem: The file cannot be written.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(html.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise EnvironmentProblem(
            f"cannot write the report to {path}: {error.strerror or error}"
        ) from error
    return path


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("llp.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: Any) -> Any:
    """Values reach a template along many paths; nothing unprintable may survive any of them."""
    return (
        formats.clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
    )


@lru_cache
def _source(name: str) -> str:
    if not name:
        return ""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0].strip()
