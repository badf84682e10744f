"""Arithmetic with verifiable answers: problems, worked solutions, a verifier, and a split that never leaks.

    prompt     "457+068="                            both operands zero-padded to the same number of digits
    solution   "7+8=15 5+6=12 4+0=05 #0525"          one column a∘b=cd per digit, right to left: c is the carry (or the
                                                     borrow) out and d the digit, the carry of the column before it
                                                     included; then # and the answer

Prompts and solutions of one task and size all have the same length. The verifier reads the answer and nothing else.
"""

import re
from typing import NamedTuple

import numpy as np

HELD_OUT_FRACTION = 0.1
MAX_DIGITS = 8


class Problem(NamedTuple):
    """One problem: operands a and b of so many digits, and the name of the task that joins them."""

    task: str
    digits: int
    a: int
    b: int


class Add:
    """a + b."""

    symbol = "+"

    def operands(self, rng, size, digits):
        """Two int64 arrays (size,), uniform over the task's problems."""
        return rng.integers(10**digits, size=(2, size))

    def column(self, x: int, y: int, carry: int) -> tuple[int, int]:
        """(carry out, digit) of one column."""
        return divmod(x + y + carry, 10)

    def answer(self, a: int, b: int) -> int:
        """The value that the verifier asks for."""
        return a + b


class Sub:
    """a − b with a ≥ b; the carry is a borrow."""

    symbol = "-"

    def operands(self, rng, size, digits):
        """The larger operand first, so that no answer is negative."""
        return np.sort(rng.integers(10**digits, size=(2, size)), axis=0)[::-1]

    def column(self, x: int, y: int, carry: int) -> tuple[int, int]:
        """(borrow, digit) of one column."""
        difference = x - y - carry
        return int(difference < 0), difference % 10

    def answer(self, a: int, b: int) -> int:
        """The value that the verifier asks for."""
        return a - b


class Mul:
    """a · b with a single digit b, which every column repeats."""

    symbol = "*"

    def operands(self, rng, size, digits):
        """n digits times one digit."""
        return np.stack([rng.integers(10**digits, size=size), rng.integers(10, size=size)])

    def column(self, x: int, y: int, carry: int) -> tuple[int, int]:
        """(carry out, digit) of one column."""
        return divmod(x * y + carry, 10)

    def answer(self, a: int, b: int) -> int:
        """The value that the verifier asks for."""
        return a * b


# A new task is one such class and one entry here.
TASKS = {"add": Add(), "sub": Sub(), "mul": Mul()}
TASK_NAMES = [*TASKS, "mix"]


def prompt_length(digits: int) -> int:
    """Characters of a prompt."""
    return 2 * digits + 2


def solution_length(digits: int) -> int:
    """Tokens of a worked solution, its EOS included."""
    return 7 * digits + 1 + (digits + 1) + 1


def is_held_out(task: str, a, b) -> np.ndarray:
    """Which side of the one split a problem is on: a hash of the task and the unordered pair of operand values.

    The side depends neither on the number of digits nor on any run's seed, so a∘b, b∘a and their zero-padded versions
    can never face each other across the split.
    """
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    low, high = np.minimum(a, b), np.maximum(a, b)
    z = (np.uint64(list(TASKS).index(task)) * np.uint64(10**8) + low) * np.uint64(10**8) + high
    with np.errstate(over="ignore"):  # splitmix64's finaliser (Steele et al. 2014): arithmetic modulo 2⁶⁴
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z < np.uint64(int(HELD_OUT_FRACTION * 2**64))


def sample_problems(
    task: str, digits: int, size: int, rng: np.random.Generator, held_out: bool = False
) -> list[Problem]:
    """`size` problems drawn uniformly, with replacement, from one side of the split; "mix" draws its task first.

    Raises ValueError for an unknown task or a number of digits outside 1 … 8.
    """
    if task not in TASK_NAMES:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASK_NAMES)}")
    if not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"digits must lie in 1 … {MAX_DIGITS}, not {digits}")
    names = np.array(list(TASKS) if task == "mix" else [task])
    chosen = names[rng.integers(len(names), size=size)]
    problems: list[Problem | None] = [None] * size
    for name in names:
        slots = np.flatnonzero(chosen == name)
        while len(slots):  # draw for every open slot, keep what falls on the right side
            a, b = TASKS[name].operands(rng, len(slots), digits)
            keep = is_held_out(name, a, b) == held_out
            for slot, x, y in zip(slots[keep], a[keep].tolist(), b[keep].tolist()):
                problems[slot] = Problem(str(name), digits, x, y)
            slots = slots[~keep]
    return problems


def prompt(problem: Problem) -> str:
    """ "457+068=" """
    return f"{problem.a:0{problem.digits}d}{TASKS[problem.task].symbol}{problem.b:0{problem.digits}d}="


def steps(problem: Problem) -> list[str]:
    """The worked solution in its steps: one column per digit, then the marked answer."""
    task, carry, columns = TASKS[problem.task], 0, []
    for i in range(problem.digits):
        x = problem.a // 10**i % 10
        y = problem.b if problem.task == "mul" else problem.b // 10**i % 10
        carry, digit = task.column(x, y, carry)
        columns.append(f"{x}{task.symbol}{y}={carry}{digit} ")
    return [*columns, f"#{task.answer(problem.a, problem.b):0{problem.digits + 1}d}"]


def solution(problem: Problem) -> str:
    """The whole worked solution, without its EOS."""
    return "".join(steps(problem))


def verify(problem: Problem, response: str) -> bool:
    """True when the response ends in # and the right number. How it got there is not looked at."""
    answer = re.search(r"#([0-9]+)$", response)
    return bool(answer) and int(answer[1]) == TASKS[problem.task].answer(problem.a, problem.b)


def first_broken_step(problem: Problem, response: str) -> str | None:
    """What went wrong first in a response, in words; None for the worked solution itself."""
    start = 0
    for column, expected in enumerate(steps(problem), 1):
        written = response[start : start + len(expected)]
        if expected[0] == "#":
            written = response[start:]
        if written != expected:
            where = "answer" if expected[0] == "#" else f"column {column}"
            return f"{where}: wrote {written!r}, should be {expected!r}"
        start += len(expected)
    return None
