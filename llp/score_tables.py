"""Tables of trials and their roles from files; the tables of studies.

A table is parquet or CSV, one row per trial. The roles are a small YAML file (keys of
`llp.scoring.Roles`): `hyperparameters: [..]`, `tier1: {column: higher|lower}`, `tier2: {column:
higher|lower|unknown}`, `study`, `target`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from llp.errors import DataError, Problem, SpecError, unknown
from llp.scoring import Roles, study_table
from llp.spec.source import parse, read
from llp.tracking.ledger import find_study, load_study, study_header


def read_table(path: Path) -> pd.DataFrame:
    """The table in a parquet or CSV file, as it is.

    Raises:
        DataError: The file cannot be read, or names a column twice.
    """
    try:
        table = pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(
            f"{path} is no parquet or CSV table: {str(error).splitlines()[0]}"
        ) from error
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise DataError(f"{path} has the column {repeated[0]!r} more than once")
    return table


def read_roles(path: Path) -> Roles:
    """The roles in a YAML file.

    Raises:
        SpecError: It is no YAML mapping, or has an unknown key or direction; with file and line.
    """
    data, places, found = parse(read(path, str(path)), str(path))
    if found:
        raise SpecError(found)
    if not isinstance(data, dict):
        raise SpecError([Problem("roles are a mapping of keys to columns", file=str(path))])
    try:
        return Roles.from_mapping(data)
    except SpecError as error:
        # A column's name may have dots of its own.
        raise SpecError(
            places.problem(tuple(problem.path.split(".", 1)), problem.message)
            for problem in error.problems
        ) from error


def check_roles(roles: Roles, table: pd.DataFrame, path: Path) -> None:
    """Holds roles against the table of a file.

    Raises:
        SpecError: See `Roles.check`; names the file.
    """
    try:
        roles.check(table)
    except SpecError as error:
        raise SpecError(
            replace(problem, file=problem.file or str(path)) for problem in error.problems
        ) from error


ENDINGS = (".parquet", ".csv")


def check_ending(path: Path) -> None:
    """Tells before any work that a name's ending says neither parquet nor CSV.

    Raises:
        SpecError: Names the nearest ending.
    """
    if path.suffix.lower() not in ENDINGS:
        raise SpecError(f"{path}: " + unknown("ending", path.suffix or "none", ENDINGS))


def check_writable(path: Path) -> None:
    """Tells before any work that a file cannot be written.

    Raises:
        DataError: It is a folder, or its folder does not exist and cannot be made, or is locked.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path} cannot be written: it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written: permission denied")


def write_text(text: str, path: Path) -> None:
    """Writes a text file, with its folder.

    Raises:
        DataError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror or error}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table with its index as parquet or CSV, by the name's ending.

    Raises:
        DataError: The index or a column cannot be written in that format, or the file not at all.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            table.to_csv(path)
        else:
            table.to_parquet(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def table_of_study(name: str, root: str) -> pd.DataFrame:
    """The trials of a study folder with its name in the column `study`.

    Raises:
        StudyError: There is no such study, or it is damaged.
    """
    folder = find_study(root, name)
    result = load_study(folder)
    return study_table(
        result.trials,
        result.profiles,
        result.verifications,
        num_validation=int(study_header(folder)["num_validation"]),
        study=folder.name,
        rungs=result.rungs,
    )
