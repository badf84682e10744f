"""On-policy distillation, start to finish. `update` is the algorithm: sample → score → advantage → loss → step.

    python train.py --method opdplus                        1½ minutes on two cores; accuracy 0.06 → 0.96
    python train.py --method opd --divergence forward_kl    under the stop-gradient: it collapses

What makes a run practical (its folder, resuming, signals, several devices) is in nano_opd/system/.
"""

import copy
from collections.abc import Iterator

from nano_opd.system import libraries  # noqa: F401, before torch, which imports tqdm: its environment may be wrong

# isort: split
import torch
from torch import nn
from torch.optim import Optimizer

from nano_opd import arithmetic, opsd, sft
from nano_opd.arithmetic import rewards
from nano_opd.evaluate import evaluate
from nano_opd.gpt import GPT
from nano_opd.methods import METHODS, Scored
from nano_opd.rollout import score
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.system import runs, sources
from nano_opd.system.batches import draw_batch, draw_problems
from nano_opd.system.config import Config, parse
from nano_opd.system.console import accept_any_text
from nano_opd.system.device import compiled, precision
from nano_opd.system.distributed import replicate, require_finite
from nano_opd.system.fast_rollout import sampler
from nano_opd.system.report import report, warn_of_a_weak_teacher

CODE = sources.digests(__file__)  # so that an edited method does not go on with what the old one has made


def update(cfg: Config, step: int, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, sample) -> dict:
    """One update of the student on a batch of B responses, over --epochs epochs; returns columns of metrics.csv.

    Raises NumericalFault, before a weight has followed it, for a log-prob, loss or gradient that is not finite.
    """
    method, device = METHODS[cfg.method], next(student.parameters()).device
    problems, prompts, teacher_prompts = draw_batch(cfg, step, device)

    # sample: the student answers
    if method.samples:
        rollout = sample(student, prompts, cfg.response_cap, torch_stream(cfg.seed, "rollout", step, device))
    else:
        rollout = sft.worked_solutions(problems, device)
    require_finite("log-prob of a sampled token", rollout.logp)

    # score: how likely the teacher finds each token after its own prompt, and whether the answer is right
    whole = method.whole_vocabulary or cfg.variance != "sampled"  # distributions, or the sampled tokens alone
    with torch.no_grad():
        view = opsd.privileged_view(rollout.tokens, rollout.prompt_length, teacher_prompts)
        teacher_logp, teacher_logits = score(teacher, *view, whole) if method.teacher else (None, None)
    R = rewards(problems, rollout) if method.rewards else None

    for epoch in range(cfg.epochs):
        student_logp, student_logits = score(student, rollout.tokens, rollout.prompt_length, whole)
        if epoch == 0:
            old_logp = student_logp.detach()  # drops nothing: p_old, the denominator of the ratio, is a constant

        # advantage → loss: all that the methods differ in, nano_opd/methods.py
        logits = student_logits, teacher_logits
        scored = Scored(rollout.responses, rollout.mask, student_logp, old_logp, teacher_logp, *logits, R, step)
        loss, measured = method.loss(scored, **cfg.options_of_method)

        # step
        require_finite("loss", loss)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip or float("inf"))
        require_finite("norm of its gradient", grad_norm)
        optimizer.step()
    return {"loss": loss, "grad_norm": grad_norm, **measured}


def train(run: runs.Run, student: GPT, teacher: GPT) -> None:
    """The loop: evaluate now and then, update every time. What it measures is in run.rows."""
    cfg, optimizer = run.cfg, sft.adamw(student, run.cfg.lr)
    student.precision = teacher.precision = precision(cfg.dtype, run.device, teacher.config.n_embd)
    scored_student, scored_teacher = replicate(compiled(cfg.compile, student)), compiled(cfg.compile, teacher)
    sample, sample_for_evaluation = (sampler(run.device, cfg.compile, seldom) for seldom in (False, True))
    held_out = draw_problems(cfg, "held-out", 4 * cfg.eval_size, held_out=True)
    parts = {"student": student, "optimizer": optimizer, "teacher": teacher}

    for step in run.steps(parts):
        if step == 0:
            warn_of_a_weak_teacher(run, teacher)
        if run.is_due():
            problems = held_out if step in (0, cfg.steps) else held_out[: cfg.eval_size]
            options = torch_stream(cfg.seed, "evaluation", step, run.device), cfg.reference_slot, sample_for_evaluation
            run.log_evaluation(evaluate(student, teacher, problems, cfg.response_cap, *options))
        if step < cfg.steps:
            if cfg.teacher_sync and step % cfg.teacher_sync == 0:
                teacher.load_state_dict(student.state_dict())
            # The learning rate rises first: AdamW's first steps are large whatever the gradient.
            optimizer.param_groups[0]["lr"] = cfg.lr * min(1, 10 * (step + 1) / cfg.steps) * (1 - step / cfg.steps)
            run.log(update(cfg, step, scored_student, scored_teacher, optimizer, sample))


def warm_start(cfg: Config, who: str, model: GPT) -> Iterator[None]:
    """Supervised training of the "teacher" or the "student" on worked solutions, in place; yields after each update.

    A model that is to be its own teacher reads half of its prompts as the student does, and half with a reference.
    """
    size, styles = getattr(cfg, f"{who}_steps") * cfg.sft_batch_size, None
    problems = draw_problems(cfg, f"{who} solutions", size)
    if cfg.reference_slot:
        views = ["blank"] * len(arithmetic.REFERENCES) + list(arithmetic.REFERENCES)
        styles = numpy_stream(cfg.seed, f"{who} views").choice(views, size).tolist()
    return sft.train(model, problems, cfg.sft_batch_size, cfg.sft_lr, styles)


def main(arguments: list[str] | None = None) -> None:
    """One run, from its command line to its files."""
    accept_any_text()
    with runs.start(parse(arguments), CODE) as run:
        student = run.cached("student", warm_start)
        teacher = copy.deepcopy(student) if run.cfg.reference_slot else run.cached("teacher", warm_start)
        train(run, student, teacher.requires_grad_(False))
        report(run, student, teacher)


if __name__ == "__main__":
    main()
