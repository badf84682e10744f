"""The speed tables compare what they say they compare; how long anything takes is not tested."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab import bench, speed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def flops(run) -> int:
    """What PyTorch counts while `run` runs, attention spelled out as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", [(2, 64), (3, 96)])
def test_a_floor_has_exactly_the_products_of_its_phase(sizes):
    B, P, R = 3, 5, 6
    student, teacher = bench.new_pair(*sizes, P + R, CPU)
    runs, c = bench.phases(student, teacher, B, P, R), student.config
    passes = speed.phase_products(c, teacher.config, B, P, R)
    assert set(runs) == set(passes)
    # what sampling does beyond its floor: it reads the keys still to come, masked, and makes logits of the prompt
    masked = 4 * c.n_layer * B * c.n_embd * sum(P + R - S for S in range(P, P + R))
    beyond = masked + 2 * B * (P - 1) * c.n_embd * c.vocab_size
    for name, products in passes.items():
        counted = 2 * sum(b * m * k * n for forward in products for b, m, k, n in forward)
        assert counted == flops(speed.floor(products, CPU, torch.float32))
        assert flops(runs[name]) == counted + (beyond if name in ("rollout", "step") else 0)


def test_the_exponent_of_a_power_law():
    x = np.array([16.0, 32, 64, 128, 256, 512])
    assert speed.exponent(x, 5 * x**1.5) == pytest.approx(1.5)
    assert speed.exponent(x, np.where(x > 100, x**2, 1e4)) == pytest.approx(2)  # overheads hide the law at first


@pytest.fixture
def small(monkeypatch):
    """Sizes and times of a test; compiling takes a minute."""
    monkeypatch.setattr(bench, "SIZES", [(1, 8)] * 4)
    for module in (bench, speed):
        monkeypatch.setattr(module, "has_compiler", lambda device: False)
    monkeypatch.setattr(speed, "speed", lambda *what, real=speed.speed: real(*what, seconds=0))
    monkeypatch.setattr(speed, "operators", lambda B, real=speed.operators: real(2, seconds=0))
    monkeypatch.setattr(speed, "peers", lambda *what, real=speed.peers: real(*what, seconds=0))
    monkeypatch.setattr(speed, "vocabulary", lambda *where, real=speed.vocabulary: real(*where, B=2, T=16, V=100))
    monkeypatch.setattr(speed, "scaling", lambda axis, _, *where, real=speed.scaling: real(axis, [1, 2, 4], *where, 1))


def test_the_tables(small, tmp_path, capsys):
    path = tmp_path / "new" / "b.json"
    speed.main(["--device", "cpu", "--threads", "1", "--json", str(path)])
    tables = json.loads(path.read_text(encoding="utf-8"))
    assert list(tables) == ["speed", "vocabulary"]
    rows = [(row["phase"], row["compile"]) for row in tables["speed"]["rows"][:4]]
    assert rows == [(phase, "off") for phase in ("rollout", "score", "update", "step")]
    said = capsys.readouterr().out
    assert all(bench.markdown(t["rows"]) in said and t["machine"] in said for t in tables.values())
    assert "threads: 1" in said and torch.__version__ in said and "float32" in said


def test_the_stored_tables_are_those_that_would_be_written(small, tmp_path, monkeypatch):
    class GPT2(SimpleNamespace):  # stands in for Hugging Face's, which is not installed everywhere
        to = eval = lambda self, *where: self
        generate = lambda self, prompts, **knobs: prompts

    twin = SimpleNamespace(GPT2Config=lambda **sizes: None, GPT2LMHeadModel=lambda config: GPT2())
    monkeypatch.setitem(sys.modules, "transformers", twin)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: twin)
    monkeypatch.setattr(speed, "precision", lambda width, *where, real=speed.precision: real(16, 2, CPU, seconds=0))
    arguments = ["--device", "cpu", "--threads", "1", "--json", str(tmp_path / "b.json")]
    speed.main(arguments)
    speed.main([*arguments, "--peers", "--precision", "--scaling", "--operators"])
    stored, written = (
        json.loads(p.read_text(encoding="utf-8")) for p in (speed.RESULTS / "speed.json", tmp_path / "b.json")
    )
    for name in ("busy", "busy_run"):  # of several processes, in a test of their own
        stored.pop(name, None)
    assert list(stored) == list(written)
    compiled = "sample, compiled / this"  # a column where there is a compiler
    for name in stored:
        columns = [column for column in stored[name]["rows"][0] if column != compiled]
        assert columns == list(written[name]["rows"][0])
    with (
        open(speed.RESULTS / "scaling.csv", encoding="utf-8") as first,
        open(tmp_path / "scaling.csv", encoding="utf-8") as second,
    ):
        assert next(csv.reader(first)) == next(csv.reader(second))
    assert (tmp_path / "scaling.png").exists()


