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
BLANK, CITE = "_", "@"
REFERENCES = ("work", "cite")


class Problem(NamedTuple):
    """One problem: operands a and b of so many digits, and the name of the task that joins them."""

    task: str
    digits: int
    a: int
    b: int


class Task(NamedTuple):
    """What joins two operands: a symbol, the rule of one column, and the answer that the verifier asks for."""

    symbol: str
    column: Callable[[int, int, int], tuple[int, int]]  # digits x and y and the carry in → the carry out, and a digit
    answer: Callable[[int, int], int]
    larger_first: bool = False  # a ≥ b, so that no answer of a subtraction is negative
    one_digit_b: bool = False  # b has one digit, which every column repeats

    def has(self, problem: Problem) -> bool:
        """Whether the operands are such as `operands` draws."""
        largest = 10**problem.digits - 1
        largest_b = 9 if self.one_digit_b else problem.a if self.larger_first else largest
        return 0 <= problem.a <= largest and 0 <= problem.b <= largest_b


# A new task is one entry here. "mix" draws one of them for each problem.
TASKS = {
    "add": Task("+", lambda x, y, carry: divmod(x + y + carry, 10), lambda a, b: a + b),
    "sub": Task(
        "-", lambda x, y, carry: (int(x - y < carry), (x - y - carry) % 10), lambda a, b: a - b, larger_first=True
    ),
    "mul": Task("*", lambda x, y, carry: divmod(x * y + carry, 10), lambda a, b: a * b, one_digit_b=True),
}


def prompt_length(digits: int, slot: bool = False) -> int:
    """Characters of a prompt, without or with a reference slot and the space after it."""
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


def operands(task: Task, rng: np.random.Generator, size: int, digits: int) -> np.ndarray:
    """Uniform operands, (2, size) int64."""
    if task.one_digit_b:
        return np.stack([rng.integers(10**digits, size=size), rng.integers(10, size=size)])
    drawn = rng.integers(10**digits, size=(2, size))
    return np.sort(drawn, axis=0)[::-1] if task.larger_first else drawn


def sample_problems(
    task: str, digits: int, size: int, rng: np.random.Generator, held_out: bool = False
) -> list[Problem]:
    """`size` problems with uniform operands, with replacement, from one side of the split; "mix" draws its task first.

    Raises ValueError for an unknown task or a number of digits outside 1 … 8.
    """
    if task not in (known := [*TASKS, "mix"]):
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(known)}")
    if not 1 <= digits <= MAX_DIGITS or digits != int(digits):
        raise ValueError(f"digits must lie in 1 … {MAX_DIGITS}, not {digits}")
    names = np.array(list(TASKS) if task == "mix" else [task])
    chosen = names[rng.integers(len(names), size=size)]
    problems: list[Problem | None] = [None] * size
    for name in names:
        slots = np.flatnonzero(chosen == name)
        while len(slots):  # draw for every open slot, keep what falls on the right side
            a, b = operands(TASKS[name], rng, len(slots), digits)
            keep = is_held_out(name, a, b) == held_out
            for slot, x, y in zip(slots[keep], a[keep].tolist(), b[keep].tolist()):
                problems[slot] = Problem(str(name), digits, x, y)
            slots = slots[~keep]
    return problems


def prompt(problem: Problem, slot: str | None = None) -> str:
    """ "457+068=", after a reference slot if there is one.

    Raises ValueError for a slot of another width, and for operands that the task does not have.
    """
    _require_operands(problem)
    task, digits, a, b = problem
    text = f"{a:0{digits}d}{TASKS[task].symbol}{b:0{digits}d}="
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


def reference(problem: Problem, style: str) -> str:
    """What the slot holds: "work" or "cite", or "blank" for the student. Raises ValueError for another style."""
    _require_reference(style, *REFERENCES, "blank")
    *columns, answer = steps(problem)
    if style == "work":
        return "".join(column[-3:-1] for column in columns) + answer
    if style == "cite":
        return CITE.ljust(2 * problem.digits, BLANK) + answer
    return BLANK * slot_length(problem.digits)


def _require_reference(name: str, *known: str) -> None:
    if name not in known:
        raise ValueError(f"unknown reference {name!r}; choose from {', '.join(known)}")


