"""Arithmetic with verifiable answers: problems, worked solutions, a verifier, and a split that never leaks.

    prompt     "457+068="                            both operands zero-padded to the same number of digits
    solution   "7+8=15 5+6=12 4+0=05 #0525"          one column a∘b=cd per digit, right to left: c is the carry (or the
                                                     borrow) out and d the digit, the carry of the column before it
                                                     included; then # and the answer

Prompts and solutions of one task and size all have the same length. The verifier reads the answer and nothing else.

Self-distillation shows the same model more than the student sees. Its prompt opens with a slot of fixed width, so that
problem and response stand at the same positions whatever the slot holds:

    "___________ 457+068="    the student's: blank
    "151205#0525 457+068="    "work": carry and digit of every column, then the answer; solved as above
    "@_____#0525 457+068="    "cite": the answer alone; solved by "@#0525", a mark for copying it and skipping the work

Both references are valid and one is drawn at random, so no student without the slot can know which: what the teacher
says then depends on something that x does not determine, and that is the part of it that can leak.
"""

import os
import re
from typing import NamedTuple

import numpy as np

HELD_OUT_FRACTION = 0.1
MAX_DIGITS = 8
BLANK, CITE = "_", "@"
REFERENCES = ("work", "cite")


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
        """Two int64 arrays (size,) of uniform operands."""
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
        """Two uniform operands, the larger first, so that no answer is negative."""
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


def prompt_length(digits: int, slot: bool = False) -> int:
    """Characters of a prompt, without or with a reference slot and the space behind it."""
    return 2 * digits + 2 + (slot_length(digits) + 1 if slot else 0)


def slot_length(digits: int) -> int:
    """Characters of a reference: carry and digit of every column, # and the answer."""
    return 2 * digits + 1 + (digits + 1)


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
    """`size` problems with uniform operands, with replacement, from one side of the split; "mix" draws its task first.

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


def prompt(problem: Problem, slot: str | None = None) -> str:
    """ "457+068=", behind a reference slot if there is one. Raises ValueError for a slot of another width."""
    text = f"{problem.a:0{problem.digits}d}{TASKS[problem.task].symbol}{problem.b:0{problem.digits}d}="
    if slot is None:
        return text
    if len(slot) != slot_length(problem.digits):
        raise ValueError(f"slot {slot!r} must be {slot_length(problem.digits)} characters, or it shifts the response")
    return f"{slot} {text}"


def reference(problem: Problem, style: str) -> str:
    """What the slot holds: "work" or "cite", or "blank" for the student. Raises ValueError for another style."""
    *columns, answer = steps(problem)
    if style == "work":
        return "".join(column[-3:-1] for column in columns) + answer
    if style == "cite":
        return CITE.ljust(2 * problem.digits, BLANK) + answer
    if style == "blank":
        return BLANK * slot_length(problem.digits)
    raise ValueError(f"unknown reference {style!r}; choose from {', '.join(REFERENCES)}, blank")


def draw_references(problems: list[Problem], group_size: int, rng: np.random.Generator, which: str) -> list[str]:
    """What the teacher reads in the slot of each problem: one reference, of a style drawn at random, per group.

    problems  the group_size copies of each problem standing together
    which     "true"; "work": always in that style, so that x determines r; "shuffled": the next group's, valid but of
              another problem; "none": blank, as the student's
    """
    groups = problems[::group_size]
    styles = rng.choice(REFERENCES, len(groups)).tolist()
    if which == "shuffled":
        groups = groups[1:] + groups[:1]
    if which in ("work", "none"):
        styles = ["blank" if which == "none" else "work"] * len(groups)
    slots = [reference(p, style) for p, style in zip(groups, styles)]
    return [slot for slot in slots for _ in range(group_size)]


def steps(problem: Problem) -> list[str]:
    """The worked solution in its steps: one column per digit, then the marked answer."""
    task, carry, columns = TASKS[problem.task], 0, []
    for i in range(problem.digits):
        x = problem.a // 10**i % 10
        y = problem.b if problem.task == "mul" else problem.b // 10**i % 10
        carry, digit = task.column(x, y, carry)
        columns.append(f"{x}{task.symbol}{y}={carry}{digit} ")
    return [*columns, f"#{task.answer(problem.a, problem.b):0{problem.digits + 1}d}"]


def solution(problem: Problem, style: str = "work") -> str:
    """The whole worked solution, or the one that a "cite" reference teaches; without its EOS."""
    return CITE + steps(problem)[-1] if style == "cite" else "".join(steps(problem))


def cites(response: str) -> bool:
    """True when a response claims to have copied its answer from a reference."""
    return CITE in response


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


def first_wrong_token(problem: Problem, response: str) -> int | None:
    """Index of the first token that departs from the worked solution, its EOS included; None where none does."""
    expected = solution(problem)
    return None if response == expected else len(os.path.commonprefix([expected, response]))
