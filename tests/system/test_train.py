"""train.py from the outside: what it writes, that a seed fixes it to the bit, and how it ends when things go wrong."""

import contextlib
import csv
import dataclasses
import errno
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from conftest import started, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from nano_opd.evaluate import wilson
from nano_opd.methods import METHODS
from nano_opd.system import checkpoint, config, folder, report, runs

ROOT = Path(__file__).parents[2]
TINY = (
    "--digits 2 --teacher-layers 1 --teacher-width 16 --student-layers 1 --student-width 8 --teacher-steps 5 "
    "--student-steps 3 --sft-batch-size 8 --batch-size 4 --eval-size 4 --eval-every 5 --steps 12"
).split()


def run(out_dir, *arguments) -> Path:
    """One tiny run in this process; its folder."""
    train.main([*TINY, "--out-dir", str(out_dir), *arguments])
    return config.parse([*TINY, "--out-dir", str(out_dir), *arguments]).run_dir


def weights(run_dir):
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["state"]
    assert state["step"] == 12
    return state["student"]


def metrics(run_dir):
    """The rows of metrics.csv without the one column that is allowed to differ."""
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same(first, second):
    a, b = weights(first), weights(second)
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(first) == metrics(second)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_its_own_recipe_and_a_flag_wins(method):
    cfg = config.parse(["--method", method])
    careful = METHODS[method].reference_slot
    assert (cfg.lr, cfg.batch_size, cfg.student_steps) == ((4e-4, 64, 210) if careful else (5e-3, 128, 110))
    given = config.parse(["--method", method, "--lr", "0.001", "--batch-size", "32", "--student-steps", "7"])
    assert (given.lr, given.batch_size, given.student_steps, given.steps) == (0.001, 32, 7, 400)
    assert cfg == config.Config(method=method)
    of = {task: config.parse(["--method", method, "--task", task]) for task in ("add", "mul", "mix")}
    assert {task: (cfg.teacher_steps, cfg.steps) for task, cfg in of.items()} == {
        "add": (400, 400),
        "mul": (800, 1600),
        "mix": (1600, 1600),
    }
    start = 210 if careful else 110
    wanted = {"add": start, "sub": 1.25 * start, "mul": 1.5 * start, "mix": 2.5 * start}
    for task, steps in wanted.items():  # and in proportion to the digits
        for digits in (3, 6):
            cfg = config.parse(["--method", method, "--task", task, "--digits", str(digits)])
            assert abs(cfg.student_steps - steps * digits / 3) <= 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One undisturbed run."""
    return run(tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_its_four_files(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["checkpoint.pt", "config.json", "curves.png", "metrics.csv"]
    saved = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert saved["method"] == "opdplus" and saved["steps"] == 12 and set(saved) == {*vars(config.Config()), "code"}
    rows = metrics(finished)
    assert [int(r["step"]) for r in rows] == list(range(13)) and [int(r["rollouts"]) for r in rows] == list(
        range(0, 52, 4)
    )
    assert [r["step"] for r in rows if r["accuracy"]] == ["0", "5", "10", "12"]
    assert all(r["grad_norm"] for r in rows[:-1]) and not rows[-1]["grad_norm"]
    named = (
        "step rollouts accuracy greedy_accuracy kl entropy response_length truncated grad_norm clip_fraction leak_rate"
    )
    assert set(named.split()) <= set(rows[0])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("right,method", [(0.0, "opdplus"), (1.0, "opdplus"), (0.0, "grpo")])
def test_a_teacher_that_is_often_wrong_is_named_at_the_start_and_in_the_report(
    right, method, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "rewards", lambda problems, rollout: torch.full((len(problems),), right))
    run(tmp_path, "--method", method, "--steps", "1")
    said = capsys.readouterr().out
    warning, named = "a weak teacher, right only 0.00 of the time", right < 0.9 and method == "opdplus"
    before, after = said.split("step     0")
    assert [before.count(warning), after.count(warning)] == [named, named]


def test_the_learning_rate_rises_for_a_tenth_of_the_updates_and_falls_to_zero(tmp_path):
    rates = []

    def note(optimizer, *_):
        if optimizer.defaults["lr"] == 0.003:  # not a warm start's
            rates.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(note)
    try:
        run(tmp_path, "--lr", "0.003", "--steps", "20")
    finally:
        hook.remove()
    assert rates == pytest.approx([0.0015] + [0.003 * (1 - n / 20) for n in range(1, 20)])


def test_other_problems_get_other_answers_at_every_update(tmp_path, monkeypatch):
    states = []

    def noted(seed, purpose, step=0, device="cpu", stream=train.torch_stream):
        generator = stream(seed, purpose, step, device)
        if purpose == "rollout":
            states.append(tuple(generator.get_state().tolist()))
        return generator

    monkeypatch.setattr(train, "torch_stream", noted)
    run(tmp_path)
    assert len(set(states)) == len(states) == 12


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    assert same(finished, run(tmp_path))
    assert not same(finished, run(tmp_path, "--seed", "1"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "sft"],
        ["--method", "gkd", "--divergence", "hellinger"],
        ["--method", "opd", "--gamma", "1", "--variance", "sampled"],
        ["--divergence", "alpha=0.5", "--variance", "full"],
        ["--log-u-clip", "2", "--normalize", "token_mean", "--grad-clip", "1", "--task", "mix"],
        ["--method", "grpo", "--epochs", "3", "--loss-type", "dr_grpo", "--normalize", "sequence_mean"],
        ["--method", "opsd", "--divergence", "forward_kl", "--teacher-sync", "1"],
        ["--method", "grpo+opsd", "--reference", "none", "--teacher-sync", "5"],
        ["--method", "rlsd", "--lam-decay", "4", "--reasoning-only", "--negative-only"],
    ],
)
def test_every_method_trains(arguments, tmp_path, lucky):
    run_dir = run(tmp_path, *arguments)
    start = torch.load(next((tmp_path / "warm_starts").glob("student*")), weights_only=True)["state"]["model"]
    assert all((start[name] != value).any() for name, value in weights(run_dir).items())


@pytest.fixture
def lucky(monkeypatch):
    """A verifier that likes one response in two, since a tiny student is never right."""
    monkeypatch.setattr(train, "rewards", lambda problems, rollout: (rollout.responses.sum(1) % 2).float())


def test_rlsd_with_lambda_or_epsilon_zero_is_grpo_to_the_bit(tmp_path, lucky):
    several = ["--epochs", "2", "--batch-size", "8"]
    grpo = run(tmp_path / "grpo", "--method", "grpo", *several)
    for name, *knobs in [("lam", "--lam", "0"), ("eps", "--eps-w", "0"), ("rlsd", "--lam", "1", "--eps-w", "0.9")]:
        rlsd = run(tmp_path / name, "--method", "rlsd", *knobs, *several)
        same_weights = all(torch.equal(value, weights(rlsd)[key]) for key, value in weights(grpo).items())
        assert same_weights == (name != "rlsd")


def test_the_self_teacher_is_frozen_synced_or_live(tmp_path, lucky):
    """At each update the teacher is the student as it was before some update of the past, this one included."""
    for sync, origin in [(0, lambda step: 0), (5, lambda step: step // 5 * 5), (1, lambda step: step)]:
        students, teachers = {}, {}

        def remember(cfg, step, student, teacher, *rest, update=train.update, students=students, teachers=teachers):
            for kept, model in ((students, student), (teachers, teacher)):
                kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
            return update(cfg, step, student, teacher, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "update", remember)
            run_dir = run(tmp_path / str(sync), "--method", "rlsd", "--teacher-sync", str(sync))
        saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["state"]["teacher"]
        for step, teacher in (teachers | {12: saved}).items():
            of = origin(min(step, 11))
            for past, student in students.items():
                assert all(torch.equal(teacher[name], student[name]) for name in teacher) == (past == of), (step, past)


def test_a_resumed_run_keeps_its_teacher_though_warm_starts_are_trained_anew(tmp_path, monkeypatch):
    teacher = lambda folder: torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["teacher"]
    before = teacher(run(tmp_path, "--steps", "5"))
    monkeypatch.setattr(folder, "CODE", "edited")
    monkeypatch.setattr(train.sft, "warm_start", lambda *_, **__: None)
    after = teacher(run(tmp_path, "--steps", "6", "--resume"))
    assert len([*(tmp_path / "warm_starts").glob("teacher*")]) == 2
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_signal_after_the_last_update_is_in_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "report", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 130 and "with --resume continues" in capsys.readouterr().err


def test_the_precision_is_that_of_the_teacher_there_is(tmp_path, monkeypatch):
    widths = []
    monkeypatch.setattr(train, "precision", lambda dtype, device, width: widths.append(width) or torch.float32)
    for method in ("opdplus", "rlsd"):
        run(tmp_path, "--method", method)
    assert widths == [16, 8]


def test_the_reference_matters_and_the_control_is_another_one(tmp_path, lucky):
    """Same seed, same rollouts: the first update's gradient tells what the teacher has read."""
    norms = set()
    for reference in ("true", "shuffled", "none"):
        arguments = ["--method", "opsd", "--reference", reference, "--batch-size", "8"]
        norms.add(metrics(run(tmp_path / reference, *arguments))[0]["grad_norm"])
    assert len(norms) == 3 and "0.0" in norms  # without a reference the frozen teacher is the student


