"""A run's folder: a name for every run, and nothing in it that is lost, taken for another's, or a traceback."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import ROOT, TINY, metrics, refused, run, same, snapshot

import train
from nano_opd import arithmetic
from nano_opd.methods import METHODS
from nano_opd.system import config, folder

OTHER = {
    "lr": 0.001,
    "divergence": "alpha=0.5",
    "negative_only": True,
    "reasoning_only": True,
    "out_dir": "elsewhere",
    "resume": True,
    "device": "cpu",
    "threads": "1",
}
FREE = {"steps", "eval_every", "out_dir", "resume", "device", "compile"}  # what a run may be resumed with
FREE |= {"threads"}  # kept by config.json, and in no name: the number that is chosen depends on the hour


def name(**options) -> str:
    return config.Config(**options).run_dir.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [*arithmetic.TASKS, "mix"])
def test_the_defaults_of_a_method_and_a_task_are_a_short_name(method, task):
    parts = [method, *({"opd", "opdplus"} & {method} and ["jsd", "sampled"]), f"{task}3", "seed0"]
    if method in ("gkd", "opsd", "grpo+opsd"):
        parts.insert(1, "jsd")
    assert name(method=method, task=task) == "-".join(parts)


def test_every_option_that_a_resumed_run_must_keep_is_in_the_name():
    names, plain_names = {}, {}
    for field in dataclasses.fields(config.Config):
        those = config.readers(field)
        plain = config.Config(method="opdplus" if "opdplus" in those else those[-1])
        plain_names[field.name] = plain.run_dir.name
        value, choices = getattr(plain, field.name), field.metadata["choices"]
        other = next(c for c in choices if c != value) if choices else OTHER.get(field.name, value)
        if other == value:
            other = value + 4 if isinstance(value, int) else (value or 1) / 2
        options = {"method": plain.method} | ({"variance": "topk"} if field.name == "top_k" else {})
        names[field.name] = name(**options | {field.name: other})
    assert {option for option, named in names.items() if named == plain_names[option]} == FREE
    rest = [named for option, named in names.items() if option not in FREE]
    assert len(set(rest)) == len(rest) and all(re.fullmatch(r"[\w.+=-]{1,120}", named) for named in rest)
    assert names["lr"] == "opdplus-jsd-sampled-add3-seed0-lr0.001"
    assert name(method="rlsd", negative_only=True) == "rlsd-add3-seed0-negative_only"


def test_a_name_is_valid_and_bounded_whatever_the_values_are():
    assert "/" not in name(divergence="alpha= 1") and " " not in name(divergence="alpha= 1")
    many = dict(lr=0.001, grad_clip=1.5, sft_lr=0.025, sft_batch_size=63, teacher_steps=77, student_steps=99)
    long = [name(**many, log_u_clip=clip, seed=10**19, teacher_width=112, eval_size=3) for clip in (1.0, 2.0)]
    assert len(set(long)) == 2 and all(len(n) <= 120 for n in long)


def test_a_changed_knob_is_another_folder_with_the_same_warm_starts(tmp_path):
    first = run(tmp_path)
    started = snapshot(tmp_path / "warm_starts")
    second = run(tmp_path, "--lr", "0.1")
    assert first != second and metrics(first) != metrics(second) and snapshot(tmp_path / "warm_starts") == started
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--lr", "1e38")
    assert end.value.code == 1
    run(tmp_path, "--lr", "0.2")


def test_a_folder_that_holds_a_run_is_not_overwritten(capsys, tmp_path):
    path, tiny = run(tmp_path) / "config.json", [*TINY, "--out-dir", str(tmp_path)]
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert "holds this run already: add --resume" in refused(capsys, *tiny)
    assert snapshot(tmp_path) == before
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"lr": 0.1}), encoding="utf-8")
    assert "holds another run (lr is 0.1 there and 0.005 here)" in refused(capsys, *tiny, "--resume")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "7", "\ud800"])
def test_a_damaged_config_is_refused_and_a_deleted_one_comes_back_from_the_right_command(text, capsys, tmp_path):
    path, tiny = run(tmp_path) / "config.json", [*TINY, "--out-dir", str(tmp_path), "--resume"]
    whole = path.read_text(encoding="utf-8")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    capsys.readouterr()
    assert "is not a run's configuration: delete it" in refused(capsys, *tiny)
    path.unlink()
    options = json.loads(whole) | {"lr": 0.1, "out_dir": str(tmp_path)}
    del options["code"], options["threads"]
    folder_of_another = shutil.copytree(path.parent, config.Config(**options).run_dir)
    assert "belongs to another configuration (lr" in refused(capsys, *tiny, "--lr", "0.1")
    assert not (folder_of_another / "config.json").exists()
    run(tmp_path, "--resume")
    assert json.loads(path.read_text(encoding="utf-8")) | {"resume": False} == json.loads(whole)


EDITED = """
import importlib, sys
from pathlib import Path
from nano_opd.system import config, folder, sources
cfg, paths = config.Config(), {}
names = "gpt sft arithmetic tokenizer policy_gradient rollout streams system.batches opdplus system.report"
for name in names.split():
    module = importlib.import_module(f"nano_opd.{name}")
    before = folder.warm_start(cfg, "student", config.parse)[0]
    with open(module.__file__, "a", encoding="utf-8") as file:
        file.write(sys.argv[1])
    sources.tree.cache_clear()
    importlib.reload(folder)
    paths[name] = folder.warm_start(cfg, "student", config.parse)[0] != before
