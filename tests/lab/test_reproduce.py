"""The driver of the multi-seed results: every arm's command parses, and what is complete is not run again."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import figures
import pytest
from conftest import wait_until
from lab import reproduce

import train
from nano_opd.system import config

TINY = "--digits 2 --student-layers 1 --student-width 8 --student-steps 2 --batch-size 8 --eval-size 4"


def test_every_arm_is_a_command_line_of_its_own():
    names = [arm for experiment in reproduce.EXPERIMENTS.values() for arm in experiment.arms]
    assert len(set(names)) == len(names)  # a claim names arms of several experiments
    for name, experiment in reproduce.EXPERIMENTS.items():
        arms = [config.parse(f"{experiment.common} {arm}".split()) for arm in experiment.arms.values()]
        if name == "credit":  # one command, and an oracle for each arm
            continue
        assert len({str(arm.run_key()) for arm in arms}) == len(arms), name
        if not name.startswith("sizes") and name != "noise":  # bare commands; rates and batches
            assert len({arm.steps for arm in arms}) == len({arm.batch_size for arm in arms}) == 1  # one budget
        folders = [arm.replace(", ", "-").replace(" ", "-") for arm in experiment.arms]
        assert len(set(folders)) == len(folders)


def test_a_plan_has_every_arm_with_every_seed(tmp_path):
    for name in ("rlsd_cite", "rlsd_confirm", "credit"):
        e = reproduce.EXPERIMENTS[name]
        planned, seeds = reproduce.plan(name, tmp_path, quick=False), range(e.first_seed, e.first_seed + e.seeds)
        assert sorted((run.arm, run.seed) for run in planned) == sorted((arm, n) for arm in e.arms for n in seeds)
        for run in planned[:: max(1, len(planned) // 8)]:
            want = config.parse(f"{e.common} {e.arms[run.arm]} --seed {run.seed}".split())
            assert run.cfg.run_key() == want.run_key() and run.cfg.resume and run.cfg.run_dir.is_relative_to(tmp_path)
        few = reproduce.plan(name, tmp_path, quick=True)
        assert {run.seed for run in few} == {e.first_seed, e.first_seed + 1}
        assert all(
            (run.cfg.steps, run.cfg.digits, run.cfg.eval_every) == (4, 2, 1) for run in few
        )  # whatever the arm asks for


def test_the_commit_is_named_and_so_is_a_changed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.commit() == "unknown"
    who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    git = lambda *arguments: subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)
    (tmp_path / "train.py").write_text("first", encoding="utf-8")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "first")
    named = reproduce.commit()
    assert len(named) >= 7 and set(named) <= set("0123456789abcdef")
    (tmp_path / "README.md").write_text("not code", encoding="utf-8")
    assert reproduce.commit() == named
    (tmp_path / "train.py").write_text("second", encoding="utf-8")
    assert reproduce.commit() == f"{named}-dirty"


def test_an_oracle_is_in_the_place_of_the_update(tiny, monkeypatch):
    """Under its own name or at another start, for its own run alone."""
    asked, update = [], train.update
    monkeypatch.setattr(
        reproduce.ceiling, "update", lambda of_method, arm, *rest: (asked.append(arm), of_method(*rest))[1]
    )
    tiny(
        f"{TINY} --steps 2",
        **{"exact A": "--method grpo", "running value from 7": "--method grpo", "grpo": "--method grpo"},
    )
    assert asked == ["exact A", "exact A", "running value", "running value"] * 2 and train.update is update


def test_all_of_it_takes_six_and_a_half_hours_on_two_cores_as_its_page_says():
    hours = sum(e.seconds * e.seeds * len(e.arms) for e in reproduce.EXPERIMENTS.values()) / 2 / 3600
    page = (reproduce.ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert 6.25 < hours < 6.75 and "six and a half hours on two cores" in page


class Here:
    """An executor that runs what it is given at once, in this process: no other has to import torch."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    def start(common=f"{TINY} --steps 4 --eval-every 2", **arms):
        experiment = reproduce.Experiment(common, arms, 2, 1)
        monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
        reproduce.main()

    monkeypatch.setattr(reproduce, "QUICK", "")
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--jobs", "1", "--out-dir", str(tmp_path)])
    start.out = tmp_path / "quick"
    return start


ARMS = {"opsd": "--method opsd", "rlsd, λ=0.9": "--method rlsd --lam 0.9"}


