"""The bench times what it says it times; how long anything takes is not tested."""

import copy
import json

import numpy as np
import pytest
import torch
from lab import bench, check_gpu
from torch.utils.flop_counter import FlopCounterMode

import train
from nano_opd import sft
from nano_opd.rollout import sample
from nano_opd.system.config import Config

CPU = torch.device("cpu")


def test_a_rollout_generates_every_token():
    for layers, width in bench.SIZES[:2]:
        model = bench.new_model(layers, width, bench.P + bench.R, CPU)
        rollout = sample(model, torch.zeros(64, bench.P, dtype=torch.long), bench.R)
        assert rollout.mask.all() and rollout.mask.shape == (64, bench.R)


def test_an_update_that_is_timed_changes_nothing():
    student, teacher = bench.new_pair(2, 64, 8, CPU)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    runs = bench.phases(student, teacher, 4, 3, 5)
    runs["update"]()
    runs["step"]()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_a_step_has_the_products_of_an_update_of_train():
    cfg = Config(batch_size=3, digits=2)
    P, R = cfg.prompt_length, cfg.response_cap
    student, teacher = bench.new_pair(2, 64, P + R, CPU)
    optimizer = sft.adamw(student, 0.0)
    step = bench.phases(student, teacher, cfg.batch_size, P, R)["step"]
    counts = []
    for run in (step, lambda: train.update(cfg, 0, student, teacher, optimizer, sample)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1]


def test_ratios_are_paired_turn_by_turn():
    rng = np.random.default_rng(0)
    busy = rng.uniform(1, 100, 40)  # how slow the machine is in each turn
    assert bench.paired_ratio(3 * busy, busy) == pytest.approx([3, 3, 3])
    assert bench.paired_ratio([1, 2, 3, 4, 50], np.ones(5)) == [3, 2, 4]


def test_all_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = bench.take_turns(runs, CPU, 0, turns=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert set(times) == set("abc") and all(t.shape == (3,) and (t >= 0).all() for t in times.values())


def test_calls_and_memory_are_counted():
    x = torch.ones(1000, 1000)

    def run():
        for _ in range(3):
            (x + 1) * 2  # two of 4 MB live at once

    calls, peak = bench.observe(run, CPU)
    assert calls == 6 and peak == pytest.approx(8, rel=0.01)


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", [(1, 8)] * 4)
    monkeypatch.setattr(bench, "has_compiler", lambda device: False)  # compiling takes a minute
    monkeypatch.setattr(bench, "measure", lambda *what, real=bench.measure: real(*what, seconds=0))
    path = tmp_path / "new" / "b.json"
    bench.main(["--device", "cpu", "--threads", "1", "--json", str(path)])
    (table,) = json.loads(path.read_text(encoding="utf-8")).values()
    rows = [(row["phase"], row["compile"]) for row in table["rows"]]
    assert rows == [(phase, "off") for phase in ("rollout", "score", "update", "step")] * 2
    columns = "size;B;phase;compile;tokens/s;ms;on / off;calls;peak, MB"
    assert list(table["rows"][0]) == columns.split(";")
    said = capsys.readouterr().out
    assert bench.markdown(table["rows"]) in said and table["machine"] in said
    assert "threads: 1" in said and torch.__version__ in said and "float32" in said


def test_compiled_phases_stand_beside_the_others(monkeypatch):
    monkeypatch.setattr(bench, "has_compiler", lambda device: True)
    monkeypatch.setattr(bench, "phases", lambda *what: {"step": lambda: torch.ones(9)})
    rows, times = bench.measure(*bench.new_pair(1, 8, 4, CPU), 2, torch.float32, 0, {"other": lambda: None})
    off, on = rows
    assert (off["compile"], off["on / off"], on["compile"]) == ("off", None, "on")
    assert on["on / off"] == bench.paired_ratio(times["step", "on"], times["step", "off"]) and "other" in times


def test_markdown_rounds_and_leaves_blanks():
    table = bench.markdown([{"a": "2×64", "b": 12345, "c": [1.2345, 1.0, 200.4]}, {"a": None, "b": 0.5, "c": 1e-4}])
    assert table.splitlines()[2:] == ["| 2×64 | 12,345 | 1.23 [1, 200] |", "|  | 0.5 | 0.0001 |"]


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--threads", "100000"], ["--device", "abacus"], ["--dtype", "int8"], ["--larg"]]
)
def test_a_bad_command_line_gets_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("bench: ") and arguments[0] in said


