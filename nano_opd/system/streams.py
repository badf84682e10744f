"""Random streams without state: every draw is a function of (seed, purpose, step).

Nothing has to be saved for a run to resume to the same bits, methods with the same seed see the same problems in the
same order (paired comparisons), and adding a draw in one place changes no draw elsewhere.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from nano_opd import arithmetic
from nano_opd.evaluate import prompts_of, slots_of
from nano_opd.system import distributed

OF_EACH_RANK = ("rollout", "reference")  # every process draws its own; rank 0's are those of a run with one process


def _entropy(seed: int, purpose: str, step: int) -> np.random.SeedSequence:
    if purpose in OF_EACH_RANK and distributed.rank() > 0:
        purpose = f"{purpose} of rank {distributed.rank()}"
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step])


def numpy_stream(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """For problems and everything else drawn on the host."""
    return np.random.default_rng(_entropy(seed, purpose, step))


def torch_stream(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """For sampling tokens on `device`."""
    state = int(_entropy(seed, purpose, step).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & (2**63 - 1))


def draw_problems(cfg, purpose: str, size: int, step: int = 0, held_out: bool = False) -> list[arithmetic.Problem]:
    """Problems of the run's task, from the random stream of this purpose and step."""
    rng = numpy_stream(cfg.seed, purpose, step)
    return arithmetic.sample_problems(cfg.task, cfg.digits, size, rng, held_out)


def draw_batch(cfg, step: int, device: torch.device) -> tuple[list[arithmetic.Problem], Tensor, Tensor]:
    """B problems for one update, and the prompts (B, P) of student and teacher; of several processes, one's share.

    A problem is drawn for each group and stands there G times. A self-teacher reads a reference where the student reads
    a blank.
    """
    drawn = distributed.shard(draw_problems(cfg, "problems", cfg.batch_size // cfg.copies, step))
    problems = [problem for problem in drawn for _ in range(cfg.copies)]
    if not cfg.reference_slot:
        prompts = prompts_of(problems, device)
        return problems, prompts, prompts
    rng = numpy_stream(cfg.seed, "reference", step)
    references = arithmetic.draw_references(problems, cfg.group_size, rng, cfg.reference)
    return problems, *(prompts_of(problems, device, slots) for slots in (slots_of(problems, "blank"), references))
