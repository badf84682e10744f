"""The tables and figures of the READMEs, made from the results of reproduce.py.

python -m lab.pages                            notebooks/results/ → its figures and the tables of three READMEs
python -m lab.pages ../out/quick/results       another folder of results: its figures, and the tables printed
"""

import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import figures
from figures import Results, Rows
from lab import RESULTS, ROOT, bench, reproduce
from lab.claims import (
    BASELINE,
    CLAIMS,
    SPARSE,
    claims_table,
    found_table,
    interval,
    leaks,
    load,
    mean_of,
    number,
    opd,
    opdplus,
    table,
)
from matplotlib.figure import Figure
from torch import Tensor

from nano_opd import divergences
from nano_opd.exact import law
from nano_opd.system.console import Parser, accept_any_text

DENSE = {
    "OPD+, JSD, sampled token": opdplus("jsd"),
    "OPD+, JSD, exact baseline": BASELINE,
    "OPD+, JSD, full vocabulary": "opdplus, jsd, full",
    "OPD, reverse KL, sampled token": opd("reverse_kl"),
    "supervised, worked solutions": "sft",
    "GRPO, one reward per response": SPARSE,
}
# The arm that runs each method with nothing but its own recipe.
BARE = {
    "sft": "sft",
    "gkd": "opdplus, jsd, full",
    "opd": opd("jsd"),
    "opdplus": opdplus("jsd"),
    "null": "null",
    "grpo": "grpo",
    "opsd": "opsd",
    "grpo+opsd": "grpo+opsd",
    "rlsd": "rlsd",
}
FIRST_DIVERGENCES = reproduce.DIVERGENCES[:3]  # reverse KL, forward KL and Jensen–Shannon


def rollouts_to(rows: Rows, level: float) -> float:
    """Rollouts until the held-out accuracy first reaches a level, on straight lines between evaluations; else ∞."""
    before = rows[0]
    for row in rows:
        if row["accuracy"] >= level:
            rise = row["accuracy"] - before["accuracy"]
            part = (level - before["accuracy"]) / rise if rise else 0
            return before["rollouts"] + part * (row["rollouts"] - before["rollouts"])
        before = row
    return math.inf


def rollouts_in_words(rollouts: float) -> str:
    return "not reached" if rollouts == math.inf else f"{rollouts:,.0f}"


def dense_table(results: Results) -> str:
    """How many rollouts each signal needs; median, and the range over seeds."""
    rows = []
    for name, arm in DENSE.items():
        if arm not in results:
            continue
        seeds = results[arm]
        cells = [name, number(statistics.mean(at_start(seeds, "accuracy")))]
        for level in (0.5, 0.8):
            needed = [rollouts_to(seed, level) for seed in seeds]
            low = rollouts_in_words(min(needed))
            middle = rollouts_in_words(statistics.median(needed))
            high = rollouts_in_words(max(needed))
            cells.append(f"{middle} ({low} … {high})")
        rows.append([*cells, interval(at_end(seeds, "accuracy"))])
    return table("signal | start | rollouts to 0.5 | rollouts to 0.8 | accuracy at the end [95 %]", rows)


def at_start(seeds: list[Rows], column: str) -> list[float]:
    """The column at the start of each seed."""
    return [rows[0][column] for rows in seeds]


def at_end(seeds: list[Rows], column: str) -> list[float]:
    """The column at the end of each seed."""
    return [rows[-1][column] for rows in seeds]


def change(seeds: list[Rows]) -> str:
    """Accuracy, start → end [95 %], means over seeds."""
    start = number(statistics.mean(at_start(seeds, "accuracy")))
    return f"{start} → {interval(at_end(seeds, 'accuracy'))}"


def methods_table(results: Results) -> str:
    """Each method as it is, on 3-digit addition."""
    rows = []
    for method, arm in BARE.items():
        if arm in results:
            rows.append([f"`{method}`", change(results[arm]), str(len(results[arm]))])
    return table("method | accuracy, start → end [95 %] | seeds", rows)


def sizes_table(results: Results) -> str:
    """Three methods as they are, on every task and three sizes."""
    rows = []
    for task in reproduce.TASKS:
        for digits in reproduce.DIGITS:
            if (task, digits) == ("add", 3):  # it has been run with the methods
                arms = [BARE[method] for method in reproduce.SIZED]
            else:
                arms = [f"{method}, {task} {digits}" for method in reproduce.SIZED]
            if all(arm in results for arm in arms):
                rows.append([task, str(digits), *(change(results[arm]) for arm in arms)])
    methods = [f"`{method}`" for method in reproduce.SIZED]
    return table(" | ".join(["task", "digits", *methods]), rows)


