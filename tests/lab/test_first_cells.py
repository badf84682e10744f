"""What `pip install -e .` brings is enough to begin a notebook."""

import os
import subprocess
import sys

from lab import ROOT

PROGRAM = """
import json, sys
for name in ("hypothesis", "nbclient", "nbformat", "pytest", "ruff", "scipy", "xdist"):
    sys.modules[name] = None  # an import of it fails
for path in sys.argv[1:]:
    cells = json.load(open(path, encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    exec(compile(first.replace("%matplotlib inline", ""), path, "exec"), {"__name__": "__main__"})
    print(path)
"""


def test_the_first_cell_of_every_notebook_runs_without_the_packages_of_development():
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    environment = os.environ | {"NANO_OPD_QUICK": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *notebooks],
        cwd=ROOT / "notebooks",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.endswith(".ipynb")] == notebooks
    assert len(notebooks) >= 6
