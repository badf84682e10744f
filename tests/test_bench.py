"""The speed table compares what it says it compares; how long anything takes is not tested."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nano_opd import bench, timing

CPU = torch.device("cpu")


def flops(run) -> int:
    """What PyTorch counts while `run` runs, attention spelled out as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", [(2, 64), (3, 96)])
def test_a_floor_has_exactly_the_products_of_its_phase(sizes):
    B, P, R = 3, 5, 6
    student, teacher = timing.new_pair(*sizes, P + R, CPU)
    runs, passes = timing.phases(student, teacher, B, P, R), timing.phase_products(student, teacher, B, P, R)
    assert set(runs) == set(passes)
    # what decoding reads beyond its floor: up to 64 keys, those still to come masked
    masked = 4 * student.config.n_layer * B * student.config.n_embd * sum(P + R - S for S in range(P, P + R))
    for name, products in passes.items():
        counted = 2 * sum(b * m * k * n for forward in products for b, m, k, n in forward)
        assert counted == flops(timing.floor(products, CPU, torch.float32))
        assert flops(runs[name]) == counted + (masked if name in ("rollout", "step") else 0)


def test_a_rollout_generates_every_token():
    for layers, width in bench.SIZES[:2]:
        model = timing.new_model(layers, width, bench.P + bench.R, CPU)
        rollout = bench.sample(model, torch.zeros(64, bench.P, dtype=torch.long), bench.R)
        assert rollout.mask.all() and rollout.mask.shape == (64, bench.R)


def test_an_update_that_is_timed_changes_nothing():
    student, teacher = timing.new_pair(2, 64, 8, CPU)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    runs = timing.phases(student, teacher, 4, 3, 5)
    runs["update"]()
    runs["step"]()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_ratios_are_paired_turn_by_turn():
    rng = np.random.default_rng(0)
    busy = rng.uniform(1, 100, 40)  # how slow the machine is in each turn
    assert timing.paired_ratio(3 * busy, busy) == pytest.approx([3, 3, 3])
    assert timing.paired_ratio([1, 2, 3, 4, 50], np.ones(5)) == [3, 2, 4]


def test_all_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.take_turns(runs, CPU, 0, turns=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert set(times) == set("abc") and all(t.shape == (3,) and (t >= 0).all() for t in times.values())


def test_calls_and_memory_are_counted():
    x = torch.ones(1000, 1000)

    def run():
        for _ in range(3):
            (x + 1) * 2  # two of 4 MB live at once

    calls, peak = timing.observe(run, CPU)
    assert calls == 6 and peak == pytest.approx(8, rel=0.01)


def test_the_exponent_of_a_power_law():
    x = np.array([16.0, 32, 64, 128, 256, 512])
    assert bench.exponent(x, 5 * x**1.5) == pytest.approx(1.5)
    assert bench.exponent(x, np.where(x > 100, x**2, 1e4)) == pytest.approx(2)  # overheads hide the law at first


def test_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", [(1, 8)] * 4)
    monkeypatch.setattr(bench, "has_compiler", lambda device: False)  # compiling takes a minute
    monkeypatch.setattr(bench, "speed", lambda *size, real=bench.speed: real(*size, seconds=0))
    monkeypatch.setattr(bench, "vocabulary", lambda *where, real=bench.vocabulary: real(*where, B=2, T=16, V=100))
    path = tmp_path / "new" / "b.json"
    bench.main(["--device", "cpu", "--threads", "1", "--json", str(path)])
    tables = json.loads(path.read_text())
    assert list(tables) == ["speed", "vocabulary"]
    rows = [(row["phase"], row["compile"]) for row in tables["speed"]["rows"][:4]]
    assert rows == [(phase, "off") for phase in ("rollout", "score", "update", "step")]
    columns = "size;B;phase;compile;tokens/s;ms;floor, ms;time / floor;calls;calls per token".split(";")
    assert list(tables["speed"]["rows"][0]) == [*columns, "peak, MB"]
    said = capsys.readouterr().out
    assert all(bench.markdown(t["rows"]) in said and t["machine"] in said for t in tables.values())
    assert "threads: 1" in said and torch.__version__ in said and "float32" in said


def test_scaling_and_precision_at_tiny_sizes():
    rows = [row for axis in ("length", "batch") for row in bench.scaling(axis, [1, 2, 3, 4], CPU, torch.float32, 1)]
    assert [row["tokens or rows"] for row in rows[::3]] == [1, 2, 3, 4] * 2
    titles = [ax.get_title() for ax in bench.scaling_figure(rows).axes]
    assert len(titles) == 3 and sum("a step ∝" in title for title in titles) == 2
    product, update = bench.precision(16, 2, CPU, seconds=0)
    assert all(0 < row["of autocast: casts"] < 1 for row in (product, update))


def test_markdown_rounds_and_leaves_blanks():
    table = bench.markdown([{"a": "2×64", "b": 12345, "c": [1.2345, 1.0, 200.4]}, {"a": None, "b": 0.5, "c": 1e-4}])
    assert table.splitlines()[2:] == ["| 2×64 | 12,345 | 1.23 [1, 200] |", "|  | 0.5 | 0.0001 |"]


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--device", "abacus"], ["--dtype", "int8"], ["--peer"], ["--peers"]]
)
def test_a_bad_command_line_gets_one_sentence(arguments, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("bench: ") and arguments[0] in said


def test_a_file_that_holds_no_tables_is_left_alone(tmp_path, capsys):
    (path := tmp_path / "b.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--json", str(path)])
    assert stopped.value.code == 2 and "b.json" in capsys.readouterr().err and path.read_text() == "{"
