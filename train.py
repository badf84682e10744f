"""On-policy distillation, start to finish: warm starts, then sample → score → advantage → step → evaluate.

`python train.py --method opdplus` takes about 1½ minutes on two laptop cores and ends near an accuracy of 0.96;
`python train.py --method opd --divergence forward_kl` is under the stop-gradient, and collapses.
"""

import copy
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from nano_opd import arithmetic, checkpoint, distributed, runs, sft
from nano_opd.checks import NumericalFault, require_finite
from nano_opd.config import Config, parse
from nano_opd.device import compiled, compiles, keep_freed_memory, precision, resolve
from nano_opd.evaluate import evaluate, prompts_of, sampled_correct, slots_of
from nano_opd.gpt import GPT
from nano_opd.losses import distillation_loss, privileged_loss
from nano_opd.rollout import response_logprobs, sample
from nano_opd.streams import numpy_stream, torch_stream


def progress(total: int, label: str) -> tqdm:
    """A bar with its ETA on a terminal; nothing where the output is a file."""
    return tqdm(total=total, desc=label, disable=distributed.rank() > 0 or not sys.stderr.isatty(), leave=False)


def problems(cfg: Config, purpose: str, size: int, step: int = 0, held_out: bool = False) -> list[arithmetic.Problem]:
    """Problems of the run's task from their own random stream."""
    rng = numpy_stream(cfg.seed, purpose, step)
    return arithmetic.sample_problems(cfg.task, cfg.digits, size, rng, held_out)


def warm_start(cfg: Config, who: str, device: torch.device, stop: runs.StopRequest) -> GPT:
    """The supervised "teacher" or "student": trained once, then read from the cache."""
    torch.manual_seed(torch_stream(cfg.seed, f"{who} weights").initial_seed())
    model = GPT(cfg.gpt(who)).to(device)
    path, key = cfg.warm_start_path(who), cfg.warm_start_key(who)
    if path.exists():
        model.load_state_dict(checkpoint.load(path, key, device))
        return model
    course, styles = problems(cfg, f"{who} solutions", key["steps"] * cfg.sft_batch_size), None
    if cfg.privileged:  # half the prompts as the student sees them, half as its own teacher does
        views = ["blank"] * len(arithmetic.REFERENCES) + list(arithmetic.REFERENCES)
        styles = numpy_stream(cfg.seed, f"{who} views").choice(views, len(course)).tolist()
    with progress(key["steps"], f"{who} warm start") as bar:
        for _ in sft.train(model, course, cfg.sft_batch_size, cfg.sft_lr, styles):
            bar.update()
            stop.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, key, model.state_dict())
    return model


