"""The figures: what is drawn is what was measured, and the stored pixels of a legend tell its entries apart."""

import base64
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import figures
import numpy as np
import pytest
from intervals import mean_interval
from matplotlib.colors import to_rgb
from PIL import Image

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def stored_figures() -> dict[str, Image.Image]:
    """Return every figure of notebooks/results/ and of the outputs of the notebooks."""
    pictures = {path.name: Image.open(path) for path in sorted((NOTEBOOKS / "results").glob("*.png"))}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for number, output in enumerate(cell.get("outputs", [])):
                if "image/png" in output.get("data", {}):
                    png = base64.b64decode(output["data"]["image/png"])
                    pictures[f"{path.stem}#{cell['id']}, output {number}"] = Image.open(io.BytesIO(png))
    return pictures


FIGURES = stored_figures()


def legend_of(picture: Image.Image) -> list[tuple[str, tuple[int, int, int]]]:
    """Return the label of each entry of a stored legend, and its colour: the pixel that is most frequent on white."""
    pixels = np.asarray(picture.convert("RGB"))
    entries = []
    for entry in json.loads(picture.text["Legend"]):
        left, top, right, bottom = entry["box"]
        inside = map(tuple, pixels[top:bottom, left:right].reshape(-1, 3).tolist())
        counts = Counter(color for color in inside if min(color) < 235)
        entries.append((entry["label"], counts.most_common(1)[0][0]))
    return entries


def difference(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Return the distance of two colours in CIE L*a*b*; at 2 an eye begins to see it, side by side."""

    def lab(color: tuple[int, int, int]) -> np.ndarray:
        rgb = np.array(color) / 255
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.0888])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return float(np.linalg.norm(lab(first) - lab(second)))


def entries_alike(picture: Image.Image) -> list[tuple[str, str]]:
    """Return the pairs of entries of a stored legend whose colours are hard to tell apart."""
    pairs = itertools.combinations(legend_of(picture), 2)
    return [(a, b) for (a, color_a), (b, color_b) in pairs if difference(color_a, color_b) < 20]


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_entries_of_a_stored_legend_look_alike(name):
    assert entries_alike(FIGURES[name]) == []


@pytest.mark.parametrize("name", ["dense.png", "01_estimator_bias#freedom, output 1"])
def test_the_check_of_the_legends_sees_what_a_small_palette_merges(name):
    picture = FIGURES[name]
    merged = picture.convert("RGB").quantize(8, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
    merged.text = picture.text
    assert entries_alike(merged) != []


@pytest.mark.parametrize("name", FIGURES)
def test_a_stored_figure_has_full_colour_and_200_dots_to_an_inch(name):
    assert FIGURES[name].mode == "RGB" and round(FIGURES[name].info["dpi"][0]) == 200


def test_a_method_has_its_colour_in_the_pixels_of_every_stored_legend():
    seen = set()
    for name, picture in FIGURES.items():
        if "projections" in name:  # whose histograms let each other through
            continue
        for label, color in legend_of(picture):
            method = figures.METHOD_OF_LABEL.get(label, label)
            if method in figures.METHOD_COLORS:
                wanted = to_rgb(figures.METHOD_COLORS[method])
                assert color == tuple(round(255 * part) for part in wanted), (name, label)
                seen.add(method)
    assert {"OPD", "OPD+", "exact", "GRPO", "OPSD", "RLSD", "GRPO + OPSD", "RLSD, shuffled", "exact A"} <= seen


def test_no_two_methods_have_one_colour_and_nothing_else_has_a_method_s():
    colors = [*figures.METHOD_COLORS.values()]
    assert len(set(colors)) == len(colors)
    others = {*figures.OTHER_COLORS.values(), *figures.COLORS} - {figures.OTHER_COLORS["truth"]}
    assert not others & set(colors)
    assert set(figures.METHOD_OF_LABEL.values()) <= set(figures.METHOD_COLORS)


def test_notebooks_and_results_stay_small():
    assert all(path.stat().st_size < 1.7e6 for path in NOTEBOOKS.glob("*.ipynb"))
    assert all(path.stat().st_size < 0.4e6 for path in (NOTEBOOKS / "results").glob("*.png"))


def test_token_credit_colours_credit_blame_and_size():
    figure = figures.token_credit([("a", "12$", [1.0, -2.0, 0.0]), ("b", "3$", [0.0, 0.0])])
    faces = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert len(faces) == 5 and all(max(abs(c - 1) for c in faces[i]) < 0.01 for i in (2, 3, 4))  # nothing is white
    blue, vermilion = to_rgb(figures.CREDIT), to_rgb(figures.BLAME)
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


def test_an_arm_has_one_colour_in_all_panels_its_line_and_its_band():
    rows = [[{"step": s, "kl": s + i} for s in range(3)] for i in range(4)]
    figure = figures.seed_panels({"a": {"grpo": rows, "opsd": []}, "b": {"opsd": rows, "new": rows}}, "kl")
    wanted = {"grpo": "#009E73", "opsd": "#CC79A7", "new": figures.COLORS[0]}
    drawn = [(line, band) for ax in figure.axes for line, band in zip(ax.get_lines(), ax.collections, strict=True)]
    assert [line.get_label() for line, _ in drawn] == ["grpo", "opsd", "new"]
    for line, band in drawn:
        assert to_rgb(line.get_color()) == to_rgb(wanted[line.get_label()])
        assert tuple(band.get_facecolor()[0][:3]) == to_rgb(line.get_color())


def test_a_saved_figure_says_where_the_entries_of_its_legend_stand(tmp_path):
    lines = {"OPD": ([0, 1], [0, 1]), "predicted OPD": ([0, 1], [1, 0])}
    figures.save(figures.curves({"": lines}, "", ""), tmp_path / "lines.png")
    (first, color), (second, _) = legend_of(Image.open(tmp_path / "lines.png"))
    assert (first, second) == ("OPD", "predicted, in the same colour")
    assert color == (0xD5, 0x5E, 0x00)


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
