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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a CUDA GPU or else the CPU.

    Raises ValueError for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
        number = there[device.type]
    except (RuntimeError, KeyError):
        raise ValueError(f"{name}: choose from auto, cpu, cuda, cuda:<n>, mps") from None
    index = 0 if device.index is None else device.index
    if index >= number:
        raise ValueError(f"{name}: this machine has no such device; auto takes what is there")
    return device


def precision(name: str, device: torch.device, width: int) -> torch.dtype:
    """Return the dtype of matrix products called `name`; "auto" is bfloat16 for wide models on a GPU, else float32.

    Cards before compute capability 8.0 emulate bfloat16. Few CPUs have instructions for it. And at a small width the
    casts, which are kernels of their own, cost what the products gain.
    """
    if name != "auto":
        return DTYPES[name]
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and width >= 256
    return torch.bfloat16 if fast else torch.float32


def compiled(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model as it is or, under --compile on, through torch.compile.

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
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        return False
    return any(shutil.which(program) for program in compilers(device))


def compilers(device: torch.device) -> list[str]:
    """Return the names of the compilers of which torch.compile needs one: for C on a GPU, for C++ on a CPU."""
    if device.type == "cuda":
        if "CC" in os.environ:
            return [os.environ["CC"]]
        return ["gcc", "clang", "cl"]
    if "CXX" in os.environ:
        return [os.environ["CXX"]]
    if sys.platform == "darwin":
        return ["clang++"]
    if sys.platform == "win32":
        return ["cl"]
    return ["g++"]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that the next step reuses it.

    By default each tensor over 128 KiB goes back to the kernel when it is freed, and the same buffer is page-faulted in
    again a moment later: on two cores of a virtual machine, a quarter of the time of scoring and updating.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in musl
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