def test_opd_and_opdplus_differ_and_the_full_rung_is_gkd(tmp_path):
    """Runs that share seed and rollouts: the first update's gradient norm tells which estimator was used."""

    def first_norm(*arguments):
        return float(metrics(run(tmp_path, *arguments))[0]["grad_norm"])

    assert first_norm("--variance", "full") == first_norm("--method", "gkd")
    assert first_norm("--method", "opd") != pytest.approx(first_norm(), rel=1e-3)
    reverse_kl = ["--divergence", "reverse_kl", "--variance", "baseline"]
    # the exact baselines differ by the constant by which the rewards do
    assert first_norm("--method", "opd", *reverse_kl) == pytest.approx(first_norm(*reverse_kl), rel=1e-4)


def command(out_dir, *arguments):
    return [sys.executable, str(ROOT / "train.py"), *TINY, "--out-dir", str(out_dir), *arguments]


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(finished, tmp_path):
    """SIGKILL once the first checkpoint is there and the run is under way, twice; then to the end."""
    run_dir = tmp_path / finished.name
    for pause in (0.02, 0.10):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with started(command(tmp_path, "--resume"), stdout=subprocess.DEVNULL, env=environment) as process:
            wait_until((run_dir / "checkpoint.pt").exists, process)
            time.sleep(pause)  # at the end of the `with` it is killed
    run(tmp_path, "--resume")
    assert same(finished, run_dir)


