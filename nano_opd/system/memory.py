"""What a run holds at the least, and what its device has, so that sizes that cannot fit are refused at once."""

import os

import torch

from nano_opd.gpt import GPTConfig


def needs(cfg) -> dict[str, int]:
    """Return the bytes that a run must hold at once, by the options that decide them: lower bounds."""
    student = cfg.gpt("student")
    if cfg.reference_slot:  # a self-teacher is a copy of the student
        teacher = student
        updates = cfg.student_steps
    else:
        teacher = cfg.gpt("teacher")
        updates = max(cfg.teacher_steps, cfg.student_steps)
    sequence = max(activations(student), activations(teacher))
    solutions = updates * cfg.sft_batch_size  # of the longer warm start, made in advance
    return {
        "--student-width and --student-layers": 4 * weights(student),  # and a gradient and AdamW's two means of each
        "--teacher-width and --teacher-layers": 4 * weights(teacher),
        "--batch-size": cfg.batch_size * activations(student),
        "--sft-batch-size": cfg.sft_batch_size * sequence,
        "--eval-size": 4 * cfg.eval_size * cache(student),
        "--teacher-steps and --student-steps": solutions * 8 * student.block_size,
        "--steps": cfg.steps * 500,  # a row of metrics.csv
    }


def weights(size: GPTConfig) -> int:
    """Return the bytes of a model's weights, in float32."""
    return 4 * size.n_embd * (12 * size.n_layer * size.n_embd + size.vocab_size + size.block_size)


def activations(size: GPTConfig) -> int:
    """Return the bytes that are kept of one sequence for its backward."""
    return 40 * size.block_size * size.n_layer * size.n_embd


def cache(size: GPTConfig) -> int:
    """Return the bytes of the keys and values of one sequence."""
    return 8 * size.block_size * size.n_layer * size.n_embd


def shortage(cfg, device: torch.device) -> str | None:
    """Return what cannot fit into the device's memory, in a sentence; None where everything may."""
    there = capacity(device)
    for option, need in needs(cfg).items():
        if need > there:
            return f"{option}: {need // 2**30:,} GiB or more are needed, of {there / 2**30:,.0f} in all: choose less"
    return None


def capacity(device: torch.device) -> int:
    """Return the bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not say
        return 2**40
