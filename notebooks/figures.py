"""The figures. The main methods have the colours of Okabe and Ito, which colour-blind readers can tell apart."""

import csv
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
import torch
from intervals import mean_interval
from matplotlib import cbook
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import DrawingArea
from matplotlib.patches import Patch, Rectangle

from nano_opd import divergences

matplotlib.rcParams["figure.dpi"] = 200

NAMES = {  # of divergences, in every figure and table
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jsd": "Jensen–Shannon",
    "pearson_chi2": "Pearson χ²",
    "neyman_chi2": "Neyman χ²",
    "hellinger": "Hellinger",
    "tv": "total variation",
    "k3": "k3",
    "jsd_falling": "JSD, falling",
    "alpha=0.5": "α = ½",
}
# One colour for one thing, in every figure of the project.
METHOD_COLORS = {
    "OPD": "#D55E00",  # vermilion
    "OPD, clipped": "#F0A070",
    "OPD, near": "#7A2F00",
    "OPD+": "#0072B2",  # blue
    "OPD+ with its exact baseline": "#332288",
    "GKD": "#88CCEE",  # OPD+ over the full vocabulary
    "exact": "#000000",
    "supervised": "#999933",
    "no teacher": "#BBBBBB",
    "GRPO": "#009E73",  # green
    "GRPO + OPSD": "#882255",
    "exact A": "#AA4499",
    "OPSD": "#CC79A7",  # pink
    "OPSD, work": "#5B2A86",
    "OPSD, cite": "#8C510A",
    "RLSD": "#E69F00",  # orange
    "RLSD, shuffled": "#56B4E9",
    "RLSD, λ = 1, ε = 0.2": "#F5C35B",
    "RLSD, λ = 1, ε = 1": "#A86400",
    "RLSD, λ = 1, ε = 10": "#5C3A00",
}
# The labels by which a method stands in a figure, where they are not its name above.
METHOD_OF_LABEL = {
    "OPD, reverse KL, sampled token": "OPD",
    "OPD+, JSD, sampled token": "OPD+",
    "OPD+, sampled": "OPD+",
    "OPD+, JSD, exact baseline": "OPD+ with its exact baseline",
    "OPD+, baseline": "OPD+ with its exact baseline",
    "OPD+, JSD, full vocabulary": "GKD",
    "OPD+, full vocabulary": "GKD",
    "gkd": "GKD",
    "supervised, worked solutions": "supervised",
    "sft": "supervised",
    "null": "no teacher",
    "grpo": "GRPO",
    "GRPO, one reward per response": "GRPO",
    "grpo+opsd": "GRPO + OPSD",
    "opsd": "OPSD",
    "opsd, work": "OPSD, work",
    "opsd, cite": "OPSD, cite",
    "rlsd": "RLSD",
    "RLSD, λ = ½, ε = 0.2": "RLSD",
    "rlsd, shuffled": "RLSD, shuffled",
    "λ=1, ε_w=0.2": "RLSD, λ = 1, ε = 0.2",
    "λ=1, ε_w=1": "RLSD, λ = 1, ε = 1",
    "λ=1, ε_w=10": "RLSD, λ = 1, ε = 10",
}
OTHER_COLORS = {  # of what is no method
    "teacher q": "#303030",
    "student p": "#A0A0A0",
    "start": "#808080",
    "truth": "#000000",
    "predicted": "#808080",
    "f": "#117733",
    "h": "#AA3377",
    "bias²": "#303030",
    "variance": "#A0A0A0",
    "sampled tokens (fraction, log scale 10⁻⁴ … 1)": "#D0D0D0",
    "OPD, reverse KL": "#2AA198",  # where a figure compares the divergences
    "OPD, forward KL": "#AA4466",
    "OPD, Jensen–Shannon": "#DDAA33",
    "OPD, Pearson χ²": "#661100",
    "OPD, Hellinger": "#9A9ADB",
}
# Of labels that no table has, in their order.
COLORS = ["#2AA198", "#AA4466", "#DDAA33", "#661100", "#9A9ADB", "#B0B0B0"]
CREDIT = "#0072B2"
BLAME = "#D55E00"
Rows = list[dict[str, float | None]]  # of metrics.csv, of one seed
Results = dict[str, list[Rows]]  # arm → its rows, seed by seed


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    """Return the colour of each label of one figure. Raises ValueError for more new labels than there are colours."""
    known = METHOD_COLORS | OTHER_COLORS
    for label, method in METHOD_OF_LABEL.items():
        known[label] = METHOD_COLORS[method]
    labels = list(dict.fromkeys(labels))  # each once
    others = [label for label in labels if label not in known]
    if len(others) > len(COLORS):
        raise ValueError(
            f"{len(others)} labels without a colour of their own, and only {len(COLORS)} colours: {others}"
        )
    known |= dict(zip(others, COLORS))
    return {label: known[label] for label in labels}


