"""The figures. The main methods have the colours of Okabe and Ito, which colour-blind readers can tell apart."""

import csv
import hashlib
import json
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
CREDIT, BLAME = "#0072B2", "#D55E00"


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    """Return the colour of each label of one figure. Raises ValueError for more new labels than there are colours."""
    known = METHOD_COLORS | OTHER_COLORS
    known |= {label: METHOD_COLORS[method] for label, method in METHOD_OF_LABEL.items()}
    labels = list(dict.fromkeys(labels))
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
        self.draw()
        height = self.get_width_height()[1]
        entries = []
        for legend in self.figure.legends:
            for handle, text in zip(legend.findobj(DrawingArea), legend.get_texts(), strict=True):
                left, bottom, right, top = handle.get_window_extent(self.get_renderer()).extents
                box = [round(left), round(height - top), round(right), round(height - bottom)]
                entries.append({"label": text.get_text(), "box": box})
        picture = np.asarray(self.buffer_rgba())[..., :3]
        with cbook.open_file_cm(file, "wb") as opened:
            opened.write(png(picture, self.figure.dpi, {"Legend": json.dumps(entries), **(metadata or {})}))


def new_figure(width: float, height: float, **options) -> Figure:
    """Return an empty figure of so many inches that draws itself by `Canvas`."""
    figure = Figure(figsize=(width, height), **options)
    Canvas(figure)
    return figure


