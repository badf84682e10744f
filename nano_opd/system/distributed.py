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
    """N, the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """k, from 0 to N − 1."""
    return int(os.environ.get("RANK", 0))


def require_launcher() -> None:
    """Raises ValueError where the environment speaks of several processes and not as torchrun does."""
    of_many = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in ("WORLD_SIZE", *of_many):
        value = os.environ.get(name, "0")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise ValueError(f"{name}={value}: not a number; unset it, or start several processes with torchrun")
    if not rank() < world_size():
        raise ValueError(f"RANK={rank()} of WORLD_SIZE={world_size()}: unset both, or start with torchrun")
    if world_size() > 1 and (missing := [name for name in of_many if name not in os.environ]):
        raise ValueError(f"WORLD_SIZE={world_size()} without {', '.join(missing)}: unset it, or start with torchrun")


def own_device(device: torch.device) -> torch.device:
    """This rank's own device of that type. Raises ValueError where the processes cannot have one each."""
    if world_size() == 1 or device.type == "cpu":
        return device
    each, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.type != "cuda" or device.index is not None or each > there:
        raise ValueError(f"{device}: {each} processes need cpu, or cuda and {each} GPUs; this machine has {there}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other ranks for the length of a `with`; a NumericalFault on one is raised on all.

    Raises RankLost when another rank is gone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if world_size() == 1:
        yield
        return
    # Gradients travel between the devices. What ranks tell each other is on the CPU, where a lost one shows at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.redirect_stdout(sys.stdout if rank() == 0 else None):
            yield
    except NumericalFault as fault:
        if not hasattr(fault, "shared"):  # the others come to `require_finite`, are here with the same fault,
            with contextlib.suppress(RuntimeError):  # or have ended
                first_value(fault)
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's have no type, but name its files
            raise RankLost("another process of this run has ended") from error
        raise
    dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone


def first_value(value):
    """On every rank the value of the lowest rank that has one, None if none has; all wait for each other here."""
    if world_size() == 1:
        return value
    first = torch.tensor(world_size() if value is None else rank())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    box = [value]
    if first < world_size():
        dist.broadcast_object_list(box, src=int(first))
    return box[0]


def require_finite(name: str, values: Tensor) -> None:
    """Raises NumericalFault on all ranks, so that none waits for one that has stopped, when any has a bad value.

    Ranks that find a fault earlier come here too, through `group`. So it stands before whatever waits for all: the
    forward of a replica, which may settle what replicas share, and the backward, which adds up their gradients.
    """
    fault, likely = None, "--lr is too high, or some token's reward overflows, so different are teacher and student"
    try:
        checks.require_finite(name, values, likely)
    except NumericalFault as error:
        fault = error
    if fault := first_value(fault):
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
    """This rank's part of what is drawn for all of them."""
    n = len(rows) // world_size()
    return rows[rank() * n : (rank() + 1) * n]


def own(purpose: str) -> str:
    """Return the name of this rank's own random stream of a purpose; rank 0 has that of a run with one process."""
    return purpose if rank() == 0 else f"{purpose} of rank {rank()}"


def replicate(model: nn.Module) -> nn.Module:
    """The model to score with: a loss of its logits has the gradient of all ranks. Their weights become rank 0's."""
    if world_size() == 1:
        return model
    replica = DistributedDataParallel(model)
    replica.broadcast_buffers = False  # they are constants, and a rank may find a fault before it comes to a forward
    return replica


def unwrap(model: nn.Module) -> nn.Module:
    """The GPT itself, neither replicated nor compiled; none of its calls waits for another rank."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return getattr(model, "_orig_mod", model)  # where torch.compile keeps it


def mean(measured: dict[str, Tensor | Fraction]) -> dict[str, float]:
    """Scalars averaged over the ranks; of a fraction, both counts are summed before one divides the other."""
    parts, wholes = [], []
    for value in measured.values():
        part, whole = value if isinstance(value, Fraction) else (value, torch.ones(()))
        parts.append(part.detach().cpu().double())  # drops nothing: it is only logged
        wholes.append(whole.cpu().double())
    sums = torch.stack(parts + wholes)
    if world_size() > 1:
        dist.all_reduce(sums)
    part, whole = sums.chunk(2)
    return dict(zip(measured, (part / whole.clamp(min=1)).tolist()))
