"""Say in one sentence how a run ended, and with which exit code.

    0    it was finished
    1    a number was not finite, or another process was lost
    2    an input, a file or the memory: the user can change it
    128+ a signal came; 130 is Ctrl-C

Whatever is not known here is a fault of the program, and keeps its traceback.
"""

import sys

import torch

from nano_opd.checks import NumericalFault
from nano_opd.system import checkpoint, distributed, folder
from nano_opd.system.config import Config
from nano_opd.system.console import say
from nano_opd.system.signals import Interrupted


def end(error: BaseException, cfg: Config) -> None:
    """End the program with the exit code of a known error, and print its sentence; rank 0 prints. Raise any other."""
    code, sentence = code_and_sentence(error, cfg)
    if code is None:
        raise error
    if distributed.rank() == 0:
        say(f"train.py: {sentence}", sys.stderr)
    sys.exit(code)


def code_and_sentence(error: BaseException, cfg: Config) -> tuple[int | None, str]:
    """Return the exit code of an error and what the user is told; None for an error that is not known."""
    again = f"the same command with --resume continues {cfg.run_dir}"
    if isinstance(error, (checkpoint.CheckpointError, checkpoint.WriteError, folder.RunFolderError)):
        return 2, str(error)
    if isinstance(error, NumericalFault):
        kept = f"The last good state, if one was saved, is in {cfg.run_dir / 'checkpoint.pt'}"
        step = getattr(error, "step", 0)
        return 1, f"step {step}: {error}. {kept}"
    if isinstance(error, distributed.RankLost):
        return 1, f"{error}; {again}"
    if is_out_of_memory(error):
        return 2, f"out of memory: choose a lower --batch-size, --eval-size or width; {again}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"stopped at once; {again}"
    if isinstance(error, Interrupted):
        return 128 + error.number, f"stopped; {again}"
    return None, ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device is used up. PyTorch has no type for a CPU's, but names its allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
