"""Tell whether code has changed: digests of source files, without their comments and docstrings.

A run keeps the digest of every file that decides one of its numbers, so that an edited method is not taken for the
method that made a run. A file is read once, when the program is imported: what is edited later does not run.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # nano_opd/
# Files that decide no number: they refuse, save, name or show. The rest of system/ draws, samples, scales or averages.
# config.py is among that rest: the response cap is made there.
LEFT_OUT = (
    "nano_opd/checks.py",
    "nano_opd/system/checkpoint.py",
    "nano_opd/system/console.py",
    "nano_opd/system/endings.py",
    "nano_opd/system/folder.py",
    "nano_opd/system/libraries.py",
    "nano_opd/system/memory.py",
    "nano_opd/system/report.py",
    "nano_opd/system/signals.py",
    "nano_opd/system/sources.py",
    "nano_opd/system/threads.py",
)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Drop a statement that is only a string; a docstring is one."""
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return node


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file without docstrings, as the file was when it was first asked for."""
    return _WithoutDocstrings().visit(ast.parse(path.read_bytes()))


def digest_of_tree(node: ast.AST) -> str:
    """Return 12 hexadecimal digits that stand for a syntax tree.

    The same file has the same digest each time on one machine. Another version of Python may write a tree differently.
    """
    text = ast.unparse(node)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def digest(path: str | Path) -> str:
    """Return the digest of a file."""
    return digest_of_tree(tree(Path(path).resolve()))


def digest_of_function(function: Callable) -> str:
    """Return the digest of a function as it was imported; of its bytecode, where no file has its source."""
    try:
        file = tree(Path(inspect.getsourcefile(function)).resolve())
    except (OSError, TypeError, SyntaxError):
        file = ast.Module([], [])
    for node in ast.walk(file):
        if isinstance(node, ast.FunctionDef):
            name = node.name
            first_line = min(part.lineno for part in (node, *node.decorator_list))
        elif isinstance(node, ast.Lambda):
            name = "<lambda>"
            first_line = node.lineno
        else:
            continue
        if first_line == function.__code__.co_firstlineno and name == function.__name__:
            return digest_of_tree(node)
    return hashlib.sha256(function.__code__.co_code).hexdigest()[:12]


def digests(program: str | Path) -> dict[str, str]:
    """Return the digest of a program and of each file of nano_opd that it imports, itself or through another.

    The keys are the names of the files. Those of LEFT_OUT are not among them, nor what they alone import.
    """
    program = Path(program).resolve()
    found = {program.name: program}
    waiting = [program]
    while waiting:
        for path in _imported(waiting.pop()):
            name = path.relative_to(PACKAGE.parent).as_posix()
            if name not in found and name not in LEFT_OUT:
                found[name] = path
                waiting.append(path)
    return {name: digest(path) for name, path in sorted(found.items())}


def _imported(path: Path) -> Iterator[Path]:
    """Yield the files of nano_opd that a file imports."""
    package = ""
    if path.is_relative_to(PACKAGE):
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level  # of a relative import
            if node.module is not None:
                module += node.module
            module = resolve_name(module, package)
            names = [module]
            names += [f"{module}.{alias.name}" for alias in node.names]  # each may be a module too
        for name in names:
            file = PACKAGE.parent / (name.replace(".", "/") + ".py")
            if name.startswith(f"{PACKAGE.name}.") and file.exists():
                yield file
