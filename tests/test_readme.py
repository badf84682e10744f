"""What the READMEs say of options, columns, files, tests, commands and extensions is so."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import reproduce

from nano_opd.system import config, runs

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*/**/README.md")) if "out" not in path.parts
}
PAGES[ROOT / "README.md"] = README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE, SYSTEM = (PAGES[ROOT / "nano_opd" / folder / "README.md"] for folder in ("", "system"))
ALL = "\n".join(PAGES.values())


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading of a page, without its head."""
    section = page.split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r" (?<!\\)\| ", row.strip("|"))] for row in rows]


def test_the_glossary_has_every_column():
    assert [row[0].strip("`") for row in table(PACKAGE, "## A glossary of metrics.csv")] == runs.COLUMNS


@pytest.mark.parametrize(
    "folder, prefix, page, heading",
    [
        ("nano_opd", "", PACKAGE, "## Reading map"),
        ("nano_opd/exact", "exact/", PACKAGE, "## Reading map"),
        ("nano_opd/system", "", SYSTEM, "# The system"),
    ],
)
def test_every_file_is_on_the_map_of_its_folder(folder, prefix, page, heading):
    page = "\n" + page
    named = [name for row in table(page, heading) for name in re.findall(rf"`{prefix}(\w+\.py)`", row[0])]
    assert sorted(named) == sorted(p.name for p in (ROOT / folder).glob("*.py") if p.stem != "__init__")


def test_every_test_named_exists():
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py"))
    names = set(re.findall(r"`(test_\w+)`", ALL))
    assert len(names) > 5 and all(f"def {name}(" in tests for name in names)


def test_every_link_leads_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), (path, target)


def test_every_command_parses():
    commands = re.findall(r"python train\.py([^`#\n]*)", ALL)
    assert len(commands) > 10
    for command in commands:
        if "--help" not in command:
            assert isinstance(config.parse(shlex.split(command)), config.Config)


def test_every_option_is_in_a_readme_an_experiment_or_a_recipe_of_the_tests():
    """No option that nobody uses: each stands in some README, or in an arm of an experiment."""
    used = ALL + str(reproduce.EXPERIMENTS) + reproduce.QUICK + Path(reproduce.__file__).read_text(encoding="utf-8")
    unused = [name for name in vars(config.Config()) if f"--{name.replace('_', '-')}" not in used]
    assert unused == []


def test_every_experiment_and_script_named_exists():
    notebooks = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb"))
    commands = re.findall(r"python -m ([\w.]+)([\w ]*)", ALL + notebooks)
    assert len(commands) > 10
    for module, names in commands:
        assert (ROOT / "notebooks" / (module.replace(".", "/") + ".py")).exists()
        if module == "lab.reproduce":
            assert set(names.split()) <= set(reproduce.EXPERIMENTS)
    assert "python notebooks/" not in ALL + notebooks


@pytest.fixture
def extended(tmp_path):
    """A copy of the package with the README's new divergence, task and method at the ends of the files it names."""
    blocks = re.findall(r"```python\n(.*?)```", README.split("\n## Extend it\n")[1], re.S)
    shutil.copytree(ROOT / "nano_opd", tmp_path / "nano_opd")
    for name, block in zip(("divergences", "arithmetic", "methods"), blocks, strict=True):
        with open(tmp_path / "nano_opd" / f"{name}.py", "a", encoding="utf-8") as file:
            file.write(f"\n\n{block}")
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


CHECK = """
import sys, torch, train
from nano_opd import arithmetic, divergences
from nano_opd.methods import METHODS, Scored
x = torch.linspace(-6, 6, 99, dtype=torch.float64, requires_grad=True)
d = divergences.get("jeffreys")
assert d.f(torch.zeros(1)) == 0 and (d.f(x) >= 0).all()
torch.testing.assert_close(d.f(x), (x.exp() - 1) * x)
slope = torch.autograd.grad(d.f(x).sum(), x)[0]
torch.testing.assert_close(d.f_prime(x), slope / x.exp())
torch.testing.assert_close(d.w_f(x), slope - d.f(x))  # u f′ = df/dx

for a, b in ((457, 68), (999, 999), (0, 7)):
    p = arithmetic.Problem("double", 3, a, b)
    assert arithmetic.verify(p, arithmetic.solution(p)) and not arithmetic.verify(p, f"#{2 * a + b + 1}")
    assert arithmetic.solution(p).endswith(f"#{2 * a + b:04d}")
    assert len(arithmetic.solution(p)) + 1 == arithmetic.solution_length(3)

logp, mask = -torch.rand(4, 3, dtype=torch.float64), torch.arange(3) < torch.tensor([[3], [2], [1], [3]])
logp.requires_grad_()
scored = Scored(mask.long(), mask, logp, logp.detach(), -torch.rand(4, 3, dtype=torch.float64))
plain = dict(divergence="tv", gamma=0.0, variance="sampled", top_k=4, log_u_clip=0.0, normalize="batch")
of = lambda method, **options: torch.autograd.grad(METHODS[method].loss(scored, **options)[0], logp)[0]
torch.testing.assert_close(of("sign", normalize="batch"), 2 * of("opdplus", **plain))

small = "--steps 1 --batch-size 8 --teacher-steps 1 --student-steps 1 --eval-size 4 --digits 2 --task double --out-dir"
for chosen in (["opd", "--divergence", "jeffreys"], ["opdplus", "--divergence", "jeffreys"], ["sign"]):
    train.main([*small.split(), sys.argv[1], "--method", *chosen])
"""


def test_the_new_divergence_task_and_method_do_what_the_readme_says(extended):
    """In a process of its own, since they join the tables before the command line is made from them."""
    environment = os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECK, str(extended / "out")]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([*(extended / "out").glob("*double2*/metrics.csv")]) == 3