def sweep(results: Results) -> dict[str, dict[str, list]]:
    """Accuracy at the end over the learning rate, as figures.sweep takes it."""
    panels = {}
    for d in FIRST_DIVERGENCES:
        panels[figures.NAMES[d]] = {
            "OPD+": over_rates(results, f"opdplus, {d}, lr={{}}", at_end),
            "OPD": over_rates(results, f"opd, {d}, lr={{}}", at_end),
            "OPD, clipped": over_rates(results, f"opd, {d}, lr={{}}, clipped", at_end),
            "OPD, near": over_rates(results, f"opd, {d}, lr={{}}, near", at_end),
            "start": over_rates(results, f"opd, {d}, lr={{}}", at_start),
        }
    return panels


def over_rates(results: Results, arm: str, measured: Callable) -> list[tuple[float, list[float]]]:
    """(learning rate, accuracies over seeds) of each rate that has been run; {} stands for the rate in the arm's name.

    measured  at_start or at_end
    """
    points = []
    for rate in reproduce.RATES:
        if arm.format(rate) in results:
            points.append((float(rate), measured(results[arm.format(rate)], "accuracy")))
    return points


def arms_table(results: Results) -> str:
    """Every arm at its end; gradient norms are means over training."""
    rows = []
    for name, experiment in reproduce.EXPERIMENTS.items():
        for arm in experiment.arms:
            if arm in results:
                rows.append([f"`{name}`", arm, *cells_of_arm(results[arm])])
    head = "experiment | arm | seeds | accuracy [95 %] | worst … best | KL to teacher | length | gradient norm | cite"
    return table(head, rows)


def cells_of_arm(seeds: list[Rows]) -> list[str]:
    """The columns of an arm, from "seeds" on."""
    accuracy = at_end(seeds, "accuracy")
    norm = statistics.mean(mean_of(rows, "grad_norm") for rows in seeds)
    cites = [rows[-1].get("leak_rate") for rows in seeds]
    return [
        str(len(seeds)),
        interval(accuracy),
        f"{min(accuracy):.3f} … {max(accuracy):.3f}",
        number(statistics.mean(at_end(seeds, "kl"))),
        number(statistics.mean(at_end(seeds, "response_length")), digits=1),
        f"{norm:.3g}",
        "" if None in cites else number(statistics.mean(cites)),
    ]


def provenance_table(folder: Path) -> str:
    """How each experiment was made."""
    notes = [list(note.values()) for note in reproduce.read(folder / "provenance.csv")]
    head = "experiment | commit | date | python | torch | numpy | processor | threads"
    return table(head, [[f"`{name}`", *rest] for name, *rest in notes])


def tables(folder: Path) -> dict[str, str]:
    """Every table of every README, by name."""
    results = load(folder)
    made = {f"claims {name}": claims_table(claims, results) for name, claims in CLAIMS.items()}
    made["found"] = found_table(results)
    made["leaks"] = leaks(results)
    made["dense"] = dense_table(results)
    made["methods"] = methods_table(results)
    made["sizes"] = sizes_table(results)
    made["arms"] = arms_table(results)
    made["provenance"] = provenance_table(folder)
    return made | speed_tables(folder)


def speed_tables(folder: Path) -> dict[str, str]:
    """What speed.py measured, each table under the machine that it was measured on."""
    path = folder / "speed.json"
    if not path.exists():
        return {}
    measured = json.loads(path.read_text(encoding="utf-8"))
    made = {}
    for name, table_of_speed in measured.items():
        if name != "scaling":  # which is drawn
            made[f"speed {name}"] = f"{table_of_speed['machine']}:\n\n{bench.markdown(table_of_speed['rows'])}"
    return made


