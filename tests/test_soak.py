"""Two thousand on-policy updates of the smallest model: memory stays flat."""

import resource

import train
from nano_opd import config, runs, sft
from nano_opd.gpt import GPT

TINY = "--digits 1 --heads 1 --teacher-layers 1 --teacher-width 8 --student-layers 1 --student-width 8 --batch-size 2"


def test_memory_is_flat_over_two_thousand_updates(tmp_path):
    cfg = config.parse([*TINY.split(), "--steps", "2000", "--out-dir", str(tmp_path)])
    student, teacher = GPT(cfg.gpt("student")), GPT(cfg.gpt("teacher")).requires_grad_(False)
    optimizer, rows = sft.adamw(student, cfg.lr), []
    for step in range(2000):
        rows.append(dict.fromkeys(runs.COLUMNS) | train.update(cfg, step, student, teacher, optimizer))
        if step == 200:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.05 * peak
