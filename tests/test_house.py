"""Imports run one way: a reader of a concept file never has to open the machinery."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nano_opd"
CONCEPT_FILES = sorted(PACKAGE.glob("*.py"))
METHOD_FILES = ("divergences", "policy_gradient", "opd", "opdplus", "gkd", "topk", "grpo", "rlsd", "opsd")
ALLOWED_IN_METHOD_FILES = {"torch"} | {f"nano_opd.{name}" for name in (*METHOD_FILES, "checks")}


def imported_modules(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, those inside its functions too.

    `from nano_opd import opd` counts as nano_opd.opd, and `from nano_opd.opd import advantage` as nano_opd.opd.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides where a name comes from"
            if node.module in ("nano_opd", "nano_opd.system", "nano_opd.exact"):
                modules |= {f"{node.module}.{name.name}" for name in node.names}
            else:
                modules.add(node.module)
    return modules


def is_within(module: str, package: str) -> bool:
    """Return whether a module is the package or lies in it."""
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", CONCEPT_FILES, ids=lambda path: path.stem)
def test_a_concept_file_imports_neither_the_machinery_nor_the_tools_of_proof(path):
    for module in imported_modules(path):
        assert not is_within(module, "nano_opd.system"), f"{path.name} imports {module}"
        assert not is_within(module, "nano_opd.exact"), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("exact/*.py")), ids=lambda path: path.stem)
def test_a_proof_does_not_rest_on_the_machinery(path):
    for module in imported_modules(path):
        assert not is_within(module, "nano_opd.system"), f"exact/{path.name} imports {module}"


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_method_file_knows_tensors_only(name):
    """It imports torch, Python's own modules, the other method files and the checks: no model, task or option."""
    for module in imported_modules(PACKAGE / f"{name}.py"):
        own = module.split(".")[0] in sys.stdlib_module_names
        allowed = any(is_within(module, package) for package in ALLOWED_IN_METHOD_FILES)
        assert own or allowed, f"{name}.py imports {module}"


def test_the_twins_differ_in_the_papers_correction_alone():
    """opd.py and opdplus.py are the same statements in one order, save a token's own term and the mean of that term."""
    differing = []
    opd = code_without_docstrings(PACKAGE / "opd.py")
    opdplus = code_without_docstrings(PACKAGE / "opdplus.py")
    for of_opd, of_opdplus in zip(opd, opdplus, strict=True):
        if of_opd != of_opdplus:
            differing.append((of_opd.strip(), of_opdplus.strip()))
    mean = "mean_over_vocabulary(student_logits, teacher_logits, divergence.{}, mask)"
    assert differing == [
        ("own = reward", "own = divergence.w_f(log_u)"),
        (f"return -{mean.format('weighted_f')}", f"return {mean.format('weighted_w_f')}"),
    ]


def code_without_docstrings(path: Path) -> list[str]:
    """Return the lines of a file's statements, without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.unparse(tree).splitlines()
