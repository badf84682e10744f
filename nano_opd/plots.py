"""The figures. Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nano_opd.evaluate import mean_interval, wilson

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def training_curves(rows: Sequence[dict], eval_size: int, response_cap: int, title: str) -> Figure:
    """curves.png of one run: accuracy with its 95 % interval, KL and entropy, response length, gradient norm.

    rows  the rows of metrics.csv as dicts; None where nothing was measured
    """
    measured = [r for r in rows if r["accuracy"] is not None]
    steps = [r["step"] for r in measured]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)

    ax = axes[0, 0]
    for name, color, label in [("accuracy", COLORS[0], "sampled"), ("greedy_accuracy", COLORS[1], "greedy")]:
        values = [r[name] for r in measured]
        ax.plot(steps, values, color=color, label=label)
        low, high = zip(*(wilson(round(v * eval_size), eval_size) for v in values))
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set(ylabel="held-out accuracy (95 % interval)", ylim=(-0.02, 1.02))
    ax.legend()

    ax = axes[0, 1]
    for name, color, label in [("kl", COLORS[0], "KL(student‖teacher)"), ("entropy", COLORS[2], "student entropy")]:
        ax.plot(steps, [r[name] for r in measured], color=color, label=label)
    ax.set(ylabel="nats per token", ylim=(0, None))
    ax.legend()

    ax = axes[1, 0]
    ax.plot(steps, [r["response_length"] for r in measured], color=COLORS[0])
    ax.axhline(response_cap, color="black", linestyle="--", linewidth=0.8, label="cap")
    ax.set(ylabel="response length (tokens)", xlabel="update", ylim=(0, 1.1 * response_cap))
    ax.legend()

    ax = axes[1, 1]
    updates = [r for r in rows if r["grad_norm"]]
    ax.semilogy([r["step"] for r in updates], [r["grad_norm"] for r in updates], color=COLORS[0], linewidth=0.8)
    ax.set(ylabel="gradient norm", xlabel="update")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure


def read_results(path: Path | str) -> dict[str, list[list[dict]]]:
    """A file of notebooks/results: arm → one list of rows per seed, as `seed_curves` takes them; None for no number."""
    results: dict[str, dict[str, list[dict]]] = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            arm, seed = row.pop("arm"), row.pop("seed")
            numbers = {name: float(value) if value else None for name, value in row.items()}
            results.setdefault(arm, {}).setdefault(seed, []).append(numbers)
    return {arm: list(seeds.values()) for arm, seeds in results.items()}


def seed_curves(results: dict[str, list[list[dict]]], columns: dict[str, str], cap: int | None = None) -> Figure:
    """One panel per column of metrics.csv: each arm's mean over its seeds with the 95 % interval of that mean.

    results  arm → one list of rows per seed, measured at the same steps
    columns  column → label of its axis
    cap      drawn as a dashed line where the column is response_length
    """
    figure = Figure(figsize=(4.2 * min(3, len(columns)), 3.2 * -(-len(columns) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(columns) // 3), min(3, len(columns)), squeeze=False).flatten()
    for ax, (column, label) in zip(axes, columns.items()):
        for (arm, seeds), color in zip(results.items(), COLORS):
            measured = [[(row["step"], row[column]) for row in rows if row[column] is not None] for rows in seeds]
            intervals = [mean_interval([value for _, value in at_step]) for at_step in zip(*measured)]
            steps = [step for step, _ in measured[0]]
            if not steps:
                continue
            mean, low, high = zip(*intervals)
            ax.plot(steps, mean, color=color, label=arm)
            ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if cap is not None and column == "response_length":
            ax.axhline(cap, color="black", linestyle="--", linewidth=0.8)
        ax.set(xlabel="update", ylabel=label)
        ax.grid(alpha=0.3)
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    axes[0].legend(fontsize="small")
    return figure


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
