"""Every multi-seed result of the README and the notebooks, from one command in the folder notebooks/.

    python -m lab.reproduce                 all experiments, two runs at a time, into notebooks/results/
    python -m lab.reproduce rlsd            one of them
    python -m lab.reproduce --quick         a miniature of all, into out/quick/results/

An experiment is a dict of arms (arguments of train.py) × seeds. Complete runs are skipped and others resumed, so the
command can be stopped and given again. Each experiment ends in one CSV, the evaluated rows of all its runs, and one
row of provenance.csv. What the numbers say is for claims.py and pages.py.
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import numpy
import torch
from lab import ROOT, ceiling
from lab.bench import processor

from nano_opd.system import config, sources
from nano_opd.system.console import Parser, accept_any_text, typed_path
from nano_opd.system.folder import RunFolderError, require_same_code

CODE = sources.digests(ROOT / "train.py")
CODE_OF_ORACLES = {
    "notebooks/lab/ceiling.py": sources.digest(ROOT / "notebooks" / "lab" / "ceiling.py"),
    "notebooks/credit.py": sources.digest(ROOT / "notebooks" / "credit.py"),
}


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in one thing, the arguments they share, and the seeds of each."""

    common: str
    arms: dict[str, str]
    seeds: int
    seconds: float  # of one run on one core, for the ETA before anything has been measured
    first_seed: int = 0


EVALUATION = "--eval-every 25 --eval-size 250"
SHORT = "--steps 200 --eval-every 50 --eval-size 250"
UPDATE_COLUMNS = ("loss", "grad_norm", "clip_fraction", "reward", "zero_groups", "weight_clip_fraction")
QUICK = "--steps 4 --eval-every 1 --batch-size 8 --teacher-steps 5 --student-steps 5 --eval-size 20 --digits 2"
DIGITS = (2, 3, 5)
SIZED = ("opdplus", "grpo", "rlsd")
TASKS = {"add": 80, "sub": 90, "mul": 220, "mix": 260}  # with seconds of a run, mean over DIGITS and SIZED
RATES = ("2e-4", "6e-4", "2e-3", "6e-3", "2e-2")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "pearson_chi2", "neyman_chi2", "hellinger", "tv", "k3")
# One change each, of what only RLSD reads; the partner is the plain grpo of rlsd.
RLSD_ONLY = {
    "sync 50": "--teacher-sync 50",
    "live teacher": "--teacher-sync 1",
    "negative only": "--negative-only",
    "reasoning only": "--reasoning-only",
    "λ=1 decaying": "--lam 1 --lam-decay 200",
}


def variants(methods: Sequence[str], divergences: Sequence[str], variance: str) -> dict[str, str]:
    """The arms "method, divergence, variance"."""
    arms = {}
    for d in divergences:
        for m in methods:
            arms[f"{m}, {d}, {variance}"] = f"--method {m} --divergence {d} --variance {variance}"
    return arms


def rates(methods: Sequence[str], divergences: Sequence[str], flags: str = "", note: str = "") -> dict[str, str]:
    """These methods under these divergences at five learning rates over two decades, with these flags."""
    arms = {}
    for d in divergences:
        for m in methods:
            for lr in RATES:
                arms[f"{m}, {d}, lr={lr}{note}"] = f"--method {m} --divergence {d} --lr {lr} {flags}"
    return arms


def sizes(task: str) -> Experiment:
    """Bare commands on a task; add with 3 digits, and the other methods, are in opd, baselines and rlsd."""
    arms = {}
    for digits in DIGITS:
        for m in SIZED:
            if (task, digits) != ("add", 3):
                arms[f"{m}, {task} {digits}"] = f"--method {m} --task {task} --digits {digits}"
    return Experiment("--eval-every 100 --eval-size 250", arms, seeds=3, seconds=TASKS[task])


