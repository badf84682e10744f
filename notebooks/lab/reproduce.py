"""Every multi-seed result of the README and the notebooks, from one command in the folder notebooks/.

    python -m lab.reproduce                 all experiments, two runs at a time, into notebooks/results/
    python -m lab.reproduce rlsd            one of them
    python -m lab.reproduce --quick         a miniature of all, into out/quick/results/

An experiment is a dict of arms (arguments of train.py) × seeds. Complete runs are skipped and others resumed, so the
command can be stopped and given again. Each experiment ends in one CSV, the evaluated rows of all its runs, and one
row of provenance.csv. What the numbers say is for claims.py and pages.py.
"""

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
DIGITS, SIZED = (2, 3, 5), ("opdplus", "grpo", "rlsd")
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


def arm(method: str, divergence: str, variance: str) -> dict[str, str]:
    """The arm "method, divergence, variance"."""
    return {f"{method}, {divergence}, {variance}": f"--method {method} --divergence {divergence} --variance {variance}"}


def sampled(names: tuple[str, ...]) -> dict[str, str]:
    """OPD and OPD+ with the sampled estimator of each divergence."""
    return {k: v for d in names for m in ("opd", "opdplus") for k, v in arm(m, d, "sampled").items()}


def rates(methods: tuple[str, ...], names: tuple[str, ...], flags: str = "", note: str = "") -> dict[str, str]:
    """These methods under these divergences at five learning rates over two decades, with these flags."""
    return {
        f"{m}, {d}, lr={lr}{note}": f"--method {m} --divergence {d} --lr {lr} {flags}"
        for d in names
        for m in methods
        for lr in RATES
    }


