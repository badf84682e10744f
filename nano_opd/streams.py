"""Random streams without state: every draw is a function of (seed, purpose, step).

Nothing has to be saved for a run to resume to the same bits. Methods with the same seed see the same problems in the
same order, so that they can be compared in pairs. Adding a draw in one place changes no draw elsewhere.
"""

import zlib

import numpy as np
import torch


def _seed_sequence(seed: int, purpose: str, step: int) -> np.random.SeedSequence:
    """Return the numbers from which a stream starts. Unlike hash(), crc32 is the same in every process."""
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step])


def numpy_stream(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """Return the stream of this purpose and step, for problems and everything else that is drawn on the host."""
    return np.random.default_rng(_seed_sequence(seed, purpose, step))


def torch_stream(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the stream of this purpose and step on a device, for sampling tokens there."""
    state = int(_seed_sequence(seed, purpose, step).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & (2**63 - 1))  # 63 bits, as a signed number holds