EXPERIMENTS = {
    "opd": Experiment(
        EVALUATION,
        variants(["opdplus"], ["jsd"], "baseline") | variants(["opd", "opdplus"], DIVERGENCES[:3], "sampled"),
        seeds=5,
        seconds=80,
    ),
    "divergences": Experiment(
        EVALUATION + " --steps 200",
        variants(["opd", "opdplus"], DIVERGENCES[3:], "sampled"),
        seeds=5,
        seconds=42,
    ),
    # The stop-gradient in other generators of the same divergences. OPD+ is in opd and divergences.
    "law": Experiment(
        EVALUATION,
        {
            "opd, jsd_falling": "--method opd --divergence jsd_falling",
            "opd, jsd,c=-0.25": "--method opd --divergence jsd,c=-0.25",
        },
        seeds=5,
        seconds=80,
    ),
    "law_others": Experiment(
        EVALUATION + " --steps 200",
        {
            "opd, hellinger,c=-1": "--method opd --divergence hellinger,c=-1",
            "opd, tv,c=-0.5": "--method opd --divergence tv,c=-0.5",
        },
        seeds=5,
        seconds=42,
    ),
    "variance": Experiment(  # the sampled token, and the baseline of jsd, are in opd; gkd is opdplus with full
        EVALUATION,
        variants(["opdplus", "opd"], ["jsd", "forward_kl"], "full"),
        seeds=5,
        seconds=62,
    ),
    "topk": Experiment(
        EVALUATION,
        variants(["opdplus"], ["jsd"], "topk") | {"null": "--method null"},
        seeds=5,
        seconds=70,
    ),
    "gamma": Experiment(  # γ = 0 is in opd
        EVALUATION + " --variance sampled",
        {
            "opdplus, jsd, γ=0.5": "--method opdplus --gamma 0.5",
            "opdplus, jsd, γ=1": "--method opdplus --gamma 1",
            "opd, reverse_kl, γ=1": "--method opd --divergence reverse_kl --gamma 1",
            "opdplus, reverse_kl, γ=1": "--method opdplus --divergence reverse_kl --gamma 1",
        },
        seeds=5,
        seconds=66,
    ),
    "baselines": Experiment(  # with the rollouts of opd; GRPO has its slot prompt, and a start that solves something
        EVALUATION,
        {"sft": "--method sft", "grpo, 400 × 128": "--method grpo --batch-size 128"},
        seeds=5,
        seconds=53,
    ),
    "rlsd": Experiment(
        EVALUATION,
        {
            "grpo": "--method grpo",
            "opsd": "--method opsd",
            "grpo+opsd": "--method grpo+opsd",
            "rlsd": "--method rlsd",
            "rlsd, shuffled": "--method rlsd --reference shuffled",
        },
        seeds=5,
        seconds=62,
    ),
    "rlsd_clip": Experiment(
        EVALUATION,
        {
            "λ=1, ε_w=0.2": "--method rlsd --lam 1 --eps-w 0.2",
            "λ=1, ε_w=1": "--method rlsd --lam 1 --eps-w 1",
            "λ=1, ε_w=10": "--method rlsd --lam 1 --eps-w 10",
        },
        seeds=5,
        seconds=59,
    ),
    "rlsd_work": Experiment(
        EVALUATION + " --reference work",
        {"opsd, work": "--method opsd", "λ=1, ε_w=10, work": "--method rlsd --lam 1 --eps-w 10"},
        seeds=5,
        seconds=57,
    ),
    "rlsd_cite": Experiment(
        EVALUATION + " --reference cite",
        {"opsd, cite": "--method opsd", "rlsd, cite": "--method rlsd"},
        seeds=5,
        seconds=60,
    ),
    "rlsd_published": Experiment(  # RLSD's published schedule, and its baseline
        EVALUATION + " --group-size 8",
        {
            "rlsd, published": "--method rlsd --reference cite --lam 0.5 --lam-decay 50 --teacher-sync 10",
            "grpo, G=8": "--method grpo",
        },
        seeds=5,
        seconds=60,
    ),
    "rlsd_search": Experiment(
        EVALUATION,
        {f"rlsd, {name}": f"--method rlsd {flags}" for name, flags in RLSD_ONLY.items()},
        seeds=3,
        seconds=60,
    ),
    "sizes_add": sizes("add"),
    "sizes_sub": sizes("sub"),
    "sizes_mul": sizes("mul"),
    "sizes_mix": sizes("mix"),
    # Is the collapse a matter of the learning rate? Also with clipped gradients, and near the teacher.
    "rate": Experiment(SHORT, rates(["opd", "opdplus"], DIVERGENCES[:3]), seeds=3, seconds=25),
    "rate_clip": Experiment(
        SHORT,
        rates(["opd"], DIVERGENCES[1:3], "--grad-clip 1", note=", clipped"),
        seeds=3,
        seconds=25,
    ),
    "rate_near": Experiment(
        SHORT,
        rates(["opd"], DIVERGENCES[1:3], "--student-steps 300", note=", near"),
        seeds=3,
        seconds=25,
    ),
    # Is it noise that fells what has the right mean gradient, at a large rate? GRPO's own rate is 4e-4.
    "noise": Experiment(
        EVALUATION,
        {
            "grpo, lr=4e-4": "--method grpo --lr 4e-4 --steps 100",
            "grpo, lr=1e-3": "--method grpo --lr 1e-3 --steps 100",
            "grpo, lr=2e-3": "--method grpo --lr 2e-3 --steps 100",
            "grpo, lr=5e-3": "--method grpo --lr 5e-3 --steps 100",
            "grpo, lr=2e-3, B=512": "--method grpo --lr 2e-3 --steps 100 --batch-size 512",
            "grpo, lr=5e-3, B=512": "--method grpo --lr 5e-3 --steps 100 --batch-size 512",
            "opdplus, reverse_kl, γ=1, lr=5e-4": "--method opdplus --divergence reverse_kl --gamma 1 --lr 5e-4",
        },
        seeds=5,
        seconds=54,
    ),
    # What perfect credit would bring; grpo, rlsd and their other clips, with the same start, are in rlsd and rlsd_clip.
    "credit": Experiment(EVALUATION, dict.fromkeys(ceiling.ARMS, "--method rlsd"), seeds=5, seconds=75),
    # The same where right answers are rare, on fresh seeds: there perfect credit saves more in enumerated chains.
    "credit_rare": Experiment(
        "--student-steps 120 --steps 1200 --eval-every 100 --eval-size 250",
        {
            "exact A from 120": "--method rlsd",
            "grpo from 120": "--method grpo",
            "rlsd, λ=1, ε_w=1 from 120": "--method rlsd --lam 1 --eps-w 1",
        },
        seeds=8,
        seconds=200,
        first_seed=5,
    ),
    "rlsd_confirm": Experiment(  # what the search found most, on seeds that had no part in finding it
        EVALUATION,
        {"grpo, fresh seeds": "--method grpo", "rlsd, sync 50, fresh seeds": "--method rlsd --teacher-sync 50"},
        seeds=8,
        seconds=55,
        first_seed=5,
    ),
}


