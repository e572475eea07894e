"""What all commands share: arguments, answers, and failures turned into exit codes.

Standard output carries the answer, standard error what is said along the way.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llp.errors import DataError, LlpError, SpecError

EPILOG = """Exit codes:
  0  done;
  1  a bug in llp;
  2  bad input: file, option or data;
  3  the search ended and no trial succeeded;
  4  the machine or the study folder does not allow it;
  5  the search is done but MLflow has not received all of it: llp sync;
130  interrupted or stopped, everything finished is saved: llp resume;
137  of a followed job: killed from outside (128 + signal), the same.
Commands that follow a job of a cluster end with its exit code."""

BUG = "This is a bug in llp. Please report it with the lines above and the output of `llp doctor`."


class Commands(TyperGroup):
    """Turns every way to fail into one message and a documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; see `EPILOG` for the codes."""
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except LlpError as error:
            if debug:
                traceback.print_exc()
            explain(error)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                error.add_note(BUG)
                raise
            say(f"error: no space left on the disk ({error.filename or error}); what was finished")
            say("is saved: free some space, then `llp resume`")
            raise typer.Exit(4) from error
        except Exception as error:
            error.add_note(BUG)
            raise


File = Annotated[
    str, typer.Argument(metavar="FILE", help="experiment file, or a name from search_spaces/")
]
Study = Annotated[
    str | None,
    typer.Argument(
        metavar="[STUDY]", help="study id or folder; default: the newest", show_default=False
    ),
]
Root = Annotated[str, typer.Option("--root", help="folder that holds the study folders")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one value; may be repeated"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]
ROOT = "llp_studies"


def say(text: str) -> None:
    """One line for people, on standard error."""
    from llp import display

    display.say(sys.stderr, text)


def emit(event: Mapping[str, Any]) -> None:
    """One JSON line for machines, on standard output."""
    from llp.display import write_line

    write_line(sys.stdout, event)


def make_folder(path: Path) -> None:
    """Makes the folder that results will go into; before they are computed.

    Raises:
        DataError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write into the folder {path}: {error.strerror}") from error


def make_place(path: Path) -> None:
    """Makes the folder of a file to be written, and tries the file; before it is computed.

    Raises:
        DataError: The file cannot be written.
    """
    make_folder(path.parent)
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def explain(error: LlpError) -> None:
    """The error in words; for a wrong file with the source line and a caret under the place."""
    if isinstance(error, SpecError):
        from llp.spec import render

        say(render(error))
    else:
        say(f"error: {error}")
