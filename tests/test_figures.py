"""The figures: what is drawn is what was measured."""

import figures
import pytest
from matplotlib.colors import to_rgb
from seeds import mean_interval


def test_token_credit_colours_credit_blame_and_size():
    figure = figures.token_credit([("a", "12$", [1.0, -2.0, 0.0]), ("b", "3$", [0.0, 0.0])])
    faces = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert len(faces) == 5 and all(max(abs(c - 1) for c in faces[i]) < 0.01 for i in (2, 3, 4))  # nothing is white
    blue, vermilion = (to_rgb(c) for c in figures.COLORS[:2])
    assert faces[1] == pytest.approx(vermilion, abs=0.01)  # the largest of its row
    assert faces[0] == pytest.approx([(1 + c) / 2 for c in blue], abs=0.01)  # half its size
    assert {"1", "2", "$", "3", "a", "b"} <= {text.get_text() for text in figure.axes[0].texts}
    with pytest.raises(ValueError):
        figures.token_credit([("a", "12", [1.0])])


def test_directions_marks_the_first_world_and_keeps_the_order_of_the_rows():
    nan = float("nan")
    rows = {"up": [(-0.5, 1.2, 3.0), (0.2, 5.0, 1.0)], "none": [(nan, 1.0, 2.0)], "down": [(0.5, 0.1, 4.0)]}
    cosines, bias, variance = figures.directions(rows).axes
    assert [label.get_text() for label in cosines.get_yticklabels()] == list(rows)
    marks = [c for c in cosines.collections if c.get_sizes()[0] == 30]
    assert [tuple(c.get_offsets()[0]) for c in marks] == [(-0.5, 0), (0, 1), (0.5, 2)]
    assert len({tuple(c.get_facecolor()[0]) for c in marks}) == 3
    assert list(bias.get_lines()[0].get_xdata()) == [1.2, 3.5]  # 5.0 stands at the edge
    assert [c.get_offsets()[0][0] for c in variance.collections] == [3, 2, 4]


def test_more_arms_than_colours_are_refused():
    with pytest.raises(ValueError):
        figures.seed_curves({str(n): [[{"step": 0, "kl": 0.0}]] * 2 for n in range(9)}, {"kl": "KL"})


def test_seed_curves_draw_the_mean_over_seeds_and_skip_what_was_not_measured():
    seeds = [[{"step": s, "kl": None if s == 1 else s + i} for s in range(3)] for i in range(4)]
    figure = figures.seed_curves({"one": seeds, "two": seeds[:1]}, {"kl": "KL"})
    one, two = figure.axes[0].get_lines()
    assert list(one.get_xdata()) == [0, 2] and list(one.get_ydata()) == [1.5, 3.5] and list(two.get_ydata()) == [0, 2]
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((mean_interval([0, 1, 2, 3])[1], mean_interval([2, 3, 4, 5])[2]))


def test_a_scatter_shows_every_point_of_every_panel_on_one_scale():
    figure = figures.scatter({"one": {"a": ([0, 1], [0, 1]), "b": ([2], [2])}, "two": {"a": ([0], [-5])}}, "x", "y")
    one, two = figure.axes
    assert [list(line.get_xydata().ravel()) for line in one.get_lines()[:2]] == [[0, 0, 1, 1], [2, 2]]
    assert one.get_ylim() == two.get_ylim() and one.get_ylim()[0] <= -5 and one.get_ylim()[1] >= 2


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('arm,seed,step,kl,leak_rate\na,0,0,0.5,\na,0,1,0.25,\na,1,0,1,0\n"b, c",0,0,2,\n', encoding="utf-8")
    results = figures.read_results(path)
    assert list(results) == ["a", "b, c"] and [len(rows) for rows in results["a"]] == [2, 1]
    assert results["a"][0][1] == {"step": 1, "kl": 0.25, "leak_rate": None} and results["a"][1][0]["leak_rate"] == 0
