"""The figures. Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from seeds import mean_interval

from nano_opd import divergences

matplotlib.rcParams["figure.dpi"] = 90  # in notebooks

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
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
# The same in every figure: blue and vermilion for the two methods, grey and black for what is neither.
OWN_COLOR = {"OPD+": COLORS[0], "OPD": COLORS[1], "exact": COLORS[6], "teacher q": "#303030", "student p": "#A0A0A0"}
OWN_COLOR |= {"f": COLORS[0], "h": COLORS[1], "bias²": "#303030", "variance": "#A0A0A0"}
OWN_COLOR |= dict(
    zip(["reverse KL", "forward KL", "Jensen–Shannon", "Hellinger", "Pearson χ²"], COLORS[2:6] + ["#808080"])
)


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

    An arm without seeds is not drawn, and keeps its colour for the other panels.

    panels  title → arm → one list of rows per seed, measured at the same steps
    column  of metrics.csv, for all panels or one for each
    x       "step" or "rollouts", the horizontal axis
    """
    figure, axes = _axes(list(panels), ylabel, 3.0, columns)
    names = [column] * len(panels) if isinstance(column, str) else column
    for ax, results, name in zip(axes, panels.values(), names):
        _bands(ax, results, name, x)
        ax.set(xlabel={"step": "update", "rollouts": "rollouts"}[x])
        if name == "accuracy":
            ax.set_ylim(-0.02, 1.02)
    drawn = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    labels = [arm for arm in dict.fromkeys(arm for results in panels.values() for arm in results) if arm in drawn]
    ncols = 5 if sum(map(len, labels)) < 80 else 3
    figure.legend([drawn[label] for label in labels], labels, loc="outside upper center", ncols=ncols)
    return figure


def seed_curves(results: dict[str, list[list[dict]]], columns: dict[str, str]) -> Figure:
    """The same arms in every panel, one panel per column of metrics.csv: {column: title}, three in a row."""
    return seed_panels(dict.fromkeys(columns.values(), results), list(columns), columns=min(3, len(columns)))


def _bands(ax, results: dict[str, list[list[dict]]], column: str, x: str = "step") -> None:
    """Each arm's mean over its seeds and the 95 % interval of that mean, as far as all of its seeds got."""
    for (arm, seeds), color in zip(results.items(), COLORS[: len(results)], strict=True):
        measured = [[(row[x], row[column]) for row in rows if row[column] is not None] for rows in seeds]
        intervals = [mean_interval([value for _, value in at_step]) for at_step in zip(*measured)]
        if not intervals:
            continue
        mean, low, high = zip(*intervals)
        steps, color = [step for step, _ in measured[0]][: len(mean)], OWN_COLOR.get(arm, color)
        ax.plot(steps, mean, color=color, label=arm)
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def sweep(panels: dict[str, dict[str, list[tuple[float, list[float]]]]], xlabel: str) -> Figure:
    """Held-out accuracy over an option, three panels in a row: {title: {arm: [(x, one value per seed), …]}}.

    Points are means over the seeds with their 95 % intervals; the arm "start" is drawn as a level.
    """
    figure, axes = _axes(list(panels), "held-out accuracy", 2.7, columns=3)
    for ax, arms in zip(axes, panels.values()):
        for n, (arm, points) in enumerate((arm, points) for arm, points in arms.items() if points):
            x, intervals = [x for x, _ in points], [mean_interval(values) for _, values in points]
            mean, low, high = np.array(intervals).T
            if arm == "start":
                ax.axhline(np.mean(mean), color="#808080", linestyle=":", label=arm)
                continue
            own = OWN_COLOR.get(arm, COLORS[n]), "o", "-"  # variants of OPD are darker and lighter than it
            color, marker, line = {"OPD, clipped": ("#F0A070", "x", ":"), "OPD, near": ("#7A2F00", "s", "--")}.get(
                arm, own
            )
            error = [np.subtract(mean, low), np.subtract(high, mean)]
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2}
            ax.errorbar(x, mean, error, label=arm, **style)
        ax.set(xscale="log", xlabel=xlabel, xlim=(1e-4, 4e-2), ylim=(-0.04, 1.04))
    drawn = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=5)
    return figure


def digest(figure: Figure) -> str:
    """A fingerprint of what a figure shows: every line's and area's points to four digits, and every label and title.

    It depends neither on fonts nor on the version of matplotlib, so it tells whether a picture is that of its numbers.
    """
    shown = []
    for ax in figure.axes:
        shown += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        points = [(line.get_label(), line.get_xydata()) for line in ax.get_lines()]
        points += [("area", path.vertices) for area in ax.collections for path in area.get_paths()]
        shown += [f"{label}: {' '.join(f'{v:.4g}' for v in np.ravel(xy))}" for label, xy in points]
    shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def save(figure: Figure, path: Path | str) -> None:
    """As PNG on white, legible on a dark page too, with its digest in the file."""
    drawn, note = io.BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=130, facecolor="white")
    note.add_text("Digest", digest(figure))
    few_colors(drawn.getvalue()).save(path, optimize=True, pnginfo=note)