EXPERIMENTS = {
    "opd": Experiment(
        EVALUATION,
        arm("opdplus", "jsd", "baseline") | sampled(DIVERGENCES[:3]),
        seeds=5,
        seconds=80,
    ),
    "divergences": Experiment(EVALUATION + " --steps 200", sampled(DIVERGENCES[3:]), seeds=5, seconds=42),
    # The stop-gradient in other generators of the same divergences. OPD+ is in opd and divergences.
    "law": Experiment(
        EVALUATION,
        {f"opd, {name}": f"--method opd --divergence {name}" for name in ("jsd_falling", "jsd,c=-0.25")},
        seeds=5,
        seconds=80,
    ),
    "law_others": Experiment(
        EVALUATION + " --steps 200",
        {f"opd, {name}": f"--method opd --divergence {name}" for name in ("hellinger,c=-1", "tv,c=-0.5")},
        seeds=5,
        seconds=42,
    ),
    "variance": Experiment(  # the sampled token, and the baseline of jsd, are in opd; gkd is opdplus with full
        EVALUATION,
        {k: v for d in ("jsd", "forward_kl") for m in ("opdplus", "opd") for k, v in arm(m, d, "full").items()},
        seeds=5,
        seconds=62,
    ),
    "topk": Experiment(EVALUATION, arm("opdplus", "jsd", "topk") | {"null": "--method null"}, seeds=5, seconds=70),
    "gamma": Experiment(  # γ = 0 is in opd
        EVALUATION + " --variance sampled",
        {f"opdplus, jsd, γ={gamma}": f"--method opdplus --gamma {gamma}" for gamma in ("0.5", "1")}
        | {f"{m}, reverse_kl, γ=1": f"--method {m} --divergence reverse_kl --gamma 1" for m in ("opd", "opdplus")},
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
        {f"λ=1, ε_w={eps}": f"--method rlsd --lam 1 --eps-w {eps}" for eps in ("0.2", "1", "10")},
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
        EVALUATION + " --reference cite", {"opsd, cite": "--method opsd", "rlsd, cite": "--method rlsd"}, 5, 60
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
    **{  # bare commands; add with 3 digits, and the other methods, are in opd, baselines and rlsd
        f"sizes_{task}": Experiment(
            "--eval-every 100 --eval-size 250",
            {
                f"{m}, {task} {digits}": f"--method {m} --task {task} --digits {digits}"
                for digits in DIGITS
                for m in SIZED
                if (task, digits) != ("add", 3)
            },
            seeds=3,
            seconds=seconds,
        )
        for task, seconds in TASKS.items()
    },
    # Is the collapse a matter of the learning rate? Also with clipped gradients, and near the teacher.
    "rate": Experiment(SHORT, rates(("opd", "opdplus"), DIVERGENCES[:3]), seeds=3, seconds=25),
    "rate_clip": Experiment(SHORT, rates(("opd",), DIVERGENCES[1:3], "--grad-clip 1", ", clipped"), 3, 25),
    "rate_near": Experiment(SHORT, rates(("opd",), DIVERGENCES[1:3], "--student-steps 300", ", near"), 3, 25),
    # Is it noise that fells what has the right mean gradient, at a large rate? GRPO's own rate is 4e-4.
    "noise": Experiment(
        EVALUATION,
        {f"grpo, lr={lr}": f"--method grpo --lr {lr} --steps 100" for lr in ("4e-4", "1e-3", "2e-3", "5e-3")}
        | {f"grpo, lr={lr}, B=512": f"--method grpo --lr {lr} --steps 100 --batch-size 512" for lr in ("2e-3", "5e-3")}
        | {"opdplus, reverse_kl, γ=1, lr=5e-4": "--method opdplus --divergence reverse_kl --gamma 1 --lr 5e-4"},
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
    def oracle(self) -> str:
        """What gives the advantage in the place of the method, if it is one of ceiling.ARMS."""
        return self.arm.split(" from ")[0]

    @property
    def code_of_oracle(self) -> dict[str, str]:
        """The digests of what trains it, beside train.py and what that imports."""
        return CODE_OF_ORACLES if self.oracle in ceiling.ARMS else {}

    def complete(self) -> bool:
        """Whether this very run has been made to its end.

        Raises SystemExit if its folder holds another, or one that was made, or begun, by other code.
        """
        folder = self.cfg.run_dir
        if (folder / "config.json").exists():
            try:
                saved = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                saved = {}
            if any(saved.get(name) != value for name, value in self.cfg.run_key().items()):
                sys.exit(f"reproduce.py: {folder} holds another run: move it away, or give another --out-dir")
            if any((folder / name).exists() for name in ("checkpoint.pt", "metrics.csv")):
                try:
                    require_same_code(folder, saved, CODE | self.code_of_oracle)
                except RunFolderError as error:
                    sys.exit(f"reproduce.py: {error}")
        return (folder / "provenance.json").exists() and (folder / "metrics.csv").exists()

    def rows(self) -> list[dict[str, str]]:
        """The evaluated rows of metrics.csv with arm and seed in front.

        What is measured at every update is its mean from one evaluation to the next.
        """
        kept = []
        for row in read(self.cfg.run_dir / "metrics.csv"):
            if row["accuracy"]:
                kept.append(({"arm": self.arm, "seed": str(self.seed)} | row, []))
            kept[-1][1].append(row)
        for row, updates in kept:
            for name in UPDATE_COLUMNS:
                if values := [float(update[name]) for update in updates if update[name]]:
                    row[name] = str(sum(values) / len(values))
        return [row for row, _ in kept]


def plan(experiment: str, out: Path, quick: bool) -> list[Run]:
    """Every run of an experiment, its folder made; warm starts are cached in one folder for all arms.

    quick  two seeds, and of a large experiment every n-th arm
    """
    e, planned = EXPERIMENTS[experiment], []
    arms = dict([*e.arms.items()][:: max(1, len(e.arms) // 2)]) if quick else e.arms
    for seed in range(e.first_seed, e.first_seed + (2 if quick else e.seeds)):
        for name, flags in arms.items():
            folder = out / experiment / name.replace(", ", "-").replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "warm_starts").exists():
                with contextlib.suppress(OSError):  # Windows lets few users make links; there each arm has its own
                    (folder / "warm_starts").symlink_to((out / "warm_starts").resolve())
            arguments = [*e.common.split(), *flags.split(), "--seed", str(seed), "--out-dir", str(folder), "--resume"]
            arguments += QUICK.split() if quick else []  # put last, so that it overrides what stands before
            planned.append(Run(experiment, name, seed, arguments, config.parse(arguments)))
    return planned


def execute(run: Run, commit: str) -> tuple[float, str]:
    """train.py in a process that stays for the next run, and a note of how it was made; its seconds and last words.

    Ending in a number that is not finite (exit code 1) is a result like any other: the rows end early.
    Raises RuntimeError with what train.py said when it ends in anything else but success.
    """
    import train

    update = partial(ceiling.update, train.update, run.oracle) if run.oracle in ceiling.ARMS else train.update
    started, stderr = time.monotonic(), io.StringIO()
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
    note = {
        "commit": commit,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
        "threads": str(json.loads((run.cfg.run_dir / "config.json").read_text(encoding="utf-8"))["threads"]),
    }
    (run.cfg.run_dir / "provenance.json").write_text(json.dumps(note, indent=2), encoding="utf-8")
    return time.monotonic() - started, " ".join(stderr.getvalue().splitlines()[-1:])


def commit() -> str:
    """The commit that is checked out, and whether the code that trains has been changed since."""
    git = lambda *arguments: subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout
    changed = git("status", "--porcelain", "--", "nano_opd", "train.py", *CODE_OF_ORACLES)
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("-dirty" if changed else "")


def main() -> None:
    """Run what is missing, then write one CSV per experiment."""
    accept_any_text()
    parser = Parser("reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a miniature, to see that everything runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--out-dir", type=typed_path, default=ROOT / "out", help="folder of the runs (default: out)")
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"unknown experiments {', '.join(sorted(unknown))}: choose from {', '.join(EXPERIMENTS)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    out = args.out_dir / ("quick" if args.quick else "reproduce")
    results = out / "results" if args.quick else ROOT / "notebooks" / "results"
    try:
        results.mkdir(parents=True, exist_ok=True)
        (out / "warm_starts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out-dir {args.out_dir}: cannot be used ({error.strerror})")

    plans = {name: plan(name, out, args.quick) for name in args.experiments or EXPERIMENTS}
    missing = [run for planned in plans.values() for run in planned if not run.complete()]
    left = {name: sum(run.experiment == name for run in missing) for name in plans}
    for name in [name for name in plans if not left[name]]:
        write(results, name, plans[name])
    expected = sum(EXPERIMENTS[run.experiment].seconds for run in missing)
    print(f"{len(missing)} of {sum(map(len, plans.values()))} runs to make, {args.jobs} at a time", end="")
    print("" if args.quick else f": about {expected / args.jobs / 60:.0f} minutes", flush=True)

    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes; a second thread would take the other run's core
    started, foreseen, spent, now = time.monotonic(), 0.0, 0.0, commit()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(execute, run, now): run for run in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                run, (seconds, stderr) = futures[future], future.result()
                foreseen, spent = foreseen + EXPERIMENTS[run.experiment].seconds, spent + seconds
                eta = (expected - foreseen) * spent / foreseen / args.jobs  # as much slower as the runs were so far
                print(
                    f"{done}/{len(missing)}  {run.experiment}: {run.arm}, seed {run.seed}  {seconds:.0f} s  "
                    f"elapsed {(time.monotonic() - started) / 60:.1f} min, ETA {eta / 60:.1f} min  {stderr}",
                    flush=True,
                )
                left[run.experiment] -= 1
                if not left[run.experiment]:
                    write(results, run.experiment, plans[run.experiment])
        except (RuntimeError, BrokenProcessPool, KeyboardInterrupt) as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"reproduce.py: {str(error) or type(error).__name__}\nThe same command continues.")


def read(path: Path) -> list[dict[str, str]]:
    """A CSV as a list of rows."""
    with open(path, encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def write(results: Path, experiment: str, planned: list[Run]) -> None:
    """One CSV of all rows, numbers to five digits, no column that is empty everywhere; and where they were made."""
    rows = [row for run in planned for row in run.rows()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    with open(results / f"{experiment}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in sorted(rows, key=lambda row: (row["arm"], int(row["seed"]), int(row["step"]))):
            numbers = [f"{float(row[name]):.5g}" if "." in row[name] else row[name] for name in columns[2:]]
            writer.writerow([row["arm"], row["seed"], *numbers])

    notes = [json.loads((run.cfg.run_dir / "provenance.json").read_text(encoding="utf-8")) for run in planned]
    note = {"experiment": experiment} | {k: "; ".join(sorted({n[k] for n in notes})) for k in notes[0]}
    path = results / "provenance.csv"
    others = [row for row in read(path) if row["experiment"] != experiment] if path.exists() else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, note, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*others, note], key=lambda row: [*EXPERIMENTS].index(row["experiment"])))
    print(f"{experiment}: {len(planned)} runs, {results / experiment}.csv", flush=True)


if __name__ == "__main__":
    main()
