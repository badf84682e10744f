"""Where a run computes, and how it keeps its memory."""

import ctypes
import sys

import torch


def resolve(name: str) -> torch.device:
    """The device called `name`, once it is known to be there; "auto" is a CUDA GPU or else the CPU.

    Raises ValueError for a name that is none, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[
            device.type
        ]
    except (RuntimeError, KeyError):
        raise ValueError(f"{name}: choose from auto, cpu, cuda, cuda:<n>, mps") from None
    if (device.index or 0) >= there:
        raise ValueError(f"{name}: this machine has no such device; auto takes what is there")
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that the next step reuses it.

    By default each tensor over 128 KiB goes back to the kernel when it is freed, and the same buffer is page-faulted in
    again a moment later: on two cores of a virtual machine, a quarter of the time of scoring and updating.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
