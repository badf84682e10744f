"""On-policy distillation, start to finish. `update` is the algorithm: sample → score → advantage → loss → step.

    python train.py --method opdplus                        1½ minutes on two cores; accuracy 0.06 → 0.96
    python train.py --method opd --divergence forward_kl    under the stop-gradient: it collapses

What makes a run practical (its folder, resuming, signals, several devices) is in nano_opd/system/.
"""

import copy

from nano_opd.system import sources  # isort: skip (before torch: a bad value of a variable TQDM_… would stop it)
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nano_opd import opsd, sft
from nano_opd.arithmetic import rewards
from nano_opd.evaluate import evaluate
from nano_opd.gpt import GPT, adamw
from nano_opd.methods import METHODS, Scored
from nano_opd.policy_gradient import Fraction
from nano_opd.rollout import score
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.system import distributed, endings, runs
from nano_opd.system.batches import draw_batch, draw_problems
from nano_opd.system.config import Config, parse
from nano_opd.system.console import accept_any_text
from nano_opd.system.device import compiled, precision
from nano_opd.system.distributed import replicate, require_finite
from nano_opd.system.fast_rollout import sampler
from nano_opd.system.report import report, warn_of_a_weak_teacher

CODE = sources.digests(__file__)  # so that an edited method does not go on with what the old one has made


def update(
    cfg: Config, step: int, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, sample
) -> dict[str, Tensor | Fraction]:
    """Update the student on a batch of B responses, once in each of --epochs epochs.

    Return what the last of them measured, as columns of metrics.csv.

    sample  answers prompts: rollout.sample, a faster way to do the same, or sft.solve

    Raises NumericalFault for a log-prob, loss or gradient that is not finite, before a weight has followed it.
    """
    method = METHODS[cfg.method]
    device = next(student.parameters()).device
    batch = draw_batch(cfg, step, device)

    # sample: the student answers
    generator = torch_stream(cfg.seed, distributed.own("rollout"), step, device)
    rollout = sample(student, batch.prompts, cfg.response_cap, generator)
    require_finite("log-prob of a sampled token", rollout.logp)

    # score: how likely the teacher finds each token after its own prompt, and whether each answer is right
    whole_vocabulary = method.compares_distributions(cfg.variance)  # or only the sampled tokens
    teacher_logp = None
    teacher_logits = None
    if method.teacher:
        tokens, prompt_length = rollout.tokens, rollout.prompt_length
        if method.teacher == "self":  # it reads a reference where the student reads a blank
            tokens, prompt_length = opsd.privileged_view(tokens, prompt_length, batch.teacher_prompts)
        with torch.no_grad():
            teacher_logp, teacher_logits = score(teacher, tokens, prompt_length, whole_vocabulary)
    R = rewards(batch.problems, rollout) if method.rewards else None

    for epoch in range(cfg.epochs):
        student_logp, student_logits = score(student, rollout.tokens, rollout.prompt_length, whole_vocabulary)
        if epoch == 0:
            old_logp = student_logp.detach()  # drops nothing: p_old, the denominator of the ratio, is a constant

        # advantage → loss: all that the methods differ in, nano_opd/methods.py
        scored = Scored(
            tokens=rollout.responses,
            mask=rollout.mask,
            student_logp=student_logp,
            old_logp=old_logp,
            teacher_logp=teacher_logp,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            rewards=R,
            step=step,
        )
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
    """Train the student: an update at every step, and an evaluation now and then. Both fill run.rows."""
    cfg = run.cfg
    optimizer = adamw(student, cfg.lr)
    student.precision = teacher.precision = precision(cfg.dtype, run.device, teacher.config.n_embd)
    scored_student = replicate(compiled(cfg.compile, student))
    scored_teacher = compiled(cfg.compile, teacher)
    sample = sampler(run.device, cfg.compile) if METHODS[cfg.method].samples else sft.solve
    sample_for_evaluation = sampler(run.device, cfg.compile, seldom=True)
    held_out = draw_problems(cfg, "held-out", 4 * cfg.eval_size, held_out=True)

    first = run.resume(student=student, optimizer=optimizer, teacher=teacher)
    if first == 0:
        warn_of_a_weak_teacher(run, teacher)

    for step in range(first, cfg.steps + 1):
        run.begin(step)
        if evaluation_is_due(cfg, step):
            measured = evaluate(
                student,
                teacher,
                problems=held_out if step in (0, cfg.steps) else held_out[: cfg.eval_size],
                max_new_tokens=cfg.response_cap,
                generator=torch_stream(cfg.seed, "evaluation", step, run.device),
                sample=sample_for_evaluation,
            )
            run.log_evaluation(measured)
            run.save(step)
            run.warn_if_slow()
        if step == cfg.steps:
            break
        if cfg.teacher_sync and step % cfg.teacher_sync == 0:
            teacher.load_state_dict(student.state_dict())
        set_learning_rate(optimizer, cfg, step)
        measured = update(cfg, step, scored_student, scored_teacher, optimizer, sample)
        run.log_update(measured)
        run.stop_if_asked()
    run.finish()


def evaluation_is_due(cfg: Config, step: int) -> bool:
    """Whether the student is evaluated at this step."""
    return step % cfg.eval_every == 0 or step == cfg.steps


def set_learning_rate(optimizer: Optimizer, cfg: Config, step: int) -> None:
    """Let the learning rate rise for a tenth of the updates and fall linearly to 0 over all of them.

    It rises first because AdamW's first steps are large whatever the gradient is.
    """
    rise = min(1, 10 * (step + 1) / cfg.steps)
    fall = 1 - step / cfg.steps
    optimizer.param_groups[0]["lr"] = cfg.lr * rise * fall


def warm_start(run: runs.Run, who: str) -> GPT:
    """Return the "teacher" or the "student" as its warm start leaves it: trained once, then read from its file.

    A model that is to be its own teacher reads half of its prompts as the student does, and half with a reference.
    """
    cfg = run.cfg
    with distributed.rank_0_first():
        model = run.new_model(who)
        if run.load_warm_start(who, model, how=warm_start):
            return model
        updates = cfg.teacher_steps if who == "teacher" else cfg.student_steps
        problems = draw_problems(cfg, f"{who} solutions", updates * cfg.sft_batch_size)
        views = numpy_stream(cfg.seed, f"{who} views") if cfg.reference_slot else None
        with runs.Progress(f"{who} warm start", updates, run.stop) as progress:
            sft.warm_start(model, problems, views, cfg.sft_batch_size, cfg.sft_lr, after_update=progress.update)
        run.save_warm_start(who, model, how=warm_start)
        return model


def main(arguments: list[str] | None = None) -> None:
    """Make one run, from its command line to its files."""
    accept_any_text()
    cfg = parse(arguments)
    try:
        with runs.opened(cfg, CODE) as run:
            student = warm_start(run, "student")
            teacher = copy.deepcopy(student) if cfg.reference_slot else warm_start(run, "teacher")
            teacher.requires_grad_(False)
            train(run, student, teacher)
            report(run, student, teacher)
    except (Exception, KeyboardInterrupt) as error:
        endings.end(error, cfg)


if __name__ == "__main__":
    main()