def few_colors(png: bytes) -> Image.Image:
    """A picture in 48 colours, those that differ most, so that a few small points keep theirs: a third of the bytes."""
    return Image.open(io.BytesIO(png)).convert("RGB").quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def token_credit(rows: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Each row a response as a strip of tokens: blue is credit (Â > 0), vermilion blame, full colour its largest |Â|.

    rows  (label, one character per token, Â of each token); "$" may stand for the EOS
    """
    figure = Figure(figsize=(0.32 * max(len(text) for _, text, _ in rows) + 2, 0.5 * len(rows) + 0.2))
    ax = figure.add_axes((0.18, 0, 0.82, 1))
    colors = LinearSegmentedColormap.from_list("credit", [COLORS[1], "white", COLORS[0]])
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
    for ax, series in zip(axes, panels.values()):
        if ax is not axes[0]:
            ax.sharey(axes[0])  # before there are points, so that the limits hold all of them
        for n, (label, (x, y)) in enumerate(series.items()):
            ax.plot(x, y, "os^Dv"[n % 5], color=COLORS[n], markersize=4, markeredgewidth=0, label=label)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(xlabel=xlabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, markerscale=2.5)
    return figure


def _axes(panels: Sequence[str], ylabel: str | Sequence[str], height: float, columns: int | None = None) -> tuple:
    """A figure of page width and its axes, one per panel title, row by row."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9, height * rows), layout="constrained")
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
    for n, (ax, name) in enumerate(zip(axes, divergence_names)):
        divergence = divergences.get(name)
        ax.plot(x, divergence.stop_gradient(x), color=COLORS[1], linestyle="--", label="OPD: −f(u)")
        ax.plot(x, divergence.unbiased(x), color=COLORS[0], label="OPD+: w_f(u)")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(ylim=(-4, 4), xlim=(-8, 4), xticks=(-8, -4, 0, 4))
        if n >= len(divergence_names) - 3:
            ax.set_xlabel("log u (nats)")
        counts = ax.twinx()
        weights = np.full(len(log_u), 1 / len(log_u))
        counts.hist(log_u, bins=96, range=(-8, 4), weights=weights, color="#D0D0D0", log=True)
        counts.set_ylim(1e-4, 1)
        counts.tick_params(axis="y", which="both", right=False, labelright=False)
        ax.set_zorder(counts.get_zorder() + 1)
        ax.patch.set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Patch(color="#D0D0D0"))
    figure.legend(
        handles, [*labels, "sampled tokens (fraction, log scale 10⁻⁴ … 1)"], loc="outside upper center", ncols=3
    )
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
    for ax, series in zip(axes, panels.values()):
        width = 0.8 / len(series)
        for n, (label, values) in enumerate(series.items()):
            x = np.arange(len(values)) + (n - (len(series) - 1) / 2) * width
            color = OWN_COLOR.get(label.split(",")[0] if n < 2 else label, COLORS[n])
            ax.bar(x, values.values(), width, color=color, label=label)
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
    for ax, series in zip(axes, panels.values()):
        measured = [label for label in series if not label.startswith("predicted")]
        for label, (x, y, *error) in series.items():
            n = measured.index(label.removeprefix("predicted "))
            color = OWN_COLOR.get(measured[n], OWN_COLOR.get(measured[n].split(", ")[-1], COLORS[n]))
            style = {"color": color, "label": label}
            if label not in measured:
                ax.plot(x, y, linestyle="--", linewidth=1, **style)
            else:
                marker = "os^DvPX"[n] if len(x) < 26 else None
                ax.errorbar(x, y, *error, linestyle="" if error else "-", marker=marker, ms=4, capsize=2, **style)
        ax.set(xlabel=xlabel, xscale=xscale, yscale=yscale)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def histograms(panels: dict[str, dict[str, np.ndarray]], xlabel: str, truth: float) -> Figure:
    """Distributions with their means, {panel title: {label: values}}, and the value that should be met."""
    figure, axes = _axes(list(panels), "density", 2.5)
    for ax, series in zip(axes, panels.values()):
        low, high = np.percentile(np.concatenate([*series.values()]), [1, 99])
        for label, values in series.items():
            color = OWN_COLOR[label]
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
    figure = Figure(figsize=(9, 8.4 / len(titles) * len(rows) + 0.3))
    figure.subplots_adjust(left=0.04, right=1, bottom=0, top=0.95, wspace=0, hspace=0)
    corners = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    for n, (ax, (row, title)) in enumerate(
        zip(figure.subplots(len(rows), len(titles), squeeze=False).flat, [(r, t) for r in rows for t in titles])
    ):
        paths = rows[row][title].numpy()
        xy, color = paths @ corners, OWN_COLOR.get(row.split(":")[0], COLORS[2])
        ax.fill(*corners.T, facecolor="#F7F7F7", edgecolor="#B0B0B0", linewidth=0.8)
        for way in xy.swapaxes(0, 1):
            ax.plot(*way.T, color=color, linewidth=0.8, alpha=0.8)
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
    figure = Figure(figsize=(9, 0.9 + 0.185 * len(rows)), layout="constrained")
    cosines, *others = axes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    styles = {"uphill": ("#882255", "^"), "nowhere": ("0.35", "x"), "downhill": ("#117733", "v")}  # no method's colours
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
