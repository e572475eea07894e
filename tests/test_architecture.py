"""The import table of the rooms, held against the code itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llp"

BASE = {"records", "protocols", "errors", "registry"}
MAY_IMPORT: dict[str, set[str]] = {
    "records": {"plain"},
    "plain": set(),
    "errors": set(),
    "protocols": {"records"},
    "registry": {"errors"},
    "spec": BASE,
    "workloads": BASE | {"spec"},
    "optim": BASE,
    "landscape": set(),
    "training": BASE | {"spec", "workloads", "optim"},
    "probing": BASE,
    "flatness": BASE | {"spec", "landscape", "optim", "workloads", "training"},
    "scoring": BASE,
    "cluster": BASE | {"spec", "probing"},
    "tracking": BASE,
    "comparing": BASE,
    "reporting": BASE | {"comparing"},
    "driver": BASE | {"probing", "tracking"},
    "surroundings": set(),
    "full_training": BASE
    | {
        "analysis",
        "driver",
        "reporting",
        "spec",
        "surroundings",
        "tracking",
        "training",
        "workloads",
    },
    "proxy_filter": BASE | {"driver", "spec"},
    "objectives": BASE | {"driver", "scoring", "spec"},
    "earlier_trials": BASE | {"spec", "tracking"},
    "meta_start": BASE | {"earlier_trials", "probing", "spec", "tracking"},
    "warm_start": BASE | {"driver", "earlier_trials", "meta_start", "spec"},
    "tie_break": BASE | {"driver", "flatness", "scoring", "spec"},
    "verification": BASE | {"driver", "scoring", "spec", "training"},
    "worker": BASE | {"spec", "workloads", "training", "flatness"},
    "pipeline": BASE
    | {
        "worker",
        "spec",
        "workloads",
        "training",
        "probing",
        "flatness",
        "scoring",
        "cluster",
        "tracking",
        "reporting",
        "driver",
        "surroundings",
        "tie_break",
        "verification",
        "warm_start",
        "objectives",
        "proxy_filter",
    },
    "api": BASE
    | {
        "spec",
        "optim",
        "training",
        "probing",
        "flatness",
        "scoring",
        "cluster",
        "tracking",
        "driver",
    },
    "progress": BASE,
    "display": BASE | {"progress", "reporting"},
    "views": BASE | {"spec", "tracking", "reporting", "progress", "display", "doctor", "pipeline"},
    "shell": BASE | {"spec", "display"},
    "cluster_commands": BASE | {"spec", "cluster", "shell"},
    "analyses": BASE | {"spec", "landscape", "workloads", "training", "tracking"},
    "analysis": BASE
    | {
        "analyses",
        "spec",
        "landscape",
        "training",
        "cluster",
        "tracking",
        "reporting",
        "surroundings",
    },
    "landscape_commands": BASE | {"analysis", "landscape_progress", "spec", "shell", "reporting"},
    "landscape_progress": BASE | {"shell", "display", "reporting"},
    "train_commands": BASE | {"full_training", "reporting", "shell", "spec", "tracking"},
    "doctor": BASE | {"spec", "tracking", "pipeline"},
    "matrix": BASE | {"spec", "workloads", "cluster", "pipeline", "tracking", "reporting"},
    "evidence": BASE
    | {
        "evidence_numbers",
        "evidence_strategies",
        "matrix",
        "spec",
        "scoring",
        "tracking",
        "reporting",
    },
    "evidence_numbers": BASE | {"scoring", "reporting"},
    "evidence_strategies": BASE | {"reporting"},
    "evidence_command": BASE | {"evidence", "matrix", "matrix_command", "spec", "shell"},
    "batch_worker": BASE | {"spec", "training", "worker", "workloads"},
    "batch_results": BASE | {"comparing", "reporting", "tracking"},
    "batch": BASE
    | {
        "batch_results",
        "batch_worker",
        "cluster",
        "driver",
        "pipeline",
        "spec",
        "tracking",
        "workloads",
    },
    "batch_command": BASE | {"batch", "batch_results", "shell", "spec", "tracking"},
    "matrix_command": BASE | {"matrix", "shell", "views", "display"},
    "curve_files": BASE | {"probing"},
    "score_tables": BASE | {"scoring", "spec", "tracking"},
    "score_commands": BASE | {"score_tables", "scoring", "shell"},
    "simulation": BASE | {"curve_files", "probing", "driver"},
    "simulate_command": BASE | {"simulation", "probing", "shell"},
    "full_forecast": BASE | {"probing"},
    "curve_commands": BASE | {"curve_files", "probing", "shell"},
    "__main__": {"cli"},
    "cli": BASE
    | {
        "spec",
        "tracking",
        "pipeline",
        "progress",
        "display",
        "views",
        "shell",
        "doctor",
        "cluster_commands",
        "landscape_commands",
        "train_commands",
        "curve_commands",
        "score_commands",
        "full_forecast",
        "evidence_command",
        "simulate_command",
        "matrix_command",
        "batch_command",
    },
}
HEAVY = {"torch", "torchvision", "ray", "mlflow", "optuna", "sklearn", "pandas", "scipy"}
FORBIDDEN_OUTSIDE: dict[str, set[str]] = {
    "records": HEAVY | {"numpy"},
    "plain": HEAVY | {"numpy"},
    "protocols": HEAVY | {"numpy"},
    "errors": HEAVY | {"numpy"},
    "registry": HEAVY | {"numpy"},
    "spec": HEAVY,
    "probing": HEAVY - {"scipy"},
    "scoring": {"torch", "ray", "mlflow", "optuna"},
    "comparing": {"torch", "ray", "mlflow", "optuna"},
    "reporting": {"torch", "ray", "mlflow", "optuna"},
    "landscape": HEAVY - {"torch", "scipy"},
    "optim": HEAVY - {"torch"},
}


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "llp":
                names = {alias.name for alias in node.names} - {"__version__"}  # no room
                found |= {f"llp.{name}" for name in names}
            else:
                found.add(node.module or "")
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is not in the table: say what it may import"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("llp.")}
    surprise = used - MAY_IMPORT[room] - {room}
    assert not surprise, f"{path.relative_to(ROOT)} imports {sorted(surprise)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_where_they_belong(path):
    roots = {name.split(".")[0] for name in imports(path)}
    surprise = roots & FORBIDDEN_OUTSIDE.get(room_of(path), set())
    assert not surprise, f"{path.relative_to(ROOT)} imports {sorted(surprise)}"


def test_each_outside_engine_has_one_door():
    doors = {
        "ray": {
            "llp/cluster/ray_tune.py",
            "llp/cluster/searchers.py",
            "llp/cluster/jobs.py",
            "llp/cluster/submission.py",
            "llp/cluster/landscape_points.py",
            "llp/simulation/peers.py",
        },
        "mlflow": {"llp/tracking/mlflow_tracker.py"},
        "optuna": {"llp/cluster/searchers.py", "llp/simulation/peers.py"},
    }
    for library, allowed in doors.items():
        users = {
            str(path.relative_to(ROOT))
            for path in FILES
            if library in {name.split(".")[0] for name in imports(path)}
        }
        assert users <= allowed, f"{library} is imported by {sorted(users - allowed)}"


def test_the_command_line_imports_nothing_heavy_at_the_top():
    light = (
        "cli",
        "batch_command",
        "cluster_commands",
        "landscape_commands",
        "shell",
        "views",
        "display",
    )
    for name in (*light, "progress", "doctor", "batch_command"):
        roots = {n.split(".")[0] for n in imports(PACKAGE / f"{name}.py", top_level_only=True)}
        assert not roots & (HEAVY | {"numpy", "matplotlib", "pydantic"}), name


def test_every_file_says_what_it_is_for():
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_no_file_is_too_long_to_read():
    for path in FILES:
        assert path.read_text().count("\n") <= 700, path.relative_to(ROOT)
