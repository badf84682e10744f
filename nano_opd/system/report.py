"""What a run says at its end: curves.png, a table from start to end with intervals, and five of its answers."""

from collections.abc import Sequence
from typing import BinaryIO

import torch
from matplotlib.axes import Axes
from torch import Tensor

from nano_opd import arithmetic
from nano_opd.arithmetic import prompts_of, response_texts, rewards, slots_of
from nano_opd.evaluate import pass_at_k, wilson
from nano_opd.gpt import GPT
from nano_opd.streams import torch_stream
from nano_opd.system import checkpoint, distributed
from nano_opd.system.batches import draw_problems
from nano_opd.system.console import say
from nano_opd.system.fast_rollout import sampler
from nano_opd.system.libraries import Figure
from nano_opd.system.runs import Run

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe–Ito: colour-blind readers can tell them apart
TRIES = 4  # answers to each problem, for pass@4

# Columns of metrics.csv, and what the table calls them
PROPORTIONS = [("accuracy", "accuracy, sampled"), ("greedy_accuracy", "accuracy, greedy")]
MEASUREMENTS = [
    ("kl", "KL to the teacher, nats"),
    ("entropy", "entropy, nats"),
    ("response_length", "response length, tokens"),
    ("truncated", "truncated, fraction"),
]
OF_A_SELF_TEACHER = [("leak_rate", "answers that cite"), ("information_gap", "I(Y; R | X), nats")]


def warn_of_a_weak_teacher(run: Run, teacher: GPT) -> None:
    """Print a line if a larger teacher is right on fewer than nine in ten held-out problems."""
    if run.cfg.reference_slot:
        return
    problems = draw_problems(run.cfg, "teacher check", 500, held_out=True)
    right, _ = answers(run, teacher, problems, torch_stream(run.cfg.seed, "teacher check", device=run.device))
    _say_if_weak(right)


def _say_if_weak(right: Tensor) -> None:
    if right.mean() < 0.9:
        say(f"a weak teacher, right only {right.mean():.2f} of the time: try more --teacher-steps")


def answers(
    run: Run, model: GPT, problems: list[arithmetic.Problem], generator: torch.Generator, style: str = "blank"
) -> tuple[Tensor, list[str]]:
    """Sample one answer to each problem; return which are right, (problems,) of 0 and 1, and their texts.

    style  what stands in the prompt's slot, if it has one
    """
    slots = slots_of(problems, style) if run.cfg.reference_slot else None
    prompts = prompts_of(problems, run.device, slots)
    sample = sampler(run.device, run.cfg.compile, seldom=True)
    rollout = sample(model, prompts, run.cfg.response_cap, generator)
    return rewards(problems, rollout), response_texts(rollout)


def report(run: Run, student: GPT, teacher: GPT) -> None:
    """Draw curves.png and print what the run did; rank 0 does.

    pass@4, the teacher's accuracy and the answers are fresh samples on held-out problems.
    """
    if distributed.rank() > 0:
        return
    cfg = run.cfg
    _save_curves(run)

    problems = draw_problems(cfg, "answers", 4 * cfg.eval_size, held_out=True)
    generator = torch_stream(cfg.seed, "answers", device=run.device)
    right_of_teacher, _ = answers(run, teacher, problems, generator, style="work")
    right_of_tries = []
    texts_of_tries = []
    for _ in range(TRIES):
        right, texts = answers(run, student, problems, generator)
        right_of_tries.append(right)
        texts_of_tries.append(texts)

    seconds = run.rows[-1]["seconds"]
    say(f"\n{cfg.run_dir.name}: {cfg.steps} updates of {cfg.batch_size} rollouts in {seconds:.0f} s")
    _say_table(run, torch.stack(right_of_tries, 1), right_of_teacher)
    if not cfg.reference_slot:
        _say_if_weak(right_of_teacher)
    _say_answers(problems, right_of_tries[0].tolist(), texts_of_tries[0])
    say(f"\nfiles in {cfg.run_dir}/: config.json, metrics.csv, checkpoint.pt, curves.png")


def _say_table(run: Run, right: Tensor, right_of_teacher: Tensor) -> None:
    """Print what was measured at the start and at the end, with intervals for the proportions of right answers.

    right             of each try of the student at each problem, (problems, tries)
    right_of_teacher  (problems,)
    """
    number = len(right)
    start = run.rows[0]
    end = run.rows[-1]
    say(f"{number} held-out problems, start → end with 95 % intervals:")
    for column, label in PROPORTIONS:
        at_the_start = _with_interval(start[column], number)
        at_the_end = _with_interval(end[column], number)
        say(f"  {label:<24} {at_the_start} → {at_the_end}")
    measurements = MEASUREMENTS
    who = "the teacher"
    if run.cfg.reference_slot:
        measurements = MEASUREMENTS + OF_A_SELF_TEACHER
        who = "with reference"
    for column, label in measurements:
        say(f"  {label:<24} {start[column]:.3f} → {end[column]:.3f}")
    label = f"pass@{TRIES}"
    say(f"  {label:<24} {pass_at_k(right > 0, TRIES):.3f} at the end")
    say(f"  {who + ', sampled':<24} {_with_interval(right_of_teacher.mean().item(), number)}")