def test_a_file_that_holds_no_tables_is_left_alone(tmp_path, capsys):
    (path := tmp_path / "b.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--json", str(path)])
    assert stopped.value.code == 2 and "b.json" in capsys.readouterr().err and path.read_text(encoding="utf-8") == "{"


def failed(rows):
    return [row["check"] for row in rows if row["as it should be"] != "True"]


def test_the_check_of_a_gpu_finds_another_gradient_and_stale_weights(monkeypatch):
    """On a CPU, which agrees with itself."""
    monkeypatch.setattr(check_gpu, "METHODS", ["grpo"])
    want = check_gpu.gradient
    rows = [*check_gpu.updates(CPU, torch.float32), *check_gpu.samples(CPU, torch.float32)]
    assert len(rows) == 4 + 4 and not failed(rows)
    assert want(check_gpu.config.parse(["--method", "grpo", "--batch-size", "32"]), torch.float32, CPU).norm() > 0

    times = iter((1, 1.1))
    monkeypatch.setattr(check_gpu, "METHODS", [])
    monkeypatch.setattr(check_gpu, "gradient", lambda *given: want(*given) * next(times))
    assert failed([next(check_gpu.updates(CPU, torch.float32))]) == ["gradient, --variance baseline, torch.float32"]
    kept = []

    def stale(student, *rest):
        kept.append(copy.deepcopy(student))
        return check_gpu.rollout.sample(kept[0], *rest)

    monkeypatch.setattr(check_gpu, "sampler", lambda device: stale)
    found = failed(check_gpu.samples(CPU, torch.float32))
    assert len(found) == 2 and all("second weights" in check for check in found)


def test_the_check_of_a_gpu_runs_every_path_and_goes_on_where_one_ends(monkeypatch, tmp_path, capsys):
    commands = []

    def main(command):
        cfg = check_gpu.config.parse(command)
        commands.append((cfg.method, cfg.compile, cfg.dtype, cfg.resume))
        if cfg.dtype == "bfloat16":
            raise RuntimeError("no kernel")

    monkeypatch.setattr(check_gpu.train, "main", main)
    monkeypatch.setattr(check_gpu, "has_compiler", lambda device: False)
    rows = [*check_gpu.runs(CPU, str(tmp_path))]
    assert failed(rows) == ["train.py --dtype bfloat16 --batch-size 32: RuntimeError: no kernel "]
    assert {method for method, *_ in commands} == set(check_gpu.METHODS) and len(rows) == len(check_gpu.METHODS) + 3
    assert len(commands) == 2 * len(rows) - 1 and ("opdplus", "off", "auto", True) in commands

    for name, made in (("updates", []), ("samples", []), ("runs", rows)):
        monkeypatch.setattr(check_gpu, name, lambda *_, made=made: made)
    monkeypatch.setattr(check_gpu, "measure", lambda *_, **__: ([{"phase": "step", "ms": 1.5}], None))
    with pytest.raises(SystemExit, match="1"):
        check_gpu.main(["--device", "cpu", "--file", str(tmp_path / "check.json")])
    report = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert len(report["checks"]) == len(rows) and report["speed"] == {
        "2×64, torch.float32": [{"phase": "step", "ms": 1.5}]
    }
    assert f"{len(rows) - 1} of {len(rows)} checks passed" in capsys.readouterr().out
    monkeypatch.setattr(check_gpu, "runs", lambda *_: rows[:-1])
    check_gpu.main(["--device", "cpu", "--file", str(tmp_path / "check.json")])  # all passed: it returns

    def samples(*_):
        yield rows[0]
        raise RuntimeError("no kernel")

    monkeypatch.setattr(check_gpu, "samples", samples)
    with pytest.raises(SystemExit, match="1"):
        check_gpu.main(["--device", "cpu", "--file", str(tmp_path / "check.json")])
    report = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))  # the report goes on
    assert failed(report["checks"]) == ["samples: RuntimeError: no kernel"] * 2 and report["speed"]
