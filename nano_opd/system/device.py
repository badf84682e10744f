"""Where a run computes, and how it keeps its memory."""

import ctypes
import importlib.util
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


def precision(name: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype of matrix products called `name`; "auto" is bfloat16 for wide models on a GPU, else float32.

    Cards before compute capability 8.0 emulate bfloat16. Few CPUs have instructions for it. And at a small width the
    casts, which are kernels of their own, cost what the products gain.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and width >= 256
    return getattr(torch, ("bfloat16" if fast else "float32") if name == "auto" else name)


def compiled(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model as it is or, under --compile on, through torch.compile.

    The operators between two matrix products become one kernel: a step of the default run takes 0.7 of the time on two
    cores. Making the kernels takes 40 s there, which a run of minutes does not earn back.
    """
    if name != "on":
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
    """Whether torch.compile can make kernels: with a C++ compiler on a CPU, with Triton and a C compiler on a GPU.

    Both need the headers of Python. The programs are those that they look for themselves.
    """
    if device.type == "cuda":
        programs = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cl"]
        ready = importlib.util.find_spec("triton") is not None
    else:
        programs = [os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))]
        ready = True
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return ready and any(map(shutil.which, programs)) and os.path.exists(header)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that the next step reuses it.

    By default each tensor over 128 KiB goes back to the kernel when it is freed, and the same buffer is page-faulted in
    again a moment later: on two cores of a virtual machine, a quarter of the time of scoring and updating.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