def test_all_arms_and_seeds_end_in_one_file_and_are_not_run_twice(tiny, monkeypatch, capsys):
    tiny(**ARMS)
    path = tiny.out / "results" / "tiny.csv"
    results, text = figures.read_results(path), path.read_bytes()
    assert list(results) == ["opsd", "rlsd, λ=0.9"]
    for seeds in results.values():
        assert [[row["step"] for row in rows] for rows in seeds] == [[0, 2, 4]] * 2
        assert seeds[0] != seeds[1]
    assert results["opsd"][0][0]["kl"] == results["rlsd, λ=0.9"][0][0]["kl"]  # the same warm start, trained once
    assert len([*(tiny.out / "warm_starts").glob("*.pt")]) == 2
    said = capsys.readouterr().out
    assert "4 of 4 runs to make" in said and all(f"\n{n}/4  tiny: " in said and "ETA" in said for n in range(1, 5))

    (folder,) = (tiny.out / "tiny" / "opsd").glob("*seed0*")
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file) if row["grad_norm"]]
    assert len({*norms, 0.0}) == 5
    want = [sum(norms[:2]) / 2, sum(norms[2:]) / 2]  # of the updates between two evaluations
    assert [row["grad_norm"] for row in results["opsd"][0][:2]] == pytest.approx(want, rel=1e-4)
    with open(tiny.out / "results" / "provenance.csv", encoding="utf-8") as file:
        (note,) = csv.DictReader(file)
    assert note["experiment"] == "tiny" and note["threads"] == "1" and all(note.values())

    path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "execute", None)
        tiny(**ARMS)
    assert path.read_bytes() == text

    (folder / "provenance.json").unlink()  # as if it had been stopped before its last line: it goes on, to the same
    tiny(**ARMS)
    assert "1 of 4 runs to make" in capsys.readouterr().out
    untimed = lambda rows: [{**row, "seconds": 0} for row in rows]
    again = figures.read_results(path)
    assert all(untimed(again[arm][n]) == untimed(results[arm][n]) for arm in ARMS for n in (0, 1))

    monkeypatch.setitem(reproduce.EXPERIMENTS, "other", reproduce.EXPERIMENTS["tiny"])
    for name in ("other", "tiny", "other"):  # each has one file and one row, whichever was made last
        reproduce.write(path.parent, name, reproduce.plan("tiny", tiny.out, quick=True))
    assert [row["experiment"] for row in reproduce.read(path.with_name("provenance.csv"))] == ["tiny", "other"]
    assert sorted(path.name for path in path.parent.iterdir()) == ["other.csv", "provenance.csv", "tiny.csv"]


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


def test_an_experiment_is_not_finished_by_other_code(tiny, monkeypatch, capsys):
    common = f"{TINY} --steps 2"
    arms = {"grpo": "--method grpo", "exact A": "--method grpo"}
    tiny(common, **arms)
    assert "no checkpoint" not in capsys.readouterr().out  # every run is given --resume
    tiny(common, **arms)
    assert "0 of 4 runs to make" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setitem(reproduce.CODE, "nano_opd/grpo.py", "edited")
        with pytest.raises(SystemExit, match=r"the code has changed since .*grpo.* \(nano_opd/grpo.py\): move it away"):
            tiny(common, **arms)
    monkeypatch.setitem(reproduce.CODE_OF_ORACLES, "notebooks/lab/ceiling.py", "edited")
    with pytest.raises(SystemExit, match=r"exact-A.* \(notebooks/lab/ceiling.py\)"):
        tiny(common, **arms)
    tiny(common, grpo=arms["grpo"])  # which has no oracle


def test_without_links_or_with_no_jobs(tiny, monkeypatch, capsys):
    """Windows lets few users make links: every arm has warm starts of its own there. With real processes, for once."""
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", ProcessPoolExecutor)
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("privilege")))
    tiny(f"{TINY} --steps 1", grpo="--method grpo")
    assert len([*tiny.out.glob("tiny/grpo/warm_starts/*.pt")]) == 2
    assert reproduce.read(tiny.out / "results" / "provenance.csv")[0]["threads"] == "1"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--jobs", "0"])
    with pytest.raises(SystemExit) as end:
        tiny(grpo="--method grpo")
    assert end.value.code == 2 and "--jobs 0: must be 1 or more" in capsys.readouterr().err


def test_an_interrupt_ends_the_runs_in_hand_and_begins_no_other(tmp_path):
    lines = f"""
import sys
from lab import reproduce
reproduce.QUICK = ""
arms = {{str(n): f"--method grpo --seed {{n}}" for n in range(4)}}
reproduce.EXPERIMENTS = {{"long": reproduce.Experiment("{TINY} --steps 100000 --eval-every 2", arms, 1, 1)}}
sys.argv = ["reproduce.py", "--quick", "--jobs", "1", "--out-dir", "{tmp_path}"]
if __name__ == "__main__":
    reproduce.main()
"""
    (tmp_path / "start.py").write_text(lines, encoding="utf-8")
    begun = lambda: sorted(path.parent.name for path in tmp_path.glob("quick/long/*/*/checkpoint.pt"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(reproduce.ROOT / "notebooks"), str(reproduce.ROOT)])}
    command = [sys.executable, str(tmp_path / "start.py")]
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as process:
        try:
            wait_until(begun, process)
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the driver and its processes
            _, said = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a run that went on would go on for hours
    assert process.returncode == 1 and b"The same command continues" in said and len(begun()) == 1