def objective(cfg: Config, step: int, student: GPT, teacher: GPT) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """Draw the update's problems, let the student answer, and return the loss of one epoch on what was sampled."""
    copies = cfg.group_size if cfg.privileged else 1
    drawn = distributed.shard(problems(cfg, "problems", cfg.batch_size // copies, step))
    batch = [p for p in drawn for _ in range(copies)]
    if cfg.method == "sft":
        tokens = sft.solution_tokens(batch, student.device)
        return lambda: (sft.loss(student, tokens, cfg.prompt_length), {})
    slots = slots_of(batch, "blank") if cfg.privileged else None
    rollout = sample(
        distributed.unwrap(student),
        prompts_of(batch, student.device, slots),
        cfg.response_cap,
        torch_stream(cfg.seed, distributed.own("rollout"), step, student.device),
        compiled=compiles(cfg.compile, student.device),
    )
    if not cfg.privileged:
        return lambda: distillation_loss(cfg, student, teacher, rollout)
    if cfg.epochs > 1:  # p_old from a full forward, so that the first epoch's ratio is 1 (compiled, up to rounding)
        with torch.no_grad():
            old_logp = response_logprobs(distributed.unwrap(student), rollout.tokens, rollout.prompt_length)
        rollout = dataclasses.replace(rollout, logp=old_logp)
    return lambda: privileged_loss(cfg, step, student, teacher, rollout, batch)


def update(cfg: Config, step: int, student: GPT, teacher: GPT, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """One step of training; returns its columns of metrics.csv.

    Raises NumericalFault, before a weight has followed it, when a log-prob, the loss or its gradient is not finite.
    """
    if cfg.privileged and cfg.teacher_sync and step % cfg.teacher_sync == 0:
        distributed.unwrap(teacher).load_state_dict(distributed.unwrap(student).state_dict())
    with distributed.together():
        loss_of_epoch = objective(cfg, step, student, teacher)
    likely = "teacher and student judge some token so differently that its reward overflows: lower --lr"
    # it rises first: AdamW's first steps are large whatever the gradient, and would undo the warm start
    optimizer.param_groups[0]["lr"] = cfg.lr * min(1, 10 * (step + 1) / cfg.steps) * (1 - step / cfg.steps)
    for _ in range(cfg.epochs):
        with distributed.together():
            loss, measured = loss_of_epoch()
            require_finite("loss", loss, likely)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip or float("inf"))
        require_finite("norm of its gradient", grad_norm, likely)
        optimizer.step()
    return distributed.mean({"loss": loss.detach(), "grad_norm": grad_norm, **measured})  # drops nothing: only logged


def train(cfg: Config, student: GPT, teacher: GPT, stop: runs.StopRequest) -> list[dict]:
    """The loop. Evaluates and saves every `eval_every` updates; returns the rows of metrics.csv.

    Raises NumericalFault as `update` does, and Interrupted, everything saved, after the step in which a signal came.
    """
    optimizer = sft.adamw(student, cfg.lr)
    held_out = problems(cfg, "held-out", 4 * cfg.eval_size, held_out=True)
    rows, first, started = [], 0, time.monotonic()
    if state := runs.load(cfg, student.device):
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        if cfg.privileged:
            teacher.load_state_dict(state["self_teacher"])
        first, rows = state["step"], state["rows"][: state["step"]]  # the row of the step itself is measured again
        started -= state["seconds"]
    replica, judge = distributed.replicate(compiled(cfg.compile, student)), compiled(cfg.compile, teacher)

    def save(step: int) -> None:
        weights = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        if cfg.privileged:
            weights["self_teacher"] = teacher.state_dict()
        runs.save(cfg, {"step": step, "seconds": time.monotonic() - started, "rows": rows} | weights)

    with progress(cfg.steps, cfg.run_dir.name) as bar:
        bar.update(first)
        for step in range(first, cfg.steps + 1):
            row = dict.fromkeys(runs.COLUMNS) | {"step": step, "rollouts": step * cfg.batch_size}
            rows.append(row)
            try:
                if step % cfg.eval_every == 0 or step == cfg.steps:
                    row["seconds"] = round(time.monotonic() - started, 3)
                    generator = torch_stream(cfg.seed, "evaluation", step, student.device)
                    some = held_out if step in (0, cfg.steps) else held_out[: cfg.eval_size]
                    row |= evaluate(student, teacher, some, cfg.response_cap, generator, cfg.privileged)
                    save(step)
                    said = "accuracy {accuracy:.3f}  kl {kl:.3f}".format(**row)
                    bar.set_postfix_str(said)
                    if bar.disable:
                        print(f"step {step:5d} {row['seconds']:7.1f} s  {said}", flush=True)
                if step < cfg.steps:
                    row |= update(cfg, step, replica, judge, optimizer)
            except NumericalFault as fault:
                raise NumericalFault(f"step {step}: {fault}") from None
            if step < cfg.steps:
                bar.update()
                if signal := distributed.agree(stop.signal):
                    stop.signal = signal
                    with distributed.rank_0_first():
                        save(step + 1)
                    stop.check()
    return rows


def main(arguments: list[str] | None = None) -> None:
    """One run, from its command line to its files."""
    cfg = parse(arguments)
    stop = runs.StopRequest()

    def end(code: int, sentence: str) -> NoReturn:
        if distributed.rank() == 0:
            print(f"train.py: {sentence}", file=sys.stderr)
        sys.exit(code)

    try:
        device = distributed.place(resolve(cfg.device))
        with distributed.group(device), runs.claim(cfg):
            run(cfg, device, stop)
    except (checkpoint.CheckpointError, checkpoint.WriteError, runs.RunFolderError) as error:
        end(2, str(error))
    except NumericalFault as error:
        end(1, f"{error}. The last good state, if one was saved, is in {cfg.run_dir / 'checkpoint.pt'}")
    except distributed.RankLost as error:
        end(1, f"{error}; the same command with --resume continues {cfg.run_dir}")
    except runs.Interrupted:
        end(128 + stop.signal, f"stopped; the same command with --resume continues {cfg.run_dir}")


def run(cfg: Config, device: torch.device, stop: runs.StopRequest) -> None:
    """Warm starts, the loop, the report."""
    keep_freed_memory()
    with distributed.rank_0_first():
        student = warm_start(cfg, "student", device, stop)
        teacher = copy.deepcopy(student) if cfg.privileged else warm_start(cfg, "teacher", device, stop)
    teacher.requires_grad_(False)
    student.precision = teacher.precision = precision(cfg.dtype, device)
    rows = train(cfg, student, teacher, stop)
    if distributed.rank() > 0:
        return
    shown = problems(cfg, "answers", 4 * cfg.eval_size, held_out=True)
    generator = torch_stream(cfg.seed, "answers", device=device)
    blank, work = (slots_of(shown, style) if cfg.privileged else None for style in ("blank", "work"))
    teacher_correct, _ = sampled_correct(teacher, shown, 1, cfg.response_cap, generator, work)
    correct, texts = sampled_correct(student, shown, 4, cfg.response_cap, generator, blank)
    runs.report(cfg, rows, shown, teacher_correct, correct, texts)


if __name__ == "__main__":
    main()
