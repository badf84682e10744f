"""The driver of the multi-seed results: every arm's command parses, and what is complete is not run again."""

import importlib.util
import sys
from pathlib import Path

import pytest

from nano_opd import config, plots

PATH = Path(__file__).parents[1] / "notebooks" / "reproduce.py"
spec = importlib.util.spec_from_file_location("reproduce", PATH)
sys.modules["reproduce"] = reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)

TINY = "--digits 1 --heads 2 --student-layers 1 --student-width 8 --student-steps 2 --batch-size 8 --eval-size 4"


def test_every_arm_is_a_command_line_of_its_own():
    for name, experiment in reproduce.EXPERIMENTS.items():
        arms = [config.parse(f"{experiment.common} {arm}".split()) for arm in experiment.arms.values()]
        assert len({str(arm.run_key()) for arm in arms}) == len(arms), name
        assert len({arm.steps for arm in arms}) == len({arm.batch_size for arm in arms}) == 1  # one budget
        folders = [arm.replace(", ", "-").replace(" ", "-") for arm in experiment.arms]
        assert len(set(folders)) == len(folders)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    arms = {"grpo": "--method grpo", "rlsd, λ=0.9": "--method rlsd --lam 0.9"}
    experiment = reproduce.Experiment(f"{TINY} --steps 4 --eval-every 2", arms, 2, quick="")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--out-dir", str(tmp_path)])
    return tmp_path / "quick"


def test_all_arms_and_seeds_end_in_one_file_and_are_not_run_twice(tiny, monkeypatch):
    reproduce.main()
    path = tiny / "results" / "tiny.csv"
    results, text = plots.read_results(path), path.read_bytes()
    assert list(results) == ["grpo", "rlsd, λ=0.9"]
    for seeds in results.values():
        assert [[row["step"] for row in rows] for rows in seeds] == [[0, 2, 4]] * 2
        assert seeds[0] != seeds[1]
    assert results["grpo"][0][0]["kl"] == results["rlsd, λ=0.9"][0][0]["kl"]  # the same warm start, trained once
    assert len([*(tiny / "warm_starts").glob("*.pt")]) == 2
    path.unlink()
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    reproduce.main()
    assert path.read_bytes() == text


def test_a_folder_of_another_run_and_a_failing_command_are_reported(tiny, monkeypatch):
    reproduce.main()
    arms = {"grpo": "--method grpo --lr 1"}
    experiment = reproduce.Experiment(f"{TINY} --steps 4 --eval-every 2", arms, 1, quick="")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    with pytest.raises(SystemExit, match="holds another run"):
        reproduce.main()
