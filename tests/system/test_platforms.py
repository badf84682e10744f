"""Other systems, simulated: Windows without fcntl, fsync of a folder or SIGHUP; consoles and disks that fail."""

import ast
import builtins
import errno
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import started, wait_until
from lab import bench
from test_train import ROOT, command, refused, run

import train
from nano_opd import arithmetic, sft
from nano_opd.evaluate import evaluate
from nano_opd.gpt import GPT
from nano_opd.rollout import response_logprobs
from nano_opd.system import checkpoint, config, device, memory

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
WINDOWS = ENVIRONMENT | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def windows(monkeypatch):
    """No fcntl and no SIGHUP, and a folder cannot be opened."""
    importing, opening = builtins.__import__, os.open

    def no_fcntl(name, *arguments):
        if name == "fcntl":
            raise ModuleNotFoundError(name)
        return importing(name, *arguments)

    def no_folder(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opening(path, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_fcntl)
    monkeypatch.setattr(os, "open", no_folder)
    monkeypatch.delattr(signal, "SIGHUP")


def test_a_run_needs_no_fcntl_and_no_folder_that_can_be_opened(tmp_path, windows):
    assert len([*run(tmp_path, "--steps", "4").iterdir()]) == 4
    run(tmp_path, "--steps", "5", "--resume")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_and_folders_to_flush_takes_a_run(number, tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    fsync = os.fsync
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", lambda n: refuse() if os.path.isdir(f"/proc/self/fd/{n}") else fsync(n))
    assert len([*run(tmp_path, "--steps", "2").iterdir()]) == 4


@pytest.mark.parametrize(
    "encoding,arguments",
    [
        ("cp1252", "train.py --help"),
        ("ascii", "train.py --help"),
        ("cp1252", "-m lab.bench --help"),
        ("ascii", "-m lab.bench --help"),
        ("ascii", "-m lab.pages"),
    ],
)
def test_every_console_takes_the_text(encoding, arguments, tmp_path):
    """And files are UTF-8, whatever the system's encoding is."""
    program = [sys.executable, *arguments.split()]
    if arguments.endswith("pages"):  # prints its tables, with ± and λ, if they are to stand in no README
        program.append(str(tmp_path))
        for path in (ROOT / "notebooks" / "results").glob("*.[cj]s*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    environment = WINDOWS | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    folder = ROOT / "notebooks" if "lab" in arguments else ROOT
    ended = subprocess.run(program, cwd=folder, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert len(said := ended.stdout.decode(encoding)) > 300 and "not run" not in said


def test_every_file_is_opened_with_an_encoding():
    for path in [
        *ROOT.glob("*.py"),
        *(p for folder in ("nano_opd", "notebooks", "tests") for p in (ROOT / folder).rglob("*.py")),
    ]:
        for call in [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ]:
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("read_text", "write_text") or (name == "open" and isinstance(call.func, ast.Name)):
                binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "xb", "ab") for a in call.args)
                assert binary or any(k.arg == "encoding" for k in call.keywords), f"{path}:{call.lineno}"


@pytest.mark.parametrize("closed", ["a pipe that closes", "a full disk"])
def test_a_run_goes_on_when_no_one_reads_what_it_says(closed, tmp_path):
    program = command(tmp_path, "--steps", "4")
    out = subprocess.PIPE if closed == "a pipe that closes" else open("/dev/full", "w", encoding="utf-8")
    with started(program, stdout=out, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        if closed == "a pipe that closes":
            process.stdout.close()
        else:
            out.close()
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and error.count(b"\n") == 1 and b"stdout cannot be written" in error
    (folder,) = tmp_path.glob("opdplus*")
    assert len([*folder.iterdir()]) == 4


@pytest.mark.parametrize("size", [0, 100, 5_000, 40_000])
def test_a_disk_that_is_really_full_is_one_error_and_the_old_file_is_intact(size, tmp_path):
    path, content = tmp_path / "a.pt", {"weight": torch.arange(10_000.0)}
    checkpoint.save(path, {}, content)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(checkpoint.WriteError, match="File too large.*intact"):
            checkpoint.save(path, {}, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_a_temporary_file_is_new_and_never_opened_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda n: b"x" * n)
    (tmp_path / f".a.{b'xxxxxxxx'.hex()}.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(checkpoint.WriteError, match="File exists"):
        checkpoint.write_atomically(tmp_path / "a", lambda file: file.write(b"content"))
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "a").exists()


def test_a_closed_terminal_loses_no_update_unless_it_is_to_be_ignored(tmp_path):
    for ignored in (False, True):
        (out := tmp_path / str(ignored)).mkdir()
        steps = "40" if ignored else "100000"
        start = lambda ignored=ignored: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        program = command(out, "--steps", steps)
        with started(program, stderr=subprocess.PIPE, stdout=-3, env=ENVIRONMENT, preexec_fn=start) as process:
            wait_until(lambda out=out: [*out.glob("*/metrics.csv")], process)
            process.send_signal(signal.SIGHUP)
            _, error = process.communicate(timeout=120)
        assert process.returncode == (0 if ignored else 129) and (b"--resume continues" in error) != ignored
        assert (b"stopping after this step" in error) != ignored  # before the step is finished
        (path,) = out.glob("*/checkpoint.pt")
        state = torch.load(path, weights_only=True)["state"]
        assert state["step"] == (40 if ignored else len(state["rows"])) and b"Traceback" not in error


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["a notebook", "a shell's background job"])
def ctrl_c(request):
    """What Ctrl-C does before a run. The tests themselves may be a background job, where Python leaves it ignored."""
    of_the_tests = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, of_the_tests)


def test_signals_are_as_before_after_a_run_and_a_second_one_acts_as_it_did(ctrl_c, tmp_path, monkeypatch, capsys):
    """In a notebook it is Python's KeyboardInterrupt, which the kernel survives; a background job goes on."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    assert before[0] == ctrl_c
    run(tmp_path, "--steps", "1")
    assert [signal.getsignal(number) for number in numbers] == before
    update = train.update

    def interrupted_twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    monkeypatch.setattr(train, "update", interrupted_twice)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--seed", "1")
    assert end.value.code == 130 and [signal.getsignal(number) for number in numbers] == before
    said = capsys.readouterr().err
    assert ("train.py: stopped at once;" in said) == (ctrl_c != signal.SIG_IGN)
    assert ("train.py: stopped;" in said) == (ctrl_c == signal.SIG_IGN)  # after the step


@pytest.mark.parametrize(
    "arguments",
    [
        "--batch-size 1000000000",
        "--student-width 1000000",
        "--teacher-layers 1000000000",
        "--eval-size 1000000000",
        "--sft-batch-size 1000000000",
        "--teacher-steps 1000000000",
        "--steps 1000000000000",
    ],
)
def test_sizes_that_cannot_fit_are_refused_before_anything_is_made(arguments, capsys, tmp_path):
    said = refused(capsys, "--out-dir", str(tmp_path / "out"), *arguments.split())
    assert said.startswith(f"train.py: {arguments.split()[0]}") or arguments.split()[0] in said
    assert "GiB or more are needed" in said and not (tmp_path / "out").exists()


def test_what_is_refused_is_less_than_a_run_really_holds():
    """So that no run is refused that would fit: the parts of a small one, by the allocator's own counts."""
    cfg = config.Config(batch_size=64, student_width=32, student_layers=3, eval_size=50)
    rng, device = np.random.default_rng(0), torch.device("cpu")
    student, peak = GPT(cfg.gpt("student")), lambda function: 1e6 * bench.observe(function, device)[1]
    solutions = sft.worked_solutions(arithmetic.sample_problems("add", 3, 64, rng))
    held_out = arithmetic.sample_problems("add", 3, 200, rng, held_out=True)
    optimizer, needs = sft.adamw(student, 1e-3), memory.needs(cfg)

    def backward():
        response_logprobs(student, solutions.tokens, solutions.prompt_length).sum().backward()

    assert 0.3 < needs["--batch-size"] / peak(backward) < 1
    assert 0.1 < needs["--eval-size"] / peak(lambda: evaluate(student, student, held_out, cfg.response_cap, None)) < 1
    held = [p.nbytes for p in student.parameters()] * 2  # with their gradients
    optimizer.step()
    held += [value.nbytes for state in optimizer.state.values() for value in state.values()]
    assert 0.9 < needs["--student-width and --student-layers"] / sum(held) <= 1


def test_a_device_that_runs_out_of_memory_is_one_sentence(capsys, tmp_path, monkeypatch):
    def allocate():
        torch.empty(2**60, dtype=torch.uint8)

    for n, error in enumerate((MemoryError("8 GiB"), torch.OutOfMemoryError("8 GiB"), None)):
        fail = allocate if error is None else lambda error=error: (_ for _ in ()).throw(error)
        monkeypatch.setattr(train, "update", lambda *_, fail=fail: fail())
        with pytest.raises(SystemExit) as end:
            run(tmp_path / str(n))
        assert end.value.code == 2 and "out of memory: choose a lower --batch-size" in capsys.readouterr().err
    for bug in (RuntimeError, NotImplementedError):  # is no such error, nor is a subclass
        monkeypatch.setattr(train, "update", lambda *_, bug=bug: (_ for _ in ()).throw(bug("a bug")))
        with pytest.raises(bug, match="a bug"):
            run(tmp_path / bug.__name__)


def test_a_self_teacher_needs_no_memory_of_its_own():
    needs = lambda *given: memory.needs(config.parse(["--method", "rlsd", *given]))
    assert needs() == needs("--teacher-steps", "1000000", "--teacher-width", "512")
    assert needs()["--teacher-width and --teacher-layers"] == needs()["--student-width and --student-layers"]


def test_bfloat16_is_taken_where_it_is_fast(monkeypatch):
    cuda, cpu, capability = torch.device("cuda"), torch.device("cpu"), [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability[0])
    chosen = lambda *given: str(device.precision(*given)).removeprefix("torch.")
    assert [chosen("auto", cuda, width) for width in (96, 256, 768)] == ["float32", "bfloat16", "bfloat16"]
    assert chosen("auto", cpu, 768) == "float32" and chosen("bfloat16", cpu, 8) == "bfloat16"
    assert chosen("float32", cuda, 768) == "float32"
    capability[0] = (7, 5)  # which emulates it
    assert chosen("auto", cuda, 768) == "float32" and chosen("bfloat16", cuda, 768) == "bfloat16"


def test_compiling_on_a_gpu_needs_triton_and_a_c_compiler(monkeypatch):
    cuda, there = torch.device("cuda"), {"gcc"}
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(device.shutil, "which", lambda program: program if program in there else None)
    monkeypatch.setattr(device.os.path, "exists", lambda path: True)
    monkeypatch.delenv("CC", raising=False)
    assert not device.has_compiler(cuda)
    there.add("triton")
    assert device.has_compiler(cuda)
    monkeypatch.setenv("CC", "other")
    assert not device.has_compiler(cuda)
    there.add("other")
    assert device.has_compiler(cuda)


@pytest.mark.parametrize(
    "environment,said",
    [
        ("WORLD_SIZE=abc", "WORLD_SIZE=abc: not a number"),
        ("WORLD_SIZE=", "WORLD_SIZE=: not a number"),
        ("WORLD_SIZE=0", "RANK=0 of WORLD_SIZE=0"),
        ("WORLD_SIZE=-1", "WORLD_SIZE=-1: not a number"),
        ("WORLD_SIZE=2", "WORLD_SIZE=2 without RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=xx", "MASTER_PORT=xx: not a number"),
        ("WORLD_SIZE=2 RANK=5 LOCAL_RANK=1", "RANK=5 of WORLD_SIZE=2"),
        ("RANK=x", "RANK=x: not a number"),
        ("RANK=1", "RANK=1 of WORLD_SIZE=1"),
        ("RANK=-1", "RANK=-1: not a number"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--lr", "foo"]])
def test_processes_that_no_launcher_started_are_refused_in_a_sentence(
    environment, said, arguments, monkeypatch, capsys
):
    for pair in environment.split(" "):
        monkeypatch.setenv(*pair.split("="))
    message = refused(capsys, *arguments)
    assert message.startswith(f"train.py: {said}") and message.count("\n") == 1 and "torchrun" in message


@pytest.mark.parametrize(
    "flag", ["--log-u-clip 1e300", "--lr 1e39", "--sft-lr 1e300", "--steps 1" + 400 * "0", "--seed 1" + 400 * "0"]
)
def test_numbers_that_no_tensor_can_hold_are_refused(flag, capsys):
    said = refused(capsys, *flag.split())
    assert said.startswith(f"train.py: {flag[:20].split()[0]} 1") and "and at most" in said and len(said) < 100


def test_a_console_that_is_not_there_stops_no_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    run(tmp_path)
    assert list(tmp_path.glob("*/metrics.csv"))