@dataclass(frozen=True)
class Run:
    """One arm of an experiment with one seed: what train.py is given, and the configuration that it makes of it."""

    experiment: str
    arm: str
    seed: int
    arguments: list[str]
    cfg: config.Config

    @property
    def oracle(self) -> str | None:
        """What gives the advantage in the place of the method: one of ceiling.ARMS, or None."""
        name = self.arm.split(" from ")[0]
        return name if name in ceiling.ARMS else None

    @property
    def code_of_oracle(self) -> dict[str, str]:
        """The digests of what trains it, beside train.py and what that imports."""
        return {} if self.oracle is None else CODE_OF_ORACLES

    def complete(self) -> bool:
        """Whether this very run has been made to its end.

        Raises SystemExit if its folder holds another, or one that was made, or begun, by other code.
        """
        folder = self.cfg.run_dir
        if (folder / "config.json").exists():
            self.require_own_folder(saved_config(folder))
        return (folder / "provenance.json").exists() and (folder / "metrics.csv").exists()

    def require_own_folder(self, saved: dict) -> None:
        """Raise SystemExit unless what is saved in the folder is this run, by this code."""
        folder = self.cfg.run_dir
        if any(saved.get(name) != value for name, value in self.cfg.run_key().items()):
            sys.exit(f"reproduce.py: {folder} holds another run: move it away, or give another --out-dir")
        if (folder / "checkpoint.pt").exists() or (folder / "metrics.csv").exists():
            try:
                require_same_code(folder, saved, CODE | self.code_of_oracle)
            except RunFolderError as error:
                sys.exit(f"reproduce.py: {error}")

    def rows(self) -> list[dict[str, str]]:
        """The evaluated rows of metrics.csv with arm and seed in front.

        What is measured at every update is its mean from one evaluation to the next.
        """
        evaluated = []
        updates = []  # beside each evaluated row: the rows from it to the next
        for row in read(self.cfg.run_dir / "metrics.csv"):
            if row["accuracy"]:
                evaluated.append({"arm": self.arm, "seed": str(self.seed)} | row)
                updates.append([])
            updates[-1].append(row)
        for row, rows in zip(evaluated, updates):
            for name in UPDATE_COLUMNS:
                values = [float(update[name]) for update in rows if update[name]]
                if values:
                    row[name] = str(sum(values) / len(values))
        return evaluated


