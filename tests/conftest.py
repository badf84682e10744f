"""Shared by the tests: one thread, so that parallel workers do not fight for the cores; a C++ compiler, or a skip."""

import pytest
import torch

from nano_opd.system import device

torch.set_num_threads(1)


@pytest.fixture
def compiler():
    if not device.has_compiler(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler, and none is on the path")