print(*[name for name, changed in paths.items() if changed])
"""


def test_a_warm_start_is_trained_anew_when_what_trains_it_is_edited(tmp_path):
    shutil.copytree(ROOT / "nano_opd", tmp_path / "nano_opd")
    trains = "gpt sft arithmetic tokenizer policy_gradient rollout streams system.batches".split()
    for edit, edited in (("# a comment", []), ("EDITED = True", trains)):
        command = [sys.executable, "-c", EDITED, f"\n{edit}\n"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert ended.stdout.decode().split() == edited, ended.stderr
    cfg = config.Config()
    paths = {folder.warm_start(cfg, "student", how)[0] for how in (train.warm_start, train.update)}
    assert len(paths) == 2


def test_a_run_that_failed_before_its_first_checkpoint_is_made_anew(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(train, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out")
    monkeypatch.undo()
    assert same(whole, run(tmp_path / "out"))


@pytest.mark.parametrize("damage", ["", "step,acc\n1,"])
def test_a_lost_or_damaged_metrics_file_comes_back_from_the_checkpoint(damage, tmp_path):
    path = run(tmp_path) / "metrics.csv"
    before = metrics(path.parent)
    path.write_text(damage, encoding="utf-8")
    run(tmp_path, "--resume")
    path.unlink()
    run(tmp_path, "--resume")
    assert metrics(path.parent) == before


def test_a_folder_that_cannot_be_used_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/none")):
        assert "cannot use" in refused(capsys, *TINY, "--out-dir", str(out_dir))


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o600])
def test_a_folder_without_permission_is_one_sentence(mode, capsys, tmp_path):
    (closed := tmp_path / "closed").mkdir(mode=mode)
    if os.access(closed, os.R_OK | os.W_OK | os.X_OK):
        pytest.skip("nothing is closed to root")
    assert "cannot use" in refused(capsys, *TINY, "--out-dir", str(closed))


def test_two_runs_in_one_folder_are_refused_while_the_first_lives(capsys, tmp_path):
    arguments = [*TINY, "--out-dir", str(tmp_path), "--resume"]
    with folder.claim(config.parse(arguments), train.CODE):
        assert "another process is writing" in refused(capsys, *arguments)
    train.main(arguments)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of one finished run."""
    run(out_dir := tmp_path_factory.mktemp("once"))
    return out_dir


def run_dir(out_dir):
    return next(out_dir.glob("opdplus*"))


def edits():
    """What one may do to a checkpoint with torch.load and torch.save, by name."""

    def of_rows(rows):
        return lambda content: content["state"].update(rows=rows)

    def of_step(step):
        return lambda content: content["state"].update(step=step)

    def of_moments(change):
        return lambda content: content["state"]["optimizer"]["state"][0].update(exp_avg=change)

    yield "a step that is text", of_step("2")
    yield "no step", lambda content: content["state"].pop("step")
    yield "rows of another kind", of_rows([1, 2, 3])
    yield "no rows", of_rows([])
    yield "moments of another shape, which a fused kernel would write behind", of_moments(torch.zeros(1))
    yield "no moments", lambda content: content["state"]["optimizer"]["state"].clear()
    yield (
        "integer weights",
        lambda content: content["state"]["student"].update(
            {"embedding.weight": content["state"]["student"]["embedding.weight"].long()}
        ),
    )
    yield (
        "weights that are not numbers",
        lambda content: content["state"]["student"]["embedding.weight"].fill_(torch.nan),
    )
    yield "a learning rate that is a tensor", lambda content: content["key"].update(lr=torch.ones(2))
    yield "a format that is a tensor", lambda content: content.update(format=torch.ones(2))
    yield "no digest", lambda content: content.pop("digest")


@pytest.mark.parametrize("edit", [pytest.param(edit, id=name) for name, edit in edits()])
def test_an_edited_checkpoint_is_refused_before_anything_of_it_is_used(edit, once, tmp_path, capsys):
    out_dir = shutil.copytree(once, tmp_path / "out")
    path = run_dir(out_dir) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as end:
        run(out_dir, "--resume", "--steps", "13")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and path.read_bytes() == before
    assert "was edited after it was saved" in said or "is not a nano_opd checkpoint" in said


def test_a_lost_checkpoint_costs_no_metrics(once, tmp_path, capsys):
    out_dir = shutil.copytree(once, tmp_path / "out")
    (run_dir(out_dir) / "checkpoint.pt").unlink()
    before = (run_dir(out_dir) / "metrics.csv").read_bytes()
    for flags in ([], ["--resume"]):
        with pytest.raises(SystemExit) as end:
            run(out_dir, *flags)
        assert end.value.code == 2 and "no checkpoint.pt to go on from" in capsys.readouterr().err
    assert (run_dir(out_dir) / "metrics.csv").read_bytes() == before


def test_a_warm_start_that_overflows_is_named_and_not_kept(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--sft-lr", "1e38")
    said = capsys.readouterr().err
    assert end.value.code == 1 and "warm start of the student" in said and "--sft-lr is too high" in said
    assert not list(tmp_path.rglob("*.pt"))


def test_the_warm_starts_of_another_user_are_one_sentence(tmp_path, capsys, monkeypatch):
    exists = Path.exists

    def forbidden(path):
        if path.parent.name == "warm_starts":
            raise PermissionError(13, "Permission denied")
        return exists(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 2 and "cannot be read (Permission denied)" in capsys.readouterr().err
