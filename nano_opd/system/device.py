"""Where a run computes, and how it keeps its memory."""

import ctypes
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def resolve(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA GPU or else the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        there = counts[device.type]
    except (RuntimeError, KeyError):
        raise ValueError(f"{name}: choose from auto, cpu, cuda, cuda:<n>, mps") from None
    if (device.index or 0) >= there:
        raise ValueError(f"{name}: this machine has no such device; auto takes what is there")
    return device


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products called `name`; "auto" is bfloat16 on a GPU, and float32 elsewhere.

    Few CPUs have instructions for bfloat16, and at width 64 those save 15 % of the time.
    """
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if name == "auto" else name)


def compiles(name: str, device: torch.device) -> bool:
    """Whether --compile `name` asks for torch.compile: "on" does, and "auto" on a GPU.

    The operators between two matrix products become one kernel: a step of the default run takes 0.7 of the time on two
    cores. Making the kernels takes 40 s there, which a run of minutes does not earn back.
    """
    return name == "on" or (name == "auto" and device.type == "cuda")


def compiled(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model as it is or, if --compile `name` asks for it, through torch.compile."""
    if not compiles(name, model.device):
        return model
    if model.device.type == "cpu":
        # Otherwise threads sum the embedding's gradient in varying order, and runs differ in the last bits.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model, dynamic=False)


@contextmanager
def any_order() -> Iterator[None]:
    """Without deterministic algorithms, for sampling, where no threads add up.

    With them torch.compile would copy a whole tensor instead of writing in place at an index.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can make kernels, for which it needs a C++ compiler on a CPU, and the headers of Python."""
    program = os.environ.get(
        "CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    )  # as it looks for one
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return device.type != "cpu" or (shutil.which(program) is not None and os.path.exists(header))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that the next step reuses it.

    By default each tensor over 128 KiB goes back to the kernel when it is freed, and the same buffer is page-faulted in
    again a moment later: on two cores of a virtual machine, a quarter of the time of scoring and updating.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
