"""How many threads a run computes with: what is measured, what wins over it, what keeps it. Nothing is timed here."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_train import TINY, refused, run, same, snapshot

import train
from nano_opd.system import config, runs, threads

CPU = torch.device("cpu")


LOOK = threads.Watch.look


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    """A machine of eight cores, on which PyTorch takes two threads, and whose user has chosen none.

    The number is only written down. What is computed is computed with one thread, since two real ones would make these
    tests slow beside others. A run does not look whether it is slow.
    """
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads.Watch, "look", lambda self: None)
    number = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[-1])
    monkeypatch.setattr(torch, "set_num_threads", number.append)


class Clock:
    """Stands in for threads.seconds_of: what a piece of work takes with each number of threads."""

    def __init__(self, **seconds):
        self.seconds = {int(name[1:]): taken for name, taken in seconds.items()}
        self.asked = []

    def __call__(self, work, number):
        self.asked.append(number)
        taken = self.seconds[number]
        return next(taken) if hasattr(taken, "__next__") else taken


@pytest.fixture
def clock(monkeypatch):
    """A function that makes a clock the one that measures."""

    def start(**seconds):
        made = Clock(**seconds)
        monkeypatch.setattr(threads, "seconds_of", made)
        return made

    return start


def recorded(run_dir: Path) -> int:
    return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["threads"]


def lines(capsys, word: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if word in line]


@pytest.mark.parametrize(
    "seconds,number",
    [
        ({1: 0.15, 2: 0.10}, 2),
        ({1: 0.15, 2: 0.90}, 1),
        ({1: 0.100, 2: 0.095}, 1),  # not clearly faster
        ({1: 0.40, 2: 0.25, 4: 0.15, 8: 0.60}, 4),
        ({1: 1.00, 2: 0.95, 4: 0.85, 8: 0.80}, 4),
        ({1: 0.15}, 1),
    ],
)
def test_the_fastest_number_is_taken_and_a_larger_one_only_if_it_is_clearly_faster(seconds, number):
    assert threads.fastest(seconds) == number


def test_the_numbers_take_turns_and_one_bad_moment_decides_nothing(clock):
    made = clock(t1=0.15, t2=iter([0.10, 0.40, 0.10, 0.10, 0.10]))
    assert threads.measure(lambda: None, [1, 2]) == {1: 0.15, 2: 0.10}
    assert made.asked[:6] == [1, 2, 2, 1, 1, 2] and torch.get_num_threads() == 2


def test_a_number_that_is_mostly_slow_is_not_taken_for_its_best_moment(clock):
    clock(t1=0.15, t2=iter([0.40, 0.09, 0.35, 0.30, 0.42]))
    assert threads.fastest(threads.measure(lambda: None, [1, 2])) == 1


def test_a_number_that_is_many_times_slower_is_measured_once(clock):
    made = clock(t1=0.15, t2=0.20, t4=5.0)
    threads.measure(lambda: None, [1, 2, 4])
    assert made.asked.count(4) == 1 and made.asked.count(1) >= 3


def test_what_is_measured_is_tried_at_one_thread_and_at_every_double_of_it():
    assert [threads.candidates(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_busy_machine_gets_one_thread_and_the_run_says_so_and_records_it(clock, tmp_path, capsys):
    clock(t1=0.15, t2=0.90)
    run_dir = run(tmp_path)
    said = lines(capsys, "threads:")
    assert said == ["threads: 1, where PyTorch would take 2 (a piece of this run takes 150 ms with 1, 900 ms with 2)"]
    assert recorded(run_dir) == 1 and torch.get_num_threads() == 2  # the number of the process is as it was
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["state"]
    assert state["threads"] == 1


def test_a_quiet_machine_gets_the_number_of_pytorch_and_nothing_is_said(clock, tmp_path, capsys):
    clock(t1=0.15, t2=0.10)
    run_dir = run(tmp_path)
    assert recorded(run_dir) == 2 and not lines(capsys, "threads")


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_environment_asks_for_is_taken_and_nothing_is_measured(name, clock, tmp_path, monkeypatch):
    made = clock()
    monkeypatch.setenv(name, "2")
    assert recorded(run(tmp_path)) == 2 and not made.asked


def test_a_number_that_is_given_is_taken_and_is_in_no_name(clock, tmp_path):
    made = clock()
    run_dir = run(tmp_path, "--threads", "1")
    assert recorded(run_dir) == 1 and not made.asked
    assert config.Config(threads="3").run_dir == config.Config().run_dir
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    del saved["code"], saved["threads"]
    assert config.Config(**saved).run_dir == run_dir


def test_a_resumed_run_keeps_its_number_however_busy_the_machine_is(clock, tmp_path, capsys):
    clock(t1=0.15, t2=0.90)
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--steps", "5")
    made = clock(t1=0.15, t2=0.05)
    capsys.readouterr()
    parts = run(tmp_path / "parts", "--resume", "--steps", "12")
    assert recorded(parts) == 1 and not made.asked
    assert lines(capsys, "threads:") == ["threads: 1, as this run began, where PyTorch would take 2"]
    assert recorded(whole) == 1


def test_a_resumed_run_with_another_number_is_refused_in_one_sentence(clock, tmp_path, capsys):
    run_dir = run(tmp_path, "--threads", "2")
    before = snapshot(tmp_path)
    capsys.readouterr()
    tiny = [*TINY, "--out-dir", str(tmp_path), "--resume", "--threads"]
    assert "was made with --threads 2, and with 1 it would go on to other bits" in refused(capsys, *tiny, "1")
    assert snapshot(tmp_path) == before
    run(tmp_path, "--resume", "--threads", "2")
    assert recorded(run_dir) == 2


def test_a_resumed_run_whose_config_is_lost_keeps_its_number_too(clock, tmp_path, capsys):
    run_dir = run(tmp_path, "--threads", "1")
    (run_dir / "config.json").unlink()
    tiny = [*TINY, "--out-dir", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit) as end:
        train.main(tiny)
    assert end.value.code == 2 and "was made with 1 threads, not 2: add --threads 1" in capsys.readouterr().err
    train.main([*tiny, "--threads", "1"])
    assert recorded(run_dir) == 1


@pytest.mark.parametrize("number", ["2", 0, -1, True, None, 1.5])
def test_a_recorded_number_that_is_none_is_refused(number, clock, tmp_path, capsys):
    run_dir = run(tmp_path, "--threads", "2")
    path = run_dir / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | {"threads": number}), encoding="utf-8")
    capsys.readouterr()
    assert "is not a run's configuration" in refused(capsys, *TINY, "--out-dir", str(tmp_path), "--resume")


def test_a_run_that_recorded_nothing_was_made_with_the_number_of_pytorch(clock, tmp_path):
    made = clock()
    run_dir = run(tmp_path, "--threads", "2")
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    del saved["threads"]
    (run_dir / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    run(tmp_path, "--resume")
    assert recorded(run_dir) == 2 and not made.asked


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", "", "9"])
def test_a_number_of_threads_that_cannot_be_is_refused(number, tmp_path, capsys):
    error = refused(capsys, "--out-dir", str(tmp_path / "out"), f"--threads={number}")
    assert f"--threads {number}: " in error and not (tmp_path / "out").exists()
    assert config.parse(["--threads", "8"]).threads == "8"


def test_processes_share_the_cores_and_measure_nothing(clock, monkeypatch):
    made = clock()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    torch.set_num_threads(8)
    assert threads.choose(config.Config(), CPU, None) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads.choose(config.Config(), CPU, None) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    torch.set_num_threads(1)
    assert threads.choose(config.Config(), CPU, None) == 1 and not made.asked


def test_a_run_on_a_gpu_measures_nothing_on_the_cpu(clock):
    made = clock()
    assert threads.choose(config.Config(), torch.device("cuda"), None) == 2 and not made.asked


def test_measuring_disturbs_no_random_stream_and_no_later_bit(tmp_path, monkeypatch):
    """A run that measures is the run to which the same number was given."""
    cfg = config.Config(batch_size=4, digits=2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    work = threads.piece_of_work(cfg)
    assert set(threads.measure(work, [1, 2])) == {1, 2}
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(threads, "fastest", max)
    assert same(run(tmp_path / "auto"), run(tmp_path / "given", "--threads", "2"))


@pytest.mark.parametrize("sizes", [{}, {"method": "grpo"}, {"student_layers": 12, "student_width": 768}])
def test_what_is_measured_is_the_runs_own_work_or_a_part_of_it(sizes, monkeypatch):
    """Tokens of its student are sampled, and a batch of its shape is scored; few rows of a large model."""
    cfg, seen = config.Config(**sizes), []
    score = threads.response_logprobs
    monkeypatch.setattr(threads, "sample", lambda model, *rest: seen.append((model, *rest)))
    monkeypatch.setattr(threads, "response_logprobs", lambda *what: seen.append(what) or score(*what))
    threads.piece_of_work(cfg)()
    (model, prompts, length, _), (scored, tokens, prompt_length) = seen
    assert model is scored and model.config == cfg.gpt("student")
    assert prompts.shape[1] == prompt_length == cfg.prompt_length and 1 < length < cfg.response_cap
    assert tokens.shape[1] == cfg.prompt_length + cfg.response_cap
    assert len(tokens) == len(prompts) == (cfg.batch_size if cfg.student_width == 64 else 1)
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "out.weight" in name)


def test_a_warm_start_made_with_another_number_is_taken_as_it_is_and_the_run_says_so(clock, tmp_path, capsys):
    run(tmp_path, "--threads", "2")
    started = snapshot(tmp_path / "warm_starts")
    assert not lines(capsys, "warm start was made")
    run(tmp_path, "--threads", "1", "--seed", "0", "--lr", "0.1")
    said = lines(capsys, "warm start was made")
    assert len(said) == 2 and snapshot(tmp_path / "warm_starts") == started
    for line, who in zip(said, ("student", "teacher")):
        assert line.startswith(f"the {who}'s warm start was made with --threads 2 and is taken as it is")
    run(tmp_path, "--threads", "2", "--lr", "0.2")
    assert not lines(capsys, "warm start was made")


class Time:
    """Stands in for the module time: a clock and a CPU clock that a test sets."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def monotonic(self):
        return self.wall

    def process_time(self):
        return self.cpu

    def pass_by(self, wall, cpu):
        self.wall += wall
        self.cpu += cpu


