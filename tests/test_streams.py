"""A stream is a function of its three keys and of nothing else."""

import itertools

import torch

from nano_opd.streams import numpy_stream, torch_stream


def test_equal_keys_give_equal_draws_and_any_other_key_gives_others():
    keys = list(itertools.product([0, 1], ["rollout", "problems"], [0, 1, 2]))
    numpy_draws = {tuple(numpy_stream(*key).integers(2**60, size=4).tolist()) for key in keys}
    torch_draws = {tuple(torch.rand(4, generator=torch_stream(*key)).tolist()) for key in keys}
    assert len(numpy_draws) == len(torch_draws) == len(keys)
    torch.manual_seed(123)  # no global state takes part
    assert {tuple(torch.rand(4, generator=torch_stream(*key)).tolist()) for key in keys} == torch_draws
    assert {tuple(numpy_stream(*key).integers(2**60, size=4).tolist()) for key in keys} == numpy_draws