def png(pixels: np.ndarray, dpi: float, texts: dict[str, str]) -> bytes:
    """Return a PNG of pixels (height, width, 3), uint8, with Latin texts by name.

    Its rows are not filtered, which makes drawings of lines a fifth smaller than Pillow does.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    dots_per_metre = round(dpi / 0.0254)
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # the first byte of a row names its filter: 0 is none
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]  # 8 bits each of red, green, blue
    parts.append(chunk(b"pHYs", struct.pack(">IIB", dots_per_metre, dots_per_metre, 1)))
    parts += [chunk(b"tEXt", f"{name}\0{text}".encode("latin-1")) for name, text in texts.items()]
    parts.append(chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)))
    parts.append(chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Canvas(FigureCanvasAgg):
    """Draw a figure as a PNG that says where each entry of its legend stands, for the test that looks at the pixels.

    The text "Legend" of the file is a list in JSON of {"label": …, "box": [left, top, right, bottom]}, in pixels. It is
    written wherever the figure is drawn: by `save`, and in a notebook.
    """

    def print_png(self, file: Path | str | BinaryIO, *, metadata: dict[str, str] | None = None, **_) -> None:
        texts = {"Legend": json.dumps(self.legend_boxes())}
        if metadata is not None:
            texts |= metadata
        picture = np.asarray(self.buffer_rgba())[..., :3]
        with cbook.open_file_cm(file, "wb") as opened:
            opened.write(png(picture, self.figure.dpi, texts))

    def legend_boxes(self) -> list[dict]:
        """Draw, and return where each entry of the legends stands."""
        self.draw()
        height = self.get_width_height()[1]
        entries = []
        for legend in self.figure.legends:
            for handle, text in zip(legend.findobj(DrawingArea), legend.get_texts(), strict=True):
                left, bottom, right, top = handle.get_window_extent(self.get_renderer()).extents
                box = [round(left), round(height - top), round(right), round(height - bottom)]
                entries.append({"label": text.get_text(), "box": box})
        return entries


def new_figure(width: float, height: float, **options) -> Figure:
    """Return an empty figure of so many inches that draws itself by `Canvas`."""
    figure = Figure(figsize=(width, height), **options)
    Canvas(figure)
    return figure


def read_results(path: Path | str) -> Results:
    """A file of notebooks/results: arm → one list of rows per seed, as `seed_panels` takes them; None for no number."""
    results: dict[str, dict[str, Rows]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            arm = row.pop("arm")
            seed = row.pop("seed")
            numbers = {name: float(value) if value else None for name, value in row.items()}
            seeds = results.setdefault(arm, {})
            seeds.setdefault(seed, []).append(numbers)
    return {arm: list(seeds.values()) for arm, seeds in results.items()}


def seed_panels(
    panels: dict[str, Results],
    column: str | Sequence[str],
    ylabel: str | Sequence[str] = "",
    x: str = "step",
    columns: int | None = None,
) -> Figure:
    """One panel per title: each arm's mean over its seeds with the 95 % interval of that mean.

    An arm without seeds is not drawn. An arm has one colour in all panels, its line and its band.

    panels  title → arm → one list of rows per seed, measured at the same steps
    column  of metrics.csv, for all panels or one for each
    x       "step" or "rollouts", the horizontal axis
    """
    figure, axes = _axes(list(panels), ylabel, height=3.0, columns=columns)
    if isinstance(column, str):
        names = [column] * len(panels)
    else:
        names = column
    colors = colors_of(arm for results in panels.values() for arm in results)
    for ax, results, name in zip(axes, panels.values(), names):
        _bands(ax, results, column=name, x=x, colors=colors)
        ax.set(xlabel={"step": "update", "rollouts": "rollouts"}[x])
        if name == "accuracy":
            ax.set_ylim(-0.02, 1.02)
    lines = _lines_by_label(axes)
    labels = [arm for arm in colors if arm in lines]
    short = sum(len(label) for label in labels) < 80
    figure.legend([lines[arm] for arm in labels], labels, loc="outside upper center", ncols=5 if short else 3)
    return figure


def seed_curves(results: Results, columns: dict[str, str]) -> Figure:
    """The same arms in every panel, one panel per column of metrics.csv: {column: title}, three in a row."""
    return seed_panels(dict.fromkeys(columns.values(), results), list(columns), columns=min(3, len(columns)))


def _bands(ax: Axes, results: Results, column: str, x: str, colors: dict[str, str]) -> None:
    """Each arm's mean over its seeds and the 95 % interval of that mean, as far as all of its seeds got."""
    for arm, seeds in results.items():
        measured = []  # of each seed
        for rows in seeds:
            measured.append([row for row in rows if row[column] is not None])
        steps = []
        intervals = []
        for rows in zip(*measured):  # of all seeds at one step
            steps.append(rows[0][x])
            intervals.append(mean_interval([row[column] for row in rows]))
        if intervals:
            mean, low, high = zip(*intervals)
            ax.plot(steps, mean, color=colors[arm], label=arm)
            ax.fill_between(steps, low, high, color=colors[arm], alpha=0.2, linewidth=0)


