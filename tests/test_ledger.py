"""The equation ledger: every address in it exists, and every estimator has one."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "nano_opd" / "README.md"
ESTIMATORS = ["opd", "opdplus", "gkd", "grpo", "opsd", "rlsd", "policy_gradient"]


def rows():
    """The cells of the ledger's table, without its head."""
    section = LEDGER.read_text(encoding="utf-8").split("\n## Equation ledger\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named(column):
    """The set of what stands in backquotes in a column; every row has at least one."""
    found = [re.findall(r"`([^`]+)`", row[column]) for row in rows()]
    assert all(found)
    return {name for names in found for name in names}


def test_every_row_has_five_cells():
    assert len(rows()) > 10
    assert all(len(row) == 5 and all(row) for row in rows())


def test_every_function_exists():
    for name in named(2):
        module, function = name.rsplit(".", 1)
        assert inspect.isfunction(getattr(importlib.import_module(f"nano_opd.{module}"), function, None)), name


def test_every_test_exists():
    for name in named(3):
        file, test = name.split("::")
        (path,) = (ROOT / "tests").rglob(file)  # in any room
        assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), name


def test_every_notebook_cell_exists():
    for name in named(4):
        number, cell = name.split("#")
        (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        ids = {c["id"] for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"}
        assert cell in ids, name


@pytest.mark.parametrize("module", ESTIMATORS)
def test_every_estimator_has_an_entry(module):
    members = inspect.getmembers(importlib.import_module(f"nano_opd.{module}"), inspect.isfunction)
    own = {name for name, f in members if f.__module__ == f"nano_opd.{module}" and not name.startswith("_")}
    assert own and {f"{module}.{name}" for name in own} <= named(2)