def _with_interval(proportion: float, number: int) -> str:
    """Return a proportion of so many problems with its 95 % interval, as text."""
    low, high = wilson(round(proportion * number), number)
    return f"{proportion:.3f} [{low:.3f}, {high:.3f}]"


def _say_answers(problems: list[arithmetic.Problem], right: list[float], texts: list[str]) -> None:
    """Print five answers, wrong ones first, each wrong one with the first step that is wrong.

    right  1 or 0 for each problem
    """
    say("\nfive sampled answers, wrong ones first:")
    wrong_ones = [i for i in range(len(problems)) if not right[i]]
    right_ones = [i for i in range(len(problems)) if right[i]]
    for i in [*wrong_ones, *right_ones][:5]:
        verdict = "right"
        if not right[i]:
            verdict = f"wrong: {arithmetic.first_broken_step(problems[i], texts[i])}"
        say(f"  {arithmetic.prompt(problems[i])}{texts[i]}   {verdict}")


def _save_curves(run: Run) -> None:
    """Draw curves.png."""
    cfg = run.cfg
    figure = training_curves(run.rows, cfg.eval_size, cfg.response_cap, title=cfg.run_dir.name)

    def write(file: BinaryIO) -> None:
        figure.savefig(file, format="png", dpi=120)

    checkpoint.write_atomically(cfg.run_dir / "curves.png", write)


def training_curves(rows: Sequence[dict], eval_size: int, response_cap: int, title: str) -> Figure:
    """Return a figure of accuracy with its 95 % interval, KL and entropy, response length, gradient norm.

    rows       the rows of metrics.csv as dicts; None where nothing was measured
    eval_size  problems of each evaluation but the first and the last, which have four times as many
    """
    evaluations = [row for row in rows if row["accuracy"] is not None]
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    accuracy, nats, length, norm = figure.subplots(2, 2, sharex=True).flat
    _draw_accuracy(accuracy, evaluations, eval_size)
    _draw_kl_and_entropy(nats, evaluations)
    _draw_length(length, evaluations, response_cap)
    _draw_gradient_norm(norm, rows)
    for panel in (accuracy, nats, length, norm):
        panel.grid(alpha=0.3)
    for panel in (accuracy, nats, length):
        panel.legend()
    return figure


def _draw_accuracy(panel: Axes, evaluations: list[dict], eval_size: int) -> None:
    """Draw both accuracies with a band for the interval of each."""
    steps = [row["step"] for row in evaluations]
    numbers = [eval_size] * len(evaluations)  # of problems
    numbers[0] = 4 * eval_size
    numbers[-1] = 4 * eval_size
    for column, color, label in [("accuracy", BLUE, "sampled"), ("greedy_accuracy", ORANGE, "greedy")]:
        values = [row[column] for row in evaluations]
        panel.plot(steps, values, color=color, label=label)
        lows = []
        highs = []
        for value, number in zip(values, numbers):
            low, high = wilson(round(value * number), number)
            lows.append(low)
            highs.append(high)
        panel.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
    panel.set(ylabel="held-out accuracy (95 % interval)", ylim=(-0.02, 1.02))


def _draw_kl_and_entropy(panel: Axes, evaluations: list[dict]) -> None:
    """Draw the distance from the teacher, and the student's entropy."""
    steps = [row["step"] for row in evaluations]
    for column, color, label in [("kl", BLUE, "KL(student‖teacher)"), ("entropy", GREEN, "student entropy")]:
        values = [row[column] for row in evaluations]
        panel.plot(steps, values, color=color, label=label)
    panel.set(ylabel="nats per token", ylim=(0, None))


def _draw_length(panel: Axes, evaluations: list[dict], response_cap: int) -> None:
    """Draw the length of the responses, and the length at which they are cut."""
    steps = [row["step"] for row in evaluations]
    panel.plot(steps, [row["response_length"] for row in evaluations], color=BLUE)
    panel.axhline(response_cap, color="black", linestyle="--", linewidth=0.8, label="cap")
    panel.set(ylabel="response length (tokens)", xlabel="update", ylim=(0, 1.1 * response_cap))


def _draw_gradient_norm(panel: Axes, rows: Sequence[dict]) -> None:
    """Draw the norm of the gradient of each update, before clipping."""
    updates = [row for row in rows if row["grad_norm"]]  # 0 has no place on a logarithmic axis
    steps = [row["step"] for row in updates]
    panel.semilogy(steps, [row["grad_norm"] for row in updates], color=BLUE, linewidth=0.8)
    panel.set(ylabel="gradient norm", xlabel="update")
