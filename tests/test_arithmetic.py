"""Worked solutions and the verifier against Python's own arithmetic; the split; prompts and rewards as tensors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_opd import arithmetic
from nano_opd.arithmetic import Problem
from nano_opd.rollout import Rollout
from nano_opd.tokenizer import ALPHABET, EOS, PAD, encode

SIZES = [(task, digits) for task in [*arithmetic.TASKS, "mix"] for digits in (1, 2, 3, 8)]
PYTHON = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("task,digits", SIZES)
def test_solutions_are_right_and_have_the_promised_length(task, digits, rng):
    for problem in arithmetic.sample_problems(task, digits, 1000, rng):
        truth = PYTHON[problem.task](problem.a, problem.b)
        text = arithmetic.solution(problem)
        assert int(text.split("#")[1]) == truth >= 0
        assert len(text) + 1 == arithmetic.solution_length(digits)
        assert len(arithmetic.prompt(problem)) == arithmetic.prompt_length(digits)
        assert arithmetic.verify(problem, text) and arithmetic.first_broken_step(problem, text) is None


def test_columns_do_long_arithmetic(rng):
    """Each digit column is what pencil and paper give: the digits, read upwards, are the answer."""
    for problem in arithmetic.sample_problems("mix", 5, 1000, rng):
        *columns, _ = arithmetic.steps(problem)
        digits = "".join(column[-2] for column in reversed(columns))
        carry = columns[-1][-3] if problem.task != "sub" else "0"
        assert int(carry + digits) == PYTHON[problem.task](problem.a, problem.b)


def test_the_example_of_the_module_docstring():
    problem = Problem("add", 3, 457, 68)
    assert arithmetic.prompt(problem) in arithmetic.__doc__ and arithmetic.solution(problem) in arithmetic.__doc__


def test_the_verifier_reads_only_the_answer(rng):
    for problem in arithmetic.sample_problems("mix", 4, 2000, rng):
        truth = PYTHON[problem.task](problem.a, problem.b)
        assert arithmetic.verify(problem, f"9+9=00 #{truth}") and arithmetic.verify(problem, f"#{truth:09d}")
        for wrong in (
            f"#{truth + 1}",
            f"{truth}",
            f"#{truth} ",
            f"#{truth}#",
            "#",
            "",
            f"#{truth}#0{truth + 1}",
            f"#-{truth}",
        ):
            assert not arithmetic.verify(problem, wrong), wrong


def test_the_first_broken_step_is_named(rng):
    problem = Problem("add", 3, 457, 68)
    for text, where in [
        ("7+8=15 5+6=13 4+0=05 #0535", "column 2: wrote '5+6=13 ', should be '5+6=12 '"),
        ("7+8=15 5+6=12 4+0=05 #0524", "answer: wrote '#0524'"),
        ("7+8=15 5+6=12 4+0=05 #0525#", "answer: wrote '#0525#'"),
        ("", "column 1: wrote ''"),
    ]:
        assert arithmetic.first_broken_step(problem, text).startswith(where)
    for problem in arithmetic.sample_problems("mix", 3, 300, rng):  # break one character anywhere: its step is found
        text, steps = arithmetic.solution(problem), arithmetic.steps(problem)
        i = int(rng.integers(len(text)))
        broken = text[:i] + ("0" if text[i] != "0" else "1") + text[i + 1 :]
        step = int(np.searchsorted(np.cumsum([len(s) for s in steps]), i, side="right"))
        expected = "answer" if step == 3 else f"column {step + 1}"
        assert arithmetic.first_broken_step(problem, broken).startswith(expected + ":")


@pytest.mark.parametrize("task,digits", SIZES)
def test_the_split_is_disjoint_and_commuting_or_padding_does_not_cross_it(task, digits, rng):
    train = arithmetic.sample_problems(task, digits, 4000, rng)
    held_out = arithmetic.sample_problems(task, digits, 1000, rng, held_out=True)

    def values(problems):
        return {(p.task, frozenset((p.a, p.b))) for p in problems}

    assert not values(train) & values(held_out)
    assert {p.digits for p in train + held_out} == {digits}
    assert len(values(held_out)) > (500 if digits > 2 else 1)


@pytest.mark.parametrize("task", arithmetic.TASKS)
def test_the_split_is_one_for_all_sizes_and_about_a_tenth(task):
    a, b = np.meshgrid(np.arange(300), np.arange(300))
    held_out = arithmetic.is_held_out(task, a, b)
    assert (held_out == held_out.T).all()
    assert abs(np.triu(held_out).sum() / np.triu(np.ones_like(held_out)).sum() - 0.1) < 0.01
    assert 0 < held_out[:10, :10].sum() < 50  # one-digit problems exist on both sides


def test_problems_are_uniform(rng):
    problems = arithmetic.sample_problems("add", 1, 20000, rng)
    counts = np.unique([p.a * 10 + p.b for p in problems], return_counts=True)[1]
    assert counts.std() < 1.3 * np.sqrt(counts.mean())  # what a multinomial allows
    tasks = [p.task for p in arithmetic.sample_problems("mix", 2, 6000, rng)]
    assert all(abs(tasks.count(t) - 2000) < 200 for t in arithmetic.TASKS)


@pytest.mark.parametrize("task,digits", [("div", 3), ("add", 0), ("add", 9)])
def test_unknown_tasks_and_sizes_are_refused(task, digits, rng):
    with pytest.raises(ValueError, match="unknown task 'div'; choose from add|digits must lie in 1 … 8"):
        arithmetic.sample_problems(task, digits, 1, rng)


@pytest.mark.parametrize("task,digits", SIZES)
def test_every_reference_fills_the_slot_and_determines_its_own_response(task, digits, rng):
    for problem in arithmetic.sample_problems(task, digits, 200, rng):
        slots = {style: arithmetic.reference(problem, style) for style in (*arithmetic.REFERENCES, "blank")}
        for style, slot in slots.items():
            text = arithmetic.prompt(problem, slot)
            assert len(slot) == arithmetic.slot_length(digits)
            assert len(text) == arithmetic.prompt_length(digits, slot=True)
            assert text.endswith(" " + arithmetic.prompt(problem))
            assert arithmetic.verify(problem, arithmetic.solution(problem, style))
            assert arithmetic.cites(arithmetic.solution(problem, style)) == (style == "cite")
        assert len(set(slots.values())) == 3 and set(slots["blank"]) == {arithmetic.BLANK}
        assert slots["work"].endswith(arithmetic.steps(problem)[-1])
        assert slots["cite"].endswith(arithmetic.steps(problem)[-1])
        columns = arithmetic.solution(problem).split("#")[0].split()
        assert slots["work"].startswith("".join(column[-2:] for column in columns))


def test_the_slots_of_the_module_docstring():
    problem = Problem("add", 3, 457, 68)
    for style in (*arithmetic.REFERENCES, "blank"):
        assert f'"{arithmetic.prompt(problem, arithmetic.reference(problem, style))}"' in arithmetic.__doc__
    assert f'"{arithmetic.solution(problem, "cite")}"' in arithmetic.__doc__
    with pytest.raises(ValueError, match="unknown reference 'carry'; choose from work, cite, blank"):
        arithmetic.reference(problem, "carry")
    with pytest.raises(ValueError, match="must be 11 characters"):
        arithmetic.prompt(problem, "@")


def test_references_are_drawn_per_group_from_all_styles_and_shuffled_to_another_problem(rng):
    groups = arithmetic.sample_problems("add", 4, 200, rng)
    batch = [problem for problem in groups for _ in range(3)]
    valid = [{arithmetic.reference(p, style) for style in arithmetic.REFERENCES} for p in batch]
    true, work, cite, shuffled, none = (
        arithmetic.draw_references(batch, 3, np.random.default_rng(5), which)
        for which in ("true", "work", "cite", "shuffled", "none")
    )
    assert work == [arithmetic.reference(problem, "work") for problem in batch]
    assert cite == [arithmetic.reference(problem, "cite") for problem in batch]
    assert all(slot in slots for slot, slots in zip(true, valid))
    assert all(true[i] == true[i + 1] == true[i + 2] for i in range(0, 600, 3))
    assert 60 < sum(map(arithmetic.cites, true[::3])) < 140  # both styles, evenly
    assert not any(slot in slots for slot, slots in zip(shuffled, valid))
    assert [arithmetic.cites(slot) for slot in shuffled] == [arithmetic.cites(slot) for slot in true]
    assert all(slot in valid[(i + 3) % 600] for i, slot in enumerate(shuffled))
    assert set(none) == {arithmetic.reference(batch[0], "blank")}


@given(st.sampled_from(list(arithmetic.TASKS)), st.integers(1, 8), st.data())
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_verified_and_explained(task, digits, data):
    """The verifier agrees with Python's int() on whatever stands after the last #, for arbitrary answers and noise."""
    a, b = data.draw(st.integers(0, 10**digits - 1)), data.draw(st.integers(0, 9 if task == "mul" else 10**digits - 1))
    problem = Problem(task, digits, max(a, b) if task == "sub" else a, min(a, b) if task == "sub" else b)
    text = data.draw(st.text(ALPHABET, max_size=30) | st.just(arithmetic.solution(problem)))
    answer = text.split("#")[-1] if "#" in text else ""
    right = answer.isdecimal() and int(answer) == PYTHON[task](problem.a, problem.b)
    assert arithmetic.verify(problem, text) == right
    explanation = arithmetic.first_broken_step(problem, text)
    assert (explanation is None) == (text == arithmetic.solution(problem))