def draw(folder: Path) -> dict[str, Figure]:
    """The figures, by the names of their files."""
    results = load(folder)
    panels = {}
    for d in FIRST_DIVERGENCES:
        panels[figures.NAMES[d]] = that_were_run(results, {"OPD": opd(d), "OPD+": opdplus(d)})
    dense = that_were_run(results, DENSE)
    rows_of_flow, teacher = flows()
    return {
        "collapse.png": figures.seed_panels(panels, "accuracy", "held-out accuracy"),
        "flow.png": figures.flow(rows_of_flow, teacher),
        "rate.png": figures.sweep(sweep(results), "learning rate"),
        "dense.png": figures.seed_panels({"": dense}, "accuracy", "held-out accuracy", x="rollouts"),
        "rlsd.png": rlsd_figure(results),
    }


def that_were_run(results: Results, arms: dict[str, str]) -> Results:
    """The results of these arms, {label: arm}, by their labels."""
    return {label: results[arm] for label, arm in arms.items() if arm in results}


def rlsd_figure(results: Results) -> Figure:
    """Accuracy of GRPO and OPSD, of the others minus GRPO's, and how often all of them cite."""
    arms = {arm: results[arm] for arm in reproduce.EXPERIMENTS["rlsd"].arms if arm in results}
    accuracy, close = {}, {}  # an arm of no seeds has its colour, and is not drawn
    for arm, seeds in arms.items():
        accuracy[arm] = seeds if arm in ("grpo", "opsd") else []
        close[arm] = minus(seeds, arms["grpo"]) if arm in ("grpo+opsd", "rlsd", "rlsd, shuffled") else []
    return figures.seed_panels(
        {"held-out accuracy": accuracy, "the same minus GRPO's": close, "answers that cite": arms},
        column=["accuracy", "difference", "leak_rate"],
        ylabel=["fraction", "", ""],
    )


@functools.cache
def flows() -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Where the expected updates of OPD and OPD+ take 55 students over three tokens, and the teacher."""
    rows = {"OPD": {}, "OPD+": {}}
    for name in FIRST_DIVERGENCES:
        d = divergences.get(name)
        title = figures.NAMES[name]
        rows["OPD"][title] = law.paths(law.of_u(d.reward), law.STUDENTS.log(), law.TEACHER.log())
        rows["OPD+"][title] = law.paths(law.of_u(d.w_f), law.STUDENTS.log(), law.TEACHER.log())
    return rows, law.TEACHER


def minus(seeds: list[Rows], others: list[Rows]) -> list[Rows]:
    """Accuracy minus that of another arm, seed by seed and step by step."""
    differences = []
    for rows, other_rows in zip(seeds, others):
        differences.append(
            [
                {"step": row["step"], "difference": row["accuracy"] - other["accuracy"]}
                for row, other in zip(rows, other_rows)
            ]
        )
    return differences


def fill(text: str, filled: dict[str, str]) -> str:
    """The text with its blocks replaced. Raises ValueError for a block that it does not have exactly once."""
    for name, block in filled.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{begin} … {end} must stand exactly once")
        before = text[: text.index(begin)]
        after = text[text.index(end) :]
        text = f"{before}{begin}\n{block}\n{after}"
    return text


def pages(folder: Path) -> dict[Path, str]:
    """Each README that tables stand in, and its text with the tables of these results."""
    filled: dict[Path, dict[str, str]] = {}
    for name, text in tables(folder).items():
        filled.setdefault(page_of(name), {})[name] = text
    return {path: fill(path.read_text(encoding="utf-8"), texts) for path, texts in filled.items()}


def page_of(table_name: str) -> Path:
    """The README that a table stands in."""
    if table_name == "found":
        return ROOT / "README.md"
    if table_name.startswith("speed "):
        return ROOT / "nano_opd" / "system" / "README.md"
    return ROOT / "notebooks" / "README.md"


def main() -> None:
    """Write the figures and the READMEs, or the figures of another folder, and print its tables."""
    accept_any_text()
    parser = Parser("pages.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of CSVs (default: notebooks/results, into the READMEs)")
    folder = parser.parse_args().folder
    if folder is not None and not (folder / "provenance.csv").exists():
        parser.error(f"{folder} holds no results: give the folder that reproduce.py wrote its CSVs to")
    if folder is None:
        write_figures(RESULTS)
        for path, text in pages(RESULTS).items():
            path.write_text(text, encoding="utf-8")
    else:
        write_figures(folder)
        for name, text in tables(folder).items():
            print(f"## {name}\n\n{text}\n")


def write_figures(folder: Path) -> None:
    """Write the figures beside the results that they show."""
    for name, figure in draw(folder).items():
        figures.save(figure, folder / name)


if __name__ == "__main__":
    main()
