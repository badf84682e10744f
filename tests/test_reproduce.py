"""The driver of the multi-seed results: every arm's command parses, and what is complete is not run again."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import figures
import pytest
import reproduce

from nano_opd.system import config

TINY = "--digits 2 --student-layers 1 --student-width 8 --student-steps 2 --batch-size 8 --eval-size 4"


def test_every_arm_is_a_command_line_of_its_own():
    names = [arm for experiment in reproduce.EXPERIMENTS.values() for arm in experiment.arms]
    assert len(set(names)) == len(names)  # a claim names arms of several experiments
    for name, experiment in reproduce.EXPERIMENTS.items():
        arms = [config.parse(f"{experiment.common} {arm}".split()) for arm in experiment.arms.values()]
        assert len({str(arm.run_key()) for arm in arms}) == len(arms), name
        if name != "sizes":  # bare commands, each with its own recipe
            assert len({arm.steps for arm in arms}) == len({arm.batch_size for arm in arms}) == 1  # one budget
        folders = [arm.replace(", ", "-").replace(" ", "-") for arm in experiment.arms]
        assert len(set(folders)) == len(folders)


def test_all_of_it_fits_into_five_hours_on_two_cores():
    assert sum(e.seconds * e.seeds * len(e.arms) for e in reproduce.EXPERIMENTS.values()) < 2 * 5 * 3600


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    def start(common=f"{TINY} --steps 4 --eval-every 2", **arms):
        experiment = reproduce.Experiment(common, arms, 2, 1)
        monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
        reproduce.main()

    monkeypatch.setattr(reproduce, "QUICK", "")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--jobs", "1", "--out-dir", str(tmp_path)])
    start.out = tmp_path / "quick"
    return start


ARMS = {"grpo": "--method grpo", "rlsd, λ=0.9": "--method rlsd --lam 0.9"}


def test_all_arms_and_seeds_end_in_one_file_and_are_not_run_twice(tiny, monkeypatch, capsys):
    tiny(**ARMS)
    path = tiny.out / "results" / "tiny.csv"
    results, text = figures.read_results(path), path.read_bytes()
    assert list(results) == ["grpo", "rlsd, λ=0.9"]
    for seeds in results.values():
        assert [[row["step"] for row in rows] for rows in seeds] == [[0, 2, 4]] * 2
        assert seeds[0] != seeds[1]
    assert results["grpo"][0][0]["kl"] == results["rlsd, λ=0.9"][0][0]["kl"]  # the same warm start, trained once
    assert len([*(tiny.out / "warm_starts").glob("*.pt")]) == 2
    said = capsys.readouterr().out
    assert "4 of 4 runs to make" in said and all(f"\n{n}/4  tiny: " in said and "ETA" in said for n in range(1, 5))

    (folder,) = (tiny.out / "tiny" / "grpo").glob("*seed0*")
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file) if row["grad_norm"]]
    want = [sum(norms[:2]) / 2, sum(norms[2:]) / 2]  # of the updates between two evaluations
    assert [row["grad_norm"] for row in results["grpo"][0][:2]] == pytest.approx(want, rel=1e-4)
    with open(tiny.out / "results" / "provenance.csv", encoding="utf-8") as file:
        (note,) = csv.DictReader(file)
    assert note["experiment"] == "tiny" and note["threads"] == "1" and all(note.values())

    path.unlink()
    monkeypatch.setattr(reproduce, "execute", None)
    tiny(**ARMS)
    assert path.read_bytes() == text


def test_a_folder_of_another_run_a_refused_one_and_a_diverging_one(tiny):
    diverging = "--method opd --divergence pearson_chi2 --teacher-steps 2 --lr"
    tiny(opd=f"{diverging} 1e38")  # ends early, and is a result
    assert len(figures.read_results(tiny.out / "results" / "tiny.csv")["opd"][0]) == 1
    with pytest.raises(SystemExit, match="holds another run"):
        tiny(opd=f"{diverging} 1e38 --eval-every 3")
    (folder := tiny.out / "tiny" / "rlsd").mkdir()
    name = config.parse(f"{TINY} --method rlsd".split()).run_dir.name
    (folder / name).write_text("a file where the run's folder should be", encoding="utf-8")
    with pytest.raises(SystemExit, match="reproduce.py: python train.py .*\n.*cannot use"):
        tiny(rlsd="--method rlsd")


def test_without_links_or_with_no_jobs(tiny, monkeypatch, capsys):
    """Windows lets few users make links: every arm has warm starts of its own there."""
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("privilege")))
    tiny(f"{TINY} --steps 1", grpo="--method grpo")
    assert len([*tiny.out.glob("tiny/grpo/warm_starts/*.pt")]) == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--jobs", "0"])
    with pytest.raises(SystemExit) as end:
        tiny(grpo="--method grpo")
    assert end.value.code == 2 and "--jobs 0: must be 1 or more" in capsys.readouterr().err


def test_an_interrupt_ends_the_runs_in_hand_and_begins_no_other(tmp_path):
    lines = f"""
import sys
import reproduce
reproduce.QUICK = ""
arms = {{str(n): f"--method grpo --seed {{n}}" for n in range(4)}}
reproduce.EXPERIMENTS = {{"long": reproduce.Experiment("{TINY} --steps 100000 --eval-every 2", arms, 1, 1)}}
sys.argv = ["reproduce.py", "--quick", "--jobs", "1", "--out-dir", "{tmp_path}"]
if __name__ == "__main__":
    reproduce.main()
"""
    (tmp_path / "start.py").write_text(lines, encoding="utf-8")
    begun = lambda: sorted(path.parent.name for path in tmp_path.glob("quick/long/*/*/checkpoint.pt"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(reproduce.__file__).parents[:2]))}
    command = [sys.executable, str(tmp_path / "start.py")]
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as process:
        try:
            while not begun():
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the driver and its processes
            _, said = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a run that went on would go on for hours
    assert process.returncode == 1 and b"The same command continues" in said and len(begun()) == 1
