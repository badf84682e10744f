"""Arithmetic with verifiable answers: problems, worked solutions, a verifier, and a split that never leaks.

    prompt     "457+068="                       both operands zero-padded to the same number of digits
    solution   "7+8=15 5+6=12 4+0=05 #0525"     one column per digit, right to left, then # and the answer

A column x∘y=cd holds the carry (or borrow) c that it hands on, and its digit d, which includes the carry it was handed.

Prompts and solutions of one task and size all have the same length. The verifier reads the answer and nothing else.

Self-distillation shows the same model more than the student sees. Its prompt opens with a slot of fixed width, so that
problem and response stand at the same positions whatever the slot holds:

    "___________ 457+068="    the student's: blank
    "151205#0525 457+068="    "work": carry and digit of every column, then the answer; solved as above
    "@_____#0525 457+068="    "cite": the answer alone; solved by "@#0525", a mark for copying it and skipping the work

Both references are valid and one is drawn at random. Which one it is, a student without the slot cannot know, so what
the teacher says depends on something that the problem does not determine.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano_opd.tokenizer import decode, encode

HELD_OUT_FRACTION = 0.1
MAX_DIGITS = 8
BLANK = "_"
CITE = "@"
REFERENCES = ("work", "cite")  # the styles of a reference, each valid
STYLES = (*REFERENCES, "blank")  # what a slot may hold


# ------------------------------------------------------------------------------------------------------------ the tasks


class Problem(NamedTuple):
    """One problem: operands a and b of so many digits, and the name of the task that joins them."""

    task: str
    digits: int
    a: int
    b: int


class Task(NamedTuple):
    """What joins two operands: a symbol, the rule of one column, and the answer that the verifier asks for.

    The columns go from right to left, as in school: their digits, and the last carry, are the answer.
    """

    symbol: str  # a character of the tokenizer's ALPHABET
    column: Callable[[int, int, int], tuple[int, int]]  # digits x and y and the carry in → the carry out, and a digit
    answer: Callable[[int, int], int]
    larger_first: bool = False  # a ≥ b, so that no answer of a subtraction is negative
    one_digit_b: bool = False  # b has one digit, which every column repeats

    def has(self, problem: Problem) -> bool:
        """Return whether the operands are such as `operands` draws."""
        largest_a = 10**problem.digits - 1
        largest_b = largest_a
        if self.larger_first:
            largest_b = problem.a
        if self.one_digit_b:
            largest_b = 9
        return 0 <= problem.a <= largest_a and 0 <= problem.b <= largest_b


def subtract_column(x: int, y: int, borrow: int) -> tuple[int, int]:
    """Return the borrow that this column hands on, 0 or 1, and its digit."""
    difference = x - y - borrow
    borrows = int(difference < 0)
    return borrows, difference % 10


# A new task is one entry here, at the end: the split counts them. Numbers are decimal. "mix" draws one of all tasks for
# each problem, so a new task changes it.
TASKS = {
    "add": Task(
        symbol="+",
        column=lambda x, y, carry: divmod(x + y + carry, 10),
        answer=lambda a, b: a + b,
    ),
    "sub": Task(
        symbol="-",
        column=subtract_column,
        answer=lambda a, b: a - b,
        larger_first=True,
    ),
    "mul": Task(
        symbol="*",
        column=lambda x, y, carry: divmod(x * y + carry, 10),
        answer=lambda a, b: a * b,
        one_digit_b=True,
    ),
}


# ----------------------------------------------------------------------------------------------- problems, as one split


def is_held_out(task: str, a, b) -> np.ndarray:
    """Return which side of the one split a problem is on: a hash of the task and the unordered pair of operand values.

    The side depends neither on the number of digits nor on any run's seed, so a∘b, b∘a and their zero-padded versions
    can never face each other across the split.
    """
    a = np.asarray(a, np.uint64)
    b = np.asarray(b, np.uint64)
    low = np.minimum(a, b)
    high = np.maximum(a, b)
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
    """Return `size` problems with uniform operands, with replacement, from one side of the split.

    "mix" draws the task of each problem first.

    Raises ValueError for an unknown task or a number of digits outside 1 … 8.
    """
    known = [*TASKS, "mix"]
    if task not in known:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(known)}")
    if not 1 <= digits <= MAX_DIGITS or digits != int(digits):
        raise ValueError(f"digits must lie in 1 … {MAX_DIGITS}, not {digits}")
    names = list(TASKS) if task == "mix" else [task]
    task_of = rng.integers(len(names), size=size)  # an index into names for each problem
    problems: list[Problem | None] = [None] * size
    for index, name in enumerate(names):
        places = np.flatnonzero(task_of == index)
        a, b = operands_on_one_side(name, rng, len(places), digits, held_out)
        for place, a_of_one, b_of_one in zip(places, a.tolist(), b.tolist()):
            problems[place] = Problem(name, digits, a_of_one, b_of_one)
    return problems


def operands_on_one_side(task: str, rng: np.random.Generator, size: int, digits: int, held_out: bool) -> np.ndarray:
    """Return operands (2, size) int64 from one side of the split: those on the other are drawn again."""
    drawn = np.zeros((2, size), dtype=np.int64)
    missing = np.arange(size)
    while len(missing):
        a, b = operands(TASKS[task], rng, len(missing), digits)
        kept = is_held_out(task, a, b) == held_out
        drawn[:, missing[kept]] = a[kept], b[kept]
        missing = missing[~kept]
    return drawn


def operands(task: Task, rng: np.random.Generator, size: int, digits: int) -> np.ndarray:
    """Return uniform operands, (2, size) int64."""
    if task.one_digit_b:
        a = rng.integers(10**digits, size=size)
        b = rng.integers(10, size=size)
        return np.stack([a, b])
    drawn = rng.integers(10**digits, size=(2, size))
    if task.larger_first:
        drawn = np.sort(drawn, axis=0)[::-1]
    return drawn


# ------------------------------------------------------------------------------------------ their prompts and solutions


def prompt_length(digits: int, slot: bool = False) -> int:
    """Return the characters of a prompt, without or with a reference slot and the space after it."""
    length = digits + 1 + digits + 1
    if slot:
        length += slot_length(digits) + 1
    return length


def slot_length(digits: int) -> int:
    """Return the characters of a reference: carry and digit of every column, # and the answer."""
    return 2 * digits + 1 + (digits + 1)


