"""What a run holds at the least, and what its device has, so that sizes that cannot fit are refused at once."""

import os

import torch


def needs(cfg) -> dict[str, int]:
    """Bytes that a run must hold at once, by the options that decide them: lower bounds."""
    of_teacher = "student" if cfg.reference_slot else "teacher"  # a self-teacher is a copy of the student
    student, teacher = cfg.gpt("student"), cfg.gpt(of_teacher)
    weights = lambda c: 4 * c.n_embd * (12 * c.n_layer * c.n_embd + c.vocab_size + c.block_size)  # float32
    activations = lambda c: 40 * c.block_size * c.n_layer * c.n_embd  # of one sequence, kept for its backward
    cache = lambda c: 8 * c.block_size * c.n_layer * c.n_embd  # keys and values of one sequence
    solutions = max(getattr(cfg, f"{of_teacher}_steps"), cfg.student_steps) * cfg.sft_batch_size  # made in advance
    return {
        "--student-width and --student-layers": 4 * weights(student),  # and a gradient and AdamW's two means of each
        "--teacher-width and --teacher-layers": 4 * weights(teacher),
        "--batch-size": cfg.batch_size * activations(student),
        "--sft-batch-size": cfg.sft_batch_size * max(activations(student), activations(teacher)),
        "--eval-size": 4 * cfg.eval_size * cache(student),
        "--teacher-steps and --student-steps": solutions * 8 * student.block_size,
        "--steps": cfg.steps * 500,  # a row of metrics.csv
    }


def shortage(cfg, device: torch.device) -> str | None:
    """What cannot fit into the device's memory, in a sentence; None where everything may."""
    there = capacity(device)
    for option, need in needs(cfg).items():
        if need > there:
            return f"{option}: {need // 2**30:,} GiB or more are needed, of {there / 2**30:,.0f} in all: choose less"
    return None


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not say
        return 2**40