def read_results(path: Path | str) -> dict[str, list[list[dict]]]:
    """A file of notebooks/results: arm → one list of rows per seed, as `seed_panels` takes them; None for no number."""
    results: dict[str, dict[str, list[dict]]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            arm, seed = row.pop("arm"), row.pop("seed")
            numbers = {name: float(value) if value else None for name, value in row.items()}
            results.setdefault(arm, {}).setdefault(seed, []).append(numbers)
    return {arm: list(seeds.values()) for arm, seeds in results.items()}


def seed_panels(
    panels: dict[str, dict[str, list[list[dict]]]],
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
    figure, axes = _axes(list(panels), ylabel, 3.0, columns)
    names = [column] * len(panels) if isinstance(column, str) else column
    colors = colors_of(arm for results in panels.values() for arm in results)
    for ax, results, name in zip(axes, panels.values(), names):
        _bands(ax, results, name, x, colors)
        ax.set(xlabel={"step": "update", "rollouts": "rollouts"}[x])
        if name == "accuracy":
            ax.set_ylim(-0.02, 1.02)
    drawn = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    labels = [arm for arm in colors if arm in drawn]
    ncols = 5 if sum(map(len, labels)) < 80 else 3
    figure.legend([drawn[label] for label in labels], labels, loc="outside upper center", ncols=ncols)
    return figure


def seed_curves(results: dict[str, list[list[dict]]], columns: dict[str, str]) -> Figure:
    """The same arms in every panel, one panel per column of metrics.csv: {column: title}, three in a row."""
    return seed_panels(dict.fromkeys(columns.values(), results), list(columns), columns=min(3, len(columns)))


def _bands(ax, results: dict[str, list[list[dict]]], column: str, x: str, colors: dict[str, str]) -> None:
    """Each arm's mean over its seeds and the 95 % interval of that mean, as far as all of its seeds got."""
    for arm, seeds in results.items():
        measured = [[(row[x], row[column]) for row in rows if row[column] is not None] for rows in seeds]
        intervals = [mean_interval([value for _, value in at_step]) for at_step in zip(*measured)]
        if not intervals:
            continue
        mean, low, high = zip(*intervals)
        steps = [step for step, _ in measured[0]][: len(mean)]
        ax.plot(steps, mean, color=colors[arm], label=arm)
        ax.fill_between(steps, low, high, color=colors[arm], alpha=0.2, linewidth=0)


def sweep(panels: dict[str, dict[str, list[tuple[float, list[float]]]]], xlabel: str) -> Figure:
    """Held-out accuracy over an option, three panels in a row: {title: {arm: [(x, one value per seed), …]}}.

    Points are means over the seeds with their 95 % intervals; the arm "start" is drawn as a level.
    """
    figure, axes = _axes(list(panels), "held-out accuracy", 2.7, columns=3)
    colors = colors_of(arm for arms in panels.values() for arm in arms)
    styles = {"OPD, clipped": ("x", ":"), "OPD, near": ("s", "--")}
    for ax, arms in zip(axes, panels.values()):
        for arm, points in arms.items():
            if not points:
                continue
            x = [x for x, _ in points]
            mean, low, high = np.array([mean_interval(values) for _, values in points]).T
            if arm == "start":
                ax.axhline(np.mean(mean), color=colors[arm], linestyle=":", label=arm)
                continue
            marker, line = styles.get(arm, ("o", "-"))
            style = {"color": colors[arm], "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2}
            ax.errorbar(x, mean, [mean - low, high - mean], label=arm, **style)
        ax.set(xscale="log", xlabel=xlabel, xlim=(1e-4, 4e-2), ylim=(-0.04, 1.04))
    drawn = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    labels = [arm for arm in colors if arm in drawn]
    figure.legend([drawn[label] for label in labels], labels, loc="outside upper center", ncols=5)
    return figure


def digest(figure: Figure) -> str:
    """A fingerprint of what a figure shows: points to four digits and colours of lines and areas, labels and titles.

    It depends neither on fonts nor on the version of matplotlib, so it tells whether a picture is that of its numbers.
    """
    shown = []
    for ax in figure.axes:
        shown += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        points = [(f"{line.get_label()} {to_hex(line.get_color())}", line.get_xydata()) for line in ax.get_lines()]
        for area in ax.collections:
            colors = [to_hex(color) for color in area.get_facecolor()]
            points += [(f"area {colors}", path.vertices) for path in area.get_paths()]
        shown += [f"{label}: {' '.join(f'{v:.4g}' for v in np.ravel(xy))}" for label, xy in points]
    shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def save(figure: Figure, path: Path | str) -> None:
    """Store a figure as PNG on white, legible on a dark page too, with its digest in the file."""
    figure.savefig(path, dpi=200, facecolor="white", metadata={"Digest": digest(figure)})


def token_credit(rows: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Each row a response as a strip of tokens: blue is credit (Â > 0), vermilion blame, full colour its largest |Â|.

    rows  (label, one character per token, Â of each token); "$" may stand for the EOS
    """
    figure = new_figure(0.32 * max(len(text) for _, text, _ in rows) + 2, 0.5 * len(rows) + 0.2)
    ax = figure.add_axes((0.18, 0, 0.82, 1))
    colors = LinearSegmentedColormap.from_list("credit", [BLAME, "white", CREDIT])
    for y, (label, text, advantage) in enumerate(rows):
        largest = max(map(abs, advantage)) or 1.0
        for x, (token, value) in enumerate(zip(text, advantage, strict=True)):
            ax.add_patch(Rectangle((x, -y), 1, -0.8, facecolor=colors(0.5 + 0.5 * value / largest), edgecolor="0.8"))
            ax.text(x + 0.5, -y - 0.4, token.replace(" ", "␣"), ha="center", va="center", family="monospace")
        ax.text(-0.3, -y - 0.4, label, ha="right", va="center")
    ax.set(xlim=(0, max(len(text) for _, text, _ in rows)), ylim=(-len(rows), 0.1))
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, markerscale=2.5)
    return figure


def _axes(panels: Sequence[str], ylabel: str | Sequence[str], height: float, columns: int | None = None) -> tuple:
    """A figure of page width and its axes, one per panel title, row by row."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = new_figure(9, height * rows, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    ylabels = [ylabel if n % columns == 0 else "" for n in range(len(panels))] if isinstance(ylabel, str) else ylabel
    for ax, title, label in zip(axes, panels, ylabels):
        ax.set_title(title, fontsize="medium")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def rewards(log_u: np.ndarray, divergence_names: Sequence[str]) -> Figure:
    """−f(u) and w_f(u) of each divergence against log u, over the histogram of the log u (N,) of sampled tokens."""
    figure, axes = _axes([NAMES.get(name, name) for name in divergence_names], "advantage", 2.3, columns=3)
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
    colors = colors_of(label for series in panels.values() for label in series)
    for ax, series in zip(axes, panels.values()):
        width = 0.8 / len(series)
        for n, (label, values) in enumerate(series.items()):
            x = np.arange(len(values)) + (n - (len(series) - 1) / 2) * width
            ax.bar(x, values.values(), width, color=colors[label], label=label)
        groups = list(next(iter(series.values())))
        widest = max(len(line) for group in groups for line in group.split("\n"))
        tilt = {"rotation": 40, "ha": "right"} if widest * len(groups) > 90 / (columns or len(panels)) else {}
        ax.set_xticks(range(len(groups)), groups, **tilt)
        if log:
            ax.set_yscale("log")
        ax.axhline(0, color="black", linewidth=0.6)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
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
    labels = dict.fromkeys(label for series in panels.values() for label in series)
    colors = colors_of(label for label in labels if not label.startswith("predicted "))
    for ax, series in zip(axes, panels.values()):
        for label, (x, y, *error) in series.items():
            if label.startswith("predicted "):
                ax.plot(x, y, linestyle="--", linewidth=1, color=colors[label.removeprefix("predicted ")])
                continue
            marker = "os^DvPX"[list(colors).index(label)] if len(x) < 26 else None
            style = {"color": colors[label], "label": label, "linestyle": "" if error else "-"}
            ax.errorbar(x, y, *error, marker=marker, ms=4, capsize=2, **style)
        ax.set(xlabel=xlabel, xscale=xscale, yscale=yscale)
    handles, names = axes[0].get_legend_handles_labels()
    if len(colors) < len(labels):
        handles.append(Line2D([], [], color=OTHER_COLORS["predicted"], linestyle="--", linewidth=1))
        names.append("predicted, in the same colour")
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure


def histograms(panels: dict[str, dict[str, np.ndarray]], xlabel: str, truth: float) -> Figure:
    """Distributions with their means, {panel title: {label: values}}, and the value that should be met."""
    figure, axes = _axes(list(panels), "density", 2.5)
    for ax, series in zip(axes, panels.values()):
        low, high = np.percentile(np.concatenate([*series.values()]), [1, 99])
        for label, values in series.items():
            color = colors_of([label])[label]
            ax.hist(values, np.linspace(low, high, 50), density=True, color=color, alpha=0.4, label=label)
            ax.axvline(values.mean(), color=color, linewidth=1.5)
        ax.axvline(truth, color="black", linestyle=":", label="truth")
    figure.supxlabel(xlabel, fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def flow(rows: dict[str, dict[str, torch.Tensor]], teacher: torch.Tensor, names: Sequence[str] = "ABC") -> Figure:
    """The ways of students over three tokens, each a line in the triangle of all distributions, from its dot onwards.

    rows     row label → panel title → their probabilities after each step (steps+1, S, 3), as law.paths returns them
    teacher  (3,) the star; under each panel stands how many students end within 0.02 of it
    """
    titles = list(next(iter(rows.values())))
    figure = new_figure(7.5, 7 / len(titles) * len(rows) + 0.3)
    figure.subplots_adjust(left=0.04, right=1, bottom=0, top=0.95, wspace=0, hspace=0)
    corners = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    for n, (ax, (row, title)) in enumerate(
        zip(figure.subplots(len(rows), len(titles), squeeze=False).flat, [(r, t) for r in rows for t in titles])
    ):
        paths = rows[row][title].numpy()
        xy = paths @ corners
        color = METHOD_COLORS.get(row, COLORS[0])
        ax.fill(*corners.T, facecolor="#F7F7F7", edgecolor="#B0B0B0", linewidth=0.8)
        for way in xy.swapaxes(0, 1):
            ax.plot(*way.T, color=color, linewidth=0.8)
            along = np.linalg.norm(np.diff(way, axis=0), axis=1).cumsum()
            at = np.searchsorted(along, 0.45 * along[-1])  # an arrow a little before half of the way
            if along[-1] > 0.05 and along[at] > 0:
                back = np.searchsorted(along, along[at] - 0.01)
                style = {"arrowstyle": "-|>,head_width=0.12,head_length=0.25", "color": color, "linewidth": 0.6}
                ax.annotate("", way[at + 1], way[min(back, at)], arrowprops=style | {"shrinkA": 0, "shrinkB": 0})
        ax.plot(*xy[0].T, ".", color="#909090", markersize=3, zorder=3)
        ends = np.linalg.norm(paths[-1] - teacher.numpy(), axis=1) < 0.02
        ax.plot(*xy[-1][~ends].T, "o", color=color, markersize=7, clip_on=False, zorder=4)
        ax.plot(*(teacher.numpy() @ corners), "*", color="black", markersize=11, markeredgecolor="white", zorder=5)
        for corner, name, (dx, dy) in zip(corners, names, [(-0.04, -0.05), (0.04, -0.05), (0, 0.05)]):
            ax.text(*(corner + (dx, dy)), name, ha="center", va="center", color="#606060", fontsize="small")
        ax.text(0.5, -0.09, f"{ends.sum()} of {len(ends)}", ha="center", va="center", color=color, fontweight="bold")
        ax.set(xlim=(-0.08, 1.08), ylim=(-0.14, 0.95), aspect="equal")
        ax.set_axis_off()
        if n < len(titles):
            ax.set_title(title, fontsize="medium")
        if n % len(titles) == 0:
            ax.text(-0.1, 0.45, row, rotation=90, ha="center", va="center", color=color, fontweight="bold")
    return figure


def directions(rows: dict[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """One row per estimator: which way its mean points (colour and mark), how far off it is, how much it scatters.

    rows  label → (cosine with the gradient, relative bias, variance / ‖gradient‖²) in one world after the other: the
          first is the large mark, the others are dots, or a line from the least to the largest. A cosine of NaN is a
          mean without a direction; another number that is NaN is not drawn. A bias above 3.5 stands at the edge.
    """
    figure = new_figure(9, 0.9 + 0.185 * len(rows), layout="constrained")
    cosines, *others = axes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    styles = {"uphill": (COLORS[1], "^"), "nowhere": ("0.35", "x"), "downhill": (COLORS[0], "v")}
    for y, numbers in enumerate(rows.values()):
        cosine, *sizes = np.array(numbers).T
        where = "nowhere" if np.isnan(cosine[0]) else "uphill" if cosine[0] < 0 else "downhill"
        color, marker = styles[where]
        cosines.scatter(
            np.nan_to_num(cosine[1:]), np.full(len(cosine) - 1, y), s=5, color=color, alpha=0.35, linewidth=0
        )
        cosines.scatter(np.nan_to_num(cosine[:1]), [y], s=30, color=color, marker=marker, zorder=3)
        for ax, values, most in zip(others, sizes, (3.5, np.inf)):
            values = np.minimum(values, most)
            ax.plot([values.min(), values.max()], [y, y], color="0.75", linewidth=2, solid_capstyle="butt")
            ax.scatter(values[:1], [y], s=22, color="0.35", zorder=3)
    for ax, title in zip(axes, ("cosine with the gradient", "relative bias", "variance / ‖gradient‖²")):
        ax.set_title(title, fontsize="medium")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    cosines.set(xlim=(-1.05, 1.05), yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.4, -0.6))
    cosines.tick_params(axis="y", labelsize="small", length=0)
    cosines.axvline(0, color="black", linewidth=0.6)
    others[0].set(xlim=(-0.1, 3.6), xticks=(0, 1, 2, 3))
    others[1].set_xscale("log")
    for ax in others:
        ax.tick_params(axis="y", length=0)
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=where) for where, (c, m) in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
