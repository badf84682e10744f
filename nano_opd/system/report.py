"""What a run says at its end: curves.png, a table from start to end with intervals, and five of its answers."""

from collections.abc import Sequence

import torch
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


def warn_of_a_weak_teacher(run: Run, teacher: GPT) -> None:
    """One line if a larger teacher is right on fewer than nine in ten held-out problems."""
    if not run.cfg.reference_slot:
        problems = draw_problems(run.cfg, "teacher check", 500, held_out=True)
        right, _ = answers(run, teacher, problems, torch_stream(run.cfg.seed, "teacher check", device=run.device))
        _say_if_weak(right)


def _say_if_weak(right: Tensor) -> None:
    if right.mean() < 0.9:
        say(f"a weak teacher, right only {right.mean():.2f} of the time: try more --teacher-steps")


def answers(
    run: Run, model: GPT, problems: list[arithmetic.Problem], generator: torch.Generator, style: str = "blank"
) -> tuple[Tensor, list[str]]:
    """One sampled answer to each problem: which are right, (problems,) of 0 and 1, and their texts.

    style  what stands in the prompt's slot, if it has one
    """
    prompts = prompts_of(problems, run.device, slots_of(problems, style) if run.cfg.reference_slot else None)
    rollout = sampler(run.device, run.cfg.compile, seldom=True)(model, prompts, run.cfg.response_cap, generator)
    return rewards(problems, rollout), response_texts(rollout)


def report(run: Run, student: GPT, teacher: GPT) -> None:
    """Draw curves.png and print what the run did; rank 0 does.

    pass@4, the teacher's accuracy and the answers are fresh samples on held-out problems.
    """
    if distributed.rank() > 0:
        return
    cfg, start, end = run.cfg, run.rows[0], run.rows[-1]
    figure = training_curves(run.rows, cfg.eval_size, cfg.response_cap, cfg.run_dir.name)
    checkpoint.write_atomically(cfg.run_dir / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))

    problems = draw_problems(cfg, "answers", 4 * cfg.eval_size, held_out=True)
    generator = torch_stream(cfg.seed, "answers", device=run.device)
    by_teacher, _ = answers(run, teacher, problems, generator, "work")
    correct, texts = zip(*(answers(run, student, problems, generator) for _ in range(4)))
    right = correct[0].tolist()

    def proportion(p: float) -> str:
        low, high = wilson(round(p * len(problems)), len(problems))
        return f"{p:.3f} [{low:.3f}, {high:.3f}]"

    say(f"\n{cfg.run_dir.name}: {cfg.steps} updates of {cfg.batch_size} rollouts in {end['seconds']:.0f} s")
    say(f"{len(problems)} held-out problems, start → end with 95 % intervals:")
    for name, label in [("accuracy", "accuracy, sampled"), ("greedy_accuracy", "accuracy, greedy")]:
        say(f"  {label:<24} {proportion(start[name])} → {proportion(end[name])}")
    for name, label in [
        ("kl", "KL to the teacher, nats"),
        ("entropy", "entropy, nats"),
        ("response_length", "response length, tokens"),
        ("truncated", "truncated, fraction"),
        *([("leak_rate", "answers that cite"), ("information_gap", "I(Y; R | X), nats")] if cfg.reference_slot else []),
    ]:
        say(f"  {label:<24} {start[name]:.3f} → {end[name]:.3f}")
    say(f"  {'pass@4':<24} {pass_at_k(torch.stack(correct, 1) > 0, 4):.3f} at the end")
    who = "with reference" if cfg.reference_slot else "the teacher"
    say(f"  {who + ', sampled':<24} {proportion(by_teacher.mean().item())}")
    if not cfg.reference_slot:
        _say_if_weak(by_teacher)

    say("\nfive sampled answers, wrong ones first:")
    for i in sorted(range(len(problems)), key=right.__getitem__)[:5]:
        wrong = f"wrong: {arithmetic.first_broken_step(problems[i], texts[0][i])}"
        say(f"  {arithmetic.prompt(problems[i])}{texts[0][i]}   {'right' if right[i] else wrong}")
    say(f"\nfiles in {cfg.run_dir}/: config.json, metrics.csv, checkpoint.pt, curves.png")


def training_curves(rows: Sequence[dict], eval_size: int, response_cap: int, title: str) -> Figure:
    """Accuracy with its 95 % interval, KL and entropy, response length, gradient norm.

    rows       the rows of metrics.csv as dicts; None where nothing was measured
    eval_size  problems of each evaluation but the first and the last, which have four times as many
    """
    measured = [r for r in rows if r["accuracy"] is not None]
    updates = [r for r in rows if r["grad_norm"]]
    steps = [r["step"] for r in measured]
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    accuracy, nats, length, norm = figure.subplots(2, 2, sharex=True).flat

    sizes = [eval_size * (4 if r in (measured[0], measured[-1]) else 1) for r in measured]
    for name, color, label in [("accuracy", BLUE, "sampled"), ("greedy_accuracy", ORANGE, "greedy")]:
        values = [r[name] for r in measured]
        accuracy.plot(steps, values, color=color, label=label)
        low, high = zip(*(wilson(round(v * n), n) for v, n in zip(values, sizes)))
        accuracy.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    accuracy.set(ylabel="held-out accuracy (95 % interval)", ylim=(-0.02, 1.02))

    for name, color, label in [("kl", BLUE, "KL(student‖teacher)"), ("entropy", GREEN, "student entropy")]:
        nats.plot(steps, [r[name] for r in measured], color=color, label=label)
    nats.set(ylabel="nats per token", ylim=(0, None))

    length.plot(steps, [r["response_length"] for r in measured], color=BLUE)
    length.axhline(response_cap, color="black", linestyle="--", linewidth=0.8, label="cap")
    length.set(ylabel="response length (tokens)", xlabel="update", ylim=(0, 1.1 * response_cap))

    norm.semilogy([r["step"] for r in updates], [r["grad_norm"] for r in updates], color=BLUE, linewidth=0.8)
    norm.set(ylabel="gradient norm", xlabel="update")
    for ax in (accuracy, nats, length, norm):
        ax.grid(alpha=0.3)
        if ax is not norm:
            ax.legend()
    return figure