def saved_config(folder: Path) -> dict:
    """What config.json holds; nothing if it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def plan(experiment: str, out: Path, quick: bool) -> list[Run]:
    """Every run of an experiment, its folder made; warm starts are cached in one folder for all arms.

    quick  two seeds, and of a large experiment every n-th arm
    """
    e = EXPERIMENTS[experiment]
    arms = list(e.arms)
    seeds = e.seeds
    if quick:
        arms = arms[:: max(1, len(arms) // 2)]
        seeds = 2
    planned = []
    for seed in range(e.first_seed, e.first_seed + seeds):
        for arm in arms:
            folder = new_folder(out, experiment, arm)
            arguments = [*e.common.split(), *e.arms[arm].split()]
            arguments += ["--seed", str(seed), "--out-dir", str(folder), "--resume"]
            if quick:
                arguments += QUICK.split()  # put last, so that it overrides what stands before
            planned.append(Run(experiment, arm, seed, arguments, config.parse(arguments)))
    return planned


def new_folder(out: Path, experiment: str, arm: str) -> Path:
    """Make the folder of an arm, and in it a link to the warm starts of all arms."""
    folder = out / experiment / arm.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "warm_starts").exists():
        with contextlib.suppress(OSError):  # Windows lets few users make links; there each arm has its own
            (folder / "warm_starts").symlink_to((out / "warm_starts").resolve())
    return folder


def execute(run: Run, commit: str) -> tuple[float, str]:
    """train.py in a process that stays for the next run, and a note of how it was made; its seconds and last words.

    Ending in a number that is not finite (exit code 1) is a result like any other: the rows end early.
    Raises RuntimeError with what train.py said when it ends in anything else but success.
    """
    import train

    update = train.update
    if run.oracle is not None:
        update = partial(ceiling.update, train.update, run.oracle)
    started = time.monotonic()
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            with mock.patch.object(train, "update", update), mock.patch.dict(train.CODE, run.code_of_oracle):
                train.main(run.arguments)
        except SystemExit as end:
            if end.code > 2:  # interrupted: this process would begin the run that it was handed in advance
                os._exit(end.code)
            if end.code != 1:
                command = " ".join(["python train.py", *run.arguments])
                raise RuntimeError(f"{command}\n{stderr.getvalue()}") from None
    note = provenance(run.cfg.run_dir, commit)
    (run.cfg.run_dir / "provenance.json").write_text(json.dumps(note, indent=2), encoding="utf-8")
    last_words = stderr.getvalue().splitlines()[-1:]
    return time.monotonic() - started, " ".join(last_words)


def provenance(run_dir: Path, commit: str) -> dict[str, str]:
    """How a run was made."""
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    return {
        "commit": commit,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
        "threads": str(saved["threads"]),
    }


def git(*arguments: str) -> str:
    """What a git command prints about the repository; "" where that fails."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout


def commit() -> str:
    """The commit that is checked out, and whether the code that trains has been changed since."""
    name = git("rev-parse", "--short", "HEAD").strip()
    if not name:
        name = "unknown"
    if git("status", "--porcelain", "--", "nano_opd", "train.py", *CODE_OF_ORACLES):
        name += "-dirty"
    return name


def parse() -> argparse.Namespace:
    """What to run, with the folders `out` of the runs and `results`, made. Bad input ends the program: exit code 2."""
    parser = Parser("reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a miniature, to see that everything runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--out-dir", type=typed_path, default=ROOT / "out", help="folder of the runs (default: out)")
    args = parser.parse_args()
    unknown = set(args.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"unknown experiments {', '.join(sorted(unknown))}: choose from {', '.join(EXPERIMENTS)}")
    if not args.experiments:
        args.experiments = list(EXPERIMENTS)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    if args.quick:
        args.out = args.out_dir / "quick"
        args.results = args.out / "results"
    else:
        args.out = args.out_dir / "reproduce"
        args.results = ROOT / "notebooks" / "results"
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.out / "warm_starts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out-dir {args.out_dir}: cannot be used ({error.strerror})")
    return args