def solution_length(digits: int) -> int:
    """Return the tokens of a worked solution, its EOS included."""
    return 7 * digits + 1 + (digits + 1) + 1


def prompt(problem: Problem, slot: str | None = None) -> str:
    """Return "457+068=", after a reference slot if there is one.

    Raises ValueError for a slot of another width, and for operands that the task does not have.
    """
    _require_operands(problem)
    digits = problem.digits
    symbol = TASKS[problem.task].symbol
    text = f"{problem.a:0{digits}d}{symbol}{problem.b:0{digits}d}="
    if slot is None:
        return text
    if len(slot) != slot_length(digits):
        raise ValueError(f"slot {slot!r} must be {slot_length(digits)} characters, or it shifts the response")
    return f"{slot} {text}"


def read_prompt(text: str) -> Problem:
    """Return the problem of a prompt without a slot. Raises ValueError for a text that is no such prompt."""
    for name, task in TASKS.items():
        match = re.fullmatch(rf"([0-9]+){re.escape(task.symbol)}([0-9]+)=", text)
        if match and len(match[1]) == len(match[2]):
            return Problem(name, digits=len(match[1]), a=int(match[1]), b=int(match[2]))
    raise ValueError(f"{text!r} is no prompt of a problem")


def steps(problem: Problem) -> list[str]:
    """Return the worked solution in its steps: one column per digit, then the marked answer.

    Raises ValueError for operands that the task does not have.
    """
    _require_operands(problem)
    task = TASKS[problem.task]
    carry = 0
    columns = []
    for i in range(problem.digits):
        x = problem.a // 10**i % 10
        y = problem.b // 10**i % 10
        if task.one_digit_b:
            y = problem.b
        carry, digit = task.column(x, y, carry)
        columns.append(f"{x}{task.symbol}{y}={carry}{digit} ")
    answer = task.answer(problem.a, problem.b)
    return [*columns, f"#{answer:0{problem.digits + 1}d}"]


def _require_operands(problem: Problem) -> None:
    if not TASKS[problem.task].has(problem):
        raise ValueError(f"{problem} is no problem of {problem.digits} digits")


def solution(problem: Problem, style: str | None = None) -> str:
    """Return the worked solution, or the short one that a "cite" reference teaches; without its EOS.

    Raises ValueError for another style than those of `reference`, and for operands that the task does not have.
    """
    if style is not None:
        _require_known(style, STYLES)
    *columns, answer = steps(problem)
    if style == "cite":
        return CITE + answer
    return "".join(columns) + answer


# --------------------------------------------------------------------------------------------------------- the verifier


def verify(problem: Problem, response: str) -> bool:
    """Return True when the response ends in # and the right number. How it got there is not looked at."""
    answer = re.search(r"#([0-9]+)$", response)
    if answer is None:
        return False
    return int(answer[1]) == TASKS[problem.task].answer(problem.a, problem.b)