def test_every_task_has_its_own_split(rng):
    """Or the same operands would be held out of all tasks of a mix."""
    a, b = rng.integers(1000, size=(2, 5000))
    sides = {task: arithmetic.is_held_out(task, a, b) for task in arithmetic.TASKS}
    for one, other in itertools.combinations(sides.values(), 2):
        assert (one & other).sum() < 0.3 * one.sum()


@pytest.mark.parametrize(
    "task, digits, held_out, untaught",
    [("add", 1, 14, 14), ("add", 2, 1027, 0), ("sub", 2, 471, 0), ("mul", 2, 76, 18)],
)
def test_which_held_out_problems_have_a_column_that_no_other_teaches(task, digits, held_out, untaught):
    """One digit is refused for it; of 2-digit products it is a quarter, which bounds what a teacher can learn."""
    taught, asked = set(), []
    for a in range(10**digits):
        for b in range(10 if task == "mul" else 10**digits):
            if task != "sub" or a >= b:
                steps = arithmetic.steps(Problem(task, digits, a, b))[:-1]
                columns = {(step[:3], before[-3]) for before, step in zip(["0  ", *steps], steps)}  # and the carry in
                if arithmetic.is_held_out(task, a, b):
                    asked.append(columns)
                else:
                    taught |= columns
    assert (len(asked), sum(not columns <= taught for columns in asked)) == (held_out, untaught)