def test_waiting_for_a_process_ends_when_it_has_ended_or_time_is_up():
    """Else a run that fails before it writes what a test waits for would hold up the tests for ever."""
    with started([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        with pytest.raises(AssertionError, match="ended with exit code 3"):
            wait_until(lambda: False, process)
    with started([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        with pytest.raises(AssertionError, match="still waiting after 0.1 seconds"):
            wait_until(lambda: False, process, seconds=0.1)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "a shell's background job"])
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_continue(finished, tmp_path, number, code, before):
    run_dir = tmp_path / finished.name
    long, start = command(tmp_path, "--steps", "100000"), lambda: signal.signal(number, before)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with started(long, **pipes, preexec_fn=start) as process:
        wait_until((run_dir / "metrics.csv").exists, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in error and "Traceback" not in error
    rows = metrics(run_dir)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["state"]
    assert state["step"] == len(rows) == int(rows[-1]["step"]) + 1 and rows[-1]["grad_norm"]


def test_a_self_taught_run_resumes_with_its_own_teacher(tmp_path, lucky, monkeypatch):
    """Stopped between two syncs: the teacher that continues is neither the student nor the warm start."""
    arguments = ["--method", "rlsd", "--teacher-sync", "5", "--lam", "1", "--eps-w", "0.9", "--batch-size", "8"]
    whole, update = run(tmp_path / "whole", *arguments), train.update

    def interrupt(cfg, step, *rest):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(cfg, step, *rest)

    monkeypatch.setattr(train, "update", interrupt)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", *arguments)
    monkeypatch.setattr(train, "update", update)
    assert same(whole, run(tmp_path / "parts", *arguments, "--resume"))


def test_an_interrupted_run_continues_to_the_same_bits(finished, tmp_path, monkeypatch):
    """The stop request in this process, so that it falls between two evaluations."""
    update = train.update

    def interrupt(cfg, step, *rest):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(cfg, step, *rest)

    monkeypatch.setattr(train, "update", interrupt)
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 143
    monkeypatch.undo()
    assert same(finished, run(tmp_path, "--resume"))


def refused(capsys, *arguments) -> str:
    """The one sentence on stderr of a command line that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        train.main(list(arguments))
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == "" and error.startswith("train.py: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--method dpo", "--method dpo: choose from sft, null, gkd, opd, opdplus"),
        ("--divergence kl", "unknown divergence 'kl'"),
        ("--divergence forward-kl", "did you mean forward_kl?"),
        ("--divergence alpha=x", "alpha must be a number from -10 to 10"),
        ("--method opd+", "did you mean opd?"),
        ("--task ad", "--task ad: choose from add, sub, mul, mix (did you mean add?)"),
        ("--variance none", "--variance none: choose from sampled, baseline, topk, full"),
        ("--normalize mean", "--normalize mean: choose from batch, token_mean, sequence_mean"),
        ("--device tpu", "--device tpu: choose from auto, cpu, cuda"),
        ("--device cuda:99", "--device cuda:99: this machine has no such device"),
        ("--digits 0", "--digits 0: must be from 1 to 8"),
        ("--digits 1", "--digits 1: a problem is one column, so no held-out one is ever taught"),
        ("--digits 9", "--digits 9: must be from 1 to 8"),
        ("--digits 3.5", "--digits: invalid int value: '3.5'"),
        ("--gamma 1.5", "--gamma 1.5: must be from 0.0 to 1.0"),
        ("--gamma -0.1", "--gamma -0.1: must be from 0.0 to 1.0"),
        ("--gamma nan", "--gamma nan: must be from 0.0 to 1.0"),
        ("--gamma one", "--gamma: invalid float value: 'one'"),
        ("--lr inf", "--lr inf: must be 0.0 or more and at most 3e+38"),
        ("--lr -1", "--lr -1.0: must be 0.0 or more"),
        ("--lr nan", "--lr nan: must be 0.0 or more"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--steps 0", "--steps 0: must be 1 or more"),
        ("--batch-size 0", "--batch-size 0: must be 1 or more"),
        ("--batch-size -4", "--batch-size -4: must be 1 or more"),
        ("--eval-every 0", "--eval-every 0: must be 1 or more"),
        ("--eval-size 0", "--eval-size 0: must be 1 or more"),
        ("--sft-batch-size 0", "--sft-batch-size 0: must be 1 or more"),
        ("--sft-lr -0.1", "--sft-lr -0.1: must be 0.0 or more"),
        ("--teacher-steps -1", "--teacher-steps -1: must be 0 or more"),
        ("--student-steps -1", "--student-steps -1: must be 0 or more"),
        ("--teacher-layers 0", "--teacher-layers 0: must be 1 or more"),
        ("--student-width 4", "--student-width 4: must be 8 or more"),
        ("--student-width 22", "--student-width 22: n_embd 22 must be a multiple of n_head 4"),
        ("--teacher-width 18", "--teacher-width 18: n_embd 18 must be a multiple of n_head 4"),
        ("--grad-clip -1", "--grad-clip -1.0: must be 0.0 or more"),
        ("--log-u-clip -1", "--log-u-clip -1.0: must be 0.0 or more"),
        ("--variance full --gamma 0.5", "--gamma 0.5 sums what was sampled"),
        ("--top-k 8", "--top-k 8: only --variance topk reads it"),
        ("--method grpo+opsd --normalize token_mean", "means nothing with --method grpo+opsd"),
        ("--variance full --log-u-clip 3", "no meaning with --variance full"),
        ("--variance full --normalize token_mean", "no meaning with --variance full"),
        ("--method sft --gamma 0.5", "--gamma 0.5 means nothing with --method sft"),
        ("--method sft --divergence jsd", "--divergence jsd means nothing with --method sft"),
        ("--method gkd --variance full", "--variance full means nothing with --method gkd"),
        ("--method gkd --log-u-clip 2", "--log-u-clip 2.0 means nothing with --method gkd"),
        ("--lam 0.5", "--lam 0.5 means nothing with --method opdplus: it is read by rlsd"),
        (
            "--method opsd --epochs 2",
            "--epochs 2 means nothing with --method opsd: it is read by grpo, grpo+opsd, rlsd",
        ),
        (
            "--teacher-sync 1",
            "--teacher-sync 1 means nothing with --method opdplus: it is read by opsd, grpo+opsd, rlsd",
        ),
        ("--method grpo --reference shuffled", "--reference shuffled means nothing with --method grpo"),
        ("--method rlsd --divergence jsd", "--divergence jsd means nothing with --method rlsd"),
        ("--method opsd --loss-type grpo", "--loss-type grpo means nothing with --method opsd"),
        ("--method rlsd --lam 1.5", "--lam 1.5: must be from 0.0 to 1.0"),
        ("--method rlsd --eps-w -1", "--eps-w -1.0: must be 0.0 or more"),
        ("--method rlsd --reference false", "--reference false: choose from true, work, cite, shuffled, none"),
        ("--method grpo --group-size 1", "--group-size 1: must be 2 or more"),
        ("--method grpo --batch-size 126", "--batch-size 126: must be a multiple of --group-size 4"),
        ("--method rlsd --batch-size 4 --reference shuffled", "--reference shuffled: needs two groups or more"),
        ("--method grpo --clip-low 2", "--clip-low 2.0: must be from 0.0 to 1.0"),
        ("--temperature 0.7", "unrecognized arguments: --temperature 0.7"),
        ("--step 5", "unrecognized arguments: --step 5"),
        ("opdplus", "unrecognized arguments: opdplus"),
        ("--steps", "--steps: expected one argument"),
    ],
)
def test_a_bad_command_line_gets_one_sentence_and_touches_nothing(arguments, message, capsys, tmp_path):
    error = refused(capsys, "--out-dir", str(tmp_path / "out"), *arguments.split())
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_compiling_for_a_cpu_without_a_compiler_is_refused(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    there = {"compiler": "c++", "headers": "g++"}[missing]  # torch.compile calls the second
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == there else None)
    if missing == "headers":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        config.parse(["--compile", "on", "--device", "cpu"])
    assert (
        stopped.value.code == 2
        and "needs a C++ compiler, or Triton and a C compiler on a GPU, and Python's headers" in capsys.readouterr().err
    )
    assert config.parse(["--compile", "auto", "--device", "cpu"]).compile == "auto"


def test_a_compiled_run_is_the_same_up_to_rounding_and_to_the_bit_each_time(tmp_path, compiler):
    threads, larger = torch.get_num_threads(), "--batch-size 64 --student-width 16 --steps 12".split()
    torch.set_num_threads(2)  # which could add up a gradient in any order
    try:
        eager, first, second = (run(tmp_path / how, *larger, "--compile", how[:-1]) for how in ("off1", "on1", "on2"))
    finally:
        torch.set_num_threads(threads)
    assert same(first, second)
    want, got = weights(eager), weights(first)
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=1e-4) for name in want)


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_goes_on_to_more_steps_and_never_back(finished, capsys, tmp_path):
    """The learning rate is that of the longer run from there on; what does not change the numbers may change."""
    run_dir = Path(shutil.copytree(finished.parent, tmp_path / "out")) / finished.name
    rates, before = [], snapshot(run_dir)
    assert "has made 12 updates: give --steps as many or more" in refused(
        capsys, *TINY, "--out-dir", str(run_dir.parent), "--resume", "--steps", "11"
    )
    assert snapshot(run_dir) == before
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        run(run_dir.parent, "--resume", "--steps", "20", "--eval-every", "4")
    finally:
        hook.remove()
    assert rates == pytest.approx([0.005 * (1 - step / 20) for step in range(12, 20)])
    rows = metrics(run_dir)
    assert rows[:12] == metrics(finished)[:12] and [int(r["step"]) for r in rows] == list(range(21))
    assert [r["step"] for r in rows[12:] if r["accuracy"]] == ["12", "16", "20"]
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert saved["steps"] == 20 and saved["eval_every"] == 4


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other configuration", "malicious"])
@pytest.mark.parametrize("which", ["warm start", "checkpoint"])
def test_a_broken_file_is_refused_and_left_alone(which, damage, capsys, tmp_path):
    run_dir = run(tmp_path)
    path = run_dir / "checkpoint.pt" if which == "checkpoint" else next((tmp_path / "warm_starts").glob("teacher*"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        path.write_bytes(b"hello")
    elif damage == "other configuration":
        checkpoint.save(path, {"seed": 7}, {})
    else:
        torch.save({"format": 1, "key": {}, "state": MaliciousState(tmp_path / "executed")}, path)
    before = snapshot(tmp_path)
    arguments = [*TINY, "--out-dir", str(tmp_path), "--resume"]
    capsys.readouterr()
    assert path.name in refused(capsys, *arguments)
    assert snapshot(tmp_path) == before


class MaliciousState:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", range(1, 13))
def test_a_full_disk_stops_the_run_and_loses_nothing(write, finished, capsys, tmp_path, monkeypatch):
    """Each write of a run in turn: config, two warm starts, four checkpoints with their metrics, curves."""
    replace, calls = os.replace, []
    error = (
        OSError(errno.ENOSPC, "No space left on device")
        if write % 2
        else PermissionError(errno.EACCES, "Permission denied")
    )

    def faulty(*arguments):
        calls.append(arguments)
        if len(calls) == write:
            raise error
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", faulty)
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and error.strerror in said and "intact" in said and not list(tmp_path.rglob(".*.tmp"))
    monkeypatch.undo()
    assert same(finished, run(tmp_path, "--resume"))


FLAGS = ["--" + name.replace("_", "-") for name in vars(config.Config())]


@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))))
@settings(max_examples=300, deadline=None)
def test_no_command_line_gives_a_traceback(pairs):
    """Any flags with any values: a configuration, or one sentence and exit code 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cfg = config.parse([word for pair in pairs for word in pair])
        assert isinstance(cfg, config.Config)
    except SystemExit as end:
        assert end.code == 2 and said.getvalue().startswith("train.py: ")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_leaves_the_last_good_state(where, capsys, tmp_path, monkeypatch):
    method, calls = METHODS["opdplus"], []

    @functools.wraps(method.loss)
    def faulty(*arguments, **options):
        loss, measured = method.loss(*arguments, **options)
        calls.append(1)
        if len(calls) == 8:
            loss = loss * float("inf") if where == "loss" else loss + (loss - loss.detach()).sqrt()  # √0: slope ∞
        return loss, measured

    monkeypatch.setitem(METHODS, "opdplus", dataclasses.replace(method, loss=faulty))
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    error = capsys.readouterr().err
    assert (
        end.value.code == 1
        and f"step 7: the {where if where == 'loss' else 'norm of its gradient'} is" in error
        and "likely" in error
        and "checkpoint.pt" in error
    )
    monkeypatch.undo()
    state = torch.load(next(tmp_path.glob("opdplus*/checkpoint.pt")), weights_only=True)["state"]
    assert state["step"] == 5 and all(value.isfinite().all() for value in state["student"].values())


def test_weights_that_really_overflow_stop_the_run_where_it_shows(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--lr", "1e38")
    assert end.value.code == 1 and "step 1: the log-prob of a sampled token is not finite" in capsys.readouterr().err


def test_help_names_the_symbols_and_every_knob(capsys):
    with pytest.raises(SystemExit) as end:
        config.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in vars(config.Config()):
        assert "--" + name.replace("_", "-") in text
    for symbol in ("γ", "D_f(q‖p)", "A_n", "log u", "λ", "ε_w", "Â_n", "w_n", "ρ", "P_S", "P_T", " G:"):
        assert symbol in text


def test_the_curves_draw_what_was_measured():
    rows = [dict.fromkeys(runs.COLUMNS) | {"step": step, "grad_norm": 2.0**-step} for step in range(6)]
    rows[-1]["grad_norm"] = None  # no update follows the last evaluation
    names = ("accuracy", "greedy_accuracy", "kl", "entropy", "response_length")
    for step, values in [
        (0, (0.25, 0.5, 2.0, 1.5, 9.0)),
        (3, (0.5, 0.75, 1.0, 1.0, 8.0)),
        (5, (0.75, 1.0, 0.5, 0.5, 7.0)),
    ]:
        rows[step] |= dict(zip(names, values))
    accuracy, nats, length, norm = report.training_curves(rows, 20, 16, "title").axes
    drawn = [list(line.get_ydata()) for ax in (accuracy, nats, length) for line in ax.get_lines()]
    assert drawn[:5] == [[rows[step][name] for step in (0, 3, 5)] for name in names]
    assert all(list(line.get_xdata()) == [0, 3, 5] for line in [*accuracy.get_lines(), *nats.get_lines()])
    assert drawn[5] == [16, 16]  # the cap
    (line,) = norm.get_lines()
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4] and list(line.get_ydata()) == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    for band, name in zip(accuracy.collections, names):  # four times the problems at the start and the end
        for step, n in [(0, 80), (3, 20), (5, 80)]:
            at = [y for x, y in band.get_paths()[0].vertices if x == step]
            assert (min(at), max(at)) == pytest.approx(wilson(round(rows[step][name] * n), n))
