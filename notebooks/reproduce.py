"""Every multi-seed result of the notebooks and the README, from one command.

    python notebooks/reproduce.py                 all experiments, two runs at a time, into notebooks/results/
    python notebooks/reproduce.py rlsd            one of them
    python notebooks/reproduce.py rlsd --quick    a miniature of it, into out/quick/results/

An experiment is a dict of arms (arguments of train.py) × seeds. Complete runs are skipped and others resumed, so the
command can be stopped and given again. Each experiment ends in one CSV, the evaluated rows of all its runs.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nano_opd import config

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in one thing, the arguments they share, and the seeds of each."""

    common: str
    arms: dict[str, str]
    seeds: int
    quick: str  # put last, so that it overrides what stands before


PRIVILEGED = "--steps 600 --batch-size 64 --student-steps 190 --lr 3e-4 --eval-every 25 --eval-size 250"
TINY = "--steps 4 --eval-every 2 --batch-size 8 --student-steps 5 --eval-size 20 --digits 1"
EXPERIMENTS = {
    "opd": Experiment(
        common="",
        arms={"opdplus, jsd, baseline": "--method opdplus"}
        | {
            f"{method}, {divergence}, sampled": f"--method {method} --divergence {divergence} --variance sampled"
            for divergence in ("reverse_kl", "forward_kl", "jsd")
            for method in ("opd", "opdplus")
        },
        seeds=5,
        quick="--steps 4 --eval-every 2 --batch-size 8 --teacher-steps 5 --student-steps 5 --eval-size 20 --digits 1",
    ),
    "rlsd": Experiment(
        common=PRIVILEGED,
        arms={
            "grpo": "--method grpo",
            "opsd": "--method opsd",
            "grpo+opsd": "--method grpo+opsd",
            "rlsd": "--method rlsd",
            "rlsd, shuffled": "--method rlsd --reference shuffled",
        },
        seeds=5,
        quick=TINY,
    ),
    "rlsd_clip": Experiment(
        common=PRIVILEGED,
        arms={f"λ=1, ε_w={eps}": f"--method rlsd --lam 1 --eps-w {eps}" for eps in ("0.2", "1", "10")},
        seeds=3,
        quick=TINY,
    ),
    "rlsd_work": Experiment(
        common=PRIVILEGED + " --reference work",
        arms={"opsd, work": "--method opsd", "λ=1, ε_w=10, work": "--method rlsd --lam 1 --eps-w 10"},
        seeds=3,
        quick=TINY,
    ),
}


def run(experiment: str, arm: str, seed: int, out: Path, quick: bool) -> list[dict[str, str]]:
    """One run, unless it is complete already; the evaluated rows of its metrics.csv with arm and seed in front.

    Raises RuntimeError with what train.py said when it ends in anything but success or a number that is not finite,
    which is a result like any other: its rows end early.
    """
    e, folder = EXPERIMENTS[experiment], out / experiment / arm.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (out / "warm_starts").mkdir(exist_ok=True)
    if not (folder / "warm_starts").exists():
        (folder / "warm_starts").symlink_to((out / "warm_starts").resolve())  # trained once for all arms
    arguments = [*e.common.split(), *e.arms[arm].split(), "--seed", str(seed), "--out-dir", str(folder), "--resume"]
    arguments += e.quick.split() if quick else []
    cfg = config.parse(arguments)
    if not complete(cfg):
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")
        print(f"{experiment}: {arm}, seed {seed}", *process.stderr.splitlines()[-1:], flush=True)
    with open(cfg.run_dir / "metrics.csv") as file:
        return [{"arm": arm, "seed": str(seed)} | row for row in csv.DictReader(file) if row["accuracy"]]


def complete(cfg: config.Config) -> bool:
    """Whether this very run has been made to its last update. Raises RuntimeError if another one is in its folder."""
    if not (cfg.run_dir / "metrics.csv").exists():
        return False
    saved = json.loads((cfg.run_dir / "config.json").read_text())
    if any(saved.get(name) != value for name, value in cfg.run_key().items()):
        raise RuntimeError(f"{cfg.run_dir} holds another run: move it away, or give another --out-dir")
    with open(cfg.run_dir / "metrics.csv") as file:
        return [*csv.DictReader(file)][-1]["step"] == str(cfg.steps)


def main() -> None:
    """Run what is missing, then write one CSV per experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a miniature, to see that everything runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out", help="folder of the runs (default: out)")
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"unknown experiments {', '.join(sorted(unknown))}: choose from {', '.join(EXPERIMENTS)}")
    out = args.out_dir / ("quick" if args.quick else "reproduce")
    results = out / "results" if args.quick else ROOT / "notebooks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for name in args.experiments or EXPERIMENTS:
            seeds = 2 if args.quick else EXPERIMENTS[name].seeds
            runs = [(name, arm, seed, out, args.quick) for seed in range(seeds) for arm in EXPERIMENTS[name].arms]
            try:
                rows = [row for part in pool.map(run, *zip(*runs)) for row in part]
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"reproduce.py: {error}")
            write(results / f"{name}.csv", rows)
            print(f"{name}: {len(runs)} runs, {results / name}.csv", flush=True)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """The rows with their numbers to five digits, without the columns that are empty everywhere."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in sorted(rows, key=lambda row: (row["arm"], int(row["seed"]), int(row["step"]))):
            numbers = [f"{float(row[name]):.5g}" if "." in row[name] else row[name] for name in columns[2:]]
            writer.writerow([row["arm"], row["seed"], *numbers])


if __name__ == "__main__":
    main()