def test_a_run_whose_threads_lose_their_cores_says_so_once_and_names_one_thread(clock, monkeypatch):
    time = Time()
    monkeypatch.setattr(threads, "time", time)
    monkeypatch.setattr(threads.Watch, "look", LOOK)
    watch = threads.Watch(config.Config(), CPU)
    made = clock(t1=0.15, t2=0.45)
    time.pass_by(10, 19.9)  # both threads have their cores
    assert watch.look() is None and not made.asked
    time.pass_by(0.5, 0.5)  # too short to say
    assert watch.look() is None and not made.asked
    time.pass_by(10, 13)
    said = watch.look()
    assert "wait for each other" in said and "3.0 times as fast" in said and "--threads 1" in said
    time.pass_by(10, 13)
    assert watch.look() is None


def test_a_run_that_only_waited_for_something_else_says_nothing(clock, monkeypatch):
    time = Time()
    monkeypatch.setattr(threads, "time", time)
    monkeypatch.setattr(threads.Watch, "look", LOOK)
    watch = threads.Watch(config.Config(), CPU)
    made = clock(t1=0.15, t2=0.10)
    time.pass_by(10, 13)
    assert watch.look() is None and set(made.asked) == {1, 2}
    torch.set_num_threads(1)
    alone = threads.Watch(config.Config(), CPU)  # one thread waits for no other
    time.pass_by(10, 3)
    assert alone.look() is None


def test_the_sentence_of_a_slow_run_comes_after_an_evaluation_and_changes_no_bit(tmp_path, monkeypatch, capsys):
    plain = run(tmp_path / "plain", "--threads", "2")
    looks = iter([None, "this run is slow", None, None])
    monkeypatch.setattr(threads.Watch, "look", lambda self: next(looks))
    capsys.readouterr()
    slow = run(tmp_path / "slow", "--threads", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("this run is slow") - 1].startswith("step     5") and same(plain, slow)


def test_a_warm_start_without_a_bar_prints_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    now = iter(range(0, 10_000, 5))  # five seconds pass from one look at the clock to the next
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(now))
    run(tmp_path, "--threads", "1")
    said = lines(capsys, "warm start:")
    of_teacher = [line for line in said if line.startswith("teacher")]
    assert of_teacher == [
        "teacher warm start: 5 updates",
        "teacher warm start: 3 of 5 updates after 15 s",
        "teacher warm start: done after 30 s",
    ]


def test_a_warm_start_with_a_bar_prints_no_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path, "--threads", "1")
    assert not lines(capsys, "warm start:")
