"""A thousand on-policy updates of the smallest model: memory stays flat."""

import gc
import os
from pathlib import Path

import pytest

import train
from nano_opd import rollout, sft
from nano_opd.gpt import GPT
from nano_opd.system import config, distributed, runs

TINY = "--digits 2 --teacher-layers 1 --teacher-width 8 --student-layers 1 --student-width 8 --batch-size 2"


def resident() -> int:
    """Bytes of this process that are in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from Linux's /proc")
def test_memory_is_flat_over_a_thousand_updates(tmp_path):
    cfg = config.parse([*TINY.split(), "--steps", "1000", "--out-dir", str(tmp_path)])
    student, teacher = GPT(cfg.gpt("student")), GPT(cfg.gpt("teacher")).requires_grad_(False)
    optimizer, rows = sft.adamw(student, cfg.lr), []
    for step in range(1000):
        measured = train.update(cfg, step, student, teacher, optimizer, rollout.sample)
        rows.append(dict.fromkeys(runs.COLUMNS) | distributed.mean(measured))
        if step == 200:
            early = resident()
    assert resident() < 1.02 * early