def _lines_by_label(axes: Iterable[Axes]) -> dict[str, Artist]:
    """What stands for each label in the legend of all axes together."""
    lines = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        lines.update(zip(labels, handles))
    return lines


def sweep(panels: dict[str, dict[str, list[tuple[float, list[float]]]]], xlabel: str) -> Figure:
    """Held-out accuracy over an option, three panels in a row: {title: {arm: [(x, one value per seed), …]}}.

    Points are means over the seeds with their 95 % intervals; the arm "start" is drawn as a level.
    """
    figure, axes = _axes(list(panels), "held-out accuracy", height=2.7, columns=3)
    colors = colors_of(arm for arms in panels.values() for arm in arms)
    styles = {"OPD, clipped": ("x", ":"), "OPD, near": ("s", "--")}
    for ax, arms in zip(axes, panels.values()):
        for arm, points in arms.items():
            if not points:
                continue
            mean, low, high = np.array([mean_interval(values) for _, values in points]).T
            if arm == "start":
                ax.axhline(np.mean(mean), color=colors[arm], linestyle=":", label=arm)
                continue
            marker, line = styles.get(arm, ("o", "-"))
            ax.errorbar(
                [x for x, _ in points],
                mean,
                yerr=[mean - low, high - mean],
                label=arm,
                color=colors[arm],
                marker=marker,
                linestyle=line,
                markersize=5,
                capsize=2,
            )
        ax.set(xscale="log", xlabel=xlabel, xlim=(1e-4, 4e-2), ylim=(-0.04, 1.04))
    lines = _lines_by_label(axes)
    labels = [arm for arm in colors if arm in lines]
    figure.legend([lines[arm] for arm in labels], labels, loc="outside upper center", ncols=5)
    return figure


def digest(figure: Figure) -> str:
    """A fingerprint of what a figure shows: points to four digits and colours of lines and areas, labels and titles.

    It depends neither on fonts nor on the version of matplotlib, so it tells whether a picture is that of its numbers.
    """
    shown = []
    for ax in figure.axes:
        shown += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        for line in ax.get_lines():
            shown.append(f"{line.get_label()} {to_hex(line.get_color())}: {_to_four_digits(line.get_xydata())}")
        for area in ax.collections:
            colors = [to_hex(color) for color in area.get_facecolor()]
            for path in area.get_paths():
                shown.append(f"area {colors}: {_to_four_digits(path.vertices)}")
    for legend in figure.legends:
        shown += [text.get_text() for text in legend.get_texts()]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def _to_four_digits(points: np.ndarray) -> str:
    return " ".join(f"{number:.4g}" for number in np.ravel(points))


def save(figure: Figure, path: Path | str) -> None:
    """Store a figure as PNG on white, legible on a dark page too, with its digest in the file."""
    figure.savefig(path, dpi=200, facecolor="white", metadata={"Digest": digest(figure)})


