"""The figures. Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from nano_opd.evaluate import wilson

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
