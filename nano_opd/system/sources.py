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
# What decides no number: it refuses, saves, names or shows. The rest of system/ draws, samples, scales or averages.
# config.py is among that rest: the response cap is made there.
LEFT_OUT = (
    "checkpoint",
    "checks",
    "console",
    "endings",
    "folder",
    "libraries",
    "memory",
    "report",
    "signals",
    "sources",
    "threads",
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
    code = function.__code__
    try:
        nodes = ast.walk(tree(Path(inspect.getsourcefile(function)).resolve()))
    except (OSError, TypeError, SyntaxError):
        nodes = ()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            decorators = getattr(node, "decorator_list", [])
            first_line = min(part.lineno for part in (node, *decorators))
            if first_line == code.co_firstlineno and getattr(node, "name", "<lambda>") == function.__name__:
                return digest_of_tree(node)
    return hashlib.sha256(code.co_code).hexdigest()[:12]


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
            if name not in found and not (path.parent.name == "system" and path.stem in LEFT_OUT):
                found[name] = path
                waiting.append(path)
    return {name: digest(path) for name, path in sorted(found.items())}


def _imported(path: Path) -> Iterator[Path]:
    """Yield the files of nano_opd that a file imports."""
    inside = path.is_relative_to(PACKAGE)
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts) if inside else ""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = resolve_name(module, package)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            root, *parts = name.split(".")
            file = PACKAGE.joinpath(*parts)
            if root == PACKAGE.name and parts and file.with_suffix(".py").exists():
                yield file.with_suffix(".py")
