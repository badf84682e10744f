"""You edit the code and run again: nothing that the old code made is taken for the new code's, and no word retrains."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import bench
from test_train import ROOT, TINY, metrics, refused, run, same, snapshot

import train
from nano_opd.system import config, sources

SHORT = [*TINY, "--steps", "2"]
FILES = {"checkpoint.pt", "config.json", "curves.png", "metrics.csv"}
OF_SYSTEM = ["batches", "config", "device", "distributed", "fast_rollout", "runs"]  # what decides a number there


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the code and, in out/, a run that it has made."""
    path = tmp_path_factory.mktemp("finished") / "copy"
    shutil.copytree(ROOT / "nano_opd", path / "nano_opd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", path)
    ended = start(path)
    assert ended.returncode == 0, ended.stderr
    return path


@pytest.fixture
def copy(finished, tmp_path):
    """The same, to be edited."""
    return shutil.copytree(finished, tmp_path / "copy")


def append(path: Path, line: str) -> None:
    """Add a line to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def start(copy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the train.py of a copy in a process of its own."""
    variables = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(copy / "train.py"), *SHORT, "--out-dir", str(copy / "out"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------------- digests


def test_a_comment_a_docstring_and_the_layout_leave_a_digest_and_every_other_edit_changes_it(tmp_path):
    source = 'def f(x):\n    """Return x + 1."""\n    return x + 1\n'
    same_code = [
        "def f(x):\n    return x + 1\n",
        '"""A module."""\n\n\ndef f(x):  # a comment\n    """Other\n    words."""\n\n    return (x\n        + 1)\n',
    ]
    other_code = [source.replace("+ 1\n", "+ 2\n"), source.replace("f(x)", "f(x=0)"), source + "f.__doc__ = '+'\n"]
    digests = []
    for n, text in enumerate([source, *same_code, *other_code]):
        (tmp_path / f"{n}.py").write_text(text, encoding="utf-8")
        digests.append(sources.digest(tmp_path / f"{n}.py"))
    assert digests[0] == digests[1] == digests[2] and len(set(digests)) == 4


def test_a_digest_is_of_the_file_as_it_was_first_read(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n", encoding="utf-8")
    before = sources.digest(path)
    path.write_text("x = 2\n", encoding="utf-8")
    assert sources.digest(path) == before
    sources.tree.cache_clear()
    assert sources.digest(path) != before


def test_the_code_of_a_run_is_what_train_py_imports_but_for_what_decides_no_number():
    """The proofs, in exact/, train nothing. Of the rest, what only refuses, saves or shows is left out."""
    files = [*(ROOT / "nano_opd").glob("*.py"), *(ROOT / "nano_opd" / "system").glob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.stem != "__init__"}
    assert train.CODE.keys() == {"train.py"} | names - {*sources.LEFT_OUT}
    assert {*sources.LEFT_OUT} <= names
    assert {Path(name).stem for name in train.CODE if "system" in name} == {*OF_SYSTEM}


def test_a_new_file_that_a_method_imports_is_part_of_the_code(copy):
    program = "from nano_opd.system import sources\nprint(*sources.digests('train.py'))"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    for n, line in enumerate(("from nano_opd import new0", "from nano_opd.new1 import x", "import nano_opd.new2")):
        append(copy / "nano_opd" / f"new{n}.py", "x = 1")
        append(copy / "nano_opd" / "methods.py", line)
    append(copy / "nano_opd" / "new3.py", "x = 1")
    append(copy / "nano_opd" / "new0.py", "from . import new3")
    append(copy / "nano_opd" / "new4.py", "not imported")
    ended = subprocess.run([sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, text=True)
    found = set(ended.stdout.split())
    assert found - train.CODE.keys() == {f"nano_opd/new{n}.py" for n in range(4)}, ended.stderr


def test_the_digest_of_a_function_is_of_its_code_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    source = 'def first():\n    """Words."""\n    return 1\n\n\ndef second():\n    return 2\n'
    edits = [source.replace("Words", "Other words").replace("return 1\n", "return 1  # one\n")]
    edits += [source.replace("return 2", "return 3"), source.replace("return 1", "return 4")]
    digests = []
    for n, text in enumerate([source, *edits]):
        (tmp_path / f"edited_{n}.py").write_text(text, encoding="utf-8")
        digests.append(sources.digest_of_function(__import__(f"edited_{n}").first))
    assert digests[0] == digests[1] == digests[2] != digests[3]
    made = {}
    exec("def without_a_file():\n    return 1\ndef another():\n    return 1 + len('')\n", made)
    assert len({sources.digest_of_function(made[name]) for name in ("without_a_file", "another")}) == 2


# ---------------------------------------------------------------------------------------------------------------- runs


def test_an_edited_method_goes_on_with_no_run_of_the_old_one(copy):
    before = snapshot(copy / "out")
    append(copy / "nano_opd" / "opdplus.py", "EDITED = True")
    for more in ([], ["--resume", "--steps", "4"]):
        ended = start(copy, *more)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
        assert "the code has changed since" in ended.stderr and "(nano_opd/opdplus.py)" in ended.stderr
        for remedy in ("move it away", "another --out-dir", "undo the edit"):
            assert remedy in ended.stderr
        assert snapshot(copy / "out") == before


def test_words_neither_end_a_run_nor_train_a_warm_start_again(copy):
    warm_starts = snapshot(copy / "out" / "warm_starts")
    for name in train.CODE:
        text = (copy / name).read_text(encoding="utf-8")
        text = re.sub(r'"""(?=\w)', '"""Other words. ', text)  # every docstring
        (copy / name).write_text(f"# a comment\n{text}", encoding="utf-8")
    ended = start(copy, "--resume", "--steps", "3")
    assert ended.returncode == 0, ended.stderr
    assert len(metrics(next((copy / "out").glob("opdplus*")))) == 4
    assert snapshot(copy / "out" / "warm_starts") == warm_starts


def test_an_edit_of_the_loop_keeps_the_warm_starts(copy):
    warm_starts = snapshot(copy / "out" / "warm_starts")
    append(copy / "train.py", "EDITED = True")
    ended = start(copy, "--lr", "0.1")
    assert ended.returncode == 0, ended.stderr
    assert snapshot(copy / "out" / "warm_starts") == warm_starts


def test_a_run_that_does_not_say_its_code_is_not_taken_for_this_code_s(tmp_path, capsys):
    path = run(tmp_path, "--steps", "2") / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved.pop("code") == train.CODE
    assert saved.pop("threads") == torch.get_num_threads()
    assert config.Config(**saved) == config.parse([*SHORT, "--out-dir", str(tmp_path)])
    path.write_text(json.dumps(saved), encoding="utf-8")
    capsys.readouterr()
    for more in ([], ["--resume"]):
        said = refused(capsys, *SHORT, "--out-dir", str(tmp_path), *more)
        assert "does not say which code made it" in said and "another --out-dir" in said


def test_a_checkpoint_knows_its_code_without_config_json(tmp_path, capsys, monkeypatch):
    (run(tmp_path, "--steps", "2") / "config.json").unlink()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setitem(train.CODE, "nano_opd/opdplus.py", "edited")
        said = refused(capsys, *SHORT, "--out-dir", str(tmp_path), "--resume")
    assert "belongs to another configuration (nano_opd/opdplus.py is" in said
    run(tmp_path, "--steps", "2", "--resume")


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_without_a_checkpoint_says_so_and_names_the_run_that_differs_in_one_option(tmp_path, capsys):
    one = run(tmp_path, "--steps", "2", "--lr", "0.25", "--method", "rlsd")
    run(tmp_path, "--steps", "2", "--lr", "0.25", "--method", "rlsd", "--lam", "0.75", "--seed", "1")
    (tmp_path / "opdplus-damaged").mkdir()
    for name, content in (("checkpoint.pt", ""), ("config.json", "[")):
        (tmp_path / "opdplus-damaged" / name).write_text(content, encoding="utf-8")
    capsys.readouterr()
    two = run(tmp_path, "--steps", "2", "--method", "rlsd", "--resume")
    said = capsys.readouterr().out
    line = f"no checkpoint in {two}: this run starts from the beginning; {one} differs in --lr alone (0.25 there and "
    assert said.startswith(line) and said.count("no checkpoint") == 1
    run(tmp_path, "--steps", "3", "--method", "rlsd", "--resume")
    assert "no checkpoint" not in capsys.readouterr().out
    three = run(tmp_path, "--steps", "2", "--task", "sub", "--grad-clip", "3", "--resume")
    assert capsys.readouterr().out.startswith(f"no checkpoint in {three}: this run starts from the beginning\n")


def test_options_that_another_method_brings_with_it_are_not_counted(tmp_path, capsys):
    """The recipes of GRPO and OPD+ differ in three options more."""
    sizes = "--digits 2 --teacher-steps 1 --teacher-layers 1 --teacher-width 16 --student-layers 1 --student-width 8"
    short = [*sizes.split(), "--eval-size", "4", "--steps", "1", "--out-dir", str(tmp_path)]
    train.main([*short, "--method", "grpo"])
    capsys.readouterr()
    train.main([*short, "--resume"])
    assert "differs in --method alone (grpo there and opdplus here)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- where, and what


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.chdir(tmp_path)
    train.main([*SHORT, "--out-dir=~/runs"])
    assert len([*(tmp_path / "runs").glob("opdplus*/checkpoint.pt")]) == 1 and not (tmp_path / "~").exists()
    assert bench.parse(bench.Parser("bench"), ["--json=~/a.json"]).json == tmp_path / "a.json"
    capsys.readouterr()
    assert "there is no such home folder; ./~none/runs" in refused(capsys, *SHORT, "--out-dir=~none/runs")


def test_a_run_in_another_thread_ends_as_in_the_main_one(tmp_path):
    whole = run(tmp_path / "main")
    before = signal.getsignal(signal.SIGINT)
    made = []
    thread = threading.Thread(target=lambda: made.append(run(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert same(whole, made[0]) and signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("what", ["folder", "config.json"])
def test_what_is_deleted_during_a_run_comes_back_whole(what, tmp_path, monkeypatch):
    update, run_dir = train.update, config.parse([*TINY, "--out-dir", str(tmp_path)]).run_dir

    def delete(cfg, step, *rest):
        if step == 7:
            shutil.rmtree(run_dir) if what == "folder" else (run_dir / "config.json").unlink()
        return update(cfg, step, *rest)

    monkeypatch.setattr(train, "update", delete)
    run(tmp_path)
    assert {path.name for path in run_dir.iterdir()} == FILES
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    options = dataclasses.asdict(config.parse([*TINY, "--out-dir", str(tmp_path)]))
    assert saved == options | {"code": train.CODE, "threads": torch.get_num_threads()}
    run(tmp_path, "--resume")


@pytest.mark.parametrize("variable", ["MPLBACKEND=nonsense", "TQDM_MININTERVAL=abc", "TQDM_NCOLS=x"])
def test_a_bad_value_for_a_library_stops_no_run(variable):
    name, value = variable.split("=")
    ended = start(ROOT, "--help", **{name: value})
    assert ended.returncode == 0 and ended.stderr == "" and "--method" in ended.stdout


def test_a_good_value_for_a_library_has_its_effect():
    program = "import os, train, matplotlib\nfrom nano_opd.system.runs import tqdm\n"
    program += "print(matplotlib.rcParams['backend'], os.environ['MPLBACKEND'], tqdm(total=1).mininterval)"
    variables = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "pdf", "TQDM_MININTERVAL": "7"}
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)
    assert ended.stdout.split() == ["pdf", "pdf", "7.0"], ended.stderr


# -------------------------------------------------------------------------------------------------------------- Config

MEANINGLESS = {
    "--lam 0.9 means nothing with --method opd: it is read by rlsd": {"method": "opd", "lam": 0.9},
    "--group-size 8 means nothing with --method opdplus": {"group_size": 8},
    "--divergence tv means nothing with --method grpo": {"method": "grpo", "divergence": "tv"},
    "--digits 3.0: must be a whole number": {"digits": 3.0},
    "--seed 1.5: must be a whole number": {"seed": 1.5},
    "--seed True: must be a whole number": {"seed": True},
    "--steps 10.0: must be a whole number": {"steps": 10.0},
    "--lr 1e-3: must be a number": {"lr": "1e-3"},
    "--gamma None: must be a number": {"gamma": None},
    "--gamma True: must be a number": {"gamma": True},
    "--negative-only 1: must be True or False": {"method": "rlsd", "negative_only": 1},
    "--method None: must be text": {"method": None},
    "--task 3: must be text": {"task": 3},
    "--out-dir 3: must be text": {"out_dir": 3},
    "--divergence 3: must be text": {"divergence": 3},
    "--digits 1000": {"digits": 10**400},
}


@pytest.mark.parametrize("said", MEANINGLESS)
def test_a_configuration_made_by_hand_is_checked_as_a_command_line_is(said):
    with pytest.raises(ValueError) as refusal:
        config.Config(**MEANINGLESS[said])
    assert str(refusal.value).startswith(said) and "\n" not in str(refusal.value)


def test_a_whole_number_is_a_number_and_the_same_run():
    first = config.Config(gamma=1, lr=1, log_u_clip=np.float64(2))
    second = config.Config(gamma=1.0, lr=1.0, log_u_clip=2)
    assert first == second and first.run_dir == second.run_dir
    assert first.run_dir.name == "opdplus-jsd-sampled-add3-seed0-gamma1.0-log_u_clip2.0-lr1.0"
    assert config.Config(out_dir=Path("a")) == config.Config(out_dir="a")