def token_credit(rows: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Each row a response as a strip of tokens: blue is credit (Â > 0), vermilion blame, full colour its largest |Â|.

    rows  (label, one character per token, Â of each token); "$" may stand for the EOS
    """
    longest = max(len(text) for _, text, _ in rows)
    figure = new_figure(0.32 * longest + 2, 0.5 * len(rows) + 0.2)
    ax = figure.add_axes((0.18, 0, 0.82, 1))
    colors = LinearSegmentedColormap.from_list("credit", [BLAME, "white", CREDIT])
    for y, (label, text, advantage) in enumerate(rows):
        largest = max(abs(value) for value in advantage)
        if largest == 0:
            largest = 1.0  # all are white
        for x, (token, value) in enumerate(zip(text, advantage, strict=True)):
            color = colors(0.5 + 0.5 * value / largest)
            ax.add_patch(Rectangle((x, -y), width=1, height=-0.8, facecolor=color, edgecolor="0.8"))
            ax.text(x + 0.5, -y - 0.4, token.replace(" ", "␣"), ha="center", va="center", family="monospace")
        ax.text(-0.3, -y - 0.4, label, ha="right", va="center")
    ax.set(xlim=(0, longest), ylim=(-len(rows), 0.1))
    ax.set_axis_off()
    return figure


def scatter(panels: dict[str, dict[str, tuple]], xlabel: str, ylabel: str, height: float = 3.6) -> Figure:
    """Points, {panel title: {legend label: (x, y)}}, on shared axes; the last label is drawn on top."""
    figure, axes = _axes(list(panels), ylabel, height)
    colors = colors_of(label for series in panels.values() for label in series)
    for ax, series in zip(axes, panels.values()):
        if ax is not axes[0]:
            ax.sharey(axes[0])  # before there are points, so that the limits hold all of them
        for n, (label, (x, y)) in enumerate(series.items()):
            ax.plot(x, y, "os^Dv"[n % 5], color=colors[label], markersize=4, markeredgewidth=0, label=label)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(xlabel=xlabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, markerscale=2.5)
    return figure


def _axes(
    panels: Sequence[str], ylabel: str | Sequence[str], height: float, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of page width and its axes, one per panel title, row by row; one ylabel stands before each row."""
    if columns is None:
        columns = len(panels)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(9, height * rows, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    if isinstance(ylabel, str):
        ylabels = [ylabel if n % columns == 0 else "" for n in range(len(panels))]
    else:
        ylabels = ylabel
    for ax, title, label in zip(axes, panels, ylabels):
        ax.set_title(title, fontsize="medium")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def rewards(log_u: np.ndarray, divergence_names: Sequence[str]) -> Figure:
    """−f(u) and w_f(u) of each divergence against log u, over the histogram of the log u (N,) of sampled tokens."""
    figure, axes = _axes([NAMES.get(name, name) for name in divergence_names], "advantage", height=2.3, columns=3)
    x = torch.linspace(-8, 4, 481, dtype=torch.float64)
    histogram = "sampled tokens (fraction, log scale 10⁻⁴ … 1)"
    grey = OTHER_COLORS[histogram]
    for n, (ax, name) in enumerate(zip(axes, divergence_names)):
        divergence = divergences.get(name)
        ax.plot(x, divergence.reward(x), color=METHOD_COLORS["OPD"], linestyle="--", label="OPD: −f(u)")
        ax.plot(x, divergence.w_f(x), color=METHOD_COLORS["OPD+"], label="OPD+: w_f(u)")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(ylim=(-4, 4), xlim=(-8, 4), xticks=(-8, -4, 0, 4))
        if n >= len(divergence_names) - 3:
            ax.set_xlabel("log u (nats)")
        counts = ax.twinx()
        weights = np.full(len(log_u), 1 / len(log_u))
        counts.hist(log_u, bins=96, range=(-8, 4), weights=weights, color=grey, log=True)
        counts.set_ylim(1e-4, 1)
        counts.tick_params(axis="y", which="both", right=False, labelright=False)
        ax.set_zorder(counts.get_zorder() + 1)
        ax.patch.set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Patch(color=grey))
    figure.legend(handles, [*labels, histogram], loc="outside upper center", ncols=3)
    return figure


def bars(
    panels: dict[str, dict[str, dict[str, float]]],
    ylabel: str | Sequence[str],
    height: float = 3.2,
    log: bool = False,
    columns: int | None = None,
) -> Figure:
    """Grouped bars, {panel title: {legend label: {group: value}}}; one ylabel for all panels or one for each."""
    figure, axes = _axes(list(panels), ylabel, height, columns)
    panels_in_a_row = len(panels) if columns is None else columns
    colors = colors_of(label for series in panels.values() for label in series)
    for ax, series in zip(axes, panels.values()):
        width = 0.8 / len(series)
        for n, (label, values) in enumerate(series.items()):
            x = np.arange(len(values)) + (n - (len(series) - 1) / 2) * width
            ax.bar(x, values.values(), width, color=colors[label], label=label)
        groups = list(next(iter(series.values())))
        widest = max(len(line) for group in groups for line in group.split("\n"))
        if widest * len(groups) > 90 / panels_in_a_row:
            ax.set_xticks(range(len(groups)), groups, rotation=40, ha="right")
        else:
            ax.set_xticks(range(len(groups)), groups)
        if log:
            ax.set_yscale("log")
        ax.axhline(0, color="black", linewidth=0.6)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def curves(
    panels: dict[str, dict[str, tuple]],
    xlabel: str,
    ylabel: str | Sequence[str],
    height: float = 3.2,
    xscale: str = "linear",
    yscale: str = "linear",
    columns: int | None = None,
) -> Figure:
    """Lines, {panel title: {legend label: (x, y) or (x, y, error)}}; "predicted …" is the dashed line of …."""
    figure, axes = _axes(list(panels), ylabel, height, columns)
    every_label = dict.fromkeys(label for series in panels.values() for label in series)
    colors = colors_of(label for label in every_label if not label.startswith("predicted "))
    markers = dict(zip(colors, "os^DvPX"))
    for ax, series in zip(axes, panels.values()):
        for label, points in series.items():
            x, y = points[:2]
            if label.startswith("predicted "):
                ax.plot(x, y, linestyle="--", linewidth=1, color=colors[label.removeprefix("predicted ")])
                continue
            ax.errorbar(
                x,
                y,
                yerr=points[2] if len(points) > 2 else None,
                linestyle="-" if len(points) == 2 else "",
                color=colors[label],
                label=label,
                marker=markers[label] if len(x) < 26 else None,
                markersize=4,
                capsize=2,
            )
        ax.set(xlabel=xlabel, xscale=xscale, yscale=yscale)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(colors) < len(every_label):
        handles.append(Line2D([], [], color=OTHER_COLORS["predicted"], linestyle="--", linewidth=1))
        labels.append("predicted, in the same colour")
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def histograms(panels: dict[str, dict[str, np.ndarray]], xlabel: str, truth: float) -> Figure:
    """Distributions with their means, {panel title: {label: values}}, and the value that should be met."""
    figure, axes = _axes(list(panels), "density", height=2.5)
    colors = colors_of(label for series in panels.values() for label in series)
    for ax, series in zip(axes, panels.values()):
        low, high = np.percentile(np.concatenate(list(series.values())), [1, 99])
        bins = np.linspace(low, high, 50)
        for label, values in series.items():
            ax.hist(values, bins, density=True, color=colors[label], alpha=0.4, label=label)
            ax.axvline(values.mean(), color=colors[label], linewidth=1.5)
        ax.axvline(truth, color="black", linestyle=":", label="truth")
    figure.supxlabel(xlabel, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


CORNERS = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])  # of the triangle of all distributions over three tokens
BESIDE_CORNERS = np.array([[-0.04, -0.05], [0.04, -0.05], [0, 0.05]])  # where their names stand


