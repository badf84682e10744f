"""Shared by the tests: one thread, so that workers do not fight for the cores; a compiler or a skip; a random model."""

import os

import pytest
import torch

from nano_opd.gpt import GPT, GPTConfig
from nano_opd.system import device
from nano_opd.tokenizer import EOS, VOCAB_SIZE

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start; and no run measures how many are fastest


def new_model(block_size, **sizes):
    """A random model that attends, and ends a response every few tokens."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(VOCAB_SIZE, block_size, **sizes))
    for block in model.blocks:  # what comes out of a block starts at zero: attention and mlp would be nothing
        torch.nn.init.normal_(block.attention_out.weight, std=0.2)
        torch.nn.init.normal_(block.mlp_out.weight, std=0.2)
    with torch.no_grad():
        model.embedding.weight[EOS] *= 2.0
    return model


@pytest.fixture
def compiler():
    if not device.has_compiler(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler, and none is on the path")
    if torch.__version__.startswith("2.5."):
        pytest.skip("torch.compile of 2.5 fails on models as small as these (AssertionError in inductor)")