def main() -> None:
    """Run what is missing, then write one CSV per experiment."""
    accept_any_text()
    args = parse()
    plans = {name: plan(name, args.out, args.quick) for name in args.experiments}
    missing = {name: [run for run in planned if not run.complete()] for name, planned in plans.items()}
    for name, planned in plans.items():
        if not missing[name]:
            write(args.results, name, planned)
    to_make = [run for runs in missing.values() for run in runs]
    seconds = sum(EXPERIMENTS[run.experiment].seconds for run in to_make)
    about = "" if args.quick else f": about {seconds / args.jobs / 60:.0f} minutes"
    planned_in_all = sum(len(planned) for planned in plans.values())
    print(f"{len(to_make)} of {planned_in_all} runs to make, {args.jobs} at a time{about}", flush=True)

    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes; a second thread would take the other run's core
    now = commit()
    left = {name: len(runs) for name, runs in missing.items()}
    progress = Progress(to_make, args.jobs)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(execute, run, now): run for run in to_make}
        try:
            for future in as_completed(futures):
                run = futures[future]
                seconds, last_words = future.result()
                progress.report(run, seconds, last_words)
                left[run.experiment] -= 1
                if not left[run.experiment]:
                    write(args.results, run.experiment, plans[run.experiment])
        except (RuntimeError, BrokenProcessPool, KeyboardInterrupt) as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"reproduce.py: {str(error) or type(error).__name__}\nThe same command continues.")


class Progress:
    """Print a line for each run that has ended, with the time that is left."""

    def __init__(self, runs: list[Run], jobs: int):
        self.runs = len(runs)
        self.jobs = jobs
        self.started = time.monotonic()
        self.expected = sum(EXPERIMENTS[run.experiment].seconds for run in runs)
        self.done = 0
        self.foreseen = 0.0  # seconds of the runs that have ended, as their experiments say
        self.spent = 0.0  # and as they took

    def report(self, run: Run, seconds: float, last_words: str) -> None:
        self.done += 1
        self.foreseen += EXPERIMENTS[run.experiment].seconds
        self.spent += seconds
        slower = self.spent / self.foreseen  # the others will be as much slower as these were
        eta = (self.expected - self.foreseen) * slower / self.jobs
        elapsed = time.monotonic() - self.started
        print(
            f"{self.done}/{self.runs}  {run.experiment}: {run.arm}, seed {run.seed}  {seconds:.0f} s  "
            f"elapsed {elapsed / 60:.1f} min, ETA {eta / 60:.1f} min  {last_words}",
            flush=True,
        )


def read(path: Path) -> list[dict[str, str]]:
    """A CSV as a list of rows."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(results: Path, experiment: str, planned: list[Run]) -> None:
    """One CSV of all rows, numbers to five digits, no column that is empty everywhere; and where they were made."""
    rows = []
    for run in planned:
        rows += run.rows()
    rows.sort(key=arm_seed_and_step)
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    with open(results / f"{experiment}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            numbers = [to_five_digits(row[name]) for name in columns[2:]]
            writer.writerow([row["arm"], row["seed"], *numbers])
    write_provenance(results / "provenance.csv", experiment, planned)
    print(f"{experiment}: {len(planned)} runs, {results / experiment}.csv", flush=True)


def arm_seed_and_step(row: dict[str, str]) -> tuple[str, int, int]:
    return row["arm"], int(row["seed"]), int(row["step"])


def to_five_digits(text: str) -> str:
    """A number with a point in it to five digits; whole numbers and what was not measured as they are."""
    return f"{float(text):.5g}" if "." in text else text


def write_provenance(path: Path, experiment: str, planned: list[Run]) -> None:
    """Put how an experiment was made into its row of a CSV, in the order of EXPERIMENTS."""
    notes = []
    for run in planned:
        notes.append(json.loads((run.cfg.run_dir / "provenance.json").read_text(encoding="utf-8")))
    note = {"experiment": experiment}
    for name in notes[0]:
        note[name] = "; ".join(sorted({note_of_run[name] for note_of_run in notes}))
    rows = [note]
    if path.exists():
        rows += [row for row in read(path) if row["experiment"] != experiment]
    order = list(EXPERIMENTS)
    rows.sort(key=lambda row: order.index(row["experiment"]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(note), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
