"""Shared by the tests: one thread, so that workers do not fight for the cores; a compiler or a skip; a random model;
processes that are waited for, and never for ever.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import suite
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


@contextlib.contextmanager
def started(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """Start a process that does not outlive the `with`, even if the test fails while the process still runs."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing happens if it has ended


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until the condition holds. Raises AssertionError if the process ends first or the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), f"it has ended with exit code {process.returncode}"
        assert time.monotonic() < deadline, f"still waiting after {seconds} seconds"
        time.sleep(0.005)


@pytest.fixture
def copied_package(tmp_path):
    """A folder with a copy of the package in it, to be edited."""
    suite.copy_package(tmp_path)
    return tmp_path


@pytest.fixture
def compiler():
    if not device.has_compiler(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler, and none is on the path")
    if torch.__version__.startswith("2.5."):
        pytest.skip("torch.compile of 2.5 fails on models as small as these (AssertionError in inductor)")
