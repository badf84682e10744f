"""More than one device: one process per device, each a rank with its share of every update, as torchrun starts them.

    torchrun --standalone --nproc_per_node=2 train.py --method opdplus

Rank k of N answers the k-th part of an update's problems, with random streams of its own, and divides its loss by B/N.
DistributedDataParallel makes every rank's gradient the mean over the ranks, that of all B responses, so the weights
stay equal. All ranks evaluate, on the same draws; rank 0 alone writes and speaks. With one process, none of it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nano_opd import checks
from nano_opd.checks import NumericalFault
from nano_opd.policy_gradient import Fraction


class RankLost(RuntimeError):
    """Another process of this run has ended, and this one waited for it."""


def world_size() -> int:
    """Return N, the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return k, from 0 to N − 1."""
    return int(os.environ.get("RANK", 0))


# What torchrun tells each process beside WORLD_SIZE
OF_MANY = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_launcher() -> None:
    """Raise ValueError where the environment speaks of several processes and not as torchrun does."""
    for name in ("WORLD_SIZE", *OF_MANY):
        value = os.environ.get(name, "0")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise ValueError(f"{name}={value}: not a number; unset it, or start several processes with torchrun")
    if rank() >= world_size():
        raise ValueError(f"RANK={rank()} of WORLD_SIZE={world_size()}: unset both, or start with torchrun")
    missing = [name for name in OF_MANY if name not in os.environ]
    if world_size() > 1 and missing:
        raise ValueError(f"WORLD_SIZE={world_size()} without {', '.join(missing)}: unset it, or start with torchrun")


def own_device(device: torch.device) -> torch.device:
    """Return this rank's own device of that type. Raises ValueError where the processes cannot have one each."""
    if world_size() == 1 or device.type == "cpu":
        return device
    each = int(os.environ["LOCAL_WORLD_SIZE"])  # processes on this machine
    there = torch.cuda.device_count()
    if device.type != "cuda" or device.index is not None or each > there:
        raise ValueError(f"{device}: {each} processes need cpu, or cuda and {each} GPUs; this machine has {there}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other ranks for the length of a `with`.

    A NumericalFault of this rank is sent to the others, which raise it at their next `require_finite`. Only rank 0
    prints within the `with`. Raises RankLost when another rank is gone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if world_size() == 1:
        yield
        return
    # Gradients travel between the devices. What ranks tell each other is on the CPU, where a lost one shows at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    stdout = sys.stdout if rank() == 0 else None
    try:
        with contextlib.redirect_stdout(stdout):
            yield
    except NumericalFault as fault:
        if not hasattr(fault, "shared"):
            # The others come to `require_finite`, are here with the same fault, or have ended.
            with contextlib.suppress(RuntimeError):
                first_value(fault)
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's have no type, but name its files
            raise RankLost("another process of this run has ended") from error
        raise
    dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone


def first_value(value):
    """Return on every rank the value of the lowest rank that has one, None if none has.

    All wait for each other here.
    """
    if world_size() == 1:
        return value
    nobody = world_size()
    first = torch.tensor(nobody if value is None else rank())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    values = [value]
    if first < nobody:
        dist.broadcast_object_list(values, src=int(first))
    return values[0]


def require_finite(name: str, values: Tensor) -> None:
    """Raise NumericalFault on all ranks, so that none waits for one that has stopped, when any has a bad value.

    Ranks that find a fault earlier come here too, through `group`. So it stands before whatever waits for all: the
    forward of a replica, which may settle what replicas share, and the backward, which adds up their gradients.
    """
    likely = "--lr is too high, or some token's reward overflows, so different are teacher and student"
    own_fault = None
    try:
        checks.require_finite(name, values, likely)
    except NumericalFault as error:
        own_fault = error
    fault = first_value(own_fault)
    if fault is not None:
        fault.shared = True
        raise fault


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the block, then the others, who find the files that it wrote."""
    if rank() > 0:
        first_value(None)
    yield
    if rank() == 0:
        first_value(None)


def shard(rows: list) -> list:
    """Return this rank's part of what is drawn for all of them."""
    share = len(rows) // world_size()
    first = rank() * share
    return rows[first : first + share]


def own(purpose: str) -> str:
    """Return the name of this rank's own random stream of a purpose; rank 0 has that of a run with one process."""
    return purpose if rank() == 0 else f"{purpose} of rank {rank()}"


def replicate(model: nn.Module) -> nn.Module:
    """Return the model to score with: a loss of its logits has the gradient of all ranks.

    Their weights become rank 0's.
    """
    if world_size() == 1:
        return model
    replica = DistributedDataParallel(model)
    replica.broadcast_buffers = False  # they are constants, and a rank may find a fault before it comes to a forward
    return replica


def unwrap(model: nn.Module) -> nn.Module:
    """Return the GPT itself, neither replicated nor compiled; none of its calls waits for another rank."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)  # where torch.compile keeps it


def mean(measured: dict[str, Tensor | Fraction]) -> dict[str, float]:
    """Return scalars averaged over the ranks; of a fraction, both counts are summed before one divides the other."""
    parts = []
    wholes = []
    for value in measured.values():
        if isinstance(value, Fraction):
            part, whole = value
        else:
            part = value
            whole = torch.ones(())
        parts.append(part.detach().cpu().double())  # drops nothing: it is only logged
        wholes.append(whole.cpu().double())
    sums = torch.stack(parts + wholes)  # one message to the other ranks
    if world_size() > 1:
        dist.all_reduce(sums)
    sums_of_parts, sums_of_wholes = sums.chunk(2)
    means = sums_of_parts / sums_of_wholes.clamp(min=1)
    return dict(zip(measured, means.tolist()))
