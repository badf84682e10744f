"""Run tests on an edited copy of the package, to see that they can fail.

A fork server imports torch once. Every mutant is then a process of its own that imports the edited copy and runs the
tests that guard it, in a second or two.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SLOW_IMPORTS = [
    "torch",
    "torch.func",
    "torch.fx.experimental.symbolic_shapes",
    "hypothesis.strategies",
    "pytest",
    "tiktoken",
    "tqdm",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "scipy.stats",
    "torch.nn.parallel",
    "torch.utils.flop_counter",
]


def copy_package(folder: Path) -> None:
    """Copy what the tests import: the package, train.py, and the modules of notebooks/."""
    shutil.copytree(ROOT / "nano_opd", folder / "nano_opd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    for path in [*(ROOT / "notebooks").glob("*.py"), *(ROOT / "notebooks" / "lab").glob("*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def file_of(name: str) -> Path:
    """Return the file test_<name>.py, whichever room it is in."""
    (path,) = TESTS.rglob(f"test_{name}.py")
    return path


def run_suite(package_parent: str, file: str, expression: str) -> None:
    """Body of the process: run the tests of a file that match, with the package under package_parent.

    Exits with pytest's code, or 99 when it was not that package that was tested.
    """
    code = 99
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        sys.path[:0] = [package_parent, os.path.join(package_parent, "notebooks")]
        import lab

        import train  # it imports the package

        imported = [Path(module.__file__) for module in (train, train.sft, lab)]
        if all(path.is_relative_to(package_parent) for path in imported):
            options = ["-x", "-o", "addopts=", "-o", "pythonpath=", "--assert=plain", "-p", "no:cacheprovider"]
            options += ["--rootdir", package_parent]
            code = pytest.main([str(file_of(file)), "-k", expression, *options])
    finally:
        os._exit(code)


def exit_code_of_suite(package_parent: Path, file: str, expression: str) -> int:
    """Return pytest's exit code of the tests of a file that match, with the package under package_parent."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(SLOW_IMPORTS)
    else:  # Windows has none: there every mutant imports torch itself
        context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_suite, args=(str(package_parent), file, expression))
    process.start()
    process.join()
    return process.exitcode


def exit_code_on_the_mutant(package_parent: Path, file: str, old: str, new: str, guard: str) -> int:
    """Make one edit in the copy, and return the exit code of the tests that guard it.

    file   in nano_opd/
    old    what stands there exactly once, and new, what is put in its place
    guard  "<test file>: <the tests, as for -k>"
    """
    path = package_parent / "nano_opd" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    test_file, expression = guard.split(": ")
    return exit_code_of_suite(package_parent, test_file, expression)