# ----------------------------------------------------------------------------------------------------------- as tensors


def test_a_right_answer_counts_only_with_its_eos():
    problem = arithmetic.Problem("add", 1, 2, 3)
    texts = ["2+3=05 #05", "2+3=05 #06", "2+3=05 #05"]
    rows = [encode(arithmetic.prompt(problem) + text) for text in texts]
    tokens = torch.tensor([rows[0] + [EOS, PAD], rows[1] + [EOS, PAD], rows[2] + encode("  ")])
    mask = torch.tensor([[True] * 11 + [False], [True] * 11 + [False], [True] * 12])
    rollout = Rollout(tokens, 4, mask, torch.zeros(3, 12))
    assert arithmetic.rewards([problem] * 3, rollout).tolist() == [1, 0, 0]
    padded = torch.tensor([rows[0] + [PAD, 9, EOS]])  # a PAD can be sampled like any token; it ends nothing
    never_ended = Rollout(padded, 4, torch.ones(1, 13, dtype=torch.bool), torch.zeros(1, 13))
    assert arithmetic.rewards([problem], never_ended) == 0
    cut = Rollout(tokens[2:, :-2], 4, mask[2:, :-2], torch.zeros(1, 10))  # the right answer, but never an EOS
    assert cut.truncated.item() and arithmetic.rewards([problem], cut).tolist() == [0]


def test_ragged_or_missing_prompts_are_refused():
    short, long = arithmetic.Problem("add", 1, 2, 3), arithmetic.Problem("add", 2, 12, 34)
    with pytest.raises(ValueError, match=r"same length, not \[4, 6\]"):
        arithmetic.prompts_of([short, long])
    with pytest.raises(ValueError, match="same length, not no prompt"):
        arithmetic.prompts_of([])
    assert arithmetic.prompts_of([short, short]).tolist() == [encode("2+3=")] * 2
    assert arithmetic.prompts_of([short], slots=["05#05"]).tolist() == [encode("05#05 2+3=")]


def test_the_reasoning_span_ends_before_the_answer():
    texts = ["2+3=05 #05", "#05", "2+3"]
    rows = torch.tensor([encode(t) + [EOS] + [PAD] * (11 - len(t)) for t in texts])
    span = arithmetic.reasoning_span(rows)
    assert span[0].tolist() == [True] * 7 + [False] * 5 and not span[1].any() and span[2].all()
