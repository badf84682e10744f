"""The tables and figures of the READMEs, made from the results of reproduce.py.

python -m lab.pages                            notebooks/results/ → its figures and the tables of three READMEs
python -m lab.pages ../out/quick/results       another folder of results: its figures, and the tables printed
"""

import functools
import json
import math
import statistics
from pathlib import Path

import figures
from lab import RESULTS, ROOT, bench, reproduce
from lab.claims import (
    BASELINE,
    CLAIMS,
    JSD,
    REVERSE,
    SPARSE,
    Results,
    claims_table,
    found_table,
    interval,
    leaks,
    load,
    mean_of,
    number,
    pair,
    table,
)
from matplotlib.figure import Figure
from torch import Tensor

from nano_opd import divergences
from nano_opd.exact import law
from nano_opd.system.console import Parser, accept_any_text

DENSE = {
    "OPD+, JSD, sampled token": JSD[1],
    "OPD+, JSD, exact baseline": BASELINE,
    "OPD+, JSD, full vocabulary": "opdplus, jsd, full",
    "OPD, reverse KL, sampled token": REVERSE[0],
    "supervised, worked solutions": "sft",
    "GRPO, one reward per response": SPARSE,
}
# The arm that runs each method with nothing but its own recipe.
BARE = {
    "sft": "sft",
    "gkd": "opdplus, jsd, full",
    "opd": JSD[0],
    "opdplus": JSD[1],
    "null": "null",
    **{m: m for m in ("grpo", "opsd", "grpo+opsd", "rlsd")},
}


def rollouts_to(rows: list[dict], level: float) -> float:
    """Rollouts until the held-out accuracy first reaches a level, on straight lines between evaluations; else ∞."""
    for before, row in zip([rows[0], *rows], rows):
        if row["accuracy"] >= level:
            rise = row["accuracy"] - before["accuracy"]
            part = (level - before["accuracy"]) / rise if rise else 0
            return before["rollouts"] + part * (row["rollouts"] - before["rollouts"])
    return math.inf


def dense_table(results: Results) -> str:
    """How many rollouts each signal needs; median, and the range over seeds."""
    rows = []
    for name, arm in ((name, arm) for name, arm in DENSE.items() if arm in results):
        cells = [number(statistics.mean(seed[0]["accuracy"] for seed in results[arm]))]
        for level in (0.5, 0.8):
            needed = [rollouts_to(seed, level) for seed in results[arm]]
            three = min(needed), statistics.median(needed), max(needed)
            low, middle, high = (f"{n:,.0f}" if n < math.inf else "not reached" for n in three)
            cells.append(f"{middle} ({low} … {high})")
        rows.append([name, *cells, interval([seed[-1]["accuracy"] for seed in results[arm]])])
    return table("signal | start | rollouts to 0.5 | rollouts to 0.8 | accuracy at the end [95 %]", rows)


def change(seeds: list[list[dict]]) -> str:
    """Accuracy, start → end [95 %], means over seeds."""
    return (
        f"{number(statistics.mean(s[0]['accuracy'] for s in seeds))} → {interval([s[-1]['accuracy'] for s in seeds])}"
    )


def methods_table(results: Results) -> str:
    """Each method as it is, on 3-digit addition."""
    rows = [[f"`{m}`", change(results[arm]), str(len(results[arm]))] for m, arm in BARE.items() if arm in results]
    return table("method | accuracy, start → end [95 %] | seeds", rows)


def sizes_table(results: Results) -> str:
    """Three methods as they are, on every task and three sizes."""
    arms = {  # 3-digit addition has been run with the methods
        (task, digits): [BARE[m] if (task, digits) == ("add", 3) else f"{m}, {task} {digits}" for m in reproduce.SIZED]
        for task in reproduce.TASKS
        for digits in reproduce.DIGITS
    }
    rows = [
        [task, str(digits), *(change(results[arm]) for arm in three)]
        for (task, digits), three in arms.items()
        if set(three) <= set(results)
    ]
    return table(" | ".join(["task", "digits", *(f"`{m}`" for m in reproduce.SIZED)]), rows)


def sweep(results: Results) -> dict[str, dict[str, list]]:
    """Accuracy at the end over the learning rate, as figures.sweep takes it."""
    panels = {}
    arms = {"OPD+": "opdplus, {}, lr={}", "OPD": "opd, {}, lr={}"}
    arms |= {f"OPD, {note}": f"opd, {{}}, lr={{}}, {note}" for note in ("clipped", "near")}
    for d in reproduce.DIVERGENCES[:3]:
        panels[figures.NAMES[d]] = {
            label: [(float(lr), results[a]) for lr in reproduce.RATES if (a := arm.format(d, lr)) in results]
            for label, arm in arms.items()
        }
    at = lambda points, n: [(lr, [seed[n]["accuracy"] for seed in seeds]) for lr, seeds in points]
    return {
        title: {label: at(points, -1) for label, points in arms.items()} | {"start": at(arms["OPD"], 0)}
        for title, arms in panels.items()
    }


