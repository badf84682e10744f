"""What the README says of options, columns, files, tests and commands is so."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reproduce

from nano_opd import config, runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_option_table_is_the_configuration():
    said = {row[0].strip("`"): row[1].strip("`") for row in table("Options of train.py")}
    fields = dataclasses.fields(config.Config)
    assert said == {"--" + f.name.replace("_", "-"): "off" if f.default is False else str(f.default) for f in fields}


def test_the_glossary_has_every_column():
    assert [row[0].strip("`") for row in table("What a run leaves")] == runs.COLUMNS


def test_every_file_of_the_package_is_on_the_map():
    named = {name.split("/")[-1] for row in table("Reading map") for name in re.findall(r"`([\w/]+\.py)`", row[0])}
    assert named == {p.name for p in (ROOT / "nano_opd").glob("*.py") if p.stem != "__init__"} | {"train.py"}


def test_every_test_named_exists():
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 5 and all(f"def {name}(" in tests for name in names)


def test_every_command_parses():
    commands = re.findall(r"python train\.py([^`#\n]*)", README)
    assert len(commands) > 1
    for command in commands:
        if "--help" not in command:
            assert isinstance(config.parse(shlex.split(command)), config.Config)


def test_every_experiment_named_exists():
    for script, names in re.findall(r"python notebooks/(\w+)\.py([\w ]*)", README):
        assert (ROOT / "notebooks" / f"{script}.py").exists()
        assert set(names.split()) <= set(reproduce.EXPERIMENTS)


@pytest.fixture
def extended(tmp_path):
    """A copy of the package with the README's new divergence and new task in the places it names."""
    divergence, task = re.findall(r"```python\n(.*?)```", README.split("\n## Add a divergence, add a task\n")[1], re.S)[
        :2
    ]
    shutil.copytree(ROOT / "nano_opd", tmp_path / "nano_opd")
    for name, table_end, block in (
        ("divergences", "\n    ]\n}\n", divergence),
        ("arithmetic", '"mul": Mul()}\n', task),
    ):
        text = (path := tmp_path / "nano_opd" / f"{name}.py").read_text()
        assert text.count(table_end) == 1
        path.write_text(text.replace(table_end, f"{table_end}\n\n{block}\n\n"))
    return tmp_path


def test_the_new_divergence_and_the_new_task_do_what_the_readme_says(extended):
    """In a process of its own, since they join the tables before the command line is made from them."""
    check = """
import sys, torch, train
from nano_opd import arithmetic, config, divergences
x = torch.linspace(-6, 6, 99, dtype=torch.float64, requires_grad=True)
d = divergences.get("jeffreys")
assert d.f(torch.zeros(1)) == 0 and (d.f(x) >= 0).all()
torch.testing.assert_close(d.f(x), (x.exp() - 1) * x)
slope = torch.autograd.grad(d.f(x).sum(), x)[0]
torch.testing.assert_close(d.f_prime(x), slope / x.exp())
torch.testing.assert_close(d.unbiased(x), slope - d.f(x))  # u f′ = df/dx
for a, b in ((457, 68), (999, 999), (0, 7)):
    p = arithmetic.Problem("double", 3, a, b)
    assert arithmetic.verify(p, arithmetic.solution(p)) and not arithmetic.verify(p, f"#{2 * a + b + 1}")
    assert arithmetic.solution(p).endswith(f"#{2 * a + b:04d}")
    assert len(arithmetic.solution(p)) + 1 == arithmetic.solution_length(3)
small = "--steps 1 --batch-size 8 --teacher-steps 1 --student-steps 1 --eval-size 4 --digits 1 --task double --out-dir"
for method in ("opd", "opdplus"):
    train.main([*small.split(), sys.argv[1], "--method", method, "--divergence", "jeffreys"])
"""
    shutil.copy(ROOT / "train.py", extended)
    environment = os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", check, str(extended / "out")]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([*(extended / "out").glob("*jeffreys*double1*/metrics.csv")]) == 2