def draw_references(problems: list[Problem], group_size: int, rng: np.random.Generator, which: str) -> list[str]:
    """What the teacher reads in the slot of each problem: one reference, of a style drawn at random, per group.

    problems  the group_size copies of each problem standing together
    which     "true"; "work" or "cite": always in that style, so that x determines r; "shuffled": the next group's,
              valid but of another problem; "none": blank, as the student's

    Raises ValueError for another `which`, for copies that do not stand together, or to shuffle a single group.
    """
    _require_reference(which, "true", *REFERENCES, "shuffled", "none")
    groups = problems[::group_size]
    if which == "shuffled" and len(groups) < 2:
        raise ValueError("one group has no other whose reference it could be given: use two or more")
    if problems != [problem for problem in groups for _ in range(group_size)]:
        raise ValueError(f"the group_size {group_size} copies of each problem must stand together")
    styles = rng.choice(REFERENCES, len(groups)).tolist()
    if which == "shuffled":
        groups = groups[1:] + groups[:1]
    if which in ("work", "cite", "none"):
        styles = ["blank" if which == "none" else which] * len(groups)
    slots = [reference(p, style) for p, style in zip(groups, styles)]
    return [slot for slot in slots for _ in range(group_size)]


def _require_operands(problem: Problem) -> None:
    if not TASKS[problem.task].has(problem):
        raise ValueError(f"{problem} is no problem of {problem.digits} digits")


def steps(problem: Problem) -> list[str]:
    """The worked solution in its steps: one column per digit, then the marked answer.

    Raises ValueError for operands that the task does not have.
    """
    _require_operands(problem)
    task, carry, columns = TASKS[problem.task], 0, []
    for i in range(problem.digits):
        x = problem.a // 10**i % 10
        y = problem.b if task.one_digit_b else problem.b // 10**i % 10
        carry, digit = task.column(x, y, carry)
        columns.append(f"{x}{task.symbol}{y}={carry}{digit} ")
    return [*columns, f"#{task.answer(problem.a, problem.b):0{problem.digits + 1}d}"]


def solution(problem: Problem, style: str | None = None) -> str:
    """The worked solution, or the short one that a "cite" reference teaches; without its EOS.

    Raises ValueError for another style than those of `reference`, and for operands that the task does not have.
    """
    if style is not None:
        _require_reference(style, *REFERENCES, "blank")
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
    for n, expected in enumerate(steps(problem), 1):
        is_answer = expected[0] == "#"
        written, response = (response, "") if is_answer else (response[: len(expected)], response[len(expected) :])
        if written != expected:
            return f"{'answer' if is_answer else f'column {n}'}: wrote {written!r}, should be {expected!r}"
    return None


# ---------------------------------------------------------------------------------------------------- as tensors


def prompts_of(
    problems: list[Problem], device: torch.device | str = "cpu", slots: Sequence[str] | None = None
) -> Tensor:
    """The problems' prompts as tokens, (B, P) int64; with `slots`, what stands in each one's reference slot.

    Raises ValueError for prompts of several lengths: a padded prompt would shift the positions of its response.
    """
    slots = [None] * len(problems) if slots is None else slots
    prompts = [encode(prompt(p, slot)) for p, slot in zip(problems, slots, strict=True)]
    if len(lengths := {len(p) for p in prompts}) != 1:
        raise ValueError(f"prompts of one batch must all have the same length, not {sorted(lengths) or 'no prompt'}")
    return torch.tensor(prompts, device=device)


def slots_of(problems: list[Problem], style: str) -> list[str]:
    """Every problem's reference of one style; "blank" is what the student reads."""
    return [reference(p, style) for p in problems]


def response_texts(rollout) -> list[str]:
    """Each response up to its EOS."""
    return [decode(row) for row in rollout.responses.tolist()]


def rewards(problems: list[Problem], rollout) -> Tensor:
    """(B,) float32, 1 for a verified answer that ended in EOS, else 0.

    Raises ValueError unless there is one problem for each response, and at least one.
    """
    if not problems or len(problems) != len(rollout.tokens):
        raise ValueError(f"rewards need one problem for each response, not {len(problems)} for {len(rollout.tokens)}")
    right = [verify(p, text) for p, text in zip(problems, response_texts(rollout), strict=True)]
    return (torch.tensor(right, device=rollout.tokens.device) & ~rollout.truncated).float()


def reasoning_span(responses: Tensor) -> Tensor:
    """(B, R) bool: the tokens of the responses (B, R) before the answer's mark."""
    return (responses == encode("#")[0]).cumsum(1) == 0