def arms_table(results: Results) -> str:
    """Every arm at its end; gradient norms are means over training."""
    rows, columns = [], ("accuracy", "kl", "response_length", "leak_rate")
    for name, experiment in reproduce.EXPERIMENTS.items():
        for arm in filter(results.get, experiment.arms):
            accuracy, kl, length, cites = ([seed[-1].get(column) for seed in results[arm]] for column in columns)
            norm = statistics.mean(mean_of(seed, "grad_norm") for seed in results[arm])
            cells = [interval(accuracy), f"{min(accuracy):.3f} … {max(accuracy):.3f}"]
            cells += [number(statistics.mean(kl)), number(statistics.mean(length), 1), f"{norm:.3g}"]
            cells += ["" if None in cites else number(statistics.mean(cites))]
            rows.append([f"`{name}`", arm, str(len(accuracy)), *cells])
    head = "experiment | arm | seeds | accuracy [95 %] | worst … best | KL to teacher | length | gradient norm | cite"
    return table(head, rows)


def provenance_table(folder: Path) -> str:
    """How each experiment was made."""
    notes = [list(note.values()) for note in reproduce.read(folder / "provenance.csv")]
    head = "experiment | commit | date | python | torch | numpy | processor | threads"
    return table(head, [[f"`{name}`", *rest] for name, *rest in notes])


def tables(folder: Path) -> dict[str, str]:
    """Every table of every README, by name."""
    results = load(folder)
    made = {f"claims {name}": claims_table(claims, results) for name, claims in CLAIMS.items()}
    made |= {"found": found_table(results), "leaks": leaks(results), "dense": dense_table(results)}
    made |= {"methods": methods_table(results), "sizes": sizes_table(results)}
    return made | {"arms": arms_table(results), "provenance": provenance_table(folder)} | speed_tables(folder)


def speed_tables(folder: Path) -> dict[str, str]:
    """What speed.py measured, each table under the machine that it was measured on."""
    path = folder / "speed.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured.pop("scaling", None)  # is drawn
    return {f"speed {name}": f"{t['machine']}:\n\n{bench.markdown(t['rows'])}" for name, t in measured.items()}


def draw(folder: Path) -> dict[str, Figure]:
    """The figures, by the names of their files."""
    results = load(folder)
    there = lambda arms: {label: results[arm] for label, arm in arms.items() if arm in results}
    pairs = {figures.NAMES[d]: pair(d) for d in reproduce.DIVERGENCES[:3]}
    panels = {name: there(dict(zip(("OPD", "OPD+"), arms))) for name, arms in pairs.items()}
    arms = there({arm: arm for arm in reproduce.EXPERIMENTS["rlsd"].arms})
    only = lambda *names: {arm: seeds if arm in names else [] for arm, seeds in arms.items()}
    close = {arm: minus(seeds, arms["grpo"]) for arm, seeds in only("grpo+opsd", "rlsd", "rlsd, shuffled").items()}
    return {
        "collapse.png": figures.seed_panels(panels, "accuracy", "held-out accuracy"),
        "flow.png": figures.flow(*flows()),
        "rate.png": figures.sweep(sweep(results), "learning rate"),
        "dense.png": figures.seed_panels({"": there(DENSE)}, "accuracy", "held-out accuracy", "rollouts"),
        "rlsd.png": figures.seed_panels(
            {"held-out accuracy": only("grpo", "opsd"), "the same minus GRPO's": close, "answers that cite": arms},
            ["accuracy", "difference", "leak_rate"],
            ["fraction", "", ""],
        ),
    }


@functools.cache
def flows() -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Where the expected updates of OPD and OPD+ take 55 students over three tokens, and the teacher."""
    rows = {"OPD": {}, "OPD+": {}}
    for d in map(divergences.get, reproduce.DIVERGENCES[:3]):
        for row, A in zip(rows, (d.reward, d.w_f)):
            rows[row][figures.NAMES[d.name]] = law.paths(law.of_u(A), law.STUDENTS.log(), law.TEACHER.log())
    return rows, law.TEACHER


def minus(seeds: list[list[dict]], others: list[list[dict]]) -> list[list[dict]]:
    """Accuracy minus that of another arm, seed by seed and step by step."""
    return [
        [{"step": row["step"], "difference": row["accuracy"] - other["accuracy"]} for row, other in zip(*both)]
        for both in zip(seeds, others)
    ]


def fill(text: str, filled: dict[str, str]) -> str:
    """The text with its blocks replaced. Raises ValueError for a block that it does not have exactly once."""
    for name, block in filled.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{begin} … {end} must stand exactly once")
        text = text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]
    return text


def pages(folder: Path) -> dict[Path, str]:
    """Each README that tables stand in, and its text with the tables of these results."""
    filled: dict[Path, dict[str, str]] = {}
    for name, text in tables(folder).items():
        folder_of = {"found": ROOT, "speed": ROOT / "nano_opd" / "system"}.get(name.split()[0], ROOT / "notebooks")
        filled.setdefault(folder_of / "README.md", {})[name] = text
    return {path: fill(path.read_text(encoding="utf-8"), texts) for path, texts in filled.items()}


def main() -> None:
    """Write the figures and the READMEs, or the figures of another folder, and print its tables."""
    accept_any_text()
    parser = Parser("pages.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of CSVs (default: notebooks/results, into the READMEs)")
    folder = parser.parse_args().folder
    if folder and not (folder / "provenance.csv").exists():
        parser.error(f"{folder} holds no results: give the folder that reproduce.py wrote its CSVs to")
    for name, figure in draw(folder or RESULTS).items():
        figures.save(figure, (folder or RESULTS) / name)
    if folder:
        print(*(f"## {name}\n\n{text}\n" for name, text in tables(folder).items()), sep="\n")
    else:
        for path, text in pages(RESULTS).items():
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
