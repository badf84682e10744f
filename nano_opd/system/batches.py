"""Draw the problems of a run: those of one update, with their prompts, and those of an evaluation."""

from typing import NamedTuple

import torch
from torch import Tensor

from nano_opd import arithmetic
from nano_opd.arithmetic import prompts_of, slots_of
from nano_opd.streams import numpy_stream
from nano_opd.system import distributed


class Batch(NamedTuple):
    """The B problems of one update, and what student and teacher read."""

    problems: list[arithmetic.Problem]
    prompts: Tensor  # (B, P) of the student
    teacher_prompts: Tensor  # (B, P) of the teacher: with a reference, where it is the student itself


def draw_problems(cfg, purpose: str, size: int, step: int = 0, held_out: bool = False) -> list[arithmetic.Problem]:
    """Return problems of the run's task, from the random stream of this purpose and step."""
    rng = numpy_stream(cfg.seed, purpose, step)
    return arithmetic.sample_problems(cfg.task, cfg.digits, size, rng, held_out)


def draw_batch(cfg, step: int, device: torch.device) -> Batch:
    """Return the batch of one update; of several processes, this one's share.

    A problem is drawn for each group and stands there G times. A self-teacher reads a reference where the student reads
    a blank.
    """
    groups = draw_problems(cfg, "problems", cfg.batch_size // cfg.copies, step)
    problems = []
    for problem in distributed.shard(groups):
        problems += [problem] * cfg.copies
    if not cfg.reference_slot:
        prompts = prompts_of(problems, device)
        return Batch(problems, prompts, teacher_prompts=prompts)
    rng = numpy_stream(cfg.seed, distributed.own("reference"), step)
    references = arithmetic.draw_references(problems, cfg.group_size, rng, cfg.reference)
    return Batch(
        problems,
        prompts=prompts_of(problems, device, slots_of(problems, "blank")),
        teacher_prompts=prompts_of(problems, device, references),
    )