def flow(rows: dict[str, dict[str, torch.Tensor]], teacher: torch.Tensor, names: Sequence[str] = "ABC") -> Figure:
    """The ways of students over three tokens, each a line in the triangle of all distributions, from its dot onwards.

    rows     row label → panel title → their probabilities after each step (steps+1, S, 3), as law.paths returns them
    teacher  (3,) the star; under each panel stands how many students end within 0.02 of it
    """
    titles = list(next(iter(rows.values())))
    figure = new_figure(7.5, 7 / len(titles) * len(rows) + 0.3)
    figure.subplots_adjust(left=0.04, right=1, bottom=0, top=0.95, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axes_of_row, (row, panels) in zip(axes, rows.items()):
        color = METHOD_COLORS.get(row, COLORS[0])
        for ax, title in zip(axes_of_row, titles):
            ax.fill(CORNERS[:, 0], CORNERS[:, 1], facecolor="#F7F7F7", edgecolor="#B0B0B0", linewidth=0.8)
            _ways(ax, panels[title].numpy(), teacher.numpy(), color)
            for (x, y), name in zip(CORNERS + BESIDE_CORNERS, names):
                ax.text(x, y, name, ha="center", va="center", color="#606060", fontsize="small")
            ax.set(xlim=(-0.08, 1.08), ylim=(-0.14, 0.95), aspect="equal")
            ax.set_axis_off()
        axes_of_row[0].text(-0.1, 0.45, row, rotation=90, ha="center", va="center", color=color, fontweight="bold")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize="medium")
    return figure