def test_the_table_of_a_busy_machine_has_every_way_and_neighbour(monkeypatch, tmp_path, capsys):
    """Real processes of one thread, and one turn each; how long they take is not tested."""
    ways = {"--threads auto": ("auto", {})}
    real = speed.environment
    monkeypatch.setattr(speed, "environment", lambda **settings: real(OMP_NUM_THREADS="1", **settings))
    monkeypatch.setattr(speed, "ways_of_waiting", lambda usual: ways)
    monkeypatch.setattr(speed, "busy_run", lambda usual, run=speed.busy_run: run(1))
    monkeypatch.setattr(speed, "NEIGHBOURS", speed.NEIGHBOURS[1:2])
    monkeypatch.setattr(speed, "TURNS", 1)
    tiny = "--digits 2 --teacher-steps 1 --student-steps 1 --steps 1 --batch-size 4 --eval-size 4"
    monkeypatch.setattr(speed, "TRAIN", [speed.TRAIN[0], *tiny.split()])
    path = tmp_path / "b.json"
    before = torch.get_num_threads()
    try:
        speed.main(["--device", "cpu", "--threads", "2", "--json", str(path), "--busy"])
    finally:
        torch.set_num_threads(before)
    tables = json.loads(path.read_text(encoding="utf-8"))
    assert list(tables) == ["busy", "busy_run"]
    for row, name in zip(tables["busy"]["rows"], ways, strict=True):
        assert list(row) == ["a step with", "beside one busy process, s", "threads"]
        assert row["a step with"] == name and row["threads"] == "1" and min(row["beside one busy process, s"]) > 0
    runs = tables["busy_run"]["rows"]
    assert [row["train.py --threads"] for row in runs] == ["1", "auto"]
    assert all(row["s"] > 0 and row["warm starts finished"] == 2 for row in runs)


def test_scaling_and_precision_at_tiny_sizes():
    rows = [row for axis in ("length", "batch") for row in speed.scaling(axis, [1, 2, 3, 4], CPU, torch.float32, 1)]
    assert [row["tokens or rows"] for row in rows[::3]] == [1, 2, 3, 4] * 2
    titles = [ax.get_title() for ax in speed.scaling_figure(rows).axes]
    assert len(titles) == 3 and sum("a step ∝" in title for title in titles) == 2
    product, update = speed.precision(16, 2, CPU, seconds=0)
    assert all(0 < row["of autocast: casts"] < 1 for row in (product, update))


def test_every_millisecond_is_somewhere():
    """What is measured adds up, and only an update has an optimizer."""
    rows = {row.pop("phase"): row for row in speed.operators(2, seconds=0)}
    assert list(rows) == ["rollout", "score", "update", "step"]
    for row in rows.values():
        kinds = {kind: ms for kind, ms in row.items() if kind not in ("B", "ms")}
        assert sum(kinds.values()) == pytest.approx(row["ms"])
        assert min(ms for kind, ms in kinds.items() if kind != "AdamW") > 0
    assert rows["rollout"]["AdamW"] == rows["score"]["AdamW"] == 0 < rows["update"]["AdamW"]


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--peer"], ["--peers"], ["--operators"], ["--busy"]])
def test_a_bad_command_line_gets_one_sentence(arguments, monkeypatch, capsys):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "resolve", lambda name: torch.device("cuda" if name == "auto" else name))
    with pytest.raises(SystemExit) as stopped:
        speed.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("speed: ") and arguments[0] in said
