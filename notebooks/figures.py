"""The figures. Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from seeds import mean_interval

from nano_opd import divergences

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
OWN_COLOR = {"OPD+": COLORS[0], "OPD": COLORS[1], "exact": COLORS[6]}  # the same in every figure


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
    for (arm, seeds), color in zip(results.items(), COLORS):
        measured = [[(row[x], row[column]) for row in rows if row[column] is not None] for rows in seeds]
        intervals = [mean_interval([value for _, value in at_step]) for at_step in zip(*measured)]
        if not intervals:
            continue
        mean, low, high = zip(*intervals)
        steps, color = [step for step, _ in measured[0]][: len(mean)], OWN_COLOR.get(arm, color)
        ax.plot(steps, mean, color=color, label=arm)
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


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
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Digest": digest(figure), "Software": None})


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
    figure, axes = _axes(divergence_names, "advantage", 2.3, columns=3)
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
            style = {"color": OWN_COLOR.get(measured[n], COLORS[n]), "label": label}
            if label not in measured:
                ax.plot(x, y, linestyle="--", linewidth=1, **style)
            else:
                marker = "os^DvPX"[n] if len(x) < 30 else None
                ax.errorbar(x, y, *error, linestyle="" if error else "-", marker=marker, ms=4, capsize=2, **style)
        ax.set(xlabel=xlabel, xscale=xscale, yscale=yscale)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def verdicts(values: dict[str, float], xlabel: str, title: str = "", limit: float | None = None) -> Figure:
    """Horizontal bars with their numbers, {label: value}; those whose label starts with "right" in another colour.

    limit  right end of the axis, the same for figures that are to be compared
    """
    figure = Figure(figsize=(9, 0.6 + 0.27 * len(values) + 0.25 * bool(title)), layout="constrained")
    ax = figure.subplots()
    colors = [COLORS[0] if label.startswith("right") else COLORS[1] for label in values]
    drawn = ax.barh(list(values), list(values.values()), 0.7, color=colors)
    ax.bar_label(drawn, ["0" if abs(v) < 1e-9 else f"{v:.2g}" for v in values.values()], padding=3)
    ax.set(xlabel=xlabel, xlim=(0, limit))
    ax.set_title(title, fontsize="medium")
    ax.margins(y=0.02)
    ax.invert_yaxis()
    return figure