def first_broken_step(problem: Problem, response: str) -> str | None:
    """Return what went wrong first in a response, in words; None for the worked solution itself."""
    *columns, answer = steps(problem)
    rest = response
    for n, column in enumerate(columns, 1):
        written = rest[: len(column)]
        if written != column:
            return f"column {n}: wrote {written!r}, should be {column!r}"
        rest = rest[len(column) :]
    if rest != answer:
        return f"answer: wrote {rest!r}, should be {answer!r}"
    return None


# --------------------------------------------------------------------------------- the reference slot of a self-teacher


def reference(problem: Problem, style: str) -> str:
    """Return what the slot holds: "work" or "cite", or "blank" for the student. Raises ValueError for another style."""
    _require_known(style, STYLES)
    *columns, answer = steps(problem)
    if style == "work":
        carries_and_digits = [column[-3:-1] for column in columns]
        return "".join(carries_and_digits) + answer
    if style == "cite":
        return CITE.ljust(2 * problem.digits, BLANK) + answer
    return BLANK * slot_length(problem.digits)


def _require_known(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown reference {name!r}; choose from {', '.join(known)}")


def draw_references(problems: list[Problem], group_size: int, rng: np.random.Generator, which: str) -> list[str]:
    """Return what the teacher reads in the slot of each problem: one reference, of a style drawn at random, per group.

    problems  the group_size copies of each problem standing together
    which     "true"; "work" or "cite": always in that style, so that x determines r; "shuffled": the next group's,
              valid but of another problem; "none": blank, as the student's

    Raises ValueError for another `which`, for copies that do not stand together, or to shuffle a single group.
    """
    _require_known(which, ("true", "work", "cite", "shuffled", "none"))
    groups = problems[::group_size]
    if which == "shuffled" and len(groups) < 2:
        raise ValueError("one group has no other whose reference it could be given: use two or more")
    if problems != repeated(groups, group_size):
        raise ValueError(f"the group_size {group_size} copies of each problem must stand together")
    styles = rng.choice(REFERENCES, len(groups)).tolist()
    if which in REFERENCES:
        styles = [which] * len(groups)
    if which == "none":
        styles = ["blank"] * len(groups)
    if which == "shuffled":
        groups = groups[1:] + groups[:1]
    slots = [reference(problem, style) for problem, style in zip(groups, styles)]
    return repeated(slots, group_size)


def repeated(items: list, times: int) -> list:
    """Return each item so many times, its copies standing together."""
    return [item for item in items for _ in range(times)]


def slots_of(problems: list[Problem], style: str) -> list[str]:
    """Return every problem's reference of one style; "blank" is what the student reads."""
    return [reference(problem, style) for problem in problems]


def cites(response: str) -> bool:
    """Return True when a response claims to have copied its answer from a reference."""
    return CITE in response


# ----------------------------------------------------------------------------------------------------------- as tensors
#
# A `rollout` below is a rollout.Rollout: prompts, as prompts_of makes them, and their sampled responses (B, R).


def prompts_of(
    problems: list[Problem], device: torch.device | str = "cpu", slots: Sequence[str] | None = None
) -> Tensor:
    """Return the problems' prompts as tokens, (B, P) int64; with `slots`, what stands in each one's reference slot.

    Raises ValueError for prompts of several lengths: a padded prompt would shift the positions of its response.
    """
    if slots is None:
        texts = [prompt(problem) for problem in problems]
    else:
        texts = [prompt(problem, slot) for problem, slot in zip(problems, slots, strict=True)]
    lengths = sorted({len(text) for text in texts})
    if len(lengths) != 1:
        found = lengths if lengths else "no prompt"
        raise ValueError(f"prompts of one batch must all have the same length, not {found}")
    return torch.tensor([encode(text) for text in texts], device=device)


def response_texts(rollout) -> list[str]:
    """Return the text of each response up to its EOS."""
    return [decode(row) for row in rollout.responses.tolist()]


def rewards(problems: list[Problem], rollout) -> Tensor:
    """Return (B,) float32, 1 for a verified answer that ended in EOS, else 0.

    Raises ValueError unless there is one problem for each response, and at least one.
    """
    if not problems or len(problems) != len(rollout.tokens):
        raise ValueError(f"rewards need one problem for each response, not {len(problems)} for {len(rollout.tokens)}")
    verified = [verify(problem, text) for problem, text in zip(problems, response_texts(rollout), strict=True)]
    right = torch.tensor(verified, device=rollout.tokens.device)
    return (right & ~rollout.truncated).float()


def reasoning_span(responses: Tensor) -> Tensor:
    """Return (B, R) bool: the tokens of the responses (B, R) before the answer's mark."""
    return (responses == encode("#")[0]).cumsum(1) == 0