def _ways(ax: Axes, paths: np.ndarray, teacher: np.ndarray, color: str) -> None:
    """The ways of students (steps+1, S, 3) with their ends, the teacher (3,), and how many end at the teacher."""
    points = paths @ CORNERS  # (steps+1, S, 2)
    for way in points.swapaxes(0, 1):
        ax.plot(way[:, 0], way[:, 1], color=color, linewidth=0.8)
        _arrow(ax, way, color)
    starts = points[0]
    ax.plot(starts[:, 0], starts[:, 1], ".", color="#909090", markersize=3, zorder=3)
    arrived = np.linalg.norm(paths[-1] - teacher, axis=1) < 0.02
    elsewhere = points[-1][~arrived]
    ax.plot(elsewhere[:, 0], elsewhere[:, 1], "o", color=color, markersize=7, clip_on=False, zorder=4)
    x, y = teacher @ CORNERS
    ax.plot(x, y, "*", color="black", markersize=11, markeredgecolor="white", zorder=5)
    count = f"{arrived.sum()} of {len(arrived)}"
    ax.text(0.5, -0.09, count, ha="center", va="center", color=color, fontweight="bold")


def _arrow(ax: Axes, way: np.ndarray, color: str) -> None:
    """An arrow a little before half of a way (steps+1, 2), if it is long enough."""
    along = np.linalg.norm(np.diff(way, axis=0), axis=1).cumsum()
    middle = np.searchsorted(along, 0.45 * along[-1])
    if along[-1] > 0.05 and along[middle] > 0:
        before = min(np.searchsorted(along, along[middle] - 0.01), middle)
        style = {
            "arrowstyle": "-|>,head_width=0.12,head_length=0.25",
            "color": color,
            "linewidth": 0.6,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        ax.annotate("", xy=way[middle + 1], xytext=way[before], arrowprops=style)


DIRECTIONS = {"uphill": (COLORS[1], "^"), "nowhere": ("0.35", "x"), "downhill": (COLORS[0], "v")}  # colour and mark


def _direction(cosine: float) -> str:
    if math.isnan(cosine):
        return "nowhere"
    if cosine < 0:
        return "uphill"
    return "downhill"


def directions(rows: dict[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """One row per estimator: which way its mean points (colour and mark), how far off it is, how much it scatters.

    rows  label → (cosine with the gradient, relative bias, variance / ‖gradient‖²) in one world after the other: the
          first is the large mark, the others are dots, or a line from the least to the largest. A cosine of NaN is a
          mean without a direction; another number that is NaN is not drawn. A bias above 3.5 stands at the edge.
    """
    figure = new_figure(9, 0.9 + 0.185 * len(rows), layout="constrained")
    cosines, biases, variances = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    for y, numbers in enumerate(rows.values()):
        cosine, bias, variance = np.array(numbers).T
        color, marker = DIRECTIONS[_direction(cosine[0])]
        dots = np.nan_to_num(cosine)
        cosines.scatter(dots[1:], np.full(len(dots) - 1, y), s=5, color=color, alpha=0.35, linewidth=0)
        cosines.scatter(dots[:1], [y], s=30, color=color, marker=marker, zorder=3)
        for ax, values in ((biases, np.minimum(bias, 3.5)), (variances, variance)):
            ax.plot([values.min(), values.max()], [y, y], color="0.75", linewidth=2, solid_capstyle="butt")
            ax.scatter(values[:1], [y], s=22, color="0.35", zorder=3)
    titles = {
        cosines: "cosine with the gradient",
        biases: "relative bias",
        variances: "variance / ‖gradient‖²",
    }
    for ax, title in titles.items():
        ax.set_title(title, fontsize="medium")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    cosines.set(xlim=(-1.05, 1.05), yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.4, -0.6))
    cosines.tick_params(axis="y", labelsize="small", length=0)
    cosines.axvline(0, color="black", linewidth=0.6)
    biases.set(xlim=(-0.1, 3.6), xticks=(0, 1, 2, 3))
    biases.tick_params(axis="y", length=0)
    variances.set_xscale("log")
    variances.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=where)
        for where, (color, marker) in DIRECTIONS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
